"""Chains that a model's own probabilities end, drafted with one forward per token.

`LanguageModel.draft_sure_chain` does the same in one call where it can. Symbols: R rows, V' logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from paceline.drafting.cached_rows import CachedRow
    from paceline.models.packing import ChainEnds


def step_while_sure(
    forward: Callable[[Sequence[int]], Tensor],
    states: Sequence[CachedRow],
    fed: dict[int, list[int]],
    num_read: Sequence[int],
    own_id: Callable[[int], int],
    longest: int,
    ends: ChainEnds,
) -> tuple[list[list[int]], list[list[float]]]:
    """Return (greedy chains [R, k], their tokens' probabilities), k <= longest.

    forward: from the places of rows to their logits [R, V'] after the tokens in `fed`. fed: each row's
    tokens that are not cached yet; changed. num_read: tokens of each row that are cached after the first
    step. own_id: from a drafted token to the model's id.
    """
    chains: list[list[int]] = [[] for _ in states]
    sure: list[list[float]] = [[] for _ in states]
    hopes = [1.0] * len(states)
    # rows sorted by slot make one attention call
    places = sorted(range(len(states)), key=lambda i: states[i].slot)
    for step in range(longest):
        probabilities, tokens = forward(places).float().softmax(dim=-1).max(dim=-1)
        pairs = zip(tokens.tolist(), probabilities.tolist(), strict=True)
        for i, (token, probability) in zip(places, pairs, strict=True):
            if step == 0:
                states[i].num_cached = num_read[i]
            else:
                states[i].drafted.extend(fed[i])
            fed[i] = [own_id(token)]
            chains[i].append(token)
            sure[i].append(probability)
            number = len(ends.chances)
            hopes[i] *= ends.chances[min(int(probability * number), number - 1)]
        if all(hope < least for hope, least in zip(hopes, ends.least, strict=True)):
            break
    return chains, sure
