"""T5's relative position bias: what each head adds to a score, by the distance from key to query.

transformers computes it for one length of the cache, so for one row; here it is a table by distance.
Source: Raffel et al. 2020, section 2.1. Symbols: H heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

_FEWEST: Final = 128  # distances of a first table


class RelativeBias:
    """The biases of one attention module, as its own code computes them."""

    def __init__(self, attention: nn.Module) -> None:
        """attention: of transformers' T5 family, with a `relative_attention_bias`."""
        self._attention: Any = attention
        self._table = torch.empty(0, 0)

    def by_distance(self, num_distances: int) -> Tensor:
        """Return [H, at least num_distances] biases of distances 0, 1, ..."""
        # a distance is always computed by a call of one length, whichever lengths are asked for, so its
        # bits do not depend on them
        while num_distances > self._table.shape[1]:
            known = self._table.shape[1]
            length = max(2 * known, _FEWEST)
            with torch.no_grad():
                # of one query after all keys: [1, H, 1, length], the last key at distance 0
                biases = self._attention.compute_bias(1, length, past_seen_tokens=length - 1)
            new = biases[0, :, 0].flip(-1)
            self._table = torch.cat((self._table, new[:, known:]), dim=1) if known else new
        return self._table


def biases_of(attentions: Mapping[int, nn.Module]) -> dict[int, RelativeBias]:
    """Return the bias of each layer by its index; none for models without one.

    attentions: the modules that attend to the text. Layers without a bias of their own (all but the
    first in T5) have the first layer's.
    """
    biases: dict[int, RelativeBias] = {}
    for layer in sorted(attentions):
        if hasattr(attentions[layer], "relative_attention_bias"):
            biases[layer] = RelativeBias(attentions[layer])
        elif biases:
            biases[layer] = biases[min(biases)]
    return biases
