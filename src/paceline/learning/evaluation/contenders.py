"""Policies to compare with each other: a saved one, or learners trained here on the same prompts.

A contender may have been trained several times with other seeds, and may see the features of some
encoders only, or none: then it can only know which arm is best on the whole. Symbols: N prompts, F
features, A arms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.contracts import no_progress
from paceline.errors import ConfigError, suggest_name
from paceline.learning.learners import check_settings, find_learner
from paceline.selection.choosers import PortableChooser
from paceline.selection.encoders import spans_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.config import LearningSection
    from paceline.contracts import Progress
    from paceline.learning.dataset import Dataset
    from paceline.selection.choosers import Chooser

    Encoders = tuple[str, ...] | None  # None: all that were collected

NO_FEATURES: Final = "none"
_NUM_TIMED: Final = 50  # choices that are timed


@dataclass(frozen=True, slots=True)
class Contender:
    """A policy by name, with one chooser per training."""

    name: str
    choosers: tuple[Chooser, ...]
    encoders: Encoders = None

    def distributions(self, data: Dataset, rows: int = 1) -> list[np.ndarray]:
        """Return, per training, the probability of each arm for each prompt: [N, A]."""
        seen = with_encoders(data, self.encoders)
        situation = seen.situation(rows)
        return [c.distribution(c.preferences(seen.features, situation)) for c in self._priced(data)]

    def choose_seconds(self, data: Dataset) -> float:
        """Return the median seconds of one choice on this machine, computing features not included."""
        seen = with_encoders(data, self.encoders)
        (chooser, *_) = self._priced(data)
        spent = []
        for i in range(min(len(seen), _NUM_TIMED)):
            prompt = seen.rows(np.array([i]))
            features, situation = prompt.features, prompt.situation()
            began = perf_counter()
            chooser.distribution(chooser.preferences(features, situation))
            spent.append(perf_counter() - began)
        return median(spent)

    def _priced(self, data: Dataset) -> tuple[Chooser, ...]:
        """Return the choosers; portable ones get the prices of the data."""
        pricer = data.pricer()
        for chooser in self.choosers:
            if isinstance(chooser, PortableChooser):
                chooser.pricer = pricer
        return self.choosers


def train_contenders(
    train: Dataset,
    learners: Sequence[str],
    encoders: Sequence[Encoders],
    section: LearningSection,
    seeds: int,
    on_progress: Progress,
) -> list[Contender]:
    """Train every learner on every choice of encoders, once per seed, and name it by both if needed.

    Raises ConfigError for an unknown learner or an option that is not valid.
    """
    checked = {
        name: check_settings(section.model_copy(update={"learner": name})) for name in learners
    }
    pairs = [(name, seen) for name in learners for seen in encoders]
    parts = {seen: with_encoders(train, seen) for seen in encoders}
    contenders = []
    for done, (name, seen) in enumerate(pairs):
        on_progress("train", done, len(pairs))
        learner, settings = find_learner(name), checked[name]
        trainings = (settings.model_copy(update={"seed": settings.seed + i}) for i in range(seeds))
        choosers = tuple(learner.fit(parts[seen], own, no_progress).chooser for own in trainings)
        what = "all encoders" if seen is None else " + ".join(seen) or "no features"
        shown = name if len(encoders) == 1 and seen is None else f"{name} ({what})"
        contenders.append(Contender(shown, choosers, seen))
    on_progress("train", len(pairs), len(pairs))
    return contenders


def parse_encoders(text: str) -> list[Encoders]:
    """Parse `a,b;a;none` to choices of encoders: both, the first alone, none of them.

    Raises ConfigError for a choice without a name.
    """
    choices: list[Encoders] = []
    for part in text.split(";"):
        names = tuple(name.strip() for name in part.split(",") if name.strip())
        if not names:
            raise ConfigError(f"--encoders '{text}': a choice names encoders, or is {NO_FEATURES}")
        choices.append(() if names == (NO_FEATURES,) else names)
    return choices


def with_encoders(data: Dataset, encoders: Encoders) -> Dataset:
    """Return the prompts with the features of some encoders. Raises ConfigError for an unknown one."""
    if encoders is None:
        return data
    for name in encoders:
        if name not in data.spans:
            raise ConfigError(
                f"the collection has no features of the encoder '{name}'"
                f"{suggest_name(name, [*data.spans, NO_FEATURES])}"
            )
    if not encoders:  # one constant feature, because every learner needs one
        constant = np.zeros((len(data), 1), dtype=np.float32)
        return replace(data, features=constant, spans={NO_FEATURES: slice(0, 1)})
    blocks = [data.features[:, data.spans[name]] for name in encoders]
    spans = spans_of({n: b.shape[1] for n, b in zip(encoders, blocks, strict=True)})
    return replace(data, features=np.hstack(blocks), spans=spans)
