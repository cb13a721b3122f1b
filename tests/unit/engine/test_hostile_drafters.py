"""Drafters that do everything wrong end their own rows, by name; their neighbours never notice."""

from __future__ import annotations

import asyncio
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from support.reference import greedy_reference

from paceline.contracts import GREEDY, Completion, Drafts, Request, SamplingParams
from paceline.drafting.base import Drafter, pad_drafts
from paceline.drafting.contract import MAX_NODES
from paceline.drafting.draft_replay import DraftReplay
from paceline.drafting.none import NoneDrafter
from paceline.drafting.union import Union
from paceline.engine import Engine
from paceline.errors import DrafterError
from paceline.models.language_model import LanguageModel
from paceline.replay import replay
from paceline.testing.scripted import ScriptedDrafter, copying
from paceline.testing.tiny_models import tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PROMPT = tuple(b"to be or not to be")
N = 10
MODEL = tiny_model("llama", context=64)
TARGET = LanguageModel(MODEL, "target")
V = TARGET.num_logits
OUTPUT = greedy_reference(MODEL, PROMPT, 30).tokens
TEXT = [*PROMPT, *OUTPUT]
SAMPLED = SamplingParams(1.0, seed=5, method="residual")


class Honest(Drafter):
    """Right about everything, by two tokens a round; the rest of this file makes it worse."""

    kind = "honest"

    def __init__(self, name: str = "bad", num_draft_tokens: int = 4) -> None:
        super().__init__(name, num_draft_tokens)
        self.held: set[int] = set()

    def start(self, rows: Sequence[Any]) -> None:
        self.held |= {row.id for row in rows}

    def finish(self, rows: Sequence[Any]) -> None:
        self.held -= {row.id for row in rows}

    def propose(self, rows: Sequence[Any], limits: Sequence[int]) -> Drafts:
        drafts = [
            TEXT[len(row.tokens) : len(row.tokens) + max(0, min(2, limit))]
            for row, limit in zip(rows, limits, strict=True)
        ]
        return Drafts(*pad_drafts(drafts, torch.device("cpu")))

    def would_accept(
        self, prompt: Any, trajectory: Any, p: Any = None, sampling: SamplingParams = GREEDY
    ) -> DraftReplay:
        raise NotImplementedError


def engine_with(*drafters: Drafter, **settings: Any) -> Engine:
    right = ScriptedDrafter("right", copying(TEXT), num_draft_tokens=3)
    arms: dict[str, Drafter] = {"none": NoneDrafter(), "right": right}
    arms |= {"bad" if i == 0 else f"bad {i}": drafter for i, drafter in enumerate(drafters)}
    return Engine(
        TARGET, arms, lambda tokens: bytes(t % 256 for t in tokens).decode("latin1"), **settings
    )


def ask(arm: str, sampling: SamplingParams = GREEDY, n: int = N) -> Request:
    return Request(arm, PROMPT, n, sampling, drafter=arm)


def slots_in_use() -> int:
    return TARGET.cache.num_rows


def serve(engine: Engine, *requests: Request) -> dict[str, Completion]:
    """All of them at once, one step after the other, in bounded time."""
    tickets = {engine.submit(request): request.id for request in requests}
    done: dict[str, Completion] = {}
    for _ in range(1000):
        for progress in engine.step():
            if progress.completion is not None:
                done[tickets[progress.ticket]] = progress.completion
        if len(done) == len(tickets):
            return done
    raise AssertionError(f"not done: {set(tickets.values()) - set(done)}")


def assert_clean(engine: Engine) -> None:
    """Nothing is left, and another request is served as ever."""
    assert engine.num_rows == 0 and slots_in_use() == 0
    assert serve(engine, ask("right"))["right"].token_ids == OUTPUT[:N]
    assert slots_in_use() == 0


def assert_ends_alone(
    drafter: Drafter, words: str, sampling: SamplingParams = GREEDY, **settings: Any
) -> Completion:
    """The bad row fails by name with these words; its neighbours have their right text."""
    engine = engine_with(drafter, **settings)
    plain = serve(engine, ask("none", sampling))["none"].token_ids

    done = serve(engine, ask("bad", sampling), ask("right"), ask("none", sampling))

    bad = done["bad"]
    assert bad.finish_reason == "error"
    assert bad.error is not None and bad.error.startswith("drafter 'bad': ")
    assert words in bad.error
    assert done["right"].token_ids == OUTPUT[:N] and done["right"].error is None
    assert done["none"].token_ids == plain and done["none"].error is None
    assert_clean(engine)
    return bad


