"""The records the rooms hand each other.

Knows no model, tokenizer, file or policy; torch appears in type hints only.

Words: a *row* is one request in flight; a *round* is one draft, verify, commit cycle; a *draft* is
the tree of tokens proposed for a row, often a chain; *accepted* counts the draft tokens kept; *tau*
(block efficiency) is the mean number of tokens emitted per target forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Progress = Callable[[str, int, int], None]
"""Called with a stage's name and how much of it is done: (stage, done, total)."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Report nothing."""


FinishReason = Literal["stop", "length", "cancelled", "error"]
SamplingMethod = Literal["greedy", "residual", "block", "invariant"]
PenaltyScope = Literal["all", "output"]  # all: prompt and output
NONE: Final = "none"
AUTO: Final = "auto"
AT: Final = "@"  # between drafter and draft length in an arm's name
DEFAULT_NEW_TOKENS: Final = 256  # max_new_tokens where neither the call nor the model sets it


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn from the target's logits. Temperature 0 is greedy.

    `method` is how a stochastic draft is judged: `residual` accepts each token with min(1, p/q),
    `block` accepts the tokens of a chain jointly, which keeps no fewer on average, `invariant` draws
    target and drafter with the same noise, so that a seed gives one text whatever the arm.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    method: SamplingMethod = "greedy"


GREEDY: Final = SamplingParams()


def sampling_label(sampling: SamplingParams) -> str:
    """What a sampling adds to a prompt's id: nothing for greedy, `@t0.8,p0.95` and the like. The seed
    has no part in it: a prompt's seed follows from its id.
    """
    if sampling.temperature == 0.0:
        return ""
    parts = [f"t{sampling.temperature:g}"]
    parts += [f"k{sampling.top_k}"] if sampling.top_k else []
    parts += [f"p{sampling.top_p:g}"] if sampling.top_p < 1.0 else []
    parts += [f"m{sampling.min_p:g}"] if sampling.min_p else []
    return "@" + ",".join(parts)


LogitsProcessor = Callable[["Tensor", "Tensor"], "Tensor"]


