"""Every loss against its definition: values, gradients, limits, and gradients from samples.

The references are float64 and take the gradient by autograd through the softmax, with the factors that
the published losses hold constant detached.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch

from paceline.distillation.losses import LOSSES, acceptance, rewards, sampled_tvd_slopes, tvd
from paceline.distillation.losses import tvd_plus_plus_of_position as tvd_plus_plus

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

V = 12
K = 4


def values_by_loops(name: str, p: Tensor, q: Tensor) -> list[float]:
    """Return a loss per position from its definition, one token after the other."""
    values = []
    for p_row, q_row in zip(p.tolist(), q.tolist(), strict=True):
        pairs = list(zip(p_row, q_row, strict=True))
        accepted = sum(min(a, b) for a, b in pairs)
        kl = sum(a * math.log(a / b) for a, b in pairs if a > 0)
        match name:
            case "cross_entropy" | "kl":
                values.append(kl)
            case "reverse_kl":
                values.append(sum(b * math.log(b / a) for a, b in pairs))
            case "jensen_shannon":
                middle = [(a, b, (a + b) / 2) for a, b in pairs]
                halves = [a * math.log(a / m) + b * math.log(b / m) for a, b, m in middle]
                values.append(sum(halves) / 2)
            case "tvd" | "tvd++" | "tvd++_position":
                values.append(sum(abs(a - b) for a, b in pairs) / 2)
            case "negative_log_acceptance":
                values.append(-math.log(accepted))
            case "lk_hybrid":
                share = math.exp(-3 * accepted)
                values.append(share * kl + (1 - share) * (1 - accepted))
            case _:
                raise AssertionError(name)
    return values


def surrogate(name: str, p: Tensor, q: Tensor) -> Tensor:
    """Return values [m] whose gradient by q is the loss's, written as torch's own operations."""
    accepted = torch.minimum(p, q).sum(-1)
    kl = (p * (p / q).log()).sum(-1)
    match name:
        case "cross_entropy" | "kl":
            return kl
        case "reverse_kl":
            return (q * (q / p).log()).sum(-1)
        case "jensen_shannon":
            middle = (p + q) / 2
            return 0.5 * (p * (p / middle).log() + q * (q / middle).log()).sum(-1)
        case "tvd" | "tvd++":
            return 0.5 * (p - q).abs().sum(-1)
        case "tvd++_position":  # REINFORCE: E_q[-advantage], with a constant advantage
            r = (p > q).to(p.dtype)
            mean = (q * r).sum(-1, keepdim=True)
            deviation = (q * (r - mean) ** 2).sum(-1, keepdim=True).sqrt()
            return -(q * ((r - mean) / deviation).detach()).sum(-1)
        case "negative_log_acceptance":
            return -accepted.log()
        case "lk_hybrid":
            share = torch.exp(-3 * accepted).detach()
            return share * kl + (1 - share) * (1 - accepted)
        case _:
            raise AssertionError(name)


def in_buckets(p: Tensor, ids: Tensor | None) -> Tensor:
    """Return the chosen tokens' probabilities and that of all others."""
    if ids is None:
        return p
    chosen = p.gather(-1, ids)
    return torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], dim=-1)


