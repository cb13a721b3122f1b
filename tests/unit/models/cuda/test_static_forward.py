"""Steps on padded fixed buffers give the plain forward's results, over one cache and any schedule."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from support.reference import greedy_reference

from paceline.assembly import Pace, build_from_objects
from paceline.config import Config, EngineSection, ModelSection
from paceline.contracts import NONE, Request, SamplingParams
from paceline.drafting.draft_model import DraftModel
from paceline.errors import ModelError
from paceline.models.cuda.graphs import ROWS, TOKENS, shape_of
from paceline.models.cuda.layout import BLOCK, Shape, lay_out
from paceline.models.cuda.paged_cache import PagedCache
from paceline.models.language_model import LanguageModel
from paceline.models.packing import Span, ancestors_of
from paceline.models.self_checks import check_packed_forward
from paceline.testing.scripted import ScriptedTree
from paceline.testing.tiny_models import perturbed, tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

COMPILED = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") == "0"
DEVICE = torch.device("cuda" if COMPILED else "cpu")
TOLERANCE = 2e-4
V = 259


def both(
    architecture: str, forward: str = "auto", context: int = 3 * BLOCK
) -> tuple[LanguageModel, LanguageModel]:
    """Return one model twice: over the plain cache and over the paged one."""
    model = tiny_model(architecture, context=context).to(DEVICE)
    plain = LanguageModel(model, "plain", forward, paged=False)  # type: ignore[arg-type]
    return plain, LanguageModel(model, "paged", forward, paged=True)  # type: ignore[arg-type]


def logits(
    model: LanguageModel,
    tokens: Sequence[int],
    spans: list[Span],
    trees: list[list[int] | None] | None = None,
) -> torch.Tensor:
    with torch.inference_mode():
        return model.unembed(model.forward(torch.tensor(tokens), spans, trees))


def random_tree(width: int, order: random.Random) -> list[int]:
    return [order.randrange(-1, k) for k in range(width - 1)]


@torch.inference_mode()
@pytest.mark.parametrize(
    ("architecture", "forward"),
    [("llama", "lean"), ("mistral", "lean"), ("gemma2", "transformers")],
)
def test_a_random_schedule_of_rows_and_trees(architecture: str, forward: str) -> None:
    plain, paged = both(architecture, forward)
    order = random.Random(3)
    lengths: dict[int, int] = {}
    for turn in range(7):
        if len(lengths) < 3:
            slot = plain.acquire()
            assert paged.acquire() == slot
            lengths[slot] = 0
        chosen = order.sample(sorted(lengths), order.randint(1, len(lengths)))
        spans, trees, tokens = [], [], []
        for slot in chosen:
            width = order.randint(1, 9) if lengths[slot] else order.choice([5, BLOCK + 3])
            width = min(width, 3 * BLOCK - lengths[slot])
            spans.append(Span(slot, lengths[slot], width))
            trees.append(random_tree(width, order) if order.random() < 0.3 else None)
            tokens += [order.randrange(V) for _ in range(width)]
        found = logits(paged, tokens, spans, trees)
        expected = logits(plain, tokens, spans, trees)
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
        for span, tree in zip(spans, trees, strict=True):
            # of a tree, one leaf's path is kept, or nothing but the root
            seen = np.ones(span.width) if tree is None else ancestors_of(tree)[-1]
            path = seen.nonzero()[0].tolist()
            lengths[span.slot] += len(path)
            for model in (plain, paged):
                source = [span.start + k for k in path]
                model.cache.copy_positions(span.slot, source, span.start)
        if turn == 3:
            slot = chosen[0]
            for model in (plain, paged):
                model.release(slot)
            del lengths[slot]


def test_every_supported_shape_of_model_passes_the_self_check() -> None:
    for architecture in ("llama3", "qwen2", "gpt2"):
        check_packed_forward(both(architecture)[1])


def test_steps_are_made_again_after_the_cache_has_moved() -> None:
    plain, paged = both("llama")
    slots = [(plain.acquire(), paged.acquire())[0] for _ in range(10)]
    first = [Span(slots[0], 0, 3)]
    logits(plain, [1, 2, 3], first)
    logits(paged, [1, 2, 3], first)
    assert paged._static is not None and isinstance(paged.cache, PagedCache)
    step = paged._static._steps[1, 4]

    for slot in slots[1:]:
        paged.cache.extend(slot, 8 * BLOCK)  # more than the pool's first size
    again = [Span(slots[0], 3, 3)]
    torch.testing.assert_close(
        logits(paged, [4, 5, 6], again), logits(plain, [4, 5, 6], again), rtol=0, atol=TOLERANCE
    )

    assert paged._static._steps[1, 4] is not step


def test_hidden_states_outlive_the_next_step() -> None:
    _, paged = both("llama")
    slot = paged.acquire()
    with torch.inference_mode():
        kept = paged.forward(torch.tensor([5]), [Span(slot, 0, 1)])
        before = kept.clone()
        paged.forward(torch.tensor([9]), [Span(slot, 1, 1)])

    assert torch.equal(kept, before)


def test_padding_writes_to_no_rows_block() -> None:
    _, paged = both("llama")
    a, b, c = (paged.acquire() for _ in range(3))
    logits(paged, [1, 2, 3, 4, 5, 6, 7], [Span(a, 0, 3), Span(b, 0, 2), Span(c, 0, 2)])
    before = [paged.cache.read(slot, 0, 2) for slot in (a, b)]

    logits(paged, [8, 9, 10, 11, 12], [Span(c, 2, 5)])  # three tokens of padding
    logits(paged, [1, 2, 3], [Span(c, 7, 1), Span(a, 3, 1), Span(b, 2, 1)])  # a row and a token
    with torch.inference_mode():
        paged.draft_chain([1, 2, 3], [Span(s, 9, 1) for s in (a, b, c)], 3, V)

    after = [paged.cache.read(slot, 0, 2) for slot in (a, b)]
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(old, new, strict=True))


def test_shapes_hold_what_they_are_chosen_for() -> None:
    for rows in range(1, ROWS[-1] + 1):
        for tokens in range(rows, TOKENS[-1] + 1, 5):
            shape = shape_of(rows, tokens)
            assert shape is not None
            assert rows <= shape.rows and tokens <= shape.tokens <= 64 * shape.words
            # the widest row that the batch may have is one that the kernel is launched for
            assert tokens - rows + 1 <= shape.tokens - shape.rows // 2
    assert shape_of(ROWS[-1] + 1, 80) is None and shape_of(1, TOKENS[-1] + 1) is None


def test_a_batch_is_laid_out_as_its_parts_are_named() -> None:
    cache = PagedCache(torch.device("cpu"))
    a, b = cache.acquire(), cache.acquire()
    cache.extend(a, 70)
    cache.extend(b, 10)
    shape = Shape(rows=4, tokens=8, words=1)
    vector = torch.empty(shape.size, dtype=torch.int64)

    spans = [Span(b, 5, 3), Span(a, 63, 2)]
    tokens = torch.tensor([7, 8, 9, 10, 11])
    lay_out(vector.numpy(), shape, tokens, spans, [[-1, -1], None], cache.places)
    ids, rows = shape.read(vector, cache.table(), 3, 70)

    assert rows.first.tolist() == [0, 3, 0, 0] and rows.width.tolist() == [3, 2, 0, 0]
    assert rows.start.tolist() == [5, 63, 0, 0] and rows.slot.tolist() == [b, a, 0, 0]
    assert ids.tolist() == [7, 8, 9, 10, 11, 0, 0, 0]
    assert rows.position.tolist() == [5, 6, 6, 63, 64, 0, 0, 0]
    expected = cache.places(np.array([b, b, b, a, a]), np.array([5, 6, 7, 63, 64]))
    assert rows.place.tolist() == [*expected.tolist(), 0, 0, 0]
    assert rows.bits is not None
    assert rows.bits[:, 0].tolist() == [0b001, 0b011, 0b101, 0b01, 0b11, 0, 0, 0]


# --- drafting and decoding over it ----------------------------------------------------------------


class View:
    """A row as a drafter sees it."""

    def __init__(self, row_id: int, tokens: list[int]) -> None:
        self.id, self.tokens, self.num_prompt = row_id, tokens, 1
        self.sampling = SamplingParams()


def test_whole_chains_are_the_steps_one_by_one() -> None:
    plain, paged = both("llama")
    order = random.Random(0)
    drafters = [DraftModel("d", model, 3, V, V) for model in (plain, paged)]
    rows = [
        View(i, [order.randrange(V) for _ in range(n)]) for i, n in enumerate((5, BLOCK - 2, 2))
    ]
    calls = []
    draft_chain = paged.draft_chain
    paged.draft_chain = lambda *given: calls.append(1) or draft_chain(*given)  # type: ignore[method-assign,func-returns-value]
    with torch.inference_mode():
        for drafter in drafters:
            drafter.start(rows)  # type: ignore[arg-type]
            for row in rows:
                while not drafter.prepare(row, 64):  # type: ignore[arg-type]
                    pass
        for turn in range(4):
            chosen = rows[1:] if turn % 2 else rows
            limits = [order.randint(0, 4) for _ in chosen]
            one, whole = (d.propose(chosen, limits) for d in drafters)  # type: ignore[arg-type]
            assert one.lengths == whole.lengths and torch.equal(one.tokens, whole.tokens)
            for i, row in enumerate(chosen):
                kept = order.randint(0, one.lengths[i])
                row.tokens += [*one.tokens[i, :kept].tolist(), order.randrange(V)]
    assert len(calls) >= 3


def test_the_last_position_of_the_context_can_be_drafted_from() -> None:
    plain, paged = both("llama", context=24)
    text = [i % V for i in range(22)]
    for model in (plain, paged):
        logits(model, text, [Span(model.acquire(), 0, len(text))])
    drafters = [DraftModel("d", model, 4, V, V) for model in (plain, paged)]
    rows = [View(0, [*text, 1])]
    proposals = []
    with torch.inference_mode():
        for drafter in drafters:
            drafter.start(rows)  # type: ignore[arg-type]
            while not drafter.prepare(rows[0], 64):  # type: ignore[arg-type]
                pass
            proposals.append(drafter.propose(rows, [4]))  # type: ignore[arg-type]
    assert proposals[0].lengths == proposals[1].lengths == [2]
    assert torch.equal(proposals[0].tokens, proposals[1].tokens)


@pytest.fixture
def everywhere_paged(monkeypatch: pytest.MonkeyPatch) -> None:
    init = LanguageModel.__init__

    def paged(self: LanguageModel, *given: object, **named: object) -> None:
        init(self, *given, **{**named, "paged": True})  # type: ignore[arg-type]

    monkeypatch.setattr(LanguageModel, "__init__", paged)


@pytest.mark.usefixtures("everywhere_paged")
def test_greedy_text_is_transformers_own() -> None:
    model = tiny_model("llama", context=96).to(DEVICE)
    prompts = [tuple(text.encode()) for text in ("a", "to be or not to be")]
    truth = {prompt: greedy_reference(model, prompt, 6).tokens for prompt in prompts}

    def tree(tokens: Sequence[int], limit: int) -> tuple[list[int], list[int]]:
        prompt = next(p for p in prompts if tuple(tokens[: len(p)]) == p)
        ahead = truth[prompt][len(tokens) - len(prompt) :][: min(limit, 3)]
        wrong = [[7], [-1]] if limit > 0 else [[], []]
        return [*wrong[0], *ahead], [*wrong[1], *([-1, 1, 2, 3][: len(ahead)])]

    drafters = {"near": perturbed(model, 0.05), "tree": ScriptedTree("tree", tree, 4)}
    config = Config(
        target=ModelSection(model="in memory"), engine=EngineSection(prefix_positions=0)
    )
    pace = Pace(build_from_objects(model, byte_tokenizer(), drafters, config))
    assert pace.parts.target._static is not None
    requests = [
        Request(f"{i} {arm}", prompt, 6, drafter=arm)
        for arm in ("near", "tree", NONE)
        for i, prompt in enumerate(prompts)
    ]
    for completion in pace.stream(requests):
        prompt = prompts[int(completion.request_id.split()[0])]
        assert completion.token_ids == truth[prompt], completion.request_id


def test_a_missing_triton_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from paceline.models.cuda import batch

    batch.attention_kernel.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "paceline.models.cuda.paged_attention", None)
    try:
        with pytest.raises(ModelError, match="pip install triton"):
            both("llama")
    finally:
        batch.attention_kernel.cache_clear()
