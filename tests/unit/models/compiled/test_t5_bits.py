"""A token's bits depend on its own row alone, its source included, and chains are their steps."""

from __future__ import annotations

import itertools
import random
from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch
from support.compiled_models import NUM_IDS, path_to, random_text, random_tree
from support.t5_models import (
    T5_SHAPES,
    begin,
    feed,
    hidden_alone,
    load_t5,
    random_source,
    random_t5,
)

from paceline.models.compiled import processor
from paceline.models.packing import ChainEnds, Span
from paceline.models.sublayers import LayerSubset

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.models.language_model import LanguageModel

SHAPES = ("t5", "umt5", "head_20", "head_64")
DTYPES = ("bfloat16", "float32")
GRID = list(itertools.product(SHAPES, DTYPES))
LENGTH = 290  # past the first tables of biases
SOURCES = (1, 31, 64, 300)  # tokens


@cache
def model_of(shape: str, dtype: str) -> LanguageModel:
    return load_t5(random_t5(dtype, **T5_SHAPES[shape]))


@cache
def whole(shape: str, dtype: str, number: int) -> torch.Tensor:
    """Return the hidden states of row `number`, computed alone and at once."""
    source, text = random_source(SOURCES[number], number), random_text(LENGTH, number)
    return hidden_alone(model_of(shape, dtype), source, text)


def begun(model: LanguageModel, number: int, start: int = 0) -> int:
    """Return the slot of row `number`, with the beginning of its text cached."""
    slot = begin(model, random_source(SOURCES[number], number))
    if start:
        feed(model, {slot: (0, random_text(LENGTH, number)[:start])})
    return slot


@pytest.mark.parametrize(("shape", "dtype"), GRID)
@pytest.mark.parametrize("sizes", [(1, 2, 3), (5, 33, 1), (16, 17), (64, 7), (129,)])
def test_a_text_may_come_in_pieces_of_any_size(
    shape: str, dtype: str, sizes: Sequence[int]
) -> None:
    model, text, start, parts = model_of(shape, dtype), random_text(LENGTH, 3), 0, []
    slot = begun(model, 3)
    for size in itertools.cycle(sizes):
        piece = text[start : start + size]
        parts.append(feed(model, {slot: (start, piece)})[slot])
        start += len(piece)
        if start == LENGTH:
            break
    model.release(slot)

    assert torch.equal(torch.cat(parts), whole(shape, dtype, 3))


@pytest.mark.parametrize(("shape", "dtype"), GRID)
@pytest.mark.parametrize("widest", [1, 2, 9, 70])
def test_rows_do_not_depend_on_each_other(shape: str, dtype: str, widest: int) -> None:
    model, source = model_of(shape, dtype), random.Random(f"{shape} {widest}")
    for _ in range(4):
        numbers = [source.randrange(4) for _ in range(source.randint(2, 6))]
        starts = [source.randrange(LENGTH - 70) for _ in numbers]
        slots = [begun(model, n, start) for n, start in zip(numbers, starts, strict=True)]
        rows = list(zip(slots, numbers, starts, strict=True))
        source.shuffle(rows)
        pieces = {
            slot: (start, random_text(LENGTH, n)[start : start + source.randint(1, widest)])
            for slot, n, start in rows
        }
        hidden = feed(model, pieces)
        for slot, number, start in rows:
            stop = start + len(pieces[slot][1])
            assert torch.equal(hidden[slot], whole(shape, dtype, number)[start:stop])
        for slot in slots:
            model.release(slot)


@pytest.mark.parametrize(("shape", "dtype"), GRID)
@pytest.mark.parametrize("width", [2, 5, 17, 40])
def test_a_path_of_a_tree_is_the_chain_that_it_may_become(
    shape: str, dtype: str, width: int
) -> None:
    model = model_of(shape, dtype)
    for start in range(1 + width % 4, 132, 23):
        number = start % 4
        source, before = random_source(SOURCES[number], number), random_text(LENGTH, number)[:start]
        nodes, parents = random_text(width, start), random_tree(width, start)
        slot, other = begun(model, number, start), begun(model, (number + 1) % 4, 7)
        pieces = {other: (7, [3, 4]), slot: (start, nodes)}
        hidden = feed(model, pieces, {slot: parents})[slot]
        path = max((path_to(parents, place) for place in range(width)), key=len)
        accepted = [*before, *(nodes[place] for place in path)]
        more = random_text(5, start + 1)
        chain = hidden_alone(model, source, [*accepted, *more])
        assert torch.equal(hidden[path], chain[start : len(accepted)])

        model.cache.copy_positions(slot, [start + place for place in path], start)
        after = feed(model, {slot: (len(accepted), more)})[slot]
        assert torch.equal(after, chain[len(accepted) :])
        model.release(slot)
        model.release(other)


