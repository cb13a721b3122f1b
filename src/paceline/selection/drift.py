"""Drift detection: an alarm when requests have left the range that a policy was learned on.

Two kinds of number are monitored: the distance of each request's features from the nearest of some
centres of the training prompts, and the acceptance of each arm in use. A request is *outside* if
such a number exceeds a quantile of training. One outside request means nothing; a cumulative sum over
requests raises the alarm. This module knows no models and no prices.

The sum adds log-likelihood ratios between the shares `RARE` and `OFTEN` of outside requests, and
restarts at 0. While at most `RARE` are outside, each monitored number raises an alarm once per
`REQUESTS_PER_FALSE_ALARM` requests on average, or less often: with a threshold of h, once per e^h
requests (Page's test; Lorden, 1971). Symbols: n prompts, F features, C centres.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from math import log, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_tensors

from paceline.errors import ArtefactError, StoreError
from paceline.files import write_atomically
from paceline.selection.features import CLIP, standardisation, standardise

if TYPE_CHECKING:
    from collections.abc import Mapping

    from paceline.contracts import Completion

RARE: Final = 0.1
OFTEN: Final = 0.6
REQUESTS_PER_FALSE_ALARM: Final = 100_000
RANGE_FILE: Final = "range.safetensors"
MIN_PROMPTS: Final = 20

_TAIL: Final = (
    0.02  # of training beyond a quantile; far below RARE, because one task may have it all
)
_NUM_CENTRES: Final = 8
_KMEANS_ROUNDS: Final = 10
_THRESHOLD: Final = log(REQUESTS_PER_FALSE_ALARM)
_UP: Final = log(OFTEN / RARE)
_DOWN: Final = log((1 - OFTEN) / (1 - RARE))


@dataclass(frozen=True, slots=True, eq=False)
class TrainingRange:
    """The range of features and acceptance in training, saved next to a policy."""

    mean: np.ndarray  # [F] float32
    scale: np.ndarray  # [F] float32, 1/std, 0 for a feature that does not vary
    centres: np.ndarray  # [C, F] float32, standardised
    farthest: float  # distance from the nearest centre that few prompts exceed
    acceptance: dict[str, tuple[float, float]]  # arm -> (low, high) quantiles of acceptance

    @classmethod
    def fit(
        cls, features: np.ndarray, acceptance: Mapping[str, np.ndarray], seed: int = 0
    ) -> TrainingRange:
        """Fit features [n, F] and, by arm, each prompt's accepted share of drafted tokens.

        Give an arm's acceptance on the prompts for which the policy would choose it; on others it
        may differ. Distances are those of prompts that did not make the centres. An arm with fewer
        than `MIN_PROMPTS` prompts is not monitored. Raises StoreError for too few prompts and for
        features that are not finite.
        """
        n = len(features)
        if n < 2 * MIN_PROMPTS or not np.isfinite(features).all():
            raise StoreError(f"a range needs at least {2 * MIN_PROMPTS} prompts, all finite: {n}")
        mean, scale = standardisation(features)
        inputs = standardise(features, mean, scale)
        rng = np.random.default_rng(seed)
        halves = rng.permutation(n) % 2
        distances = np.empty(n)
        for half in range(2):
            centres = _fit_centres(inputs[halves != half], rng)
            distances[halves == half] = [_distance(row, centres) for row in inputs[halves == half]]
        return cls(
            mean,
            scale,
            _fit_centres(inputs, rng),
            float(np.quantile(distances, 1 - _TAIL)),
            {
                arm: (
                    float(np.quantile(shares, _TAIL / 2)),
                    float(np.quantile(shares, 1 - _TAIL / 2)),
                )
                for arm, shares in acceptance.items()
                if len(shares) >= MIN_PROMPTS
            },
        )

    def distance(self, features: np.ndarray) -> float:
        """Return the distance of features [F] from the nearest centre; NaN if a feature is NaN."""
        with np.errstate(invalid="ignore"):  # infinity times a scale of 0
            inputs = (features - self.mean) * self.scale
        return _distance(np.minimum(np.maximum(inputs, -CLIP), CLIP), self.centres)

    def save(self, folder: Path) -> None:
        """Write the range next to a policy."""
        tensors = {"mean": self.mean, "scale": self.scale, "centres": self.centres}
        facts = {"farthest": self.farthest, "acceptance": self.acceptance}
        data = save_tensors(tensors, metadata={"range": json.dumps(facts)})
        write_atomically(Path(folder) / RANGE_FILE, data)

    @classmethod
    def load(cls, folder: Path) -> TrainingRange:
        """Read a saved range. Raises ArtefactError if it is missing or damaged."""
        path = Path(folder) / RANGE_FILE
        try:
            with safe_open(path, "np") as file:
                facts: dict[str, Any] = json.loads(file.metadata()["range"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            acceptance = {arm: (low, high) for arm, (low, high) in facts["acceptance"].items()}
            return cls(farthest=facts["farthest"], acceptance=acceptance, **tensors)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ArtefactError(
                f"{path}: no training range to monitor ({error}); run `paceline learn`"
            ) from error


def _distance(inputs: np.ndarray, centres: np.ndarray) -> float:
    """Return the root mean square difference of features [F] from the nearest centre."""
    differences = centres - inputs
    return sqrt(np.einsum("cf,cf->c", differences, differences).min() / len(inputs))


def _fit_centres(inputs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return centres [C, F] of features [n, F] by k-means: several tasks have no common middle."""
    centres = inputs[rng.permutation(len(inputs))[:_NUM_CENTRES]].copy()
    for _ in range(_KMEANS_ROUNDS):
        squares = (centres**2).sum(axis=1) - 2 * inputs @ centres.T  # [n, C], up to a constant
        nearest = squares.argmin(axis=1)
        for c in range(len(centres)):
            if (own := nearest == c).any():
                centres[c] = inputs[own].mean(axis=0)
    return centres


