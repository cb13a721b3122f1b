"""Cross-entropy through the output head, computed in slices of positions.

For a small student with a large vocabulary, the head is most of the work and its logits are most of
the memory. Each slice's logits become loss and gradients while they are in the CPU's cache.
Knows no model. Symbols: n positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from torch import Tensor

_SLICE: Final = 256  # positions per slice


class _SlicedCrossEntropy(torch.autograd.Function):
    """A loss that computes its gradients in the forward pass, while a slice has its logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, dtype: torch.dtype
    ) -> Tensor:
        cast_head = head.to(dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head)
        total = hidden.new_zeros((), dtype=torch.float64)
        for first in range(0, hidden.shape[0], _SLICE):
            part = slice(first, first + _SLICE)
            h = hidden[part].to(dtype)  # [m, D]
            logits = (h @ cast_head.T).float()  # [m, V]
            at = targets[part, None]
            wanted = logits.gather(1, at)[:, 0]
            # one pass of exp serves loss and gradient
            top = logits.amax(dim=-1)
            grad = logits.sub_(top[:, None]).exp_()
            norm = grad.sum(dim=-1)
            weight = weights[part]
            total += ((norm.log() + top - wanted) * weight).sum()
            # d loss / d logits = weight * (softmax - one-hot), in place of the logits
            grad.mul_((weight / norm)[:, None])
            grad.scatter_add_(1, at, -weight[:, None])
            grad = grad.to(dtype)
            grad_hidden[part] = grad @ cast_head
            if dtype == head.dtype:
                grad_head.addmm_(grad.T, h)
            else:
                grad_head += grad.T @ h
        ctx.save_for_backward(grad_hidden, grad_head)
        return total.to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grad_loss, grad_head * grad_loss, None, None, None


def weighted_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return sum_i weights[i] * -log softmax(hidden @ head.T)[i, targets[i]], a scalar.

    hidden: [n, D]; head: [V, D]; targets: [n] int64; weights: [n]. Products are computed in `dtype`.
    """
    return _SlicedCrossEntropy.apply(hidden, head, targets, weights, dtype)  # type: ignore[no-untyped-call,no-any-return]


def losses_and_matches(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses [n] and whether each argmax is the target [n] bool, without gradients."""
    losses, matches = [], []
    for first in range(0, hidden.shape[0], _SLICE):
        logits = (hidden[first : first + _SLICE] @ head.T).float()
        wanted = targets[first : first + _SLICE]
        losses.append(logits.logsumexp(dim=-1) - logits.gather(1, wanted[:, None])[:, 0])
        matches.append(logits.argmax(dim=-1) == wanted)
    return torch.cat(losses), torch.cat(matches)
