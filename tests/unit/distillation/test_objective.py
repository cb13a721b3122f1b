"""The loss through the output head, slice by slice, against plain logits; memory; figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from paceline.distillation import objective
from paceline.distillation.losses import LOSSES, acceptance, rewards
from paceline.distillation.objective import judge, sliced_loss
from paceline.distillation.teachers import LiveTeacher, StoredTeacher, TextTeacher

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.distillation.settings import LossName
    from paceline.distillation.teachers import Teacher

NUM, D, V = 230, 16, 40
NAMES: list[LossName] = sorted(LOSSES)
SLICE = 7 * V  # 7 positions: 33 slices, the last with 6


@pytest.fixture
def many_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(objective._SLICE, "cpu", SLICE)


def example(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states and head as leaves, and weights of which a fifth are 0, as of prompts."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM, D, generator=generator).requires_grad_()
    head = (torch.randn(V, D, generator=generator) * scale).requires_grad_()
    weights = torch.rand(NUM, generator=generator)
    weights[::5] = 0
    return hidden, head, weights


def targets_distribution() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(NUM, V, generator=generator) * 2).softmax(-1)


def teacher_of(kind: str, p: Tensor) -> Teacher:
    if kind == "live":  # hidden states that are the logits themselves
        return LiveTeacher(p.log(), lambda hidden: hidden, 1.0, torch.device("cpu"))
    if kind == "stored":
        top = p.topk(6)
        return StoredTeacher(top.indices.int(), top.values)
    return TextTeacher(p.argmax(-1))


def plain_loss(
    hidden: Tensor, head: Tensor, weights: Tensor, teacher: Teacher, name: LossName
) -> tuple[Tensor, Tensor]:
    """Return loss and acceptance from all logits at once; the gradient flows by autograd.

    The values are not differentiated but the slopes' inner product with q's logarithm, whose gradient
    by the logits is w - q sum(w).
    """
    q = (hidden @ head.T).double().softmax(-1)
    ids, p = teacher.buckets(slice(0, NUM))
    p = p.double()
    if ids is not None:
        chosen = q.gather(1, ids)
        q = torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], dim=-1)
    values, slopes = LOSSES[name](p, q.detach())
    by_gradient = (slopes * q.log()).sum(-1)
    if name == "tvd++":  # deviation of the rewards over the batch, under q and the weights
        mean_reward = (rewards(p, q.detach()) * q.detach()).sum(-1)
        mean = (weights * mean_reward).sum() / weights.sum()
        by_gradient = by_gradient / (mean * (1 - mean)).sqrt()
    value = (values * weights).sum().detach()
    surrogate = (by_gradient * weights).sum()
    return surrogate - surrogate.detach() + value, (acceptance(p, q) * weights).sum().detach()


@pytest.mark.usefixtures("many_slices")
@pytest.mark.parametrize("kind", ["live", "stored", "text"])
@pytest.mark.parametrize("name", NAMES)
def test_slices_have_the_sums_and_gradients_of_all_logits_at_once(
    name: LossName, kind: str
) -> None:
    hidden, head, weights = example()
    teacher = teacher_of(kind, targets_distribution())
    expected, expected_accepted = plain_loss(hidden, head, weights, teacher, name)
    totals = sliced_loss(hidden, head, weights, teacher, name)

    torch.testing.assert_close(totals.loss.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(totals.accepted.double(), expected_accepted, rtol=1e-4, atol=1e-4)
    # the gradient of a loss that is scaled afterwards
    found = torch.autograd.grad(3 * totals.loss, [hidden, head])
    wanted = torch.autograd.grad(3 * expected, [hidden, head])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))
    assert not found[0][weights == 0].any()


@pytest.mark.parametrize("name", NAMES)
def test_the_size_of_slices_does_not_change_the_gradient(
    name: LossName, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, head, weights = example()
    teacher = teacher_of("live", targets_distribution())
    found = []
    for size in (V, SLICE, 10**9):
        monkeypatch.setitem(objective._SLICE, "cpu", size)
        loss = sliced_loss(hidden, head, weights, teacher, name).loss
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [hidden, head])]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("many_slices")
def test_tvd_plus_plus_is_the_tvd_gradient_divided_by_the_batchs_deviation() -> None:
    """One factor for the batch, not one per slice or position; positions count with their weights."""
    hidden, head, weights = example()
    weights = weights**4  # so uneven that a mean without weights would differ
    p = targets_distribution()
    teacher = teacher_of("live", p)
    gradients = {}
    for name in ("tvd", "tvd++"):
        loss = sliced_loss(hidden, head, weights, teacher, name).loss
        gradients[name] = torch.autograd.grad(loss, hidden)[0]
    with torch.no_grad():
        q = (hidden @ head.T).softmax(-1)
        share = weights[:, None] * q / weights.sum()  # of each (position, token), sum 1
        r = rewards(p, q)
        mean = (share * r).sum()
        deviation = (share * (r - mean) ** 2).sum().sqrt()
        unweighted = (q * r).sum(-1).mean()
    torch.testing.assert_close(gradients["tvd++"], gradients["tvd"] / deviation)
    assert abs(deviation - (unweighted * (1 - unweighted)).sqrt()) > 1e-3 * deviation


@pytest.mark.usefixtures("many_slices")
@pytest.mark.parametrize("name", NAMES)
def test_products_in_bfloat16_have_nearly_the_same_gradient(name: LossName) -> None:
    hidden, head, weights = example(scale=0.3)
    teacher = teacher_of("stored", targets_distribution())
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        loss = sliced_loss(hidden, head, weights, teacher, name, dtype).loss
        gradients.append(torch.autograd.grad(loss, [hidden, head]))
    for exact, half in zip(*gradients, strict=True):
        assert half.dtype == torch.float32
        assert not torch.equal(exact, half)
        assert F.cosine_similarity(exact.flatten(), half.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("name", NAMES)
def test_equal_distributions_have_nearly_no_gradient(name: LossName) -> None:
    """Rounding makes p and q differ in their last bit, which the rewards see as p > q."""
    hidden, head, weights = example()
    teacher = LiveTeacher(hidden.detach(), lambda h: h @ head.T, 1.0, torch.device("cpu"))
    loss = sliced_loss(hidden, head, weights, teacher, name).loss
    assert abs(float(loss.detach())) < 1e-4
    gradient = torch.autograd.grad(loss, hidden)[0]
    if not name.startswith(("tvd", "negative", "lk")):
        assert gradient.abs().max() < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_weight_has_no_gradient(name: LossName) -> None:
    hidden, head, weights = example()
    teacher = teacher_of("live", targets_distribution())
    for zero in (weights * 0, weights[:0]):
        own = hidden[: len(zero)]
        loss = sliced_loss(own, head, zero, teacher, name).loss
        assert float(loss.detach()) == 0
        for gradient in torch.autograd.grad(loss, [hidden, head]):
            assert not gradient.any()


# --- memory ---------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return result


@pytest.mark.parametrize("kind", ["live", "stored"])
@pytest.mark.parametrize("name", NAMES)
def test_no_tensor_has_more_logits_than_a_slice(
    name: LossName, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4,096 positions of a vocabulary of 128,000 on a device that only computes shapes.

    All logits would be 524 million numbers. The head itself has 8 million.
    """
    limit, num, size, width = 2**24, 4096, 128_000, 64
    monkeypatch.setitem(objective._SLICE, "meta", limit)
    with torch.device("meta"):
        hidden = torch.empty(num, width, requires_grad=True)
        head = torch.empty(size, width, requires_grad=True)
        weights = torch.empty(num)
        targets = torch.empty(num, dtype=torch.int64)
        teacher: Teacher = StoredTeacher(
            torch.empty(num, 32, dtype=torch.int32), torch.empty(num, 32)
        )
        if kind == "live":
            of_target = torch.empty(num, 8), torch.empty(8, size)
            teacher = LiveTeacher(
                of_target[0], lambda h: h @ of_target[1], 1.0, torch.device("meta")
            )
    with LargestTensor() as seen:
        torch.autograd.grad(sliced_loss(hidden, head, weights, teacher, name).loss, [hidden, head])
        judge(hidden.detach(), head.detach(), targets, teacher)
    assert limit // 2 < seen.largest <= limit