# --- proposals ------------------------------------------------------------------------------------


class Proposing(Honest):
    """A drafter of a function's results, from its second round on; with `stops`, not in the last."""

    def __init__(
        self, answer: Callable[[int], Any], num_draft_tokens: int = 4, stops: bool = False
    ) -> None:
        super().__init__("bad", num_draft_tokens)
        self.answer, self.stops = answer, stops

    def propose(self, rows: Sequence[Any], limits: Sequence[int]) -> Drafts:
        early = any(len(row.tokens) < len(PROMPT) + 3 for row in rows)
        if early or (self.stops and min(limits) < 2):
            return super().propose(rows, limits)
        return self.answer(len(rows))


def ints(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def chain(tokens: Any, length: Any = 1) -> Callable[[int], Drafts]:
    return lambda r: Drafts(tokens, [length] * r)


def tree(*parents: Any, width: int | None = None) -> Callable[[int], Drafts]:
    """One row's tree; `width` tokens where there are not as many as parents."""
    k = len(parents) if width is None else width
    return lambda r: Drafts(
        ints(r, k), [k] * r, parents=torch.tensor([parents] * r).reshape(r, len(parents))
    )


def with_probs(probs: Any, k: int = 2) -> Callable[[int], Drafts]:
    return lambda r: Drafts(ints(r, k), [k] * r, probs)


def with_chances(chances: Any, k: int = 2) -> Callable[[int], Drafts]:
    return lambda r: Drafts(ints(r, k), [k] * r, chances=chances)


HUGE = 100_000

PROPOSALS: dict[str, tuple[Callable[[int], Any], str]] = {
    "nothing": (lambda r: None, "None (NoneType); `propose` must return a `Drafts`"),
    "a list": (lambda r: [[1]] * r, "`propose` must return a `Drafts`"),
    "a lookalike": (lambda r: SimpleNamespace(tokens=ints(r, 1), lengths=[1] * r), "a `Drafts`"),
    "float tokens": (chain(torch.zeros(1, 1)), "tokens must be int64, got torch.float32"),
    "bool tokens": (chain(ints(1, 1).bool()), "tokens must be int64, got torch.bool"),
    "complex tokens": (chain(ints(1, 1).cfloat()), "tokens must be int64"),
    "uint64 tokens": (
        chain(torch.tensor([[2**63]], dtype=torch.uint64)),
        "tokens must be int64, got torch.uint64",
    ),
    "3-D tokens": (chain(ints(1, 1, 1)), "must have the shape [rows, width], got [1, 1, 1]"),
    "1-D tokens": (chain(ints(1)), "must have the shape [rows, width], got [1]"),
    "0-D tokens": (chain(ints()), "must have the shape [rows, width], got []"),
    "listed tokens": (chain([[1]]), "tokens must be a torch tensor or a numpy array"),
    "numpy fractions": (chain(np.zeros((1, 1))), "tokens must be int64, got float64"),
    "unsigned tokens": (chain(np.zeros((1, 1), dtype=np.uint64)), "tokens must be int64, got uint64"),
    "one row of numpy": (chain(np.zeros(1, dtype=np.int64)), r"[rows, width], got [1]"),
    "no tokens": (chain(None), "tokens must be a torch tensor or a numpy array, got None"),
    "tokens without numbers": (chain(ints(1, 1).to("meta")), "meta"),
    "fewer rows of tokens": (chain(ints(0, 1)), "proposed for 0 rows instead of 1"),
    "more rows of tokens": (chain(ints(3, 1)), "proposed for 3 rows instead of 1"),
    "fewer lengths": (lambda r: Drafts(ints(r, 1), []), "proposed for 0 rows instead of 1"),
    "more lengths": (lambda r: Drafts(ints(r, 1), [1] * 3), "proposed for 3 rows instead of 1"),
    "no lengths": (lambda r: Drafts(ints(r, 1), None), "lengths must be 1 whole numbers, got None"),
    "one length for all": (lambda r: Drafts(ints(r, 1), 1), "lengths must be 1 whole numbers"),
    "a length without dimension": (
        lambda r: Drafts(ints(r, 1), torch.tensor(1)),
        "lengths must be 1 whole numbers",
    ),
    "a length beyond the tokens": (chain(ints(1, 1), 3), "tokens are 1 wide where a length says 3"),
    "a length beyond the limit": (chain(ints(1, 40), 40), "40 tokens where 4 were allowed"),
    "a negative length": (chain(ints(1, 1), -1), "proposed -1 tokens"),
    "a fractional length": (chain(ints(1, 2), 1.5), "a length must be a whole number, got 1.5"),
    "a float length": (chain(ints(1, 2), 1.0), "a length must be a whole number, got 1.0"),
    "a nan length": (chain(ints(1, 2), float("nan")), "a length must be a whole number, got nan"),
    "a boolean length": (chain(ints(1, 2), True), "a length must be a whole number, got True"),
    "a written length": (chain(ints(1, 2), "1"), "a length must be a whole number, got '1'"),
    "fractional lengths": (
        lambda r: Drafts(ints(r, 2), torch.full((r,), 1.5)),
        "a length must be a whole number, got 1.5",
    ),
    "a chain of 100,000": (chain(ints(1, HUGE), HUGE), "100000 tokens where 4 were allowed"),
    "parents out of order": (tree(1, -1), "out of order: token 0 follows 1"),
    "its own parent": (tree(-1, 1), "out of order: token 1 follows 1"),
    "a parent before the root": (tree(-2), "out of order: token 0 follows -2"),
    "fractional parents": (tree(-1.0, 0.5), "parents must be int64, got torch.float32"),
    "short parents": (tree(-1, width=2), "parents are 1 wide where a length says 2"),
    "no parents": (tree(width=2), "parents"),
    "parents of other rows": (
        lambda r: Drafts(ints(r, 1), [1] * r, parents=-torch.ones(r + 1, 1, dtype=torch.int64)),
        "proposed for 2 rows instead of 1",
    ),
    "listed parents": (
        lambda r: Drafts(ints(r, 1), [1] * r, parents=[[-1]]),
        "parents must be a torch tensor or a numpy array",
    ),
    "a tree with too many nodes": (tree(*[-1] * 5), "5 tokens where 4 were allowed"),
    "a tree with probabilities": (
        lambda r: Drafts(ints(r, 1), [1] * r, torch.full((r, 1, V), 1 / V), -1 + ints(r, 1)),
        "a tree with probabilities",
    ),
    "narrow probabilities": (with_probs(torch.full((1, 2, V - 1), 0.1)), f"got [1, 2, {V - 1}]"),
    "wide probabilities": (with_probs(torch.full((1, 2, V + 1), 0.1)), f"got [1, 2, {V + 1}]"),
    "2-D probabilities": (with_probs(torch.full((2, V), 1 / V)), f"got [2, {V}]"),
    "short probabilities": (with_probs(torch.full((1, 1, V), 1 / V)), f"got [1, 1, {V}]"),
    "probabilities of other rows": (with_probs(torch.full((2, 2, V), 1 / V)), "[2, 2, "),
    "whole probabilities": (with_probs(ints(1, 2, V)), "tensor of floats, got torch.int64"),
    "listed probabilities": (with_probs([[[1.0]]]), "probs must be a tensor of floats, got [[["),
    "listed chances": (with_chances([[0.5, 0.5]]), "chances must be an array of floats, got [["),
    "whole chances": (with_chances(np.ones((1, 2), int)), "array of floats, got int64"),
    "narrow chances": (with_chances(np.ones((1, 1))), "the shape [1, 2], rows and width, got [1, 1]"),
    "chances of other rows": (with_chances(np.ones((2, 2))), "got [2, 2]"),
    "1-D chances": (with_chances(np.ones(2)), "got [2]"),
    "nan chances": (with_chances(np.array([[0.5, np.nan]])), "token 1 with a chance of nan"),
    "negative chances": (with_chances(np.array([[-0.5, 0.1]])), "token 0 with a chance of -0.5"),
    "chances above 1": (with_chances(np.array([[1.5, 0.1]])), "between 0 and its parent's, 1"),
    "rising chances": (with_chances(np.array([[0.5, 0.6]])), "between 0 and its parent's, 0.5"),
    "chances that rise in a tree": (
        lambda r: Drafts(
            ints(r, 3),
            [3] * r,
            parents=torch.tensor([[-1, -1, 0]]),
            chances=np.array([[0.2, 0.9, 0.8]]),
        ),
        "token 2 with a chance of 0.8; it must be between 0 and its parent's, 0.2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PROPOSALS)
def test_a_proposal_that_breaks_the_contract_ends_its_row(case: str) -> None:
    answer, words = PROPOSALS[case]
    drafter = Proposing(answer)

    bad = assert_ends_alone(drafter, words)

    assert bad.token_ids == OUTPUT[: len(bad.token_ids)] and len(bad.token_ids) >= 3
    assert drafter.held == set()


def test_no_draft_is_larger_than_the_bound_whatever_a_drafter_says_of_itself() -> None:
    answer = tree(*[-1] * (MAX_NODES + 1))

    assert_ends_alone(
        Proposing(answer, num_draft_tokens=HUGE), f"1025 tokens where {MAX_NODES} were allowed"
    )


def test_a_tree_as_large_as_the_bound_is_judged() -> None:
    drafter = Proposing(tree(*[-1] * MAX_NODES), num_draft_tokens=HUGE, stops=True)

    [completion] = serve(engine_with(drafter), ask("bad")).values()

    assert completion.error is None and completion.token_ids == OUTPUT[:N]
    assert max(r.drafted for r in completion.rounds) == MAX_NODES


def of_mass(*values: float) -> torch.Tensor:
    """[1, 2, V] distributions whose second one holds these values first."""
    probs = torch.full((1, 2, V), 1 / V)
    probs[0, 1] = 0.0
    probs[0, 1, : len(values)] = torch.tensor(values)
    return probs


@pytest.mark.parametrize("method", ["residual", "block"])
@pytest.mark.parametrize(
    ("probs", "words"),
    [
        (of_mass(), "token 1 with probabilities that sum to 0 instead of 1"),
        (of_mass(0.5), "sum to 0.5 instead of 1"),
        (of_mass(0.75, 0.75), "sum to 1.5 instead of 1"),
        (of_mass(1.5, -0.5), "token 1 with probabilities that are negative or not finite"),
        (of_mass(float("nan"), 1.0), "negative or not finite"),
        (of_mass(float("inf")), "negative or not finite"),
        (of_mass(float("inf"), float("-inf")), "negative or not finite"),
    ],
)
def test_a_distribution_that_is_none_ends_its_sampled_row(
    probs: torch.Tensor, words: str, method: Any
) -> None:
    sampling = SamplingParams(1.0, seed=5, method=method)
    assert_ends_alone(Proposing(lambda r: Drafts(ints(r, 2), [2] * r, probs)), words, sampling)


WELCOME: dict[str, Callable[[Drafts], Drafts]] = {
    "int32": lambda d: Drafts(d.tokens.int(), d.lengths),
    "int16": lambda d: Drafts(d.tokens.short(), d.lengths),
    "uint8": lambda d: Drafts(d.tokens.clamp(min=0).to(torch.uint8), d.lengths),
    "lengths as a tensor": lambda d: Drafts(d.tokens, torch.tensor(d.lengths)),
    "lengths as an array": lambda d: Drafts(d.tokens, np.array(d.lengths)),
    "lengths as numbers of numpy": lambda d: Drafts(d.tokens, [np.int32(n) for n in d.lengths]),
    "lengths as a tuple": lambda d: Drafts(d.tokens, tuple(d.lengths)),
    "a wide buffer": lambda d: Drafts(
        torch.cat([d.tokens, torch.full((len(d.lengths), 9), -1)], dim=1), d.lengths
    ),
    "not contiguous": lambda d: Drafts(d.tokens.repeat_interleave(2, dim=1)[:, ::2], d.lengths),
    "nothing at all": lambda d: Drafts(d.tokens[:, :0], [0] * len(d.lengths)),
    "chances": lambda d: Drafts(
        d.tokens, d.lengths, chances=np.full((len(d.lengths), 9), 0.5, dtype=np.float32)
    ),
    "no chance": lambda d: Drafts(
        d.tokens, d.lengths, chances=np.zeros((len(d.lengths), d.tokens.shape[1]))
    ),
}


@pytest.mark.parametrize("case", WELCOME)
def test_what_says_the_same_in_another_way_is_welcome(case: str) -> None:
    class Other(Honest):
        def propose(self, rows: Sequence[Any], limits: Sequence[int]) -> Drafts:
            return WELCOME[case](super().propose(rows, limits))

    engine = engine_with(Other())

    done = serve(engine, ask("bad"), ask("right"))

    assert done["bad"].error is None and done["bad"].token_ids == OUTPUT[:N]
    accepted = sum(r.accepted for r in done["bad"].rounds)
    assert (accepted > 0) == (case != "nothing at all")
    assert_clean(engine)


def sevens(num_rows: int, probs: torch.Tensor) -> Drafts:
    return Drafts(ints(num_rows, 2) + 7, [2] * num_rows, probs)


@pytest.mark.parametrize("kind", ["float64", "float16", "bfloat16", "grad", "inference", "wide"])
def test_distributions_of_any_float_give_the_same_text(kind: str) -> None:
    flat = torch.full((1, 2, V), 1 / 256)  # a number that every float type holds
    flat[..., 256:] = 0.0
    with torch.inference_mode(kind == "inference"):
        other = flat.clone()
    if kind == "grad":
        other.requires_grad_()
    elif kind == "wide":
        other = torch.cat([other, torch.full((1, 3, V), float("nan"))], dim=1)
    elif kind != "inference":
        other = other.to(getattr(torch, kind))

    texts = [
        serve(
            engine_with(Proposing(partial(sevens, probs=q), stops=True)),
            ask("bad", SAMPLED, 7),
        )["bad"]
        for q in (flat, other)
    ]

    assert texts[0].error is texts[1].error is None
    assert texts[0].token_ids == texts[1].token_ids


class Certain(Honest):
    """Certain of one token, another one for each row; may write every answer into the same arrays."""

    def __init__(self, reuses: bool) -> None:
        super().__init__("bad", 1)
        self.reuses = reuses
        self.buffer = torch.zeros(4, 1, V)

    def propose(self, rows: Sequence[Any], limits: Sequence[int]) -> Drafts:
        if any(row.num_prompt > len(PROMPT) for row in rows):
            raise ValueError("of one row only")
        probs = (self.buffer if self.reuses else self.buffer.clone())[: len(rows)].zero_()
        tokens = torch.tensor([[65 + row.sampling.seed] for row in rows])
        probs.scatter_(2, tokens[..., None], 1.0)
        return Drafts(tokens, [min(1, limit) for limit in limits], probs)


def test_a_drafter_that_reuses_its_arrays_is_judged_by_what_it_said_of_each_row() -> None:
    texts = []
    for reuses in (False, True):
        requests = [
            Request(
                str(i), PROMPT, N, SamplingParams(1.0, seed=i, method="residual"), drafter="bad"
            )
            for i in range(3)
        ]
        spoiler = Request("spoiler", (*PROMPT, 1), N, drafter="bad")
        done = serve(engine_with(Certain(reuses)), *requests, spoiler)
        assert done.pop("spoiler").error == "drafter 'bad': of one row only"
        texts.append({id: completion.token_ids for id, completion in done.items()})

    assert texts[0] == texts[1]


# --- what it raises -------------------------------------------------------------------------------


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


class DeadlyError(Exception):
    def __str__(self) -> str:
        raise SystemExit(2)


class OfItsOwn(BaseException):
    pass


ERRORS: list[tuple[BaseException, str]] = [
    (ValueError("by hand"), "by hand"),
    (KeyError("slot"), "KeyError: 'slot'"),
    (AssertionError(), "AssertionError"),
    (StopIteration(), "StopIteration"),
    (MemoryError(), "MemoryError"),
    (SystemExit(3), "SystemExit: 3"),
    (SystemExit(), "SystemExit"),
    (OfItsOwn("deep"), "OfItsOwn: deep"),
    (asyncio.CancelledError(), "CancelledError"),
    (UnprintableError(), "UnprintableError"),
    (DeadlyError(), "DeadlyError"),
]


def failing(method: str, error: BaseException) -> Honest:
    """An honest drafter one of whose methods raises, `finish` after it has done its work."""
    drafter = Honest()
    good = getattr(drafter, method)

    def fail(*given: Any) -> Any:
        if method == "finish":
            good(*given)
        raise error

    setattr(drafter, method, fail)
    return drafter


@pytest.mark.parametrize(("error", "words"), ERRORS, ids=[type(e).__name__ for e, _ in ERRORS])
@pytest.mark.parametrize("method", ["start", "prepare", "propose", "finish"])
def test_whatever_is_raised_ends_the_row(method: str, error: BaseException, words: str) -> None:
    drafter = failing(method, error)

    bad = assert_ends_alone(drafter, words)

    assert bad.token_ids == OUTPUT[: len(bad.token_ids)]
    assert drafter.held == set(), "finish is called whatever came before"


@pytest.mark.parametrize("method", ["start", "prepare", "propose", "finish"])
def test_the_users_own_interrupt_stops_everything(method: str) -> None:
    engine = engine_with(failing(method, KeyboardInterrupt()))
    for arm in ("bad", "right"):
        engine.submit(ask(arm))

    with pytest.raises(KeyboardInterrupt):
        for _ in range(100):
            engine.step()

    engine.drafters["bad"] = Honest()
    engine.step()
    assert_clean(engine)


def test_the_first_error_of_a_row_is_reported() -> None:
    drafter = failing("propose", ValueError("the cause"))
    drafter.finish = failing("finish", ValueError("what followed")).finish

    assert_ends_alone(drafter, "the cause")


# --- its prefill ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "prepare returned None (NoneType); it must return True"),
        (1, "prepare returned 1 (int)"),
        ("yes", "prepare returned 'yes'"),
        (torch.tensor(True), "prepare returned tensor(True)"),
        (False, "and is not done; it must return True when nothing is left"),
        (np.False_, "and is not done"),
    ],
)
def test_a_prefill_that_never_ends_is_ended(answer: Any, words: str) -> None:
    drafter = Honest()
    drafter.prepare = lambda row, max_tokens: answer

    assert_ends_alone(drafter, words)
    assert drafter.held == set()


def test_a_prefill_may_take_as_many_pieces_as_the_prompt_has_and_more() -> None:
    drafter, left = Honest(), iter([np.False_] * 100 + [np.True_])
    drafter.prepare = lambda row, max_tokens: next(left)

    done = serve(engine_with(drafter, prefill_chunk=4), ask("bad"))

    assert done["bad"].token_ids == OUTPUT[:N]


# --- what it says of itself -----------------------------------------------------------------------


def raising(*given: Any) -> Any:
    raise RuntimeError("not this one")


def with_attribute(name: str, value: Any) -> Drafter:
    """An honest drafter whose class has the attribute; setting it is ignored."""
    held = property(value, lambda self, given: None) if name in _PROPERTIES else value
    kind: Any = type("Odd", (Honest,), {name: held})
    drafter: Drafter = kind()
    return drafter


_PROPERTIES = ("num_draft_tokens", "name", "note", "kind")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (raising, "not this one"),
        (lambda self: None, "num_draft_tokens must be a whole number, got None"),
        (lambda self: "8", "num_draft_tokens must be a whole number, got '8'"),
        (lambda self: 2.5, "num_draft_tokens must be a whole number, got 2.5"),
        (lambda self: float("nan"), "num_draft_tokens must be a whole number, got nan"),
        (lambda self: True, "num_draft_tokens must be a whole number, got True"),
        (lambda self: -3, "num_draft_tokens is -3; it must be 0 or more"),
        (lambda self: object(), "num_draft_tokens must be a whole number"),
    ],
)
def test_a_number_of_draft_tokens_that_is_none_ends_the_row(value: Any, words: str) -> None:
    assert_ends_alone(with_attribute("num_draft_tokens", value), words)


