"""Policies that stand beside each other: a saved one, or learners trained here on the same prompts.

A contender may have been trained several times with other seeds, and may see only some encoders'
features, or none: then it can only know which arm is best on the whole. Symbols: N prompts, F
features, A arms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.errors import ConfigError, suggest_name
from paceline.learning.learners import LEARNERS
from paceline.selection.choosers import PortableChooser

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.config import LearningSection
    from paceline.learning.dataset import Dataset
    from paceline.learning.learners import Progress
    from paceline.selection.choosers import Chooser

    Encoders = tuple[str, ...] | None  # None: all that were collected

NO_FEATURES: Final = "none"
_TIMED: Final = 50  # choices that are clocked


@dataclass(frozen=True, slots=True)
class Contender:
    """A policy by name, with a chooser for each training of it."""

    name: str
    choosers: tuple[Chooser, ...]
    encoders: Encoders = None

    def distributions(self, data: Dataset, rows: int = 1) -> list[np.ndarray]:
        """By training, the probability of each arm for each prompt: [N, A]."""
        seen = with_encoders(data, self.encoders)
        situation = seen.situation(rows)
        return [c.distribution(c.preferences(seen.features, situation)) for c in self._priced(data)]

    def choose_seconds(self, data: Dataset) -> float:
        """What one choice takes on this machine, the median of some; features are at hand by then."""
        seen = with_encoders(data, self.encoders)
        (chooser, *_) = self._priced(data)
        spent = []
        for i in range(min(len(seen), _TIMED)):
            one = seen.rows(np.array([i]))
            features, situation = one.features, one.situation()
            began = perf_counter()
            chooser.distribution(chooser.preferences(features, situation))
            spent.append(perf_counter() - began)
        return median(spent)

    def _priced(self, data: Dataset) -> tuple[Chooser, ...]:
        """The choosers, with the prices that the data was priced with where they take any."""
        pricer = data.pricer()
        for chooser in self.choosers:
            if isinstance(chooser, PortableChooser):
                chooser.pricer = pricer
        return self.choosers


def train_contenders(
    train: Dataset,
    learners: Sequence[str],
    encoders: Sequence[Encoders],
    settings: LearningSection,
    seeds: int,
    on_progress: Progress,
) -> list[Contender]:
    """Every learner on every choice of encoders, trained once a seed; named by both where needed."""
    for learner in learners:
        if learner not in LEARNERS:
            raise ConfigError(f"unknown learner '{learner}'{suggest_name(learner, LEARNERS)}")
    pairs = [(learner, seen) for learner in learners for seen in encoders]
    parts = {seen: with_encoders(train, seen) for seen in encoders}
    contenders = []
    for done, (learner, seen) in enumerate(pairs):
        on_progress("train", done, len(pairs))
        choosers = tuple(
            LEARNERS[learner]
            .fit(
                parts[seen],
                settings.model_copy(update={"learner": learner, "seed": settings.seed + i}),
                _quiet,
            )
            .chooser
            for i in range(seeds)
        )
        name = learner if len(encoders) == 1 and seen is None else f"{learner} ({_named(seen)})"
        contenders.append(Contender(name, choosers, seen))
    on_progress("train", len(pairs), len(pairs))
    return contenders


def _quiet(stage: str, done: int, total: int) -> None:
    """No progress."""


def _named(encoders: Encoders) -> str:
    if encoders is None:
        return "all encoders"
    return " + ".join(encoders) or "no features"


def parse_encoders(text: str) -> list[Encoders]:
    """`a,b;a;none` as choices of encoders: both, the first alone, none of them."""
    choices: list[Encoders] = []
    for part in text.split(";"):
        names = tuple(name.strip() for name in part.split(",") if name.strip())
        if not names:
            raise ConfigError(f"--encoders '{text}': a choice names encoders, or is {NO_FEATURES}")
        choices.append(() if names == (NO_FEATURES,) else names)
    return choices


def with_encoders(data: Dataset, encoders: Encoders) -> Dataset:
    """The same prompts with the features of some encoders. Raises ConfigError for an unknown one."""
    if encoders is None:
        return data
    for name in encoders:
        if name not in data.spans:
            raise ConfigError(
                f"the collection has no features of the encoder '{name}'"
                f"{suggest_name(name, [*data.spans, NO_FEATURES])}"
            )
    if not encoders:  # a feature that says nothing, so that every learner has one
        nothing = np.zeros((len(data), 1), dtype=np.float32)
        return replace(data, features=nothing, spans={NO_FEATURES: slice(0, 1)})
    blocks = [data.features[:, data.spans[name]] for name in encoders]
    ends = np.cumsum([block.shape[1] for block in blocks]).tolist()
    begins = [0, *ends[:-1]]
    spans = {name: slice(*ends_of) for name, *ends_of in zip(encoders, begins, ends, strict=True)}
    return replace(data, features=np.hstack(blocks), spans=spans)
