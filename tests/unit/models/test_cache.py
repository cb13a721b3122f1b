"""Slots are reused lowest first; storage grows without losing entries."""

from __future__ import annotations

import torch

from paceline.models.cache import BLOCK, RowCache


def new_entries() -> torch.Tensor:
    return torch.zeros(1, 4, 2)


def test_the_lowest_free_slot_is_given_first() -> None:
    cache = RowCache()
    assert [cache.acquire() for _ in range(4)] == [0, 1, 2, 3]

    cache.release(2)
    cache.release(0)

    assert [cache.acquire() for _ in range(3)] == [0, 2, 4]


def test_capacity_is_whole_blocks_for_every_slot() -> None:
    cache = RowCache()
    cache.acquire(), cache.acquire()
    cache.extend(0, BLOCK + 1)

    entries = cache.layer(0, new_entries())

    assert entries.shape == (2, 4, 2 * BLOCK, 2)
    assert cache.num_bytes() == entries.nbytes


def test_growing_by_slots_and_by_positions_keeps_contents() -> None:
    cache = RowCache()
    cache.acquire()
    cache.extend(0, BLOCK)
    entries = cache.layer(1, new_entries())
    entries[0, :, 5], entries[0, :, BLOCK - 1] = 7.0, 8.0

    cache.acquire()
    cache.extend(0, 3 * BLOCK)
    entries = cache.layer(1, new_entries())

    assert entries.shape[0] >= 2 and entries.shape[2] >= 3 * BLOCK
    assert entries[0, :, 5].eq(7.0).all() and entries[0, :, BLOCK - 1].eq(8.0).all()
    assert entries.sum() == (7.0 + 8.0) * 8


def test_growing_by_positions_keeps_slots_that_doubling_left_over() -> None:
    cache = RowCache()
    for _ in range(3):
        cache.acquire()
        cache.extend(0, BLOCK)
        entries = cache.layer(0, new_entries())
    assert entries.shape[0] == 4
    entries[3] = 5.0

    cache.extend(0, 2 * BLOCK)

    assert cache.layer(0, new_entries()).shape[:3:2] == (4, 2 * BLOCK)


def test_storage_is_given_back_when_the_last_of_several_rows_ends() -> None:
    cache = RowCache()
    slots = [cache.acquire() for _ in range(3)]
    cache.extend(0, 10)
    cache.layer(0, new_entries())

    for slot in slots:
        assert cache.num_bytes() > 0
        cache.release(slot)

    assert cache.num_bytes() == 0
    assert cache.acquire() == 0


def test_only_the_row_that_moves_entries_is_touched() -> None:
    cache = RowCache()
    cache.acquire(), cache.acquire()
    cache.extend(0, 8)
    entries = cache.layer(0, new_entries())
    entries[:] = torch.arange(entries.shape[2])[None, None, :, None]

    cache.copy_positions(1, [2, 5, 6], 2)

    assert entries[1, 0, :8, 0].tolist() == [0, 1, 2, 5, 6, 5, 6, 7]
    assert entries[0, 0, :8, 0].tolist() == list(range(8))


def fill(cache: RowCache, slot: int, length: int) -> torch.Tensor:
    cache.extend(slot, length)
    return cache.layer(0, new_entries())


def test_a_bound_takes_the_room_to_grow_and_then_the_blocks() -> None:
    cache = RowCache()
    cache.bound(3 * BLOCK)
    cache.acquire()
    assert fill(cache, 0, BLOCK + 1).shape[:3:2] == (1, 2 * BLOCK)
    assert fill(cache, 0, 2 * BLOCK + 1).shape[:3:2] == (1, 3 * BLOCK)
    cache.acquire()
    cache.release(0)
    cache.acquire()
    assert fill(cache, 0, BLOCK + 9).shape[:3:2] == (2, BLOCK + 9)  # a block more were too many
    assert cache.max_length == 3 * BLOCK // 2


def test_what_is_needed_is_given_beyond_a_bound() -> None:
    cache = RowCache()
    cache.bound(10)
    cache.acquire()
    assert fill(cache, 0, 50).shape[:3:2] == (1, 50)


def test_no_storage_stays_as_long_as_a_released_row() -> None:
    cache = RowCache()
    cache.acquire()
    fill(cache, 0, 50 * BLOCK)
    cache.release(0)
    assert fill_of_new(cache).shape[:3:2] == (1, 50 * BLOCK)  # kept: the next may be as long
    assert fill_of_new(cache).shape[:3:2] == (2, BLOCK)


def fill_of_new(cache: RowCache) -> torch.Tensor:
    return fill(cache, cache.acquire(), 5)


def test_an_exact_fit_gives_back_what_a_row_held() -> None:
    cache = RowCache()
    cache.bound(None, exact_fit=True)
    for slot, length in enumerate((5, 3 * BLOCK, 6)):
        assert cache.acquire() == slot
        entries = fill(cache, slot, length)
        entries[slot, :, :5] = slot + 1.0
    cache.release(1)
    assert cache.layers[0] is not None and cache.layers[0].shape[:3:2] == (3, BLOCK)
    assert cache.layers[0][2, :, :5].eq(3.0).all() and cache.layers[0][0, :, :5].eq(1.0).all()
    cache.release(2)
    assert cache.layers[0] is not None and cache.layers[0].shape[:3:2] == (1, BLOCK)
    cache.release(0)
    assert cache.num_bytes() == 0