def test_a_slice_of_the_largest_vocabulary_has_at_least_one_position() -> None:
    """The CPU's limit is 2 million logits per slice."""
    for num_logits, expected in ((128_000, 16), (2**21, 1), (2**23, 1)):
        parts = list(objective._slices(torch.empty(4096, 1), num_logits))
        assert parts[0] == slice(0, expected)
        assert [part.start for part in parts] == list(range(0, 4096, expected))


# --- figures of a student -------------------------------------------------------------------------


@pytest.mark.usefixtures("many_slices")
@pytest.mark.parametrize("kind", ["live", "stored", "text"])
def test_figures_are_those_of_all_logits(kind: str) -> None:
    hidden, head, _ = example()
    hidden, head = hidden.detach(), head.detach()
    p = targets_distribution()
    targets = p.multinomial(1, generator=torch.Generator().manual_seed(2))[:, 0]
    targets[::2] = (hidden @ head.T).argmax(-1)[::2]
    teacher = TextTeacher(targets) if kind == "text" else teacher_of(kind, p)
    found = judge(hidden, head, targets, teacher)

    logits = hidden @ head.T
    torch.testing.assert_close(found.losses, F.cross_entropy(logits, targets, reduction="none"))
    assert torch.equal(found.matches, logits.argmax(-1) == targets)
    assert 0.4 < found.matches.float().mean() < 0.6
    ids, p_b = teacher.buckets(slice(0, NUM))
    q = logits.softmax(-1)
    if ids is not None:
        q = torch.cat([q.gather(1, ids), 1 - q.gather(1, ids).sum(-1, keepdim=True)], dim=-1)
    torch.testing.assert_close(found.accepted, acceptance(p_b, q), rtol=1e-4, atol=1e-5)
    if kind == "text":
        chance = logits.softmax(-1).gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(found.accepted, chance)
