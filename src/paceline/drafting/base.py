"""What every drafter does, and what replay may ask of it.

Drafters pull: the engine owns each row's tokens, and `propose` first catches up with them, so a
drafter that sat out a while cannot be stale. Randomness comes from `paceline.noise`, keyed by the
row's seed and the position; no drafter keeps a generator.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import BaseModel

from paceline.contracts import GREEDY

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from torch import Tensor

    from paceline.contracts import Drafts, RowView, SamplingParams
    from paceline.costs.table import CostTable
    from paceline.models.language_model import LanguageModel
    from paceline.models.vocabulary import Tokenizer, Vocabulary


@dataclass(frozen=True, slots=True)
class Needs:
    """What a drafter must be given, as data."""

    same_vocabulary: bool = False
    target_weights: bool = False


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a drafter is built amid: the target, and the drafters configured before it."""

    target: LanguageModel
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    drafters: Mapping[str, Drafter]
    prefill_chunk: int = 512


@dataclass(frozen=True, slots=True)
class PositionScores:
    """A chain drafter's teacher-forced judgement of a trajectory of T tokens, by position.

    match: the drafter's most likely token is the trajectory's. ratio: min(1, q/p) at the
    trajectory's token, the odds that a token drawn from p would also be drawn from q. overlap: sum
    of min(p, q), the acceptance probability under sampling. confidence: the drafter's largest
    probability. ratio and overlap are NaN where no target distribution was given.
    """

    match: np.ndarray  # [T] bool
    ratio: np.ndarray  # [T] float32
    overlap: np.ndarray  # [T] float32
    confidence: np.ndarray  # [T] float32


class Foresight(ABC):
    """What one drafter would have had accepted along one trajectory."""

    scores: PositionScores | None = None

    @abstractmethod
    def accepted(self, position: int, limit: int) -> tuple[int, int]:
        """(drafted, accepted) of the round that starts when `position` tokens are emitted.

        limit: the most tokens the engine would let it draft there.
        """

    def close(self) -> None:  # noqa: B027 - most foresights hold nothing
        """Give back what the replay held."""


class Drafter(ABC):
    """Proposes tokens for rows. `name` is the arm's name in configuration, tables and artefacts.

    A kind of drafter is a class: `kind` is its name in paceline.yaml, `Settings` the schema of its
    settings there, `check` and `build` turn them into a drafter.
    """

    kind: ClassVar[str]
    Settings: ClassVar[type[BaseModel]]
    needs: ClassVar[Needs] = Needs()
    nests: ClassVar[bool] = False
    """Whether a draft under a lower limit is the beginning of the one under a higher limit. Then every
    draft length is an arm of its own, and what it gains is known from one replay."""
    replays_everywhere: bool = True
    """Whether replay asks for a round at every position, from which any schedule of rounds follows; not
    where a round depends on the rounds before it, or costs too much to draft so often."""
    note: str = ""  # what its user should know of how it was built

    def __init__(self, name: str, num_draft_tokens: int) -> None:
        """num_draft_tokens: the most tokens of one draft, a chain's or a tree's."""
        self.name = name
        self.num_draft_tokens = num_draft_tokens

    @classmethod  # noqa: B027 - most have nothing to check
    def check(cls, name: str, settings: Any, vocabulary: Vocabulary) -> None:
        """Raise ConfigError if the settings cannot serve a target of this vocabulary.

        Asked before any weights are read, so only what is cheap to find out belongs here.
        """

    @classmethod
    def build(cls, name: str, settings: Any, around: Surroundings) -> Drafter:
        """The drafter of valid settings; by default its class is called with name and settings."""
        return cls(name, settings)

    def start(self, rows: Sequence[RowView]) -> None:  # noqa: B027 - most drafters keep no state
        """Take rows that were just given this drafter; `prepare` does the work."""

    def prepare(self, row: RowView, max_tokens: int) -> bool:
        """Do a piece of the drafter's own prefill of a started row; True when none is left.

        Called between rounds until it is, so that a long prompt does not hold up other rows.
        """
        return True

    @abstractmethod
    def propose(self, rows: Sequence[RowView], limits: Sequence[int]) -> Drafts:
        """Drafts for all rows, after catching up with them.

        A row's chain has at most min(limit, num_draft_tokens) tokens; a tree has at most
        num_draft_tokens and is at most `limit` deep.
        """

    def finish(self, rows: Sequence[RowView]) -> None:  # noqa: B027 - as above
        """Forget rows that ended or changed drafter."""

    @abstractmethod
    def would_accept(
        self,
        prompt: Sequence[int],
        trajectory: Sequence[int],
        p: Tensor | None = None,
        sampling: SamplingParams = GREEDY,
    ) -> Foresight:
        """Replay: the rounds this drafter would have had along the target's own output.

        p: [T, V] the target's warped distribution at each trajectory position, for the sampling
        scores. sampling: how the trajectory was drawn, greedily or by `invariant` sampling: there
        the same noise draws target's and drafter's tokens, so that replay is exact.
        """

    @property
    def wants_prices(self) -> bool:
        """Whether it cannot draft before `price` gave it this machine's costs."""
        return False

    def price(self, costs: CostTable) -> None:  # noqa: B027 - most drafters ignore what they cost
        """Take what work costs on this machine, where it decides how much to draft."""

    def at_full_length(self) -> AbstractContextManager[None]:
        """While it lasts, no rule ends a draft early: for measuring what a length costs."""
        return nullcontext()

    def identity(self) -> dict[str, object]:
        """What makes this arm the arm it is; a policy learned with another one is refused."""
        return {"kind": self.kind, "num_draft_tokens": self.num_draft_tokens}

    def num_bytes(self) -> int:
        """Bytes held now: weights and the state of all rows."""
        return 0

    def holders(self) -> Sequence[Drafter]:
        """The drafters that hold its rows' state: itself, or those it is made of."""
        return (self,)

    def bound_cache(self, max_positions: int | None, exact_fit: bool) -> None:  # noqa: B027
        """Bound the rows x positions of keys and values that the drafter holds, if it holds any.

        It drafts nothing for a row that does not fit. exact_fit: hold no more than the rows need.
        """

    def state_bytes(self, lengths: Sequence[int]) -> int:
        """Bytes that rows of at most so many tokens each would make it hold, beside its weights."""
        return 0


def pad_drafts(drafts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, list[int]]:
    """Lists of unequal length as [R, K] int64 with -1 behind each end, and the lengths."""
    lengths = [len(d) for d in drafts]
    width = max(lengths, default=0)
    padded = [[*d, *[-1] * (width - len(d))] for d in drafts]
    return torch.tensor(padded, dtype=torch.int64, device=device).reshape(
        len(drafts), width
    ), lengths
