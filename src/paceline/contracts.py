"""The records that rooms give each other. Knows no model, tokenizer, file or policy.

Words: a *row* is one request in flight; a *round* is one draft, verify, commit cycle; a *draft* is the
tree of tokens proposed for a row, often a chain; *accepted* counts the draft tokens that are emitted;
an *arm* is a drafter, perhaps at a draft length; *tau* (block efficiency) is the mean number of tokens
emitted per target forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# --- requests -------------------------------------------------------------------------------------

SamplingMethod = Literal["greedy", "residual", "block", "invariant"]
PenaltyScope = Literal["all", "output"]  # all: prompt and output
NONE: Final = "none"
AUTO: Final = "auto"
TEXT_ONLY: Final = "written elsewhere"  # identity line of a drafter known by its texts alone
AT: Final = "@"  # between drafter and draft length in an arm's name
DEFAULT_NEW_TOKENS: Final = 256  # max_new_tokens if neither the call nor the model sets it


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The sampling of the next token from the target's logits. Temperature 0 is greedy.

    method: the verification of a stochastic draft. `residual` accepts each token with min(1, p/q);
    `block` accepts the tokens of a chain jointly, on average at least as many; `invariant` draws for
    target and drafter with the same noise, so that a seed gives the same text with every arm.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    method: SamplingMethod = "greedy"


GREEDY: Final = SamplingParams()


LogitsProcessor = Callable[["Tensor", "Tensor"], "Tensor"]


@dataclass(frozen=True, slots=True)
class LogitRules:
    """Changes to the target's logits that depend on the text so far; a default changes nothing.

    They are applied before temperature and filters, at every place of a draft with the text before it,
    so they are exact with every drafter. A scope names the text that a penalty counts. forced_tokens:
    the answer's first tokens. processors: functions (input_ids [1, n], scores [1, V]) -> scores, as in
    transformers, that depend on their arguments only.
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

    Exactly `max_new_tokens` tokens are emitted, or fewer if a stop comes first or the target's context
    is full: the last emitted token is not an input, so a context of C positions gives at most
    C + 1 - len(prompt_tokens) tokens. A stop or the limit inside an accepted draft ends the text there.
    logprobs: return log p of each emitted token by the target's own logits, before rules and
    temperature. features: [bins, frames] of audio, if the target's encoder reads those.
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
    features: Tensor | None = field(default=None, compare=False, repr=False)
    # the engine that has checked it; a copy by `dataclasses.replace` has none
    checked_by: object | None = field(default=None, init=False, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Context:
    """The input of a policy's choice: results of the prefill and the load."""

    prompt_tokens: Sequence[int]
    mean_hidden: np.ndarray  # [D] float32, target's final hidden states averaged over the prompt
    last_hidden: np.ndarray  # [D] float32, at the prompt's last token
    sampling: SamplingParams
    rows_in_flight: int
    request_id: str = ""  # for logs; never a feature
    text: Callable[[], str] | None = None  # the prompt's text, decoded when called
    max_new_tokens: int | None = None  # of the answer, if known
    # drafter, or none -> number of other rows; rows without a choice yet are not counted
    drafters_in_flight: Mapping[str, int] = field(default_factory=dict)


@lru_cache(maxsize=1024)
def split_arm(arm: str) -> tuple[str, int | None]:
    """Return an arm's drafter and draft length: `math@3` drafts up to 3 tokens; `math` has None, the
    drafter's own length. Raises ValueError for a wrong length.
    """
    drafter, at, length = arm.partition(AT)
    if not at:
        return arm, None
    if not length.isdecimal() or int(length) < 1:
        raise ValueError(f"'{arm}': a draft length must be a whole number of tokens, at least 1")
    return drafter, int(length)


def join_arm(drafter: str, num_draft_tokens: int) -> str:
    """Return the arm of a drafter at a draft length."""
    return f"{drafter}{AT}{num_draft_tokens}"


def identity_of_arms(arms: Mapping[str, Mapping[str, object]]) -> dict[str, str]:
    """Return one comparable line per arm. arms: arm -> its drafter's `identity()`."""
    return {
        name: ", ".join(f"{key}={value}" for key, value in sorted(facts.items()))
        for name, facts in arms.items()
    }


# --- rounds ---------------------------------------------------------------------------------------


class RowView(Protocol):
    """What a drafter may see of a row.

    tokens: prompt and output, whoever reads the prompt; `num_prompt` of them are the prompt's. slot: in
    the target's cache. num_cached: its positions that hold the row, all of the target's text but its
    last token; 0 without a slot. features: as in `Request`.
    """

    @property
    def id(self) -> int: ...
    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def num_prompt(self) -> int: ...
    @property
    def features(self) -> Tensor | None: ...
    @property
    def sampling(self) -> SamplingParams: ...
    @property
    def slot(self) -> int: ...
    @property
    def num_cached(self) -> int: ...


@dataclass(slots=True)
class Drafts:
    """The proposals of one drafter for R rows, as arrays.

    probs: the warped distribution that each token was drawn from; None if the tokens are a
    deterministic function of the text, or were drawn with the verifier's noise. parents: the index of
    each token's parent in a tree, below its own, -1 for the row's last token; None if all drafts are
    chains. A tree has no `probs`: the verifier samples from the target's distribution at each node.
    evidence: of a lookup, the class of the statistics behind each token, which tells how likely it is
    accepted if its parent is. chances: the probability that each token is accepted with its parents, by
    which rows share a budget, except for tokens drawn from `probs`. proposed: of a cascade, the tokens
    that a model drafted for each row, which decide the price. Entries after a row's length are padding.
    """

    tokens: Tensor | np.ndarray  # [R, K] int64
    lengths: Sequence[int]  # R
    probs: Tensor | None = None  # [R, K, V]
    parents: Tensor | np.ndarray | None = None  # [R, K] int64
    evidence: np.ndarray | None = None  # [R, K] int64
    chances: np.ndarray | None = None  # [R, K] float64
    proposed: Sequence[int] | None = None  # R


@dataclass(frozen=True, slots=True)
class RoundStats:
    """One round of one row. `accepted` counts draft tokens that were emitted."""

    drafted: int
    accepted: int


class DraftOutcome(NamedTuple):
    """The agreement of a draft, of the arm in use or a shadow draft, with the text so far.

    drafted: tokens of the draft, at most `allowed`. accepted: leading tokens that equal the text.
    ended: the token after them differs from the text, or the draft stopped below `allowed`; otherwise
    the text is too short to tell, or no more tokens were allowed. known: accepted earlier.
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
        """Return an outcome. right: leading tokens that equal the `visible` ones written since."""
        ended = right < min(drafted, visible) or right == drafted < allowed
        return cls(drafter, drafted, allowed, right, ended, known)

    @property
    def is_final(self) -> bool:
        """Whether later text cannot change the outcome."""
        return self.ended or self.accepted == self.drafted


class RoundReport(NamedTuple):
    """One round of a controlled row, after its commit.

    context: tokens before the round, but for the last. rows: in the batch. room: tokens that may still
    be emitted. num_drafted: by all rows, in the round. The seconds are the row's share: of starting its
    drafter since the last round, of drafting, of the rest, and of shadow drafts.
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
    num_drafted: int = 0


# --- answered requests ----------------------------------------------------------------------------

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Decision:
    """The arm of a request and the probability with which it was chosen."""

    arm: str  # a drafter, or a drafter at a draft length; see `split_arm`
    propensity: float = 1.0
    scores: dict[str, float] = field(default_factory=dict)
    policy: str = "fixed"
    features: np.ndarray | None = field(default=None, compare=False, repr=False)  # [F]
    seconds_per_token: dict[str, float] = field(default_factory=dict)  # predicted, per arm
    seconds_in_rounds: dict[str, float] = field(default_factory=dict)  # without prefill and start

    @property
    def drafter(self) -> str:
        return split_arm(self.arm)[0]

    @property
    def num_draft_tokens(self) -> int | None:
        """Maximum number of tokens of a draft; None leaves it to the drafter."""
        return split_arm(self.arm)[1]


@dataclass(slots=True)
class Seconds:
    """Wall-clock seconds of a request by part; a batch's shared work is divided among its rows.

    `queue` is the time before admission, which is not in the total.
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


@dataclass(slots=True)
class Completion:
    """The answer to a request, with its rounds and seconds.

    `text` ends before a stop string; `token_ids` includes the token that completed the stop.
    `seconds_total` is wall-clock time from admission to the last token; `seconds` has its parts.
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
    error: str | None = None  # the reason if finish_reason is "error"
    logprobs: list[float] | None = None  # of the emitted tokens under the target, if requested
    # (tokens emitted before, arm) of every change of arm after the decision
    switches: list[tuple[int, str]] = field(default_factory=list)
    weights: str = "own"  # of the target: `int8` if the configuration has rounded them

    @property
    def block_efficiency(self) -> float:
        """tau: emitted tokens per target forward, without the prefill's first token."""
        return (len(self.token_ids) - 1) / len(self.rounds) if self.rounds else 1.0

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.seconds_total if self.seconds_total > 0 else 0.0


# --- offline jobs ---------------------------------------------------------------------------------

Progress = Callable[[str, int, int], None]
"""Called with a stage's name and how much of it is done: (stage, done, total)."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """A prompt with its name; `domain` labels tables and is never a feature."""

    id: str
    domain: str
    prompt: str