@dataclass(frozen=True, slots=True)
class Alarm:
    """The cause of an alarm: the arm whose acceptance left its training range, None for the features.

    `outside` of the last `requests` requests were outside, counted since the sum was 0.
    """

    arm: str | None
    outside: int
    requests: int

    def __str__(self) -> str:
        what = "features" if self.arm is None else f"acceptance of '{self.arm}'"
        return (
            f"{what} left the range seen in training: {self.outside} of the last {self.requests} "
            "requests lay outside; collect prompts like them and run `paceline learn`"
        )


@dataclass(slots=True)
class _CumulativeSum:
    total: float = 0.0
    outside: int = 0
    requests: int = 0
    alarmed: bool = False

    def add(self, is_outside: bool) -> bool:
        """Add a request; return True if it raises the alarm, once until the sum is 0 again."""
        self.requests += 1
        self.outside += is_outside
        self.total += _UP if is_outside else _DOWN
        if self.total <= 0:
            self.total, self.outside, self.requests, self.alarmed = 0.0, 0, 0, False
        raised = self.total >= _THRESHOLD and not self.alarmed
        if self.total >= _THRESHOLD:
            self.total, self.alarmed = _THRESHOLD, True  # capped, so that it can fall again
        return raised


@dataclass(slots=True)
class DriftAlarm:
    """A monitor of completed requests; its memory is one sum, and one per arm."""

    range: TrainingRange
    _sums: dict[str | None, _CumulativeSum] = field(default_factory=dict)

    def observe_completion(self, completion: Completion) -> Alarm | None:
        """Count a completed request of a policy; return the alarm that it raises, or None.

        Acceptance counts only if the policy's arm decoded the whole request: with several
        arms it is unknown whose tokens were accepted. A request without features did not ask the policy
        and is not counted.
        """
        decision = completion.decision
        if decision.features is None:
            return None
        is_as_chosen = not (completion.switches or "," in decision.policy)
        rounds = completion.rounds if is_as_chosen else []
        accepted, drafted = sum(r.accepted for r in rounds), sum(r.drafted for r in rounds)
        return self.observe(decision.features, decision.arm, accepted, drafted)

    def observe(
        self, features: np.ndarray | None, arm: str, accepted: int, drafted: int
    ) -> Alarm | None:
        """Count one request; return the alarm that it raises, features before acceptance, or None.

        features: [F], or None to monitor the acceptance alone. Features with a NaN are outside.
        """
        alarm = None
        if drafted and arm in self.range.acceptance:
            low, high = self.range.acceptance[arm]
            alarm = self._count(arm, not low <= accepted / drafted <= high)
        if features is not None:
            is_inside = self.range.distance(features) <= self.range.farthest
            alarm = self._count(None, not is_inside) or alarm
        return alarm

    def _count(self, arm: str | None, is_outside: bool) -> Alarm | None:
        monitored = self._sums.setdefault(arm, _CumulativeSum())
        if monitored.add(is_outside):
            return Alarm(arm, monitored.outside, monitored.requests)
        return None
