"""Sampled text has the target's own distribution, whatever drafts and however it is judged.

The verifier is run on many rows at once against a target that is a small table p(next | last token),
so the exact distribution of the first two tokens is known; planted bugs show that
the same check sees them.
Then the engine itself on a model with ten tokens, and the promise that a seed gives one text.
Symbols: R rows, K drafted tokens, V tokens.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from scipy import stats
from support.examples import OTHER_KINDS, add_examples
from support.judging import JudgedDrafts, judge_block, judge_residual
from support.random_controller import RandomController

import paceline.engine.budget
from paceline import noise
from paceline.assembly import Pace, Parts, build_from_objects
from paceline.config import Config, EngineSection, ModelSection
from paceline.contracts import Decision, Drafts, Request, SamplingParams
from paceline.drafting.draft_model import DraftModel
from paceline.drafting.none import NoneDrafter
from paceline.drafting.prompt_lookup import PromptLookup, PromptLookupSettings
from paceline.engine import Driver, Engine
from paceline.engine.gate import Gate
from paceline.models.language_model import LanguageModel
from paceline.testing.tiny_models import perturbed, tiny_model
from paceline.testing.tokenizers import byte_tokenizer
from paceline.verification import follow
from paceline.warping import warp

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from paceline.contracts import PromptRecord
    from paceline.drafting.base import Drafter

    Judge = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], JudgedDrafts]

V = 9
K = 2
START = V  # index of the table's row for the first token: nothing came before it
NUM_DRAWS = 100_000
FAMILY_ALPHA = 1e-6  # chance that a correct verifier fails anywhere in the whole grid
NUM_CHECKS = 2 * 700  # more than there are
ALPHA = FAMILY_ALPHA / NUM_CHECKS


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """p-value of the counts under `expected` probabilities; 0 if the impossible was seen."""
    expected = expected / expected.sum() * counts.sum()
    possible = expected > 0
    if counts[~possible].any():
        return 0.0
    counts, expected = counts[possible], expected[possible]
    order = np.argsort(expected)
    counts, expected = counts[order], expected[order]
    # pool the rarest cells until each holds enough for the approximation
    rare = int(np.searchsorted(np.cumsum(expected), 10.0)) + 1
    rare = max(rare, int((expected < 10.0).sum()))
    counts = np.concatenate([[counts[:rare].sum()], counts[rare:]])
    expected = np.concatenate([[expected[:rare].sum()], expected[rare:]])
    if len(counts) < 2:
        return 1.0
    return float(stats.chisquare(counts, expected).pvalue)


# --- the simulated decoder ------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One way to sample with one drafter. `extra` tokens exist in the drafter's vocabulary alone."""

    drafter: str
    method: str  # residual | block | deterministic | invariant
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    extra: int = 0

    @property
    def params(self) -> SamplingParams:
        method = "invariant" if self.method == "invariant" else "residual"
        return SamplingParams(self.temperature, self.top_k, self.top_p, self.min_p, method=method)

    def __str__(self) -> str:
        return (
            f"{self.method}-{self.drafter}-t{self.temperature}-k{self.top_k}-p{self.top_p}"
            f"-m{self.min_p}" + (f"-extra{self.extra}" if self.extra else "")
        )