def test_a_number_of_draft_tokens_of_numpy_is_one() -> None:
    drafter = with_attribute("num_draft_tokens", lambda self: np.int64(4))

    done = serve(engine_with(drafter), ask("bad"), ask("right"))

    assert done["bad"].token_ids == OUTPUT[:N] and len(done["bad"].rounds) < N - 1


@pytest.mark.parametrize(
    ("method", "value", "words"),
    [
        ("state_bytes", raising, "not this one"),
        ("state_bytes", lambda self, lengths: None, "state_bytes gave None"),
        ("state_bytes", lambda self, lengths: "12", "state_bytes gave '12'"),
        ("state_bytes", lambda self, lengths: float("nan"), "state_bytes gave nan"),
        ("state_bytes", lambda self, lengths: float("inf"), "state_bytes gave inf"),
        ("state_bytes", lambda self, lengths: -1, "state_bytes gave -1"),
        ("holders", raising, "not this one"),
        ("holders", lambda self: None, "NoneType"),
        ("holders", lambda self: [object()], "state_bytes"),
    ],
)
def test_a_size_that_is_none_ends_the_row(method: str, value: Any, words: str) -> None:
    assert_ends_alone(with_attribute(method, value), words, max_drafter_mb=1.0)


def test_a_size_that_fails_later_is_no_fault_of_the_row_that_asks() -> None:
    drafter = Honest()
    drafter.prepare = lambda row, max_tokens: False
    engine = engine_with(drafter, max_drafter_mb=1.0)
    engine.submit(ask("bad"))
    for _ in range(2):
        assert not any(progress.completion for progress in engine.step())
    drafter.state_bytes = raising
    engine.submit(ask("right"))

    done = [p.completion for _ in range(50) for p in engine.step() if p.completion is not None]

    assert {c.request_id: c.error for c in done} == {
        "bad": "drafter 'bad': not this one",
        "right": None,
    }


