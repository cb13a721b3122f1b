"""A network of one hidden layer with one logit per arm, as plain arrays, evaluated in numpy.

`learning` trains it. The shape of the published method's policy (arXiv 2408.08470) is not confirmed;
this shape is ours. The rows in flight are an input in addition to the features, so that one network
chooses under every load. Symbols: N prompts, F features, H hidden units, A arms.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from paceline.selection.choosers.base import Chooser
from paceline.selection.features import standardise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.selection.choosers.base import Arrays, Facts, Situation


@dataclass(frozen=True, slots=True)
class PolicyNetwork:
    """A network: logits = tanh(clip((inputs - mean) * scale) @ w1 + b1) @ w2 + b2, all float32.

    `scale` is 1/std, and 0 for an input that never varied in training, whose effect is unknown.
    """

    mean: np.ndarray  # [F]
    scale: np.ndarray  # [F]
    w1: np.ndarray  # [F, H]
    b1: np.ndarray  # [H]
    w2: np.ndarray  # [H, A]
    b2: np.ndarray  # [A]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all parameters by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def logits(self, inputs: np.ndarray) -> np.ndarray:
        """Return logits [..., A] for inputs [..., F]. NaN counts as the mean."""
        standardised = standardise(inputs, self.mean, self.scale)
        hidden = np.tanh(standardised @ self.w1 + self.b1)
        return np.asarray(hidden @ self.w2 + self.b2, dtype=np.float32)


class NetworkChooser(Chooser):
    """A ranking by the mean log-probability of networks, one per seed."""

    kind: ClassVar[str] = "network"

    def __init__(self, arms: Sequence[str], networks: Sequence[PolicyNetwork]) -> None:
        self.arms = tuple(arms)
        self.networks = tuple(networks)
        for network in self.networks:
            _check_shapes(network, len(self.arms))

    def preferences(self, features: np.ndarray, situation: Situation) -> np.ndarray:
        inputs = with_rows(features, situation.rows)
        return np.asarray(
            np.mean([log_softmax(network.logits(inputs)) for network in self.networks], axis=0)
        )

    def arrays(self) -> dict[str, np.ndarray]:
        return {
            f"{i}.{name}": array
            for i, network in enumerate(self.networks)
            for name, array in network.arrays().items()
        }

    def facts(self) -> dict[str, object]:
        return {"num_networks": len(self.networks)}

    @classmethod
    def merged(cls, choosers: Sequence[NetworkChooser]) -> NetworkChooser:
        networks = [network for chooser in choosers for network in chooser.networks]
        return cls(choosers[0].arms, networks)

    @classmethod
    def restore(cls, arms: Sequence[str], arrays: Arrays, facts: Facts) -> NetworkChooser:
        names = [field.name for field in fields(PolicyNetwork)]
        count = int(str(facts["num_networks"]))
        if set(arrays) != {f"{i}.{name}" for i in range(count) for name in names}:
            raise ValueError(f"unexpected arrays {sorted(arrays)}")
        return cls(
            arms,
            [PolicyNetwork(*(arrays[f"{i}.{name}"] for name in names)) for i in range(count)],
        )


def _check_shapes(network: PolicyNetwork, num_arms: int) -> None:
    F, H = network.w1.shape
    expected = {
        "mean": (F,),
        "scale": (F,),
        "w1": (F, H),
        "b1": (H,),
        "w2": (H, num_arms),
        "b2": (num_arms,),
    }
    found = {name: tuple(array.shape) for name, array in network.arrays().items()}
    if found != expected:
        raise ValueError(f"arrays {found} where {expected} are expected")


def with_rows(features: np.ndarray, rows: int) -> np.ndarray:
    """Return features [N, F] and the logarithm of the rows in flight, as [N, F + 1] float32."""
    load = np.full((len(features), 1), np.log(max(rows, 1)), dtype=np.float32)
    return np.hstack([features, load])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
