"""Rows own blocks, which are given back, reused and never shared."""

from __future__ import annotations

import numpy as np
import torch

from paceline.models.cuda.layout import BLOCK
from paceline.models.cuda.paged_cache import PagedCache


def filled(cache: PagedCache, slot: int, length: int, value: float) -> None:
    cache.write(slot, 0, [torch.full((4, length, 2), value) for _ in range(2)])


def new_cache() -> PagedCache:
    return PagedCache(torch.device("cpu"))


def test_the_lowest_free_slot_is_given_first() -> None:
    cache = new_cache()
    assert [cache.acquire() for _ in range(4)] == [0, 1, 2, 3]

    cache.release(2)
    cache.release(0)

    assert [cache.acquire() for _ in range(3)] == [0, 2, 4]


def test_rows_share_no_block_and_none_owns_the_first() -> None:
    cache = new_cache()
    order = np.random.default_rng(0)
    rows: dict[int, tuple[float, int]] = {}
    for turn in range(60):
        if rows and order.random() < 0.4:
            slot = int(order.choice(list(rows)))
            cache.release(slot)
            del rows[slot]
        else:
            slot = cache.acquire()
            rows[slot] = float(turn + 1), int(order.integers(1, 6 * BLOCK))
            filled(cache, slot, rows[slot][1], rows[slot][0])
        for slot, (value, length) in rows.items():
            assert cache.read(slot, 0, length)[1].eq(value).all()
    owned = [block for blocks in cache._blocks for block in blocks]
    assert 0 not in owned
    assert sorted([*owned, *cache._free_blocks]) == list(range(1, cache._num_blocks))


def test_growing_keeps_contents_and_tells_whoever_kept_addresses() -> None:
    cache = new_cache()
    a, b = cache.acquire(), cache.acquire()
    filled(cache, a, 3, 7.0)
    before, address = cache.version, cache.layers[0].data_ptr()  # type: ignore[union-attr]

    filled(cache, b, 2 * BLOCK, 8.0)
    assert cache.version == before and cache.layers[0].data_ptr() == address  # type: ignore[union-attr]
    filled(cache, b, 200 * BLOCK, 8.0)

    assert cache.version > before
    assert all(entry.eq(7.0).all() for entry in cache.read(a, 0, 3))
    assert all(entry.eq(8.0).all() for entry in cache.read(b, 0, 200 * BLOCK))


def test_a_read_row_can_be_written_elsewhere() -> None:
    cache = new_cache()
    a, b = cache.acquire(), cache.acquire()
    entries = [torch.randn(4, BLOCK + 9, 2) for _ in range(2)]
    cache.write(a, 0, entries)

    cache.write(b, 0, cache.read(a, 0, BLOCK + 9))
    cache.release(a)

    for entry, expected in zip(cache.read(b, 3, BLOCK + 9), entries, strict=True):
        assert torch.equal(entry, expected[:, 3:])


def test_positions_move_across_blocks() -> None:
    cache = new_cache()
    cache.acquire()
    slot = cache.acquire()
    entry = torch.randn(4, BLOCK + 10, 2)
    cache.write(slot, 0, [entry])

    cache.copy_positions(slot, [BLOCK - 2, BLOCK + 1, BLOCK + 5], BLOCK - 2)

    moved = cache.read(slot, BLOCK - 2, BLOCK + 1)[0]
    assert torch.equal(moved, entry[:, [BLOCK - 2, BLOCK + 1, BLOCK + 5]])


def test_host_and_device_agree_where_a_position_lies() -> None:
    cache = new_cache()
    slots = [cache.acquire() for _ in range(12)]
    for slot in slots:
        cache.extend(slot, 1500 + 100 * slot)
    rows, positions = np.array([0, 5, 11, 11]), np.array([0, 700, 1499, 2500])

    expected = cache.places(rows, positions)

    found = cache.places_on_device(torch.from_numpy(rows), torch.from_numpy(positions))
    assert found.tolist() == expected.tolist() and len(set(expected.tolist())) == 4


def test_a_bound_holds_however_the_pool_has_grown() -> None:
    cache = new_cache()
    cache.bound(10 * BLOCK)
    rows = [cache.acquire() for _ in range(3)]
    for turn in range(9):
        filled(cache, rows[turn % 3], (turn // 3 + 1) * BLOCK, float(turn))
        assert (
            cache.layers[0] is not None and cache.layers[0].shape[0] <= 11 * BLOCK
        )  # and the first
    filled(cache, rows[0], 8 * BLOCK, 5.0)  # more than was allowed is needed all the same
    assert cache.read(rows[0], 0, 8 * BLOCK)[0].eq(5.0).all()
    assert (cache.num_rows, cache.num_slots_with_one_more) == (3, 4)


def test_a_row_that_is_forgotten_gives_its_blocks_back() -> None:
    cache = new_cache()
    slot = cache.acquire()
    filled(cache, slot, 5 * BLOCK, 1.0)
    free = len(cache._free_blocks)

    cache.forget(slot)

    assert len(cache._free_blocks) == free + 5
    filled(cache, slot, 2 * BLOCK, 2.0)
    assert cache.read(slot, 0, 2 * BLOCK)[0].eq(2.0).all()