@pytest.mark.parametrize(
    "method",
    ["__hash__", "__eq__", "__str__", "__repr__", "__bool__", "__len__", "name", "note", "kind"],
)
def test_what_is_never_asked_can_fail(method: str) -> None:
    engine = engine_with(with_attribute(method, raising), max_drafter_mb=1.0)

    done = serve(
        engine, *[Request(str(i), PROMPT, N, drafter="bad") for i in range(2)], ask("right")
    )

    assert all(c.error is None and c.token_ids == OUTPUT[:N] for c in done.values())
    assert_clean(engine)


def test_two_drafters_that_call_themselves_equal_are_two() -> None:
    class Equal(Honest):
        def __eq__(self, other: object) -> bool:
            return True

        def __hash__(self) -> int:
            return 0

    class Worse(Equal):
        def propose(self, rows: Sequence[Any], limits: Sequence[int]) -> Drafts:
            raise ValueError("by hand")

    engine = engine_with(Equal(), Worse())

    done = serve(engine, ask("bad"), ask("bad 1"))

    assert done["bad"].error is None and done["bad"].token_ids == OUTPUT[:N]
    assert done["bad 1"].error == "drafter 'bad 1': by hand"
    assert_clean(engine)


# --- what is not its own --------------------------------------------------------------------------


