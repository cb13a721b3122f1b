"""Noise depends on seed, position and stream only; it is uniform and its streams are independent."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from paceline import noise

STREAMS = (noise.TARGET, noise.DRAFT, noise.ACCEPT)
ALPHA = 1e-7
N = 200_000


def test_noise_does_not_depend_on_its_batch() -> None:
    seeds = torch.tensor([0, 1, -5, 2**62])[:, None]
    positions = torch.arange(7)
    together = noise.exponential(seeds, positions, noise.TARGET, 11)
    uniforms = noise.uniform(seeds, positions, noise.ACCEPT)

    assert together.shape == (4, 7, 11)
    for i, j in itertools.product(range(4), range(7)):
        alone = noise.exponential(seeds[i, 0], positions[j], noise.TARGET, 11)
        assert torch.equal(alone, together[i, j])
        assert torch.equal(noise.uniform(seeds[i, 0], positions[j], noise.ACCEPT), uniforms[i, j])


def test_a_larger_vocabulary_does_not_change_the_noise_of_the_first_tokens() -> None:
    seed, position = torch.tensor(4), torch.tensor(9)
    wide = noise.exponential(seed, position, noise.DRAFT, 50)

    assert torch.equal(noise.exponential(seed, position, noise.DRAFT, 20), wide[:20])


def reference_bits(seed: int, position: int, stream: int) -> int:
    """Return the generator's bits, computed with Python integers."""
    mask = 2**64 - 1
    golden = 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    return mix((mix((seed + golden * stream) & mask) + golden * (position + 1)) & mask)


@pytest.mark.parametrize("stream", STREAMS)
def test_noise_equals_the_reference_generator(stream: int) -> None:
    for seed, position in itertools.product((0, 1, -1, 2**62, -(2**63)), (0, 1, 12345)):
        expected = (reference_bits(seed, position, stream) >> 11) * 2.0**-53

        assert noise.uniform(torch.tensor(seed), torch.tensor(position), stream) == expected


def test_the_values_of_a_seed_are_fixed() -> None:
    """Another constant or stream number would change every seeded text."""
    u = noise.uniform(torch.tensor([0, 123456789]), torch.tensor(3), noise.ACCEPT)
    e = noise.exponential(torch.tensor(42), torch.tensor(0), noise.TARGET, 3)

    assert u.tolist() == pytest.approx([0.46318214836205696, 0.24569966324713444], abs=1e-12)
    assert e.tolist() == pytest.approx([0.4893484, 2.542331, 0.08677468], rel=1e-5)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("along", ["seeds", "positions", "spread seeds"])
def test_uniforms_are_uniform(stream: int, along: str) -> None:
    counter = torch.arange(N)
    zero = torch.tensor(17)
    u = {
        "seeds": lambda: noise.uniform(counter, zero, stream),
        "positions": lambda: noise.uniform(zero, counter, stream),
        "spread seeds": lambda: noise.uniform(counter << 32, zero, stream),
    }[along]().numpy()

    assert u.min() >= 0.0 and u.max() < 1.0
    assert stats.kstest(u, "uniform").pvalue > ALPHA
    counts = np.histogram(u, bins=512, range=(0.0, 1.0))[0]
    assert stats.chisquare(counts).pvalue > ALPHA


@pytest.mark.parametrize("stream", STREAMS)
def test_exponentials_are_exponential_for_every_token(stream: int) -> None:
    e = noise.exponential(torch.arange(N // 8), torch.tensor(2), stream, 8).numpy()

    for token in range(8):
        assert stats.kstest(e[:, token], "expon").pvalue > ALPHA
    assert e.min() > 0.0 and np.isfinite(e).all()


def shifted_pairs() -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Return pairs of numbers that are used together, so must be independent."""
    counter, place = torch.arange(N), torch.tensor(5)
    pairs = [
        (f"stream {a} and {b}", noise.uniform(counter, place, a), noise.uniform(counter, place, b))
        for a, b in itertools.combinations(STREAMS, 2)
    ]
    one = noise.uniform(counter, place, noise.TARGET)
    pairs.append(("next position", one, noise.uniform(counter, place + 1, noise.TARGET)))
    pairs.append(("next seed", one, noise.uniform(counter + 1, place, noise.TARGET)))
    pairs.append(("far seed", one, noise.uniform(counter + 2**40, place, noise.TARGET)))
    tokens = noise.exponential(counter, place, noise.TARGET, 3)
    drafts = noise.exponential(counter, place, noise.DRAFT, 3)
    later = noise.exponential(counter, place + 1, noise.TARGET, 3)
    pairs.append(("neighbouring tokens", tokens[:, 0], tokens[:, 1]))
    pairs.append(("a token drafted and judged", tokens[:, 1], drafts[:, 1]))
    pairs.append(("a token and its neighbour at the next position", tokens[:, 1], later[:, 0]))
    accept = noise.uniform(counter, place, noise.ACCEPT)
    pairs.append(("a draft and its accept test", drafts[:, 0], accept))
    return pairs


def test_noise_for_different_purposes_is_independent() -> None:
    for name, a, b in shifted_pairs():
        assert stats.spearmanr(a.numpy(), b.numpy()).pvalue > ALPHA, name
        ranks = [stats.rankdata(x.numpy()) * 16 // (N + 1) for x in (a, b)]
        table = np.histogram2d(*ranks, bins=16)[0]
        assert stats.chi2_contingency(table).pvalue > ALPHA, name


def test_the_race_draws_from_the_given_distribution() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.0499, 0.0001, 0.0])
    drawn = noise.race(p, noise.exponential(torch.arange(N), torch.tensor(1), noise.TARGET, 6))

    counts = torch.bincount(drawn, minlength=6).numpy()
    assert counts[5] == 0
    expected = (p[:5].double() / p.double().sum() * N).numpy()
    assert stats.chisquare(counts[:5], expected).pvalue > ALPHA


def test_the_race_does_not_depend_on_the_scale_of_weights() -> None:
    p = torch.tensor([0.5, 0.3, 0.2])
    e = noise.exponential(torch.arange(1000), torch.tensor(1), noise.TARGET, 3)

    assert torch.equal(noise.race(p, e), noise.race(0.125 * p, e))


@pytest.mark.parametrize("width", [1, 7, 300, 5000])
def test_the_compiled_race_has_the_winner_of_the_reference(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    for seed in (0, 11, -3, 2**62):
        for position in (0, 5, 900, noise.of_round(17, 12)):
            logits = torch.randn(width, generator=generator) * 4
            probs = logits.softmax(dim=-1)
            probs[torch.rand(width, generator=generator) < 0.3] = 0.0
            for stream in (noise.TARGET, noise.DRAFT):
                e = noise.exponential(torch.tensor(seed), torch.tensor(position), stream, width)

                assert noise.draw(probs, seed, position, stream) == noise.race(probs, e)


def test_the_compiled_race_draws_from_the_distribution() -> None:
    p = torch.tensor([0.5, 0.0, 0.25, 0.125, 0.125])

    counts = np.bincount([noise.draw(p, s, 3, noise.DRAFT) for s in range(N // 8)], minlength=5)

    expected = p.numpy() * counts.sum()
    assert counts[1] == 0
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected) + 1e-9).all()
