"""A loss through the output head, computed in slices of positions.

For a small student with a large vocabulary, the head is most of the work and its logits are most of
the memory. Each slice's logits become loss and gradients while they are in the cache, so a batch
needs the memory of one slice. Knows no model. Symbols: n positions, m of a slice, D hidden size, V
vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from paceline.distillation.losses import LOSSES, acceptance

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from paceline.distillation.losses import Loss
    from paceline.distillation.settings import LossName
    from paceline.distillation.teachers import Teacher

_SLICE: Final = {"cpu": 2**21, "cuda": 2**26}  # logits per slice; the CPU's fit into its cache
_LEAST_DEVIATION: Final = 1e-2  # of TVD++'s rewards


class Totals(NamedTuple):
    """Weighted sums over the positions of a batch."""

    loss: Tensor  # scalar, with gradient
    accepted: Tensor  # scalar, of sum min(p, q)


def sliced_loss(
    hidden: Tensor,
    head: Tensor,
    weights: Tensor,
    teacher: Teacher,
    name: LossName,
    dtype: torch.dtype = torch.float32,
) -> Totals:
    """Return sum_i weights[i] * loss_i and the same sum of the acceptance.

    hidden: [n, D] of the student; head: [V, D]; weights: [n]. Products are computed in `dtype`.
    """
    return Totals(*_SlicedLoss.apply(hidden, head, weights, teacher, name, dtype))  # type: ignore[no-untyped-call]


class _SlicedLoss(torch.autograd.Function):
    """A loss that computes its gradients in the forward pass, while a slice has its logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        weights: Tensor,
        teacher: Teacher,
        name: LossName,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        cast_head = head.to(dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head)
        sums = hidden.new_zeros(3, dtype=torch.float64)  # loss, accepted, mean reward
        for part in _slices(hidden, len(head)):
            h = hidden[part].to(dtype)  # [m, D]
            weight = weights[part]
            step = _differentiate((h @ cast_head.T).float(), *teacher.buckets(part), LOSSES[name])
            sums += torch.stack([(v * weight).sum() for v in step[1:]]).double()
            grad = step.grad.mul_(weight[:, None]).to(dtype)
            grad_hidden[part] = grad @ cast_head
            if dtype == head.dtype:
                grad_head.addmm_(grad.T, h)
            else:
                grad_head += grad.T @ h
        if name == "tvd++":
            factor = _standardising_factor(sums[2], weights)
            grad_hidden *= factor
            grad_head *= factor
        ctx.save_for_backward(grad_hidden, grad_head)
        accepted = sums[1].to(hidden.dtype)
        ctx.mark_non_differentiable(accepted)
        return sums[0].to(hidden.dtype), accepted

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grad_loss, grad_head * grad_loss, None, None, None, None


class _SliceStep(NamedTuple):
    """The gradient of a slice [m, V] and its values per position [m]."""

    grad: Tensor
    loss: Tensor
    accepted: Tensor
    mean_reward: Tensor


def _differentiate(logits: Tensor, ids: Tensor | None, p: Tensor, loss: Loss) -> _SliceStep:
    """Return the gradient by the logits [m, V], which it overwrites, and the values per position.

    ids: [m, k], or None for a bucket per token; p: [m, B], see `Teacher.buckets`.
    """
    exps = logits.sub_(logits.amax(dim=-1, keepdim=True)).exp_()  # [m, V]
    if ids is None:
        q = exps / exps.sum(dim=-1, keepdim=True)
        values, slopes = loss(p, q)
        grad = slopes - q * slopes.sum(dim=-1, keepdim=True)
        return _SliceStep(grad, values, acceptance(p, q), (q * (p > q)).sum(dim=-1))
    chosen = exps.gather(1, ids)  # [m, k]
    # summed without the chosen tokens: 1 - their sum would lose the digits of a small rest
    rest = exps.scatter_(1, ids, 0.0).sum(dim=-1, keepdim=True)
    norm = chosen.sum(dim=-1, keepdim=True) + rest
    q = torch.cat([chosen, rest], dim=-1) / norm  # [m, k + 1]
    values, slopes = loss(p, q)
    total = slopes.sum(dim=-1, keepdim=True)
    # the tokens of the last bucket share its slope in proportion to q
    share = slopes[:, -1:] / q[:, -1:].clamp(min=torch.finfo(q.dtype).tiny)
    grad = exps.mul_((share - total) / norm)
    grad.scatter_(1, ids, slopes[:, :-1] - q[:, :-1] * total)
    return _SliceStep(grad, values, acceptance(p, q), (q * (p > q)).sum(dim=-1))


def _standardising_factor(weighted_reward: Tensor, weights: Tensor) -> Tensor:
    """Return 1 / deviation of the rewards over all tokens and positions of the batch.

    Tokens count with q, positions with their weights. The mean cancels: over the whole vocabulary the
    gradient of E_q[constant] is 0.
    """
    # a batch without a learned position has no gradient
    mean = weighted_reward / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
    return (mean * (1 - mean)).clamp(min=_LEAST_DEVIATION**2).rsqrt().to(weights.dtype)


@dataclass(frozen=True, slots=True)
class Judgement:
    """A student's figures at n positions."""

    losses: Tensor  # [n] nats, of the text's token
    matches: Tensor  # [n] bool, whether the greedy token is the text's
    accepted: Tensor  # [n] sum min(p, q) against the teacher


@torch.inference_mode()
def judge(hidden: Tensor, head: Tensor, targets: Tensor, teacher: Teacher) -> Judgement:
    """Return the figures of a student's hidden states [n, D]; targets: [n], the text's tokens."""
    losses, matches, accepted = [], [], []
    for part in _slices(hidden, len(head)):
        logits = (hidden[part] @ head.T).float()
        wanted = targets[part]
        log_norm = logits.logsumexp(dim=-1)
        losses.append(log_norm - logits.gather(1, wanted[:, None])[:, 0])
        matches.append(logits.argmax(dim=-1) == wanted)
        ids, p = teacher.buckets(part)
        q = (logits - log_norm[:, None]).exp_()
        if ids is not None:
            chosen = q.gather(1, ids)
            q = torch.cat([chosen, (1 - chosen.sum(dim=-1, keepdim=True)).clamp(min=0)], dim=-1)
        accepted.append(acceptance(p, q))
    return Judgement(torch.cat(losses), torch.cat(matches), torch.cat(accepted))


def _slices(hidden: Tensor, num_logits: int) -> Iterator[slice]:
    size = max(1, _SLICE.get(hidden.device.type, _SLICE["cuda"]) // num_logits)
    for first in range(0, hidden.shape[0], size):
        yield slice(first, first + size)
