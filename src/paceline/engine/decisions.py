"""The check of a policy's decision, before it is carried out and logged.

A policy may be the user's own code. Numbers of other libraries are converted to Python's, so that a
decision can be compared, written as JSON and read again.
"""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from paceline.contracts import Decision
from paceline.errors import ArtefactError, shown

if TYPE_CHECKING:
    from collections.abc import Mapping

_ROUNDED: Final = 1e-6  # rounding error of a sum of probabilities


def check_decision(given: Any) -> Decision:
    """Return the decision in Python's numbers. Raises ArtefactError that names the wrong field."""
    if not isinstance(given, Decision):
        raise ArtefactError(f"choose must return a Decision, got {shown(given)}")
    for what in ("arm", "policy"):
        if not isinstance(getattr(given, what), str):
            raise ArtefactError(f"{what} must be a string, got {shown(getattr(given, what))}")
    propensity = _number("propensity", given.propensity)
    if not 0.0 < propensity <= 1.0 + _ROUNDED:
        raise ArtefactError(
            f"propensity must be a probability above 0, got {propensity:g}: how likely the arm was "
            "to be chosen"
        )
    return Decision(
        arm=str(given.arm),
        propensity=min(propensity, 1.0),
        scores=_numbers("scores", given.scores),
        policy=str(given.policy),
        features=None if given.features is None else _features(given.features),
        seconds_per_token=_numbers("seconds_per_token", given.seconds_per_token, above=0.0),
        seconds_in_rounds=_numbers("seconds_in_rounds", given.seconds_in_rounds, above=0.0),
    )


def _numbers(what: str, given: Mapping[Any, Any], above: float | None = None) -> dict[str, float]:
    if not hasattr(given, "items"):
        raise ArtefactError(f"{what} must map arms to numbers, got {shown(given)}")
    found: dict[str, float] = {}
    for arm, value in given.items():
        if not isinstance(arm, str):
            raise ArtefactError(f"{what} must be given by arm, got {shown(arm)}")
        number = found[str(arm)] = _number(f"{what} of '{arm}'", value)
        if above is not None and not number > above:
            raise ArtefactError(f"{what} of '{arm}' must be above {above:g}, got {number:g}")
    return found


def _number(what: str, given: Any) -> float:
    try:
        number = float("nan") if isinstance(given, str | bytes | bool) else float(given)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not isfinite(number):
        raise ArtefactError(f"{what} must be a finite number, got {shown(given)}")
    return number


def _features(given: Any) -> np.ndarray:
    try:
        features = np.asarray(given, dtype=np.float32).copy()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArtefactError(f"features must be an array of numbers ({error})") from error
    if features.ndim != 1:
        raise ArtefactError(f"features must have one dimension, got {list(features.shape)}")
    return features