def tables(cell: Cell, seed: int = 0) -> tuple[Tensor, Tensor]:
    """p [V+1, V] and q [V+extra+1, V+extra]: next token given the last one, warped alike.

    The last row of each is the start's.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = V + cell.extra
    target = torch.randn(V + 1, V, generator=generator) * 1.2
    other = torch.randn(wide + 1, wide, generator=generator)
    if cell.drafter == "good":
        other *= 0.6
        other[:V, :V] += target[:V]
        other[-1, :V] += target[-1]
    elif cell.drafter == "garbage":
        other *= 2.0
    else:  # nothing that one may say may the other
        target[:, ::2] = float("-inf")
        other[:, 1::2] = float("-inf")
    return warp(target, cell.params), warp(other, cell.params)


def emitted_pairs(
    cell: Cell, num_draws: int = NUM_DRAWS, judge: Judge = judge_residual, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Counts of the first two emitted tokens [V, V], and the probabilities they should have.

    A round may emit one token only; then the second comes from a second round.
    """
    p, q = tables(cell, seed)
    rows = torch.arange(num_draws) + 1_000_003 * seed
    start = torch.full((num_draws,), START)
    emitted, num_emitted = one_round(cell, p, q, rows, start, position=5, judge=judge)
    short = num_emitted == 1
    again, _ = one_round(cell, p, q, rows[short], emitted[short, 0], position=6, judge=judge)
    emitted[short, 1] = again[:, 0]
    pairs = emitted[:, 0] * V + emitted[:, 1]
    counts = torch.bincount(pairs, minlength=V * V).reshape(V, V).numpy()
    expected = (p[START][:, None] * p[:V]).double().numpy()
    return counts, expected


def one_round(
    cell: Cell, p: Tensor, q: Tensor, seeds: Tensor, last: Tensor, position: int, judge: Judge
) -> tuple[Tensor, Tensor]:
    """Draft K tokens after `last` [R], judge them; return (emitted [R, K+1], their number [R])."""
    drafts, q_of_drafts = [], []
    token = torch.where(last == START, q.shape[0] - 1, last)
    for k in range(K):
        here = q[token]
        drawn = noise.TARGET if cell.method == "invariant" else noise.DRAFT
        at = torch.tensor(position + k)
        if cell.method in ("residual", "block"):
            at = noise.of_round(at, position)
        e = noise.exponential(seeds, at, drawn, q.shape[1])
        token = here.argmax(-1) if cell.method == "deterministic" else noise.race(here, e)
        drafts.append(token)
        q_of_drafts.append(here[:, :V])
    draft = torch.stack(drafts, dim=1)  # [R, K]
    # what the target says behind a token it does not know is never used
    p_places = p[torch.cat([last[:, None], draft.clamp(max=V - 1)], dim=1)]  # [R, K+1, V]
    places = position + torch.arange(K + 1)
    e = noise.exponential(seeds[:, None], places, noise.TARGET, V)
    lengths = torch.full((len(seeds),), K)
    if cell.method in ("residual", "block"):
        at = noise.of_round(places[:K], position) if cell.method == "block" else places[:K]
        u = noise.uniform(seeds[:, None], at, noise.ACCEPT)
        judge = judge_block if cell.method == "block" else judge
        verdicts = judge(p_places, torch.stack(q_of_drafts, dim=1), draft, lengths, u, e)
    else:
        choices = noise.race(p_places, e)
        kept = [len(follow(c, d)) for c, d in zip(choices.tolist(), draft.tolist(), strict=True)]
        num_kept = torch.tensor(kept)
        verdicts = JudgedDrafts(num_kept, choices.gather(1, num_kept[:, None])[:, 0])
    emitted = torch.cat([draft, draft[:, :1]], dim=1)
    emitted.scatter_(1, verdicts.num_accepted[:, None], verdicts.next_tokens[:, None])
    return emitted, verdicts.num_accepted + 1


