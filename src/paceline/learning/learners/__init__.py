"""Every learner by its name in the configuration."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from paceline.learning.learners.acceptance import AcceptanceLearner
from paceline.learning.learners.bandits import BanditLearner
from paceline.learning.learners.base import Curve, Fitted, Learner, Progress, Summary
from paceline.learning.learners.baselines import (
    FirstLineLearner,
    FixedLearner,
    RandomLearner,
    oracle,
)
from paceline.learning.learners.neighbours import NeighboursLearner
from paceline.learning.learners.networks import LOSSES, NetworkLearner

if TYPE_CHECKING:
    from collections.abc import Mapping

_ALL: Final[tuple[Learner, ...]] = (
    AcceptanceLearner(),
    *(NetworkLearner(loss) for loss in LOSSES),
    NeighboursLearner(),
    BanditLearner("linucb"),
    BanditLearner("thompson"),
    FixedLearner(),
    RandomLearner(),
    FirstLineLearner(),
)
LEARNERS: Final[Mapping[str, Learner]] = MappingProxyType({one.name: one for one in _ALL})

__all__ = [
    "LEARNERS",
    "Curve",
    "Fitted",
    "Learner",
    "Progress",
    "Summary",
    "oracle",
]