def append(tokens: list[int]) -> None:
    tokens.append(1)


def overwrite(tokens: list[int]) -> None:
    tokens[-1] += 1


@pytest.mark.parametrize("change", [append, overwrite, list.pop, list.clear])
@pytest.mark.parametrize("method", ["start", "prepare", "propose"])
def test_a_drafter_that_writes_into_its_row_ends_it(method: str, change: Any) -> None:
    drafter = Honest()
    good = getattr(drafter, method)

    def meddle(rows: Any, *rest: Any) -> Any:
        for row in [rows] if method == "prepare" else rows:
            change(row.tokens)
        return good(rows, *rest)

    setattr(drafter, method, meddle)

    bad = assert_ends_alone(drafter, "changed row.tokens")

    assert bad.token_ids == OUTPUT[: len(bad.token_ids)]


@pytest.mark.parametrize("method", ["start", "prepare", "propose"])
def test_a_drafter_that_moves_the_cached_positions_ends_its_row(method: str) -> None:
    drafter = Honest()
    good = getattr(drafter, method)

    def meddle(rows: Any, *rest: Any) -> Any:
        for row in [rows] if method == "prepare" else rows:
            row.num_cached -= 1
        return good(rows, *rest)

    setattr(drafter, method, meddle)

    bad = assert_ends_alone(drafter, "changed row.tokens or row.num_cached")

    assert bad.token_ids == OUTPUT[: len(bad.token_ids)]


