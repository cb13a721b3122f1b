"""The chains that a cascade asks a model for, ended and cut by the model's own probabilities.

Symbols: W the longest draft of the cascade.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from paceline.drafting.contract import blaming, read_drafts, read_length
from paceline.drafting.draft_model import DraftModel
from paceline.models.packing import ChainEnds

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from paceline.contracts import RowView
    from paceline.drafting.base import Drafter

    Cut = Callable[[np.ndarray, np.ndarray, np.ndarray, float, np.ndarray], int]


class Wish(NamedTuple):
    """A row that a model is asked for.

    place: of the row in the round. longest: maximum tokens. least: the chance of all tokens below which
    the chain ends. verifying, drafting: [W + 1] seconds by tokens. chances: [W], receives each token's.
    """

    place: int
    row: RowView
    longest: int
    least: float
    verifying: np.ndarray
    drafting: np.ndarray
    chances: np.ndarray


class Chain(NamedTuple):
    """A model's tokens for the row at a place. num_drafted: the tokens before the end was cut."""

    place: int
    tokens: list[int]
    num_drafted: int


def ends_by_itself(part: Drafter, row: RowView) -> bool:
    """Return whether the model's own probabilities end its chain for the row."""
    is_greedy = row.sampling.method != "invariant"
    return is_greedy and isinstance(part, DraftModel) and part.stop.stop == "fixed"


def draft_chains(
    part: Drafter, wishes: Sequence[Wish], if_sure: tuple[float, ...], cut: Cut | None
) -> list[Chain]:
    """Return a model's chains for some rows, in no order.

    if_sure: chances by the model's probability for a token. cut: `kernels.cut_chain`, to cut off what
    does not pay.
    """
    by_itself = [wish for wish in wishes if ends_by_itself(part, wish.row)]
    others = [wish for wish in wishes if not ends_by_itself(part, wish.row)]
    chains: list[Chain] = []
    if others:
        rows, limits = [wish.row for wish in others], [wish.longest for wish in others]
        with blaming(part.name, "part"):
            drafts = read_drafts(part.propose(rows, limits), rows, limits, read_length(part))
        pairs = zip(others, drafts, strict=True)
        chains += [Chain(wish.place, draft.tokens, len(draft.tokens)) for wish, draft in pairs]
    if by_itself:
        assert isinstance(part, DraftModel)
        chains += _draft_while_sure(part, by_itself, if_sure, cut)
    return chains


def _draft_while_sure(
    part: DraftModel, wishes: Sequence[Wish], if_sure: tuple[float, ...], cut: Cut | None
) -> list[Chain]:
    rows, limits = [wish.row for wish in wishes], [wish.longest for wish in wishes]
    ends = ChainEnds(if_sure, [wish.least for wish in wishes])
    with blaming(part.name, "part"):
        drafted, sure = part.draft_while_sure(rows, limits, ends)
    chains, table = [], np.array(if_sure)
    for wish, tokens, probabilities in zip(wishes, drafted, sure, strict=True):
        kept = num_drafted = len(tokens)
        if cut is not None:
            spent = float(wish.drafting[num_drafted])
            kept = cut(np.array(probabilities), table, wish.verifying, spent, wish.chances)
        chains.append(Chain(wish.place, tokens[:kept], num_drafted))
    return chains
