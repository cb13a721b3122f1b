"""Packed keys and values are those of a plain list of entries, whatever happens to rows."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from support.compiled_models import compile_model, hidden_of, prefill, random_model, random_text

from paceline.models.compiled.cache import UNIT, CacheShape, PackedRows
from paceline.models.packing import Span

DTYPES = (torch.bfloat16, torch.float32)
LAYERS, KV_HEADS = 3, 2


def shape_of(head_dim: int, dtype: torch.dtype) -> CacheShape:
    rooms = -(-head_dim // 32) * 32, -(-head_dim // 64) * 64
    return CacheShape(LAYERS, KV_HEADS, head_dim, *rooms, dtype)


def entries(shape: CacheShape, length: int, seed: int = 0) -> torch.Tensor:
    """Return random keys and values [L, 2 * Hkv, n, d]."""
    generator = torch.Generator().manual_seed(seed)
    size = LAYERS, 2 * KV_HEADS, length, shape.head_dim
    return torch.randn(size, generator=generator).to(shape.dtype)


def read(rows: PackedRows, slot: int, start: int, stop: int) -> torch.Tensor:
    return torch.stack(rows.read(slot, start, stop))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 8, 32, 50, 64, 80, 128])
def test_entries_that_are_written_are_read_again(head_dim: int, dtype: torch.dtype) -> None:
    shape = shape_of(head_dim, dtype)
    rows, source = PackedRows(shape), random.Random(head_dim)
    plain: dict[int, torch.Tensor] = {}  # by slot
    for turn in range(120):
        if len(plain) < 4 and source.random() < 0.3:
            slot = rows.acquire()
            plain[slot] = entries(shape, source.randrange(1, 90), turn)
            rows.write(slot, 0, list(plain[slot]))
        elif plain:
            slot = source.choice(list(plain))
            length = plain[slot].shape[2]
            action = source.randrange(5)
            if action == 0:
                start = source.randint(0, length)
                new = entries(shape, source.randrange(1, 70), turn)
                rows.write(slot, start, list(new))
                kept = plain[slot][:, :, start + new.shape[2] :]
                plain[slot] = torch.cat([plain[slot][:, :, :start], new, kept], dim=2)
            elif action == 1:
                places = sorted(source.sample(range(length), source.randint(1, length)))
                start = source.randint(0, places[0])
                rows.copy_positions(slot, places, start)
                moved = plain[slot][:, :, places]
                plain[slot] = plain[slot].clone()
                plain[slot][:, :, start : start + len(places)] = moved
            elif action == 2:
                rows.extend(slot, length + source.randrange(200))
            elif action == 3:
                rows.clear(slot)
                plain[slot] = torch.zeros_like(plain[slot])
            elif source.random() < 0.3:
                rows.release(slot)
                del plain[slot]
        for slot, expected in plain.items():
            length = expected.shape[2]
            start, stop = sorted(source.sample(range(length + 1), 2))
            assert torch.equal(read(rows, slot, start, stop), expected[:, :, start:stop])
            assert torch.equal(read(rows, slot, 0, length), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_copied_entries_continue_a_row_as_if_they_were_its_own(dtype: str) -> None:
    forward, text = compile_model(random_model(dtype, head_dim=80)), random_text(170)
    expected = hidden_of(forward, text)
    rows = forward.new_cache()
    first = prefill(forward, rows, text[:130])
    for stop in (1, 15, 16, 64, 100, 130):
        other = forward.new_cache()
        slot = other.acquire()
        other.write(slot, 0, rows.read(first, 0, stop))
        hidden = forward.hidden(text[stop:], [Span(slot, stop, 170 - stop)], None, other)
        assert torch.equal(hidden, expected[stop:])


def test_the_lowest_free_slot_is_given_first() -> None:
    rows = PackedRows(shape_of(8, torch.float32))
    assert [rows.acquire() for _ in range(4)] == [0, 1, 2, 3]
    rows.release(2)
    rows.release(0)

    assert (rows.num_rows, rows.num_slots, rows.num_slots_with_one_more) == (2, 4, 4)
    assert [rows.acquire() for _ in range(3)] == [0, 2, 4]
    assert rows.num_slots_with_one_more == 6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exact_fit", [False, True])
def test_bytes_are_those_of_whole_units(dtype: torch.dtype, exact_fit: bool) -> None:
    shape = shape_of(40, dtype)
    rows = PackedRows(shape)
    rows.bound(None, exact_fit)
    bytes_of_unit = UNIT * LAYERS * KV_HEADS * (64 + 64) * dtype.itemsize
    slots = [rows.acquire() for _ in range(3)]
    assert rows.num_bytes() == 0
    for slot, length in zip(slots, (1, UNIT, UNIT + 1), strict=True):
        rows.extend(slot, length)
        assert rows.rounded(length) % UNIT == 0 and 0 <= rows.rounded(length) - length < UNIT
    assert rows.num_bytes() % bytes_of_unit == 0
    if exact_fit:
        assert rows.num_bytes() == 4 * bytes_of_unit
        rows.forget(slots[1])
        assert rows.num_bytes() == 3 * bytes_of_unit
        rows.release(slots[2])
        assert rows.num_bytes() == bytes_of_unit
        rows.release(slots[0]), rows.release(slots[1])
        assert rows.num_bytes() == 0
    else:
        assert rows.num_bytes() >= 4 * bytes_of_unit
        before = rows.num_bytes()
        rows.extend(slots[0], 2 * UNIT)  # there is room already
        assert rows.num_bytes() == before


def test_a_bound_takes_the_room_to_grow() -> None:
    rows = PackedRows(shape_of(32, torch.float32))
    unit = UNIT * LAYERS * KV_HEADS * (32 + 64) * 4
    rows.bound(3 * UNIT)
    slot = rows.acquire()
    for units in (1, 2, 3, 4):  # what is needed is given beyond the bound
        rows.extend(slot, (units - 1) * UNIT + 1)
        assert rows.num_bytes() == units * unit
    assert rows.max_length == 3 * UNIT
    rows.acquire()
    assert rows.max_length == UNIT  # whole units


def test_growth_is_rare_and_keeps_entries() -> None:
    shape = shape_of(16, torch.bfloat16)
    rows, text = PackedRows(shape), entries(shape, 2000)
    slot, sizes = rows.acquire(), []
    for start in range(0, 2000, 10):
        rows.write(slot, start, list(text[:, :, start : start + 10]))
        sizes.append(rows.num_bytes())

    assert torch.equal(read(rows, slot, 0, 2000), text)
    assert len(set(sizes)) <= 8
    assert all(a <= b for a, b in itertools.pairwise(sizes))


def test_a_forgotten_row_begins_anew() -> None:
    forward, text = compile_model(random_model()), random_text(90)
    for exact_fit in (False, True):
        rows = forward.new_cache()
        rows.bound(None, exact_fit)
        slot = prefill(forward, rows, random_text(200, 3))
        rows.forget(slot)
        hidden = forward.hidden(text, [Span(slot, 0, 90)], None, rows)
        assert torch.equal(hidden, hidden_of(forward, text))


def test_checks_get_an_empty_cache_of_the_same_shape() -> None:
    rows = PackedRows(shape_of(8, torch.float32))
    rows.acquire()
    checked = rows.for_checks()

    assert (checked.num_rows, checked.num_bytes(), checked.acquire()) == (0, 0, 0)
    checked.write(0, 0, list(entries(shape_of(8, torch.float32), 5)))
    with pytest.raises(IndexError, match="slot 0 holds no positions"):
        rows.read(0, 0, 1)
