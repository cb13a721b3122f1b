"""The interface of a drafter, and the context that it is built in.

The engine owns each row's tokens. `propose` first reads the tokens it has not seen, so a drafter that
was not asked for some rounds is never stale. Randomness comes from `paceline.noise`, keyed by the row's
seed and the position; no drafter keeps a generator.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from pydantic import BaseModel

from paceline.contracts import GREEDY
from paceline.drafting.draft_replay import SimulatedReplay
from paceline.store.trained_on import join

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from paceline.contracts import Drafts, RowView, SamplingParams
    from paceline.costs.table import CostTable
    from paceline.drafting.draft_replay import DraftReplay
    from paceline.models.language_model import LanguageModel
    from paceline.models.vocabulary import Tokenizer, Vocabulary
    from paceline.store.trained_on import TrainedOn


@dataclass(frozen=True, slots=True)
class Needs:
    """The properties of the target that a drafter needs."""

    same_vocabulary: bool = False
    target_weights: bool = False


@dataclass(frozen=True, slots=True)
class BuildContext:
    """The target and the drafters configured earlier, from which `Drafter.build` may take parts."""

    target: LanguageModel
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    drafters: Mapping[str, Drafter]
    prefill_chunk: int = 512


class Drafter(ABC):
    """A proposer of tokens for rows. `name` is the arm's name in configuration, tables and artefacts.

    A kind of drafter is a class: `kind` is its name in paceline.yaml, `Settings` the schema of its
    settings there; `check` tests them, and `build` makes a drafter from them.
    """

    kind: ClassVar[str]
    Settings: ClassVar[type[BaseModel]]
    needs: ClassVar[Needs] = Needs()
    nests: ClassVar[bool] = False
    """True if a draft under a lower limit is the beginning of the draft under a higher limit. Then every
    draft length is an arm, and one replay gives the rounds of all lengths."""
    replays_everywhere: bool = True
    """True if replay asks for a round at every position, which gives the rounds of any schedule. False
    if a round depends on the rounds before it, or if a draft costs too much."""
    stops_early: bool = True  # rules may end a draft before its limit
    composed: ClassVar[bool] = False
    """True if its rounds follow from the replays of its parts, so that it is not replayed itself."""
    takes_prices: ClassVar[bool] = False  # its drafts follow this machine's costs, if it gets them
    rows_in_flight: int = 1  # with any drafter; the engine sets it before `propose`
    note: str = ""  # a remark for the user on how the drafter was built

    def __init__(self, name: str, num_draft_tokens: int) -> None:
        """num_draft_tokens: maximum number of tokens per draft, chain or tree."""
        self.name = name
        self.num_draft_tokens = num_draft_tokens

    @classmethod  # noqa: B027 - most have nothing to check
    def check(cls, name: str, settings: Any, vocabulary: Vocabulary) -> None:
        """Raise ConfigError if the settings do not fit a target of this vocabulary.

        Runs before any weights are read, so it must be cheap.
        """

    @classmethod
    def build(cls, name: str, settings: Any, context: BuildContext) -> Drafter:
        """Return the drafter of valid settings; by default `cls(name, settings)`."""
        return cls(name, settings)

    def start(self, rows: Sequence[RowView]) -> None:  # noqa: B027 - most drafters keep no state
        """Register rows that were just given this drafter; `prepare` does the work."""

    def prepare(self, row: RowView, max_tokens: int) -> bool:
        """Do a piece of the drafter's own prefill of a started row; return True when none is left.

        Called between rounds until it returns True, so that a long prompt does not delay other rows.
        """
        return True

    def longest_draft(self, row: RowView) -> int:
        """Return the most tokens that a chain of the row can have now."""
        return self.num_draft_tokens

    @abstractmethod
    def propose(self, rows: Sequence[RowView], limits: Sequence[int]) -> Drafts:
        """Return drafts for all rows, after reading their new tokens.

        A row's chain has at most min(limit, num_draft_tokens) tokens; a tree has at most
        num_draft_tokens and is at most `limit` deep. `drafting.draft_length` has the order
        of all rules.
        """

    def finish(self, rows: Sequence[RowView]) -> None:  # noqa: B027 - most drafters keep no state
        """Forget rows that ended or changed drafter."""

    def would_accept(
        self,
        prompt: Sequence[int],
        trajectory: Sequence[int],
        p: Tensor | None = None,
        sampling: SamplingParams = GREEDY,
    ) -> DraftReplay:
        """Return the replay of this drafter's rounds along the target's own output.

        By default `propose` runs along the text, which is exact for every drafter whose drafts depend
        on the row's text alone. p: [T, V] the target's warped distribution at each trajectory
        position, for the scores of chain drafters. sampling: how the trajectory was drawn, greedily or
        by `invariant` sampling; the latter draws the target's and the drafter's tokens with the same
        noise, so that the replay is exact.
        """
        return SimulatedReplay(self, prompt, trajectory, sampling=sampling)

    @property
    def wants_prices(self) -> bool:
        """True if it needs this machine's costs, by `price`, before it can draft."""
        return False

    def price(self, costs: CostTable) -> None:  # noqa: B027 - most drafters ignore their costs
        """Take this machine's costs, if they decide the length of drafts."""

    @contextmanager
    def at_full_length(self) -> Iterator[None]:
        """Make all drafts in the block as long as the limit, to measure the cost of a length."""
        before, self.stops_early = self.stops_early, False
        try:
            yield
        finally:
            self.stops_early = before

    @contextmanager
    def without_answers_to(self, group: str) -> Iterator[None]:
        """Draft in the block as if no answer to a prompt had been collected.

        A drafter that uses collected answers is replayed and judged in this block, since a new prompt
        has no collected answer. By default the parts leave them out. group: the prompt's id, which its
        wordings and samplings share.
        """
        with ExitStack() as stack:
            for part in self.holders():
                if part is not self:
                    stack.enter_context(part.without_answers_to(group))
            yield

    def identity(self) -> dict[str, object]:
        """Return all that changes the drafts; a policy learned with another identity is refused."""
        return {"kind": self.kind, "num_draft_tokens": self.num_draft_tokens}

    def trained_on(self) -> TrainedOn | None:
        """Return the prompts that the drafter was trained on; None if they are unknown.

        By default those of its parts; they are unknown for a drafter without parts.
        """
        parts = [part for part in self.holders() if part is not self]
        return join([part.trained_on() for part in parts]) if parts else None

    def num_bytes(self) -> int:
        """Return the bytes held now: weights and the state of all rows."""
        return 0

    def holders(self) -> Sequence[Drafter]:
        """Return the drafters that hold the state of its rows: itself, or its parts."""
        return (self,)

    def bound_cache(self, max_positions: int | None, exact_fit: bool) -> None:  # noqa: B027
        """Bound the rows x positions of keys and values that the drafter holds, if it holds any.

        It drafts nothing for a row that does not fit. exact_fit: hold no more than the rows need.
        """

    def state_bytes(self, lengths: Sequence[int]) -> int:
        """Return the bytes of state that rows of these maximum lengths need, without the weights."""
        return 0


def pad_drafts(drafts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, list[int]]:
    """Return lists of unequal length as [R, K] int64, padded with -1, and the lengths."""
    lengths = [len(d) for d in drafts]
    width = max(lengths, default=0)
    flat: list[int] = []
    for draft, length in zip(drafts, lengths, strict=True):
        flat += draft
        if length < width:
            flat += [-1] * (width - length)
    # numpy reads lists several times faster than torch, and a flat one faster than a nested one
    tokens = torch.from_numpy(np.array(flat, dtype=np.int64).reshape(len(drafts), width))
    return tokens.to(device), lengths