def test_a_drafter_that_clears_its_row_at_the_end_takes_no_text_with_it() -> None:
    drafter = Honest()
    drafter.finish = lambda rows: [row.tokens.clear() for row in rows]

    assert serve(engine_with(drafter), ask("bad"))["bad"].token_ids == OUTPUT[:N]


@pytest.mark.parametrize("change", [list.clear, list.reverse, lambda given: given.sort(key=id)])
def test_what_a_drafter_does_to_its_arguments_is_its_own_affair(change: Any) -> None:
    class Careless(Honest):
        def propose(self, rows: Any, limits: Any) -> Drafts:
            drafts = super().propose(rows, limits)
            change(rows)
            change(limits)
            return drafts

    engine = engine_with(Careless())
    requests = [Request(str(i), PROMPT, N, drafter="bad") for i in range(3)]

    done = serve(engine, *requests, ask("right"))

    for request in requests:
        assert done[request.id].token_ids == OUTPUT[:N]
        assert sum(r.accepted for r in done[request.id].rounds) == 6
    assert_clean(engine)


def test_a_drafter_cannot_raise_its_limits() -> None:
    class Greedy(Honest):
        def propose(self, rows: Any, limits: Any) -> Drafts:
            limits[:] = [4] * len(rows)
            return Drafts(ints(len(rows), 4), list(limits))

    bad = assert_ends_alone(Greedy(), "proposed 4 tokens where 3 were allowed")

    assert len(bad.token_ids) == N - 4


