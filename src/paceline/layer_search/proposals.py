"""Proposals of the next subset: a fixed design, then Bayesian optimisation with a Gaussian process.

The design tries every sub-layer alone, then growing sets of the harmless ones. After it the process
proposes the subset with the largest log expected improvement. If that was tried before, an untried
neighbour of the best subset takes its place. A proposal depends only on the seed and the earlier
trials, so an interrupted search continues as it would have. Source: arXiv 2309.08168, section 3.1,
with 1,000 rounds of such a search. A subset is a tuple of bits: attention of layer 0, 1, ..., then
MLP of layer 0, 1, ...; a set bit is skipped.
"""

from __future__ import annotations

import importlib
import random
import warnings
from itertools import combinations
from typing import TYPE_CHECKING, Any, Final

from paceline.errors import ConfigError
from paceline.models.sublayers import LayerSubset

if TYPE_CHECKING:
    from collections.abc import Mapping

    Bits = tuple[bool, ...]

_TOGETHER: Final = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)  # shares of the sub-layers


def bits_of(subset: LayerSubset, num_layers: int) -> Bits:
    layers = range(num_layers)
    return (*(i in subset.attention for i in layers), *(i in subset.mlp for i in layers))


def subset_of(bits: Bits) -> LayerSubset:
    num_layers = len(bits) // 2
    skipped = [i for i, bit in enumerate(bits) if bit]
    return LayerSubset(
        frozenset(i for i in skipped if i < num_layers),
        frozenset(i - num_layers for i in skipped if i >= num_layers),
    )


def next_subset(tried: Mapping[Bits, float], num_bits: int, seed: int) -> Bits | None:
    """Return the subset to try next, or None if all were tried.

    tried: subset -> log seconds per token, in order. seed: of the search.
    """
    if len(tried) >= 2**num_bits:
        return None
    proposed = _from_design(tried, num_bits) or _from_process(tried, num_bits, seed)
    return proposed if proposed not in tried else _untried_neighbour(tried, seed)


def _from_design(tried: Mapping[Bits, float], num_bits: int) -> Bits | None:
    alone = [tuple(i == k for i in range(num_bits)) for k in range(num_bits)]
    for bits in alone:
        if bits not in tried:
            return bits
    ranked = sorted(range(num_bits), key=lambda k: tried[alone[k]])
    for share in _TOGETHER:
        chosen = set(ranked[: max(2, round(share * num_bits))])
        bits = tuple(i in chosen for i in range(num_bits))
        if bits not in tried:
            return bits
    return None


def _from_process(tried: Mapping[Bits, float], num_bits: int, seed: int) -> Bits:
    optuna = import_optuna()
    choices = optuna.distributions.CategoricalDistribution([False, True])
    space = {f"bit {i}": choices for i in range(num_bits)}
    # a new sampler for every proposal, so that nothing depends on how long this process has run
    sampler = optuna.samplers.GPSampler(seed=hash((seed, len(tried))) % 2**32, n_startup_trials=0)
    study = optuna.create_study(sampler=sampler)
    for bits, value in tried.items():
        params = dict(zip(space, bits, strict=True))
        trial = optuna.trial.create_trial(params=params, distributions=space, value=value)
        study.add_trial(trial)
    asked = study.ask(space).params
    return tuple(bool(asked[name]) for name in space)


def _untried_neighbour(tried: Mapping[Bits, float], seed: int) -> Bits:
    """Return the best subset with the fewest flipped bits that is untried; ties are drawn."""
    best = min(tried, key=lambda bits: tried[bits])
    for flips in range(1, len(best) + 1):
        near = [
            bits
            for flipped in combinations(range(len(best)), flips)
            if (bits := tuple(b != (i in flipped) for i, b in enumerate(best))) not in tried
        ]
        if near:
            return random.Random(f"{seed} {len(tried)}").choice(near)
    raise ValueError("every subset was tried")


def import_optuna() -> Any:
    """Return optuna, silenced. Raises ConfigError with the command that installs what is missing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import optuna

            importlib.import_module("scipy")  # the sampler needs it, but fails late
    except ImportError as error:
        raise ConfigError(
            f"the search needs {error.name}; install it with: pip install 'paceline[search]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
