"""The prompts that no drafter was trained on, on which alone the headline figures are judged.

A drafter is faster on the prompts of its own training than on any others, and so are the policies that
choose it. Symbols: N prompts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.errors import StoreError
from paceline.learning.dataset import TRAINED, UNKNOWN

if TYPE_CHECKING:
    from collections.abc import Mapping

    from paceline.learning.dataset import Dataset

MIN_UNSEEN: Final = 8
"""Fewest unseen prompts to judge on where others were seen."""


@dataclass(frozen=True, slots=True)
class Exposure:
    """Numbers of held-out prompts by what the drafters were trained on.

    seen: prompts that at least one drafter was trained on; by_drafter: those of each such drafter.
    unknown: by drafter the prompts for which that is not known; they count as unseen. seen_by_policies:
    seen prompts among those that the policies learned from.
    """

    unseen: int
    seen: int
    by_drafter: dict[str, int]
    unknown: dict[str, int]
    seen_by_policies: int = 0

    def sentences(self) -> list[str]:
        """Return the counts in words; none if no drafter was trained on any prompt."""
        said = []
        if self.seen:
            counts = ", ".join(f"{name} on {num}" for name, num in self.by_drafter.items())
            said.append(
                f"judged on {self.unseen} prompts that no drafter was trained on; on the other "
                f"{self.seen} some were ({counts})"
            )
        if self.seen_by_policies:
            said.append(
                f"{self.seen_by_policies} of the prompts that policies learned from were in a drafter's "
                "training, where the drafter is faster than on new prompts"
            )
        if self.unknown:
            total = self.unseen + self.seen
            counts = ", ".join(
                name if num == total else f"{name} ({num} of {total})"
                for name, num in self.unknown.items()
            )
            said.append(
                f"it is not known which prompts these drafters were trained on, so that all count as "
                f"unseen: {counts}"
            )
        return said


def seen_by_training(
    trained: Mapping[str, np.ndarray], num_prompts: int
) -> tuple[np.ndarray, Exposure]:
    """Return ([N] whether a drafter was trained on the prompt, the counts).

    trained: by drafter [N], as in `Dataset.trained`. Raises StoreError if some drafter was trained on
    some of the prompts, and too few others are left.
    """
    seen = _any_trained(trained, num_prompts)
    by_drafter = {name: int((known == TRAINED).sum()) for name, known in trained.items()}
    unknown = {name: int((known == UNKNOWN).sum()) for name, known in trained.items()}
    num_seen = int(seen.sum())
    if num_seen and num_prompts - num_seen < MIN_UNSEEN:
        names = ", ".join(name for name, num in by_drafter.items() if num)
        raise StoreError(
            f"of {num_prompts} prompts to judge on, {num_prompts - num_seen} are new to all drafters "
            f"({names} were trained on the others), at least {MIN_UNSEEN} are needed; run `paceline "
            "collect PROMPTS` with prompts that no drafter was trained on"
        )
    return seen, Exposure(
        unseen=num_prompts - num_seen,
        seen=num_seen,
        by_drafter={name: num for name, num in by_drafter.items() if num},
        unknown={name: num for name, num in unknown.items() if num},
    )


def count_seen(trained: Mapping[str, np.ndarray]) -> int:
    """Return the number of prompts that any drafter was trained on."""
    num_prompts = len(next(iter(trained.values()), ()))
    return int(_any_trained(trained, num_prompts).sum())


def _any_trained(trained: Mapping[str, np.ndarray], num_prompts: int) -> np.ndarray:
    seen = np.zeros(num_prompts, dtype=bool)
    for known in trained.values():
        seen |= known == TRAINED
    return seen


def unseen_part(data: Dataset) -> Dataset:
    """Return the prompts that no drafter was trained on. Raises StoreError if too few are left."""
    return data.part(~seen_by_training(trained_by_drafter(data), len(data))[0])


def trained_by_drafter(data: Dataset) -> dict[str, np.ndarray]:
    """Return by drafter [N] whether it was trained on the prompt, as in `Dataset.trained`."""
    return dict(zip(data.drafters, data.trained.T, strict=True))


def in_other_words(data: Dataset, other: Dataset) -> Dataset:
    """Return `other` with the prompts marked that a drafter was trained on in the wording of `data`.

    Prompts with one id are one prompt in several wordings.
    """
    trained = other.trained.copy()
    for column, name in enumerate(other.drafters):
        of_name = data.trained[:, data.drafters.index(name)]
        ids = {data.groups[i] for i in np.flatnonzero(of_name == TRAINED)}
        trained[[group in ids for group in other.groups], column] = TRAINED
    return replace(other, trained=trained)