def distributions(seed: int, num: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Return p [num, V], logits [num, V] of q, and the K most probable tokens of p."""
    generator = torch.Generator().manual_seed(seed)
    p, logits = torch.randn(2, num, V, generator=generator, dtype=torch.float64) * 2
    p = p.softmax(-1)
    return p, logits, p.topk(K).indices


def gradient_by_definition(
    p: Tensor, logits: Tensor, ids: Tensor | None, of: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    logits = logits.clone().requires_grad_()
    loss = of(in_buckets(p, ids), in_buckets(logits.softmax(-1), ids)).sum()
    return torch.autograd.grad(loss, logits)[0]


def gradient_by_slopes(slopes: Tensor, logits: Tensor, ids: Tensor | None) -> Tensor:
    """Return dL/dlogits as the module's docstring says: w_j - q_j sum(w), in buckets spread by q."""
    q = logits.softmax(-1)
    spread = slopes
    if ids is not None:
        rest = in_buckets(q, ids)[:, -1:]
        spread = (slopes[:, -1:] * q / rest).scatter(-1, ids, slopes[:, :-1])
    return spread - q * slopes.sum(-1, keepdim=True)


@pytest.mark.parametrize("buckets", [False, True], ids=["dense", "top-k"])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_loss_has_the_value_and_the_gradient_of_its_definition(name: str, buckets: bool) -> None:
    p, logits, top = distributions(seed=len(name))
    ids = top if buckets else None
    p_b, q_b = in_buckets(p, ids), in_buckets(logits.softmax(-1), ids)
    values, slopes = LOSSES[name](p_b, q_b)

    assert values.tolist() == pytest.approx(values_by_loops(name, p_b, q_b), rel=1e-9)
    expected = gradient_by_definition(p, logits, ids, lambda a, b: surrogate(name, a, b))
    found = gradient_by_slopes(slopes, logits, ids)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_a_mean_over_the_vocabulary_instead_of_q_has_another_gradient() -> None:
    """Planted bug: a surrogate that sums the advantages without the weight q.

    Its values look like a loss and fall in training, but its direction is another one.
    """
    p, logits, _ = distributions(seed=1)

    def unweighted(p: Tensor, q: Tensor) -> Tensor:
        r = (p > q).to(p.dtype)
        mean, deviation = r.mean(-1, keepdim=True), r.std(-1, keepdim=True)
        return -(q.log() * ((r - mean) / deviation)).mean(-1)

    right = gradient_by_definition(p, logits, None, lambda a, b: surrogate("tvd++_position", a, b))
    wrong = gradient_by_definition(p, logits, None, unweighted)
    ours = gradient_by_slopes(tvd_plus_plus(p, logits.softmax(-1))[1], logits, None)

    assert torch.cosine_similarity(ours, right, dim=-1).min() > 1 - 1e-9
    assert torch.cosine_similarity(ours, wrong, dim=-1).max() < 0.95


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_equal_distributions_have_no_loss_and_no_gradient(name: str) -> None:
    p, _, _ = distributions(seed=2)
    values, slopes = LOSSES[name](p, p.clone())
    assert values.abs().max() < 1e-12
    assert gradient_by_slopes(slopes, p.log(), None).abs().max() < 1e-12


def test_for_a_certain_target_three_losses_are_the_cross_entropy() -> None:
    _, logits, _ = distributions(seed=3)
    tokens = logits.argmin(-1)  # far from the student's own choice
    p = torch.nn.functional.one_hot(tokens, V).double()
    expected = torch.nn.functional.cross_entropy(logits, tokens, reduction="none")
    gradient = logits.softmax(-1) - p
    for name in ("cross_entropy", "kl", "negative_log_acceptance"):
        values, slopes = LOSSES[name](p, logits.softmax(-1))
        torch.testing.assert_close(values, expected)
        torch.testing.assert_close(gradient_by_slopes(slopes, logits, None), gradient)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_losses_of_certain_and_of_tiny_probabilities_are_finite(name: str) -> None:
    certain = torch.zeros(2, V)
    certain[0, 0], certain[1, 1] = 1, 1
    sharp = (torch.eye(V)[:2].roll(3, 0) * 200).softmax(-1)
    for p in (certain, sharp):
        for q in (certain.flip(0), sharp.flip(0), torch.full((2, V), 1 / V)):
            values, slopes = LOSSES[name](p, q)
            assert torch.isfinite(values).all()
            assert torch.isfinite(slopes).all()


def test_the_total_variation_distance_is_one_minus_the_acceptance() -> None:
    p, logits, _ = distributions(seed=4)
    q = logits.softmax(-1)
    torch.testing.assert_close(0.5 * (p - q).abs().sum(-1), 1 - acceptance(p, q))


def test_the_lk_hybrid_is_between_kl_and_tvd_by_the_acceptance() -> None:
    """Nearly KL while nothing is accepted, nearly TVD (weight 1 - exp(-3)) when all is."""
    p, logits, _ = distributions(seed=5)
    q = logits.softmax(-1)
    hybrid, _ = LOSSES["lk_hybrid"](p, q)
    ends = torch.stack([LOSSES["kl"](p, q)[0], LOSSES["tvd"](p, q)[0]])
    assert (hybrid > ends.amin(0)).all()
    assert (hybrid < ends.amax(0)).all()

    apart = torch.tensor([[1 - 1e-9, 1e-9], [1e-9, 1 - 1e-9]], dtype=torch.float64)
    close = torch.tensor([[0.5, 0.5], [0.5 + 1e-4, 0.5 - 1e-4]], dtype=torch.float64)
    for (p_row, q_row), kl_share in ((apart, 1.0), (close, math.exp(-3))):
        _, slopes = LOSSES["lk_hybrid"](p_row[None], q_row[None])
        of_kl, of_tvd = LOSSES["kl"](p_row[None], q_row[None])[1], -q_row * (p_row > q_row)
        torch.testing.assert_close(
            slopes, kl_share * of_kl + (1 - kl_share) * of_tvd, rtol=1e-3, atol=1e-6
        )


# --- buckets --------------------------------------------------------------------------------------


def test_in_fewer_buckets_divergences_are_lower_bounds() -> None:
    p, logits, ids = distributions(seed=6)
    q = logits.softmax(-1)
    for name in ("kl", "reverse_kl", "jensen_shannon", "tvd"):
        whole, _ = LOSSES[name](p, q)
        bound, _ = LOSSES[name](in_buckets(p, ids), in_buckets(q, ids))
        assert (bound < whole + 1e-12).all(), name
    assert (acceptance(in_buckets(p, ids), in_buckets(q, ids)) >= acceptance(p, q) - 1e-12).all()


# --- samples --------------------------------------------------------------------------------------


def sampled_gradients(
    p: Tensor, logits: Tensor, draws: int, num_samples: int, standardised: bool
) -> Tensor:
    """Return gradients [draws, m, V], each from its own samples."""
    generator = torch.Generator().manual_seed(0)
    q = logits.softmax(-1)
    return torch.stack(
        [
            gradient_by_slopes(
                sampled_tvd_slopes(p, q, num_samples, generator, standardised), logits, None
            )
            for _ in range(draws)
        ]
    )


def test_the_mean_of_sampled_gradients_is_the_exact_gradient() -> None:
    p, logits, _ = distributions(seed=7, num=3)
    found = sampled_gradients(p, logits, draws=4000, num_samples=8, standardised=False)
    exact = gradient_by_slopes(tvd(p, logits.softmax(-1))[1], logits, None)
    # of 36 entries none is five standard errors away, with 1 in 50,000 runs as the exception
    errors = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - exact).abs() < 5 * errors + 1e-12).all()
    assert errors.max() < 0.1 * exact.abs().max()  # or the comparison could not fail