def p_values(counts: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Of the first token alone and of the first two together."""
    return chi_square(counts.sum(axis=1), expected.sum(axis=1)), chi_square(
        counts.ravel(), expected.ravel()
    )


DRAFTERS = ("good", "garbage", "disjoint")
METHODS = ("residual", "block", "deterministic", "invariant")
GRID = [
    Cell(drafter, method, temperature, top_k, top_p, min_p)
    for drafter, method, temperature, top_k, top_p, min_p in itertools.product(
        DRAFTERS, METHODS, (0.5, 1.0, 1.5), (0, 3), (1.0, 0.8), (0.0, 0.1)
    )
] + [
    Cell(drafter, method, temperature, extra=3)
    for drafter in ("good", "garbage")
    for method in ("residual", "block")
    for temperature in (0.5, 1.0, 1.5)
]
# every drafter with every method, every setting alone and all of them at once
CHOSEN = [
    *(Cell(drafter, method) for drafter in DRAFTERS for method in METHODS),
    Cell("good", "residual", 0.5),
    Cell("good", "residual", 1.5, top_k=3),
    Cell("garbage", "residual", 1.0, top_p=0.8),
    Cell("good", "residual", 1.0, min_p=0.1),
    Cell("good", "invariant", 1.5, top_k=3, top_p=0.8, min_p=0.1),
    Cell("good", "residual", 1.5, top_k=3, top_p=0.8, min_p=0.1),
    Cell("good", "deterministic", 1.5, top_k=3, top_p=0.8, min_p=0.1),
    Cell("good", "residual", 1.0, extra=3),
    Cell("good", "block", 0.5, extra=3),
    Cell("good", "block", 1.5, top_k=3, top_p=0.8, min_p=0.1),
]


@pytest.mark.parametrize("cell", CHOSEN, ids=str)
def test_the_emitted_distribution_is_the_targets(cell: Cell) -> None:
    assert min(p_values(*emitted_pairs(cell))) > ALPHA


@pytest.mark.wide
@pytest.mark.parametrize("cell", GRID, ids=str)
def test_the_emitted_distribution_is_the_targets_on_the_whole_grid(cell: Cell) -> None:
    assert 2 * len(GRID) + 4 * len(CHOSEN) <= NUM_CHECKS
    assert min(p_values(*emitted_pairs(cell, seed=1))) > ALPHA


def test_block_verification_keeps_no_fewer_tokens_on_average() -> None:
    rows, start = torch.arange(50_000), torch.full((50_000,), START)
    gains = []
    for drafter, temperature in itertools.product(("good", "garbage"), (0.5, 1.0, 1.5)):
        mean = {}
        for method in ("residual", "block"):
            cell = Cell(drafter, method, temperature)
            _, num = one_round(cell, *tables(cell), rows, start, 5, judge_residual)
            mean[method] = num.double().mean().item()
        gains.append(mean["block"] - mean["residual"])

    assert min(gains) > -0.01  # three standard errors of a difference of two such means
    assert max(gains) > 0.02


def test_good_drafts_are_accepted_and_disjoint_ones_are_not() -> None:
    """Else the cells above would all test the same place of the draft."""
    rows, start = torch.arange(2000), torch.full((2000,), START)
    mean_emitted = {}
    for drafter in DRAFTERS:
        cell = Cell(drafter, "residual")
        _, num = one_round(cell, *tables(cell), rows, start, 5, judge_residual)
        mean_emitted[drafter] = num.double().mean().item()

    assert mean_emitted["disjoint"] == 1.0
    assert 1.1 < mean_emitted["garbage"] < mean_emitted["good"] < 2.9


# --- planted bugs: the same check must see them ---------------------------------------------------


def accepts_too_often(
    p: Tensor, q: Tensor, tokens: Tensor, lengths: Tensor, u: Tensor, e: Tensor
) -> JudgedDrafts:
    """The accept test lets 2 % of the draws through that it should stop."""
    return judge_residual(p, q, tokens, lengths, (u - 0.02).clamp(min=0.0), e)


def recovers_from_p(
    p: Tensor, q: Tensor, tokens: Tensor, lengths: Tensor, u: Tensor, e: Tensor
) -> JudgedDrafts:
    """After a rejection p itself is drawn from instead of max(0, p - q)."""
    right = judge_residual(p, q, tokens, lengths, u, e)
    rows = torch.arange(len(p))
    drawn = noise.race(p[rows, right.num_accepted], e[rows, right.num_accepted])
    return JudgedDrafts(right.num_accepted, drawn)


def warps_the_residual(
    p: Tensor, q: Tensor, tokens: Tensor, lengths: Tensor, u: Tensor, e: Tensor
) -> JudgedDrafts:
    """The residual goes through the temperature, 0.5, once more."""
    right = judge_residual(p, q, tokens, lengths, u, e)
    rows = torch.arange(len(p))
    n = right.num_accepted
    residual = (p[rows, n] - q[rows, n.clamp(max=K - 1)]).clamp(min=0.0)
    again = warp(residual.log(), SamplingParams(0.5, method="residual"))
    drawn = noise.race(again, e[rows, n])
    return JudgedDrafts(n, torch.where(n < lengths, drawn, right.next_tokens))


def trims_unknown_tokens(
    p: Tensor, q: Tensor, tokens: Tensor, lengths: Tensor, u: Tensor, e: Tensor
) -> JudgedDrafts:
    """A drafted token outside the vocabulary is cut off instead of counting as rejected."""
    known = ((tokens >= 0) & (tokens < p.shape[-1])).to(torch.int64)
    lengths = torch.minimum(lengths, known.cumprod(dim=-1).sum(dim=-1))
    return judge_residual(p, q, tokens, lengths, u, e)


def stops_by_what_was_drawn(
    p: Tensor, q: Tensor, tokens: Tensor, lengths: Tensor, u: Tensor, e: Tensor
) -> JudgedDrafts:
    """A draft is cut before a token that its drafter found improbable, after drawing it."""
    sure = q.gather(-1, tokens.clamp(max=V - 1)[..., None])[..., 0] > 0.15
    kept = sure.to(torch.int64).cumprod(dim=-1).sum(dim=-1)
    return judge_residual(p, q, tokens, torch.minimum(lengths, kept), u, e)


def chooses_the_arm_by_what_was_drawn(
    p: Tensor, q: Tensor, tokens: Tensor, lengths: Tensor, u: Tensor, e: Tensor
) -> JudgedDrafts:
    """The row goes without a draft where the target would reject its first token."""
    first = tokens[:, 0].clamp(max=V - 1)[:, None]
    doubtful = (p[:, 0].gather(1, first) < q[:, 0].gather(1, first))[:, 0]
    return judge_residual(p, q, tokens, torch.where(doubtful, 0, lengths), u, e)


def reuses_the_drafts_noise(
    p: Tensor, q: Tensor, tokens: Tensor, lengths: Tensor, u: Tensor, e: Tensor
) -> JudgedDrafts:
    """The recovered token is drawn with the noise that the rejected one was drawn with."""
    seeds, places = torch.arange(len(p))[:, None], noise.of_round(5 + torch.arange(K + 1), 5)
    drafts_own = noise.exponential(seeds, places, noise.DRAFT, p.shape[-1])
    return judge_residual(p, q, tokens, lengths, u, drafts_own)


@pytest.mark.parametrize(
    ("judge", "cell"),
    [
        (accepts_too_often, Cell("garbage", "residual")),
        (recovers_from_p, Cell("good", "residual")),
        (warps_the_residual, Cell("good", "residual", temperature=0.5)),
        (trims_unknown_tokens, Cell("good", "residual", extra=3)),
        (reuses_the_drafts_noise, Cell("good", "residual")),
        (stops_by_what_was_drawn, Cell("good", "residual")),
        (chooses_the_arm_by_what_was_drawn, Cell("good", "residual")),
    ],
)
def test_a_planted_bug_in_judging_is_seen(judge: Judge, cell: Cell) -> None:
    assert min(p_values(*emitted_pairs(cell, judge=judge))) < ALPHA


def test_a_drafter_that_misreports_its_distribution_is_seen() -> None:
    """q as it was before the temperature, while the drafts were drawn after it."""
    cell = Cell("good", "residual", temperature=0.5)

    def judge(*given: Tensor) -> JudgedDrafts:
        p, q, *rest = given
        return judge_residual(p, warp(q.log(), replace(cell.params, temperature=2.0)), *rest)

    assert min(p_values(*emitted_pairs(cell, judge=judge))) < ALPHA


@pytest.mark.parametrize("cell", CHOSEN[::4], ids=str)
def test_two_percent_of_moved_mass_is_seen(cell: Cell) -> None:
    counts, expected = emitted_pairs(cell)
    marginal = expected.sum(axis=1)
    first, second = np.argsort(marginal)[-2:]
    moved = counts.sum(axis=1)
    taken = round(0.02 * NUM_DRAWS)
    moved[first] -= taken
    moved[second] += taken

    assert chi_square(moved, marginal) < ALPHA


def test_a_token_the_target_cannot_say_is_seen() -> None:
    counts, expected = np.array([50, 49, 1]), np.array([0.5, 0.5, 0.0])

    assert chi_square(counts, expected) == 0.0


# --- the engine, on a model whose distribution is known -------------------------------------------

SMALL_V = 10
NUM_REQUESTS = 1500


@pytest.fixture(scope="module")
def small_target() -> LanguageModel:
    return LanguageModel(tiny_model("llama", vocab_size=SMALL_V, context=16), "target")


def law_of_three_tokens(
    model: LanguageModel, prompt: Sequence[int], params: SamplingParams
) -> np.ndarray:
    """[V, V, V] probabilities of the first three tokens, from transformers' own forward."""

    def after(texts: Sequence[Sequence[int]]) -> Tensor:
        return warp(model.model(torch.tensor(texts)).logits[:, -1], params).double()

    tokens = range(SMALL_V)
    with torch.inference_mode():
        first = after([prompt])[0]
        second = after([[*prompt, a] for a in tokens])
        third = after([[*prompt, a, b] for a in tokens for b in tokens])
    third = third.reshape(SMALL_V, SMALL_V, SMALL_V)
    distribution: np.ndarray = (first[:, None, None] * second[:, :, None] * third).numpy()
    return distribution


def small_drafters(target: LanguageModel) -> dict[str, Drafter]:
    models = {
        "near": perturbed(target.model, 0.2),
        "random": tiny_model("gpt2", seed=5, vocab_size=SMALL_V, context=16),
    }
    lookup = PromptLookupSettings(min_ngram=1, num_draft_tokens=3)
    return {
        "none": NoneDrafter(),
        "lookup": PromptLookup("lookup", lookup),
        **{
            name: DraftModel(name, LanguageModel(model, name), 3, SMALL_V, SMALL_V)
            for name, model in models.items()
        },
    }


@pytest.mark.parametrize(
    ("arm", "method"),
    [
        ("near", "residual"),
        ("random", "residual"),
        ("lookup", "residual"),
        ("near", "invariant"),
    ],
)
def test_the_engine_emits_the_targets_distribution(
    small_target: LanguageModel, arm: str, method: str
) -> None:
    params = SamplingParams(1.2, top_k=7, min_p=0.02, method=method)
    prompt = (3, 7, 1, 3)
    engine = Engine(small_target, small_drafters(small_target), decode=str, max_rows=100)
    requests = [
        Request(str(i), prompt, 4, replace(params, seed=1_000 + i), drafter=arm)
        for i in range(NUM_REQUESTS)
    ]

    counts = np.zeros((SMALL_V, SMALL_V, SMALL_V), dtype=np.int64)
    firsts = []  # what became of the first round's two draft tokens
    for completion in Driver(engine).generate(requests):
        counts[tuple(completion.token_ids[:3])] += 1
        firsts.append(completion.rounds[0].accepted)

    distribution = law_of_three_tokens(small_target, prompt, params)
    assert set(firsts) == {0, 1, 2}
    for axes in ((), (0,), (2,), (0, 1)):
        assert chi_square(counts.sum(axes).ravel(), distribution.sum(axes).ravel()) > ALPHA


def test_a_watch_that_switches_by_what_was_right_moves_no_mass(small_target: LanguageModel) -> None:
    """Shadow drafts are drawn with noise of their own round."""
    params = SamplingParams(1.2, top_k=7, min_p=0.02, method="residual")
    prompt = (3, 7, 1, 3)
    controller = RandomController(
        ["none", "near", "near@1", "random"], ["near", "random", "lookup"]
    )
    engine = Engine(
        small_target,
        small_drafters(small_target),
        decode=str,
        choose=lambda context: Decision("near@1"),
        max_rows=100,
        controller=controller,
    )
    requests = [
        Request(str(i), prompt, 4, replace(params, seed=1_000 + i)) for i in range(NUM_REQUESTS)
    ]

    counts = np.zeros((SMALL_V, SMALL_V, SMALL_V), dtype=np.int64)
    for completion in Driver(engine).generate(requests):
        counts[tuple(completion.token_ids[:3])] += 1

    assert len(controller.ended) == NUM_REQUESTS
    distribution = law_of_three_tokens(small_target, prompt, params)
    for axes in ((), (0,), (2,), (0, 1)):
        assert chi_square(counts.sum(axes).ravel(), distribution.sum(axes).ravel()) > ALPHA


# --- the budget of verified tokens -----------------------------------------------------------------


class RisingSeconds:
    """A round's seconds: 1, then more for each drafted token."""

    def __init__(self, steps: Sequence[float]) -> None:
        """steps: of the first tokens; the last one is that of all others."""
        self._steps = steps

    def up_to(self, rows: int, context: int, num_drafted: int) -> np.ndarray:
        steps = [*self._steps, *[self._steps[-1]] * num_drafted][:num_drafted]
        return np.cumsum([1.0, *steps])


class Stopping(DraftModel):
    """A draft model that ends a draft after its first token if that is one of half of all tokens."""

    def propose(self, rows: Sequence[Any], limits: Sequence[int]) -> Drafts:
        whole = super().propose(rows, limits)
        tokens: list[list[int]] = whole.tokens.tolist()
        lengths = [
            min(n, 1) if n and tokens[i][0] < SMALL_V // 2 else n
            for i, n in enumerate(whole.lengths)
        ]
        return Drafts(whole.tokens, lengths, whole.probs)


class OpenGate(Gate):
    """A gate that lets every drafter be called, so that the cut alone decides."""

    def admits(self, own: Sequence[Any], num_rows: int) -> bool:
        return super().admits(own, num_rows) or True


def counts_with_budget(
    target: LanguageModel,
    arm: str,
    params: SamplingParams,
    seconds: RisingSeconds,
    max_rows: int,
    num_requests: int = NUM_REQUESTS,
    gate: type[Gate] = OpenGate,
) -> tuple[np.ndarray, tuple[int, int]]:
    """Return the counts of the first three tokens [V, V, V], and of (whole, cut) drafts."""
    drafters = small_drafters(target)
    near = LanguageModel(perturbed(target.model, 0.2), "stopping")
    drafters["stopping"] = Stopping("stopping", near, 3, SMALL_V, SMALL_V)
    prices: Any = seconds
    engine = Engine(target, drafters, decode=str, max_rows=max_rows, round_seconds=prices)
    budget: Any = engine._budget
    whole, cut = 0, 0

    def counting(rows: Sequence[Any], drafts: list[Any], own: Any = budget.cut) -> list[Any]:
        nonlocal whole, cut
        kept: list[Any] = own(rows, drafts)
        for before, after in zip(drafts, kept, strict=True):
            if before.tokens:
                whole += len(after.tokens) == len(before.tokens)
                cut += len(after.tokens) < len(before.tokens)
        return kept

    budget.cut = counting
    budget.gate = gate(prices)
    requests = [
        Request(str(i), BUDGET_PROMPT, 5, replace(params, seed=1_000 + i), drafter=arm)
        for i in range(num_requests)
    ]
    counts = np.zeros((SMALL_V, SMALL_V, SMALL_V), dtype=np.int64)
    for completion in Driver(engine).generate(requests):
        counts[tuple(completion.token_ids[:3])] += 1
    return counts, (whole, cut)


BUDGET_PROMPT = (3, 7, 1, 3)
SLOPED = RisingSeconds([0.004])  # per token, of about a hundred rows
FIRST_IS_DEAR = RisingSeconds([0.6, 0.0])  # so one token does not pay, and several do


def least_p_value(counts: np.ndarray, distribution: np.ndarray) -> float:
    return min(
        chi_square(counts.sum(axes).ravel(), distribution.sum(axes).ravel())
        for axes in ((), (0,), (2,), (0, 1))
    )


def of_drawn_tokens(row: Any, draft: Any) -> list[float]:
    """Return chances that a leaking budget takes from the drawn tokens' own probabilities."""
    own = draft.probs[range(len(draft.tokens)), draft.tokens]
    found: list[float] = (own * 2).clamp(max=1.0).cumprod(0).tolist()
    return found


def of_drawn_length(row: Any, draft: Any) -> list[float]:
    """Return chances of the tokens that were drawn, where a drafter stops by what it draws."""
    found: list[float] = row.in_use.acceptance.chances(None, len(draft.tokens))
    return found


@pytest.mark.parametrize(
    ("arm", "method"),
    [
        ("near", "residual"),
        ("near", "block"),
        ("random", "residual"),
        ("lookup", "residual"),
        ("near", "invariant"),
    ],
)
def test_the_budget_moves_no_mass(small_target: LanguageModel, arm: str, method: str) -> None:
    params = SamplingParams(1.2, top_k=7, min_p=0.02, method=method)

    counts, drafts = counts_with_budget(small_target, arm, params, SLOPED, max_rows=100)

    distribution = law_of_three_tokens(small_target, BUDGET_PROMPT, params)
    assert least_p_value(counts, distribution) > ALPHA
    assert min(drafts) > 100, "some drafts are cut, others are not"


def test_the_budget_moves_no_mass_where_a_drafter_stops_by_what_it_draws(
    small_target: LanguageModel,
) -> None:
    params = SamplingParams(1.2, top_k=7, min_p=0.02, method="residual")

    counts, drafts = counts_with_budget(
        small_target, "stopping", params, FIRST_IS_DEAR, 2, 3 * NUM_REQUESTS
    )

    distribution = law_of_three_tokens(small_target, BUDGET_PROMPT, params)
    assert least_p_value(counts, distribution) > ALPHA
    assert min(drafts) > 100


@pytest.mark.parametrize("method", ["residual", "block"])
def test_the_gate_moves_no_mass(small_target: LanguageModel, method: str) -> None:
    """Drafters are called now and then, as earlier rounds decide."""
    params = SamplingParams(1.2, top_k=7, min_p=0.02, method=method)
    admitted: list[bool] = []

    class Counting(Gate):
        def admits(self, own: Sequence[Any], num_rows: int) -> bool:
            admitted.append(super().admits(own, num_rows))
            return admitted[-1]

    counts, _ = counts_with_budget(
        small_target, "near", params, RisingSeconds([0.25]), 2, gate=Counting
    )

    distribution = law_of_three_tokens(small_target, BUDGET_PROMPT, params)
    assert least_p_value(counts, distribution) > ALPHA
    assert min(admitted.count(True), admitted.count(False)) > 100


@pytest.mark.parametrize(
    ("leak", "arm", "seconds", "max_rows", "times"),
    [
        (of_drawn_tokens, "near", SLOPED, 100, 1),
        (of_drawn_length, "stopping", FIRST_IS_DEAR, 2, 3),
    ],
)
def test_a_budget_that_reads_what_was_drawn_is_seen(
    small_target: LanguageModel,
    monkeypatch: pytest.MonkeyPatch,
    leak: Any,
    arm: str,
    seconds: RisingSeconds,
    max_rows: int,
    times: int,
) -> None:
    params = SamplingParams(1.2, top_k=7, min_p=0.02, method="residual")
    monkeypatch.setattr(paceline.engine.budget, "_chances", leak)

    counts, _ = counts_with_budget(
        small_target, arm, params, seconds, max_rows, times * NUM_REQUESTS
    )

    distribution = law_of_three_tokens(small_target, BUDGET_PROMPT, params)
    assert least_p_value(counts, distribution) < ALPHA


# --- a seed is a text -----------------------------------------------------------------------------

ARMS = ("none", "near", "random", *OTHER_KINDS)
SETTINGS = {"temperature": 0.9, "top_p": 0.95, "max_new_tokens": 20, "ignore_eos": True}


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2", "zoo"])
def sampled(
    request: pytest.FixtureRequest, zoo_target: Parts, prompts: list[PromptRecord]
) -> tuple[Parts, list[list[int]]]:
    """Parts with the arms above, and a few prompts."""
    if request.param == "zoo":
        target, tokenizer = zoo_target.target.model, zoo_target.tokenizer
        texts = [record.prompt for record in prompts[1:5:2]]
    else:
        target, tokenizer = tiny_model(request.param), byte_tokenizer()
        texts = ["spam, spam, eggs and spam", "x", "to be or not to be"]
    drafters = {
        "near": perturbed(target, 0.05),
        "random": tiny_model("llama", seed=77, vocab_size=target.config.vocab_size),
    }
    config = Config(target=ModelSection(model="in memory"), engine=EngineSection(max_rows=3))
    parts = add_examples(build_from_objects(target, tokenizer, drafters, config))
    return parts, [tokenizer(text)["input_ids"] for text in texts]


def texts_of(
    parts: Parts, prompts: Sequence[list[int]], arms: Sequence[str], **settings: object
) -> list[list[int]]:
    pace = Pace(parts)
    requests = [
        pace.request(prompt, id=str(i), drafter=arm, **{**SETTINGS, **settings})
        for i, (prompt, arm) in enumerate(zip(prompts, itertools.cycle(arms), strict=False))
    ]
    done = {c.request_id: c.token_ids for c in pace.stream(requests)}
    return [done[request.id] for request in requests]


def test_a_seed_gives_one_text_whatever_the_arm_and_the_batch(
    sampled: tuple[Parts, list[list[int]]],
) -> None:
    parts, prompts = sampled
    alone = [texts_of(parts, [prompt], ["none"], seed=11)[0] for prompt in prompts]

    for turn in range(len(ARMS)):
        arms = ARMS[turn:] + ARMS[:turn]
        assert texts_of(parts, prompts, arms, seed=11) == alone
    crowd = [*prompts[::-1], *prompts, prompts[0]]
    assert texts_of(parts, crowd, ARMS, seed=11) == [*alone[::-1], *alone, alone[0]]


def test_under_invariant_sampling_the_target_accepts_all_of_its_own_drafts(
    sampled: tuple[Parts, list[list[int]]],
) -> None:
    """Drafts and verdicts meet at the same noise: another position's would nearly never match."""
    parts, prompts = sampled
    own = build_from_objects(
        parts.target.model, parts.tokenizer, {"self": parts.target.model}, parts.config
    )
    pace = Pace(own)
    requests = [
        pace.request(p, id=str(i), drafter="self", seed=5, **SETTINGS)
        for i, p in enumerate(prompts)
    ]

    for completion in pace.stream(requests):
        assert all(r.accepted == r.drafted for r in completion.rounds)
        assert len(completion.rounds) == 4  # 19 tokens after the first, 5 a round


def test_another_seed_gives_another_text(sampled: tuple[Parts, list[list[int]]]) -> None:
    parts, prompts = sampled
    by_seed = [texts_of(parts, prompts[:1], ["near"], seed=seed)[0] for seed in (11, 12, -3)]

    assert len({tuple(text) for text in by_seed}) == 3


def test_residual_sampling_repeats_itself_under_a_seed(
    sampled: tuple[Parts, list[list[int]]],
) -> None:
    parts, prompts = sampled
    arms = ("near", "random", *OTHER_KINDS)

    first = texts_of(parts, prompts, arms, seed=11, sampling="residual")

    assert texts_of(parts, prompts, arms, seed=11, sampling="residual") == first
    assert texts_of(parts, prompts, arms, seed=12, sampling="residual") != first
