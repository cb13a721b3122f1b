"""The batch of a paged cache: attention of packed tokens through one kernel."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache as cached
from typing import TYPE_CHECKING, Any

import torch

from paceline.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from paceline.models.cuda.layout import PackedRows
    from paceline.models.packing import KeyBias


@cached
def attention_kernel() -> Any:
    """Return the function that calls the kernel. Raises ModelError if triton is missing."""
    try:
        from paceline.models.cuda.paged_attention import attend_blocks
    except ImportError as error:
        raise ModelError(
            f"CUDA needs triton, which torch's CUDA builds bring along ({error}); "
            "run `pip install triton`, or set device: cpu"
        ) from error
    return attend_blocks


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """The packed tokens of one forward over a `PagedCache`."""

    rows: PackedRows
    storage_of: Callable[[int, Tensor], Tensor]  # a layer and its new entries -> the layer's pool
    biases: dict[KeyBias, Tensor] = field(default_factory=dict)  # filled on demand

    @property
    def num_tokens(self) -> int:
        return len(self.rows.position)

    @property
    def num_positions(self) -> int:
        return self.rows.num_positions

    def only_chain(self) -> None:
        """Return None, since one row's chain has no faster path here."""

    def positions(self) -> Tensor:
        return self.rows.position

    def attend(
        self,
        layer: int,
        query: Tensor,
        key_value: Tensor,
        scale: float,
        window: int | None = None,
        cap: float | None = None,
        bias: KeyBias | None = None,
    ) -> Tensor:
        pool = self.storage_of(layer, key_value)
        pool.index_copy_(0, self.rows.place, key_value)
        biases = None if bias is None else self._biases(bias)
        out: Tensor = attention_kernel()(query, pool, self.rows, scale, window, cap, biases=biases)
        return out

    def _biases(self, bias: KeyBias) -> Tensor:
        """Return the biases [H, L] of all positions, the same in every layer."""
        if bias not in self.biases:
            positions = torch.arange(self.num_positions + 1, device=self.rows.position.device)
            self.biases[bias] = bias(positions).float().contiguous()
        return self.biases[bias]
