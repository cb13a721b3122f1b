"""Matrix products with fixed weights: packed once for the CPU's kernels, or fused on other devices.

On the CPU a decode step reads every weight once for a few tokens, and oneDNN reads weights in its own
blocked layout about twice as fast as row by row; for several tokens, up to five times in float32. The
packed weights are copies in addition to transformers' own. On other devices fused weights are one
tensor, and the original parameters become views of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F

from paceline.errors import ModelError
from paceline.models.exact import find_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

# A packed call costs about 15 us, so float32 weights must have at least this size.
_MIN_PACKED_NUMBERS: Final = 2**17
# tokens that the packed layout is made for; other numbers are slightly slower
_ROWS_HINT: Final = 8

_FOUND_ROWS: Final[dict[tuple[object, ...], tuple[int, bool]]] = {}


class Product:
    """x -> x W^T (+ b) for fixed W; several linear layers with one input become one product."""

    def __init__(self, layers: Sequence[nn.Linear], exact: bool = False) -> None:
        """exact: the bits of a row depend on that row alone; see `exact.py`.

        Raises ModelError if exact mode is impossible, since device and dtype have no packed products.
        """
        weights = [layer.weight.data for layer in layers]
        biases: list[Any] = [layer.bias for layer in layers]
        known = [bias.data for bias in biases if bias is not None]
        if known and len(known) != len(layers):
            raise ValueError("layers with and without biases do not make one product")
        self.bias: Tensor | None = torch.cat(known) if known else None
        weight = joined(weights)
        self.packed = packs(weight) if exact else packs(weight) and is_worth_packing(weight)
        if exact and not self.packed:
            raise ModelError(
                f"exact mode needs packed products, which {weight.dtype} on {weight.device} does "
                "not have on this machine; use float32 on a CPU, or bfloat16 on a CPU that multiplies "
                "it (AVX-512 BF16, AMX)"
            )
        like = weight
        if self.packed:
            weight = _mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)
        elif weight.device.type == "cpu":
            weight = weight.T.contiguous()
        elif len(layers) > 1:
            sizes = [w.shape[0] for w in weights]
            for layer, part in zip(layers, weight.split(sizes), strict=True):
                layer.weight.data = part
        self.transposed = not self.packed and weight.device.type == "cpu"
        self.weight: Tensor = weight
        self.rows, self.fixed = 1, False
        if exact:
            self.rows, self.fixed = self._find_rows(like)

    def _find_rows(self, weight: Tensor) -> tuple[int, bool]:
        """Return `exact.find_rows`, called once per shape, by which kernels are chosen."""
        key = (*weight.shape, weight.dtype, self.bias is None, torch.get_num_threads())
        if key not in _FOUND_ROWS:
            _FOUND_ROWS[key] = find_rows(self, self.add_to, weight.shape[1], weight)
        return _FOUND_ROWS[key]

    def __call__(self, x: Tensor) -> Tensor:
        """Return the product [N, out]. x: [N, in]."""
        if self.packed:
            if self.fixed or len(x) < self.rows:
                return self._in_tiles(x, None)
            out: Tensor = _plain(x, self.weight, self.bias, "none", [], "")
            return out
        if self.transposed:
            if self.bias is None:
                return torch.mm(x, self.weight)
            return torch.addmm(self.bias, x, self.weight)
        return F.linear(x, self.weight, self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """Return residual [N, out] + the product, in one pass if the kernel can."""
        if self.packed:
            if self.fixed or len(x) < self.rows:
                return self._in_tiles(x, residual)
            out: Tensor = _binary(x, residual, self.weight, self.bias, "add")
            return out
        if self.transposed and self.bias is None:
            return torch.addmm(residual, x, self.weight)
        return self(x).add_(residual)

    def _in_tiles(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Return the product in calls of `rows` rows, the last call padded with zeros."""
        num_rows = len(x)
        missing = -num_rows % self.rows
        x = F.pad(x, (0, 0, 0, missing))
        if residual is not None:
            residual = F.pad(residual, (0, 0, 0, missing))
        outputs = []
        for first in range(0, len(x), self.rows):
            part = x[first : first + self.rows]
            if residual is None:
                outputs.append(_plain(part, self.weight, self.bias, "none", [], ""))
            else:
                other = residual[first : first + self.rows]
                outputs.append(_binary(part, other, self.weight, self.bias, "add"))
        return torch.cat(outputs)[:num_rows]


def joined(weights: Sequence[Tensor]) -> Tensor:
    """Join weights [out, in] into one [sum of outs, in].

    Copies nothing if they are adjacent views of one tensor, so that a second product of the same layers
    does not move them again.
    """
    first, end = weights[0], weights[0].data_ptr()
    for weight in weights:
        storage = weight.untyped_storage().data_ptr()
        together = storage == first.untyped_storage().data_ptr() and weight.data_ptr() == end
        if not (together and weight.is_contiguous()):
            return torch.cat(list(weights))
        end += weight.nbytes
    num_outputs = sum(len(weight) for weight in weights)
    return first.as_strided((num_outputs, first.shape[1]), (first.shape[1], 1))


def packs(weight: Tensor) -> bool:
    """Return whether this machine has packed kernels for the weight's device and dtype."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(_mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def is_worth_packing(weight: Tensor) -> bool:
    """Return whether the weight is large enough for the cost of a packed call."""
    return weight.dtype != torch.float32 or weight.numel() >= _MIN_PACKED_NUMBERS


_mkldnn: Any = torch.ops.mkldnn
_plain = _mkldnn._linear_pointwise.default
_binary = _mkldnn._linear_pointwise.binary