@pytest.mark.parametrize(("shape", "dtype"), GRID)
def test_a_draft_may_be_taken_back(shape: str, dtype: str) -> None:
    model, text = model_of(shape, dtype), random_text(LENGTH, 1)
    slot = begun(model, 1, 60)
    for wrong in (1, 4, 30):
        feed(model, {slot: (60, random_text(wrong, 99))})
        found = feed(model, {slot: (60, text[60:75])})[slot]
        assert torch.equal(found, whole(shape, dtype, 1)[60:75])
    model.release(slot)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_bits_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    expected = whole("t5", "float32", 1)  # by the threads of the other tests
    model = model_of("t5", "float32")
    torch.set_num_threads(threads)
    try:
        slot, other = begun(model, 1), begun(model, 3)
        text = random_text(LENGTH, 1)
        for start, stop in ((0, 90), (90, 91), (91, 94)):
            hidden = feed(
                model, {other: (start, text[start:stop]), slot: (start, text[start:stop])}
            )
            assert torch.equal(hidden[slot], expected[start:stop])
    finally:
        torch.set_num_threads(before)
    model.release(slot)
    model.release(other)


@pytest.mark.parametrize("shape", ["t5", "umt5", "few_distances"])
def test_longer_texts_of_other_rows_change_no_bias(shape: str) -> None:
    """The tables of biases grow past their first sizes, and known distances keep their bits."""
    source, text = random_source(50), random_text(1100)
    at_once = hidden_alone(load_t5(random_t5(**T5_SHAPES[shape])), source, text)
    model = load_t5(random_t5(**T5_SHAPES[shape]))
    slot, longer = begin(model, source), begin(model, source)
    parts = [feed(model, {slot: (0, text[:100])})[slot]]
    for start, stop in ((0, 257), (257, 600), (600, 1100)):
        found = feed(model, {longer: (start, text[start:stop])})[longer]
        assert torch.equal(found, at_once[start:stop])
    parts.append(feed(model, {slot: (100, text[100:400])})[slot])

    assert torch.equal(torch.cat(parts), at_once[:400])


def test_a_slot_forgets_the_source_of_the_row_before() -> None:
    model, text = load_t5(random_t5()), random_text(20)
    short, long = random_source(7), random_source(200, 1)
    expected = hidden_alone(model, short, text)
    slot = begin(model, long)
    feed(model, {slot: (0, text)})
    model.release(slot)

    assert begin(model, short) == slot
    assert torch.equal(feed(model, {slot: (0, text)})[slot], expected)


def test_a_damaged_source_harms_no_other_row_and_not_the_next_in_its_slot() -> None:
    weights = random_t5()
    weights.shared.weight.data[9] = float("nan")
    model = load_t5(weights)
    text, source = [1, 2, 3], [t % 9 for t in random_source(40)]
    slot, other = begin(model, [9] * 70), begin(model, source)
    hidden = feed(model, {slot: (0, text), other: (0, text)})

    assert hidden[slot].isnan().all() and hidden[other].isfinite().all()
    model.release(slot, damaged=True)
    assert begin(model, source) == slot
    assert torch.equal(feed(model, {slot: (0, text)})[slot], hidden[other])


def test_a_row_without_a_source_is_refused() -> None:
    model = load_t5(random_t5())
    slot = model.acquire()

    with pytest.raises(IndexError, match="the row of slot 0 has no source"):
        feed(model, {slot: (0, [1])})


SKIP = LayerSubset(frozenset({1}), frozenset({0}))


def step_by_step(
    model: LanguageModel, slot: int, start: int, text: list[int], K: int, skip: LayerSubset | None
) -> list[int]:
    """Return K greedy ids after the text of a row that is cached up to `start`."""
    chain: list[int] = []
    new = text[start:]
    for _ in range(K):
        hidden = feed(model, {slot: (start, new)}, skip=skip)[slot]
        start += len(new)
        new = [int(model.unembed(hidden[-1:])[0].argmax())]
        chain += new
    return chain


