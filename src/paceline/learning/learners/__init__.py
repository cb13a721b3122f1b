"""The catalogue of learners. A new learner is one file here and one line in `_ALL`."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from paceline.errors import ConfigError, suggest_name
from paceline.learning.learners.acceptance import AcceptanceLearner
from paceline.learning.learners.bandits import BanditLearner
from paceline.learning.learners.base import Curve, Fitted, Learner, LearnerSettings, Summary
from paceline.learning.learners.baselines import FirstLineLearner, FixedLearner, RandomLearner
from paceline.learning.learners.neighbours import NeighboursLearner
from paceline.learning.learners.networks import LOSSES, NetworkLearner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from paceline.config import LearningSection

_ALL: Final[tuple[Learner[Any], ...]] = (
    AcceptanceLearner(),
    *(NetworkLearner(loss) for loss in LOSSES),
    NeighboursLearner(),
    BanditLearner(),
    FixedLearner(),
    RandomLearner(),
    FirstLineLearner(),
)
LEARNERS: Final[Mapping[str, Learner[Any]]] = MappingProxyType(
    {learner.name: learner for learner in _ALL}
)

__all__ = [
    "LEARNERS",
    "Curve",
    "Fitted",
    "Learner",
    "LearnerSettings",
    "Summary",
    "check_settings",
    "find_learner",
]


def find_learner(name: str) -> Learner[Any]:
    """Return the learner of a name. Raises ConfigError if there is none."""
    if name not in LEARNERS:
        raise ConfigError(f"unknown learner '{name}'{suggest_name(name, list(LEARNERS))}")
    return LEARNERS[name]


def check_settings(section: LearningSection) -> LearnerSettings:
    """Return the section as its learner's settings, see `Learner.settings`.

    An option of any learner is allowed, so that several learners can be compared under one section.
    Raises ConfigError for an unknown learner, an unknown option or a value out of range.
    """
    find_learner(section.learner)
    options = {name for learner in LEARNERS.values() for name in learner.Settings.model_fields}
    for name in section.model_extra or ():
        if name not in options:
            raise ConfigError(
                f"learning: unknown key '{name}'{suggest_name(name, sorted(options))}"
            )
    checked: dict[str, LearnerSettings] = {
        name: learner.settings(section) for name, learner in LEARNERS.items()
    }
    return checked[section.learner]
