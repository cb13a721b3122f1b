"""Matrix products with the fixed weights of linear layers, several of one input as one product.

On CUDA and MPS the joined weights are one tensor, and the layers' own weights become views of it. On
the CPU, where the lean forward is the readable reference, they are a copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn


class Product:
    """x -> x W^T (+ b) for fixed W; several linear layers with one input become one product."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        """Raise ValueError if only some of the layers have biases."""
        biases: list[Any] = [layer.bias for layer in layers]
        known = [bias.data for bias in biases if bias is not None]
        if known and len(known) != len(layers):
            raise ValueError("layers with and without biases do not make one product")
        self.bias: Tensor | None = torch.cat(known) if known else None
        self.weight: Tensor = joined([layer.weight.data for layer in layers])
        if self.weight.device.type != "cpu":
            sizes = [layer.weight.shape[0] for layer in layers]
            for layer, part in zip(layers, self.weight.split(sizes), strict=True):
                layer.weight.data = part

    def __call__(self, x: Tensor) -> Tensor:
        """Return the product [..., out]. x: [..., in]."""
        return F.linear(x, self.weight, self.bias)


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