@dataclass(frozen=True, slots=True)
class LogitRules:
    """Changes to the target's logits that depend on the text so far; a default changes nothing.

    They are applied before temperature and filters, at every place of a draft with the text that
    leads there, so they are as exact under speculation as without it. A penalty's scope says which
    text it counts. `forced_tokens` are the answer's first tokens. `processors` follow transformers'
    protocol (input_ids [1, n], scores [1, V]) -> scores and must depend on their arguments alone.
    """

    logit_bias: Mapping[int, float] = field(default_factory=dict)
    repetition_penalty: float = 1.0
    repetition_scope: PenaltyScope = "all"
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    presence_scope: PenaltyScope = "output"  # of presence and frequency
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    suppress_tokens: frozenset[int] = frozenset()
    forced_tokens: tuple[int, ...] = ()
    processors: tuple[LogitsProcessor, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to complete.

    At most `max_new_tokens` tokens are emitted, exactly that many unless a stop comes first or the
    target's context is full: the last emitted token is never fed, so a context of C positions
    gives at most C + 1 - len(prompt_tokens) of them. Every rule holds for each emitted token alone,
    so a stop or the limit inside an accepted run cuts the run there. `logprobs` asks for each emitted
    token's log-probability under the target's own logits, before rules and temperature.
    """

    id: str
    prompt_tokens: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams = GREEDY
    stop_token_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    drafter: str = AUTO
    rules: LogitRules | None = None
    logprobs: bool = False
    # mark of the engine that has checked it; a copy by `dataclasses.replace` has none
    checked_by: object | None = field(default=None, init=False, compare=False, repr=False)


class RowView(Protocol):
    """What a drafter may see of a row: its tokens so far, and how they are sampled."""

    @property
    def id(self) -> int: ...
    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def num_prompt(self) -> int:
        """How many of the tokens are the prompt's."""

    @property
    def sampling(self) -> SamplingParams: ...
    @property
    def slot(self) -> int:
        """Its place in the target's cache, where all tokens but the last are between rounds."""

    @property
    def hidden(self) -> Tensor | None:
        """[D] the target's final hidden state before the last token, for drafters that need it."""


@dataclass(slots=True)
class Drafts:
    """The proposals of one drafter for R rows, as arrays.

    `probs` is the warped distribution each token was drawn from; None means that the tokens are a
    deterministic function of the text, or were drawn with the noise the judge uses too. `parents`
    makes a row's draft a tree: the index of the token that each one follows, -1 for the row's last
    token, always before its own; None means that all are chains. A tree has no `probs`: it is judged
    node by node from the target's distribution. Entries at or past a row's length are padding.
    """

    tokens: Tensor  # [R, K] int64
    lengths: Sequence[int]  # R
    probs: Tensor | None = None  # [R, K, V]
    parents: Tensor | None = None  # [R, K] int64


@dataclass(slots=True)
class Verdicts:
    """What the target says of R drafts that were drawn at random."""

    num_accepted: Tensor  # [R] int64, draft tokens kept
    next_weights: Tensor  # [R, V] weights, not normalised, of the recovered or the bonus token


@dataclass(frozen=True, slots=True)
class RoundStats:
    """One round of one row. `accepted` counts draft tokens that were emitted."""

    drafted: int
    accepted: int


@dataclass(frozen=True, slots=True)
class DraftOutcome:
    """What the text has come to say of one draft, of the arm in use or of one made beside it.

    Of at most `allowed` tokens it had `drafted`. Depths up to `known` were told of before; since then
    those up to `accepted` turned out to be on the text, and with `ended` the next one not to be, or
    not to be drafted. Without, no more of the text is known yet, or no more was allowed.
    """

    drafter: str
    drafted: int
    allowed: int
    accepted: int
    ended: bool
    known: int = 0

    @classmethod
    def of(
        cls, drafter: str, drafted: int, allowed: int, right: int, visible: int, known: int = 0
    ) -> DraftOutcome:
        """right: depths on the text so far, of which `visible` tokens have been written since."""
        ended = right < min(drafted, visible) or right == drafted < allowed
        return cls(drafter, drafted, allowed, right, ended, known)

    @property
    def is_final(self) -> bool:
        """Whether more text would say no more."""
        return self.ended or self.accepted == self.drafted


@dataclass(frozen=True, slots=True)
class RoundReport:
    """One round of a controlled row, as it stands after the commit.

    context: tokens in the target's cache before it. room: tokens that may still be emitted. The
    seconds are this row's: of starting its drafter since the last round, of drafts beside, of drafting,
    of the rest.
    """

    arm: str
    stats: RoundStats
    emitted: int
    context: int
    rows: int
    room: int
    outcomes: Sequence[DraftOutcome]
    start_seconds: float
    draft_seconds: float
    other_seconds: float
    shadow_seconds: float = 0.0


@dataclass(slots=True)
class Seconds:
    """Wall-clock seconds of a request by part; shared work of a batch is divided among its rows.

    `queue` is the time before admission, which is not part of the total.
    """

    queue: float = 0.0
    prefill: float = 0.0
    choose: float = 0.0
    draft: float = 0.0
    verify: float = 0.0
    commit: float = 0.0

    @property
    def total(self) -> float:
        return self.prefill + self.choose + self.draft + self.verify + self.commit


@dataclass(frozen=True, slots=True)
class Context:
    """What a policy may look at when it chooses: the prefill's by-products and the load."""

    prompt_tokens: Sequence[int]
    mean_hidden: np.ndarray  # [D] float32, target's final hidden states averaged over the prompt
    last_hidden: np.ndarray  # [D] float32, at the prompt's last token
    sampling: SamplingParams
    rows_in_flight: int
    request_id: str = ""  # for whoever records; never a feature
    text: Callable[[], str] | None = None  # the prompt's text, decoded when asked for
    max_new_tokens: int | None = None  # the most the answer may have, where known


def split_arm(arm: str) -> tuple[str, int | None]:
    """(drafter, draft length) of an arm: `math@3` drafts up to 3 tokens, `math` as many as the drafter
    is configured to. Raises ValueError if what follows the @ is no length.
    """
    drafter, at, length = arm.partition(AT)
    if not at:
        return arm, None
    if not length.isdecimal() or int(length) < 1:
        raise ValueError(f"'{arm}': a draft length is a whole number of tokens, at least 1")
    return drafter, int(length)


def join_arm(drafter: str, num_draft_tokens: int) -> str:
    """The arm of a drafter at a length."""
    return f"{drafter}{AT}{num_draft_tokens}"


@dataclass(frozen=True, slots=True)
class Decision:
    """Which arm a request got, and with what probability it was chosen."""

    arm: str  # a drafter, or a drafter at a draft length; see `split_arm`
    propensity: float = 1.0
    scores: dict[str, float] = field(default_factory=dict)
    policy: str = "fixed"
    features: np.ndarray | None = field(default=None, compare=False, repr=False)  # [F] it saw
    seconds_per_token: dict[str, float] = field(default_factory=dict)  # predicted, where it is
    seconds_in_rounds: dict[str, float] = field(default_factory=dict)  # without prefill and start

    @property
    def drafter(self) -> str:
        return split_arm(self.arm)[0]

    @property
    def num_draft_tokens(self) -> int | None:
        """The most tokens of a draft; None leaves it to the drafter."""
        return split_arm(self.arm)[1]


@dataclass(slots=True)
class Completion:
    """The answer to a request, with what it cost.

    `text` ends before a stop string; `token_ids` includes the token that completed the stop.
    `seconds_total` runs from admission to the last token by the clock; `seconds` splits it by part.
    """

    request_id: str
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    drafter: str
    decision: Decision
    rounds: list[RoundStats]
    seconds: Seconds
    seconds_total: float
    num_prompt_tokens: int
    seed: int
    error: str | None = None  # why finish_reason is "error"
    logprobs: list[float] | None = None  # of the emitted tokens under the target, where asked for
    # (tokens emitted before, arm) of every change of arm after the decision
    switches: list[tuple[int, str]] = field(default_factory=list)

    @property
    def block_efficiency(self) -> float:
        """tau: emitted tokens per target forward, the prefill's first token not counted."""
        return (len(self.token_ids) - 1) / len(self.rounds) if self.rounds else 1.0

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.seconds_total if self.seconds_total > 0 else 0.0


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """A prompt with its name; `domain` labels tables and is never a feature."""

    id: str
    domain: str
    prompt: str


@dataclass(frozen=True, slots=True)
class ReplayedDrafter:
    """One drafter along one trajectory: drafted and accepted, at its full draft length.

    `everywhere`: of the round that would start at each position 1 to T - 1 (tokens emitted so far);
    otherwise of the rounds that the drafter had from the first position on, one after the other.
    """

    table: np.ndarray  # [T - 1, 2] or [rounds, 2] int
    everywhere: bool


@dataclass(frozen=True, slots=True)
class CollectedPrompt:
    """What a collection knows of one prompt under one sampling: the target's output and every
    drafter's replay of it.
    """

    id: str  # the prompt's own id, and the sampling's label where it is not greedy
    domain: str
    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]  # T, the trajectory
    max_new_tokens: int
    features: np.ndarray  # [F] float32
    replays: dict[str, ReplayedDrafter]
    draft_outputs: dict[str, tuple[int, ...]]  # drafter -> its own greedy output, where collected
    # drafter -> (match, confidence) by position, of chains; see drafting's PositionScores
    scores: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    sampling: SamplingParams = GREEDY
    spans: Mapping[str, slice] = field(default_factory=dict)  # encoder -> its part of the features

    @property
    def prompt_id(self) -> str:
        """The prompt's own id, which all its samplings share: what splits must go by."""
        return self.id.removesuffix(sampling_label(self.sampling))


def identity_of_arms(arms: Mapping[str, Mapping[str, object]]) -> dict[str, str]:
    """One comparable line for each arm from what its drafter says of itself."""
    return {
        name: ", ".join(f"{key}={value}" for key, value in sorted(facts.items()))
        for name, facts in arms.items()
    }