def test_standardised_samples_have_the_exact_direction_and_less_noise() -> None:
    """TVD++ subtracts the mean reward, which is a baseline: the expected gradient keeps its direction.

    With rewards of 0 or 1 and a share m of 1, the noise of one sample falls from about m to m (1 - m).
    For a q near p, as of a trained drafter, m is a little below one half, so the variance per squared
    mean is nearly halved. Without the baseline (only divided by the deviation) the ratio would be 1.
    """
    generator = torch.Generator().manual_seed(5)
    of_target, noises = torch.randn(2, 8, 50, generator=generator, dtype=torch.float64)
    p, logits = of_target.softmax(-1), of_target + 0.4 * noises
    exact = gradient_by_slopes(tvd(p, logits.softmax(-1))[1], logits, None)
    noise = []
    for standardised in (False, True):
        found = sampled_gradients(p, logits, 3000, 16, standardised)
        mean = found.mean(0)
        assert torch.cosine_similarity(mean.flatten(), exact.flatten(), dim=0) > 0.99
        noise.append(float(found.var(0).sum() / (mean**2).sum()))
    share = float((logits.softmax(-1) * rewards(p, logits.softmax(-1))).sum(-1).mean())
    assert 0.3 < share < 0.5
    assert noise[1] < 0.75 * noise[0]