# --- as a part, and along a text ------------------------------------------------------------------


def test_a_bad_part_is_named_with_its_union() -> None:
    part = Proposing(chain(torch.zeros(1, 1)))
    union = Union("bad", {"part": part, "right": ScriptedDrafter("right", copying(TEXT), 2)})

    assert_ends_alone(union, "part 'part': tokens must be int64, got torch.float32")


def with_replay(drafter: Drafter) -> Drafter:
    drafter.would_accept = lambda prompt, trajectory, p=None, sampling=GREEDY: (
        ScriptedDrafter.would_accept(
            drafter,
            prompt,
            trajectory,
            p,
            sampling,
        )
    )
    return drafter


def never_ready() -> Drafter:
    drafter = Honest()
    drafter.prepare = lambda row, max_tokens: False
    return drafter


@pytest.mark.parametrize(
    ("drafter", "words"),
    [
        (never_ready(), "and is not done"),
        (Proposing(chain(torch.zeros(1, 1))), "tokens must be int64"),
        (Proposing(tree(1, -1)), "out of order"),
        (Proposing(chain(ints(1, HUGE), HUGE)), "100000 tokens where 4 were allowed"),
        (with_attribute("num_draft_tokens", lambda self: None), "must be a whole number"),
    ],
)
def test_replay_keeps_a_drafter_to_the_same_contract(drafter: Drafter, words: str) -> None:
    with pytest.raises(DrafterError, match=words):
        replay(with_replay(drafter), PROMPT, OUTPUT, 30)


class Foreseeing(DraftReplay):
    def __init__(self, drafted: Any, accepted: Any) -> None:
        self.answer = drafted, accepted

    def round_at(self, position: int, limit: int) -> tuple[int, int]:
        return self.answer


@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize(
    ("drafted", "accepted", "words"),
    [
        (4, -1, "foresees -1 accepted of 4 drafted tokens"),  # a walk that never ends
        (1, 2, "foresees 2 accepted of 1 drafted tokens"),
        (2, 1.5, "accepted must be a whole number, got 1.5"),
        (None, 0, "drafted must be a whole number, got None"),
    ],
)
def test_what_a_drafter_foresees_must_be_possible(
    drafted: Any, accepted: Any, words: str, everywhere: bool
) -> None:
    drafter = Honest()
    drafter.replays_everywhere = everywhere
    drafter.would_accept = lambda *given: Foreseeing(drafted, accepted)

    with pytest.raises(DrafterError, match=words):
        replay(drafter, PROMPT, OUTPUT, 30)
