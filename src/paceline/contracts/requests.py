"""Records of a request: sampling, logit rules, the request itself and the policy's view of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SamplingMethod = Literal["greedy", "residual", "block", "invariant"]
PenaltyScope = Literal["all", "output"]  # all: prompt and output
NONE: Final = "none"
AUTO: Final = "auto"
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


def sampling_label(sampling: SamplingParams) -> str:
    """Return the label that a sampling adds to a prompt's id: `@t0.8,p0.95`; empty for greedy.

    It has no seed: a prompt's seed follows from its id.
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
    logprobs: return each emitted token's log-probability under the target's own logits, before rules
    and temperature.
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
