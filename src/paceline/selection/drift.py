"""Noticing that requests have left what a policy was learned on: an alarm, not a decision.

Controlled are one number of each request's features, its distance from the nearest of some centres of
the training prompts, and the acceptance of each arm in use. A request is outside where such a number
lies beyond a quantile of training. One outside says nothing; a cumulative sum over requests raises
the alarm. Knows no models and no prices.

The sum is that of log-likelihood ratios between `RARE` and `OFTEN` outside, restarted at 0. While a
share of at most `RARE` is outside, an alarm comes once in `REQUESTS_PER_FALSE_ALARM` requests or more
seldom, on average, for each number watched: e^h requests at least, for a threshold of h.
Symbols: n prompts, F features, C centres.
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
from paceline.selection.scaling import CLIP, standardisation, standardise

if TYPE_CHECKING:
    from collections.abc import Mapping

    from paceline.contracts import Completion

RARE: Final = 0.1
OFTEN: Final = 0.6
REQUESTS_PER_FALSE_ALARM: Final = 100_000
RANGE_FILE: Final = "range.safetensors"
MIN_PROMPTS: Final = 20

_TAIL: Final = 0.02  # of training beyond a quantile; well below RARE, for one task may have it all
_NUM_CENTRES: Final = 8
_ROUNDS: Final = 10
_THRESHOLD: Final = log(REQUESTS_PER_FALSE_ALARM)
_UP: Final = log(OFTEN / RARE)
_DOWN: Final = log((1 - OFTEN) / (1 - RARE))


@dataclass(frozen=True, slots=True, eq=False)
class TrainingRange:
    """Where features and acceptance lay in training. Saved beside a policy."""

    mean: np.ndarray  # [F] float32
    scale: np.ndarray  # [F] float32, 1/std, 0 where nothing varied
    centres: np.ndarray  # [C, F] float32, standardised
    farthest: float  # distance from the nearest centre that few prompts exceed
    acceptance: dict[str, tuple[float, float]]  # arm -> lowest and highest share, but for a few

    @classmethod
    def fit(
        cls, features: np.ndarray, acceptance: Mapping[str, np.ndarray], seed: int = 0
    ) -> TrainingRange:
        """From features [n, F] and, by arm, each prompt's accepted share of drafted tokens.

        Give an arm's acceptance on the prompts for which the policy would choose it: on others it
        may be quite different. Distances are of prompts that the centres were not made from. An arm
        with fewer than `MIN_PROMPTS` is not watched.
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
            centres = _centres(inputs[halves != half], rng)
            distances[halves == half] = [_nearest(row, centres) for row in inputs[halves == half]]
        shares = {arm: np.asarray(values) for arm, values in acceptance.items()}
        return cls(
            mean,
            scale,
            _centres(inputs, rng),
            float(np.quantile(distances, 1 - _TAIL)),
            {
                arm: (float(np.quantile(v, _TAIL / 2)), float(np.quantile(v, 1 - _TAIL / 2)))
                for arm, v in shares.items()
                if len(v) >= MIN_PROMPTS
            },
        )

    def distance(self, features: np.ndarray) -> float:
        """From the nearest centre, for features [F]; not a number where one of them is not."""
        with np.errstate(invalid="ignore"):  # infinity times a scale of 0
            inputs = (features - self.mean) * self.scale
        return _nearest(np.minimum(np.maximum(inputs, -CLIP), CLIP), self.centres)

    def save(self, folder: Path) -> None:
        """Write it beside a policy."""
        tensors = {"mean": self.mean, "scale": self.scale, "centres": self.centres}
        facts = {"farthest": self.farthest, "acceptance": self.acceptance}
        data = save_tensors(tensors, metadata={"range": json.dumps(facts)})
        write_atomically(Path(folder) / RANGE_FILE, data)

    @classmethod
    def load(cls, folder: Path) -> TrainingRange:
        """What `save` wrote. Raises ArtefactError if it is missing or damaged."""
        path = Path(folder) / RANGE_FILE
        try:
            with safe_open(path, "np") as file:
                facts: dict[str, Any] = json.loads(file.metadata()["range"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            acceptance = {arm: (low, high) for arm, (low, high) in facts["acceptance"].items()}
            return cls(farthest=facts["farthest"], acceptance=acceptance, **tensors)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ArtefactError(
                f"{path}: no range to watch ({error}); run `paceline learn`"
            ) from error


def _nearest(inputs: np.ndarray, centres: np.ndarray) -> float:
    """Root mean square difference of standardised features [F] from the nearest centre."""
    apart = centres - inputs
    return sqrt(np.einsum("cf,cf->c", apart, apart).min() / len(inputs))


def _centres(inputs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[C, F] by a few rounds of k-means from [n, F]: prompts of several tasks have no one middle."""
    centres = inputs[rng.permutation(len(inputs))[:_NUM_CENTRES]].copy()
    for _ in range(_ROUNDS):
        squares = (centres**2).sum(axis=1) - 2 * inputs @ centres.T  # [n, C], up to a constant
        nearest = squares.argmin(axis=1)
        for c in range(len(centres)):
            if (own := nearest == c).any():
                centres[c] = inputs[own].mean(axis=0)
    return centres


@dataclass(frozen=True, slots=True)
class Alarm:
    """Which arm's acceptance left its training range; None: the features did. `outside` of the last
    `requests` were outside, counted from where the sum last was 0.
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
class _Sum:
    """The cumulative sum of one watched number."""

    total: float = 0.0
    outside: int = 0
    requests: int = 0
    alarmed: bool = False

    def add(self, is_outside: bool) -> bool:
        """Whether this request raises the alarm; it is raised once until the sum is 0 again."""
        self.requests += 1
        self.outside += is_outside
        self.total += _UP if is_outside else _DOWN
        if self.total <= 0:
            self.total, self.outside, self.requests, self.alarmed = 0.0, 0, 0, False
        raised = self.total >= _THRESHOLD and not self.alarmed
        if self.total >= _THRESHOLD:
            self.total, self.alarmed = _THRESHOLD, True  # capped, so that it can come down again
        return raised


@dataclass(slots=True)
class DriftAlarm:
    """Watches requests as they end; memory for one sum, and one an arm."""

    range: TrainingRange
    _sums: dict[str | None, _Sum] = field(default_factory=dict)

    def observe(
        self, features: np.ndarray | None, arm: str, accepted: int, drafted: int
    ) -> Alarm | None:
        """Count one request; the alarm it raises, features before acceptance, or None.

        `features` [F] are None where the policy was not asked. Features that are not numbers are
        outside.
        """
        alarm = None
        if drafted and arm in self.range.acceptance:
            low, high = self.range.acceptance[arm]
            alarm = self._count(arm, not low <= accepted / drafted <= high)
        if features is not None:
            is_inside = self.range.distance(features) <= self.range.farthest
            alarm = self._count(None, not is_inside) or alarm
        return alarm

    def observe_completion(self, completion: Completion) -> Alarm | None:
        """Count one completed request, as `observe` does, if the policy chose its arm."""
        decision = completion.decision
        if decision.features is None:
            return None
        # a mixture or a switch of arms does not say which arm accepted which tokens
        as_chosen = not (completion.switches or "," in decision.policy)
        rounds = completion.rounds if as_chosen else []
        accepted, drafted = sum(r.accepted for r in rounds), sum(r.drafted for r in rounds)
        return self.observe(decision.features, decision.arm, accepted, drafted)

    @property
    def alarms(self) -> list[str | None]:
        """What is outside its range now, as in `Alarm.arm`."""
        return [arm for arm, total in self._sums.items() if total.alarmed]

    def _count(self, arm: str | None, is_outside: bool) -> Alarm | None:
        watched = self._sums.setdefault(arm, _Sum())
        if watched.add(is_outside):
            return Alarm(arm, watched.outside, watched.requests)
        return None