@pytest.mark.parametrize("skip", [None, SKIP])
@pytest.mark.parametrize(("shape", "dtype"), GRID)
def test_a_chain_is_its_steps_one_by_one(shape: str, dtype: str, skip: LayerSubset | None) -> None:
    model = model_of(shape, dtype)
    compiled = model._compiled
    assert compiled is not None
    starts, widths, K = (20, 61, 250, 100), (1, 2, 40, 1), 9
    slots = [begin(model, random_source(SOURCES[n], n)) for n in range(4)]
    texts = [random_text(a + w, n) for n, (a, w) in enumerate(zip(starts, widths, strict=True))]
    for slot, start, text in zip(slots, starts, texts, strict=True):
        feed(model, {slot: (0, text[:start])}, skip=skip)
    order = (2, 0, 3, 1)
    spans = [Span(slots[n], starts[n], widths[n]) for n in order]
    tokens = [token for n in order for token in texts[n][starts[n] :]]
    chains = compiled.chain(tokens, spans, model.cache, K, NUM_IDS, skip)  # type: ignore[arg-type]
    expected = [step_by_step(model, slots[n], starts[n], texts[n], K, skip) for n in order]
    for slot in slots:
        model.release(slot)

    assert chains == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sure_chain_is_the_chain_with_its_probabilities(dtype: str) -> None:
    model, K = model_of("t5", dtype), 7
    texts = {begun(model, n, 30 * n + 1): random_text(LENGTH, n)[: 30 * n + 2] for n in range(4)}
    spans = [Span(slot, len(text) - 1, 1) for slot, text in texts.items()]
    tokens = [text[-1] for text in texts.values()]
    ends = ChainEnds((1.0,) * 16, [0.0] * 4)  # never
    chains, sure = model.draft_sure_chain(tokens, spans, K, NUM_IDS, ends)
    assert model.draft_chain(tokens, spans, K, NUM_IDS) == chains
    for span, text, chain, probabilities in zip(spans, texts.values(), chains, sure, strict=True):
        given = [text[-1], *chain[:-1]]
        hidden = feed(model, {span.slot: (span.start, given)})[span.slot]
        expected = model.unembed(hidden).softmax(dim=-1).amax(dim=-1)
        torch.testing.assert_close(torch.tensor(probabilities), expected, rtol=1e-4, atol=1e-5)
        model.release(span.slot)
    some = ChainEnds(tuple(float(k > 7) for k in range(16)), [0.5] * 4)
    again = {begun(model, n, 30 * n + 1): None for n in range(4)}
    spans = [Span(slot, 30 * n + 1, 1) for n, slot in enumerate(again)]
    fewer, _ = model.draft_sure_chain(tokens, spans, K, NUM_IDS, some)
    assert [chain[: len(short)] for chain, short in zip(chains, fewer, strict=True)] == fewer
    for slot in again:
        model.release(slot)


def test_bits_of_8_bit_weights_do_not_depend_on_batch_draft_or_tree() -> None:
    model = load_t5(random_t5("bfloat16", **T5_SHAPES["head_64"]), weights="int8")
    source, text = random_source(90), random_text(80)
    expected = hidden_alone(model, source, text)
    slot, other = begin(model, source), begin(model, random_source(5))
    feed(model, {slot: (0, text[:50])})
    for width in (1, 2, 7, 30):
        pieces = {other: (0, text[:3]), slot: (50, text[50 : 50 + width])}
        assert torch.equal(feed(model, pieces)[slot], expected[50 : 50 + width])
    tree = feed(model, {slot: (50, [text[50], 0, text[51], text[52]])}, {slot: [-1, -1, 1]})[slot]
    assert torch.equal(tree[[0, 2, 3]], expected[50:53])


@pytest.mark.parametrize("kind", processor.available()[1:])
def test_other_kernels_have_bits_of_a_row_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(processor.SETTING, kind)
    for dtype in DTYPES:
        model = load_t5(random_t5(dtype, **T5_SHAPES["head_20"]))
        expected = hidden_alone(model, random_source(64, 2), random_text(100, 2))
        slot, other = begun(model, 2), begun(model, 0)
        for start, width in ((0, 1), (1, 2), (3, 6), (9, 40), (49, 51)):
            pieces = {other: (0, [1, 2]), slot: (start, random_text(100, 2)[start : start + width])}
            assert torch.equal(feed(model, pieces)[slot], expected[start : start + width])
