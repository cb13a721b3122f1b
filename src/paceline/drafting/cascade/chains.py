"""The chains that a cascade asks a model for, ended by the model's own probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from paceline.drafting.contract import blaming, read_drafts, read_length
from paceline.drafting.draft_model import DraftModel
from paceline.models.packing import ChainEnds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.contracts import RowView
    from paceline.drafting.base import Drafter


class Wish(NamedTuple):
    """A row that a model is asked for.

    place: of the row in the round. model: place among the models. longest: maximum tokens. least: the
    chance of all tokens below which the chain ends.
    """

    place: int
    model: int
    row: RowView
    longest: int
    least: float


class Chain(NamedTuple):
    """A model's tokens for the row at a place. sure: their probabilities, if the model tells them."""

    place: int
    tokens: list[int]
    sure: list[float] | None


def ends_by_itself(part: Drafter, row: RowView) -> bool:
    """Return whether the model's own probabilities end its chain for the row."""
    is_greedy = row.sampling.method != "invariant"
    return is_greedy and isinstance(part, DraftModel) and part.stop.stop == "fixed"


def draft_chains(part: Drafter, wishes: Sequence[Wish], if_sure: tuple[float, ...]) -> list[Chain]:
    """Return a model's chains for some rows, in no order.

    if_sure: chance that a token is accepted, by the class of the model's probability for it.
    """
    by_itself = [wish for wish in wishes if ends_by_itself(part, wish.row)]
    others = [wish for wish in wishes if not ends_by_itself(part, wish.row)]
    chains: list[Chain] = []
    if others:
        rows, limits = [wish.row for wish in others], [wish.longest for wish in others]
        with blaming(part.name, "part"):
            drafts = read_drafts(part.propose(rows, limits), rows, limits, read_length(part))
        pairs = zip(others, drafts, strict=True)
        chains += [Chain(wish.place, draft.tokens, None) for wish, draft in pairs]
    if by_itself:
        assert isinstance(part, DraftModel)
        rows, limits = [wish.row for wish in by_itself], [wish.longest for wish in by_itself]
        ends = ChainEnds(if_sure, [wish.least for wish in by_itself])
        with blaming(part.name, "part"):
            drafted, sure = part.draft_while_sure(rows, limits, ends)
        chains += [
            Chain(wish.place, tokens, probabilities)
            for wish, tokens, probabilities in zip(by_itself, drafted, sure, strict=True)
        ]
    return chains
