"""Choosers that learn little or nothing: one arm, any arm, and a table of first tokens.

A learned chooser must beat them. Symbols: N prompts, A arms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from paceline.selection.choosers.base import Chooser

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from paceline.selection.choosers.base import Arrays, Facts, Situation


class FixedChooser(Chooser):
    """One arm for every prompt, or one per load; other loads take the arm of the nearest one."""

    kind: ClassVar[str] = "fixed"

    def __init__(self, arms: Sequence[str], arm: str | Mapping[int, str]) -> None:
        """arm: its name, or rows in flight -> its name."""
        self.arms = tuple(arms)
        self.by_rows = {1: arm} if isinstance(arm, str) else dict(arm)
        if not self.by_rows or not set(self.by_rows.values()) <= set(self.arms):
            raise ValueError(f"no such arms: {self.by_rows}")

    def at(self, rows: int) -> str:
        """Return the arm for a number of rows in flight."""
        nearest = min(self.by_rows, key=lambda known: abs(np.log(known / max(rows, 1))))
        return self.by_rows[nearest]

    def preferences(self, features: np.ndarray, situation: Situation) -> np.ndarray:
        place = self.arms.index(self.at(situation.rows))
        return np.tile(np.eye(len(self.arms))[place], (len(situation), 1))

    def scores(self, preferences: np.ndarray) -> np.ndarray:
        return preferences

    def facts(self) -> dict[str, object]:
        return {"by_rows": [[rows, name] for rows, name in self.by_rows.items()]}

    @classmethod
    def restore(cls, arms: Sequence[str], arrays: Arrays, facts: Facts) -> FixedChooser:
        pairs: list[tuple[int, str]] = list(facts["by_rows"])  # type: ignore[call-overload]
        return cls(arms, {int(rows): str(name) for rows, name in pairs})


class RandomChooser(Chooser):
    """A random arm for every prompt, each equally often."""

    kind: ClassVar[str] = "random"

    def __init__(self, arms: Sequence[str]) -> None:
        self.arms = tuple(arms)

    def preferences(self, features: np.ndarray, situation: Situation) -> np.ndarray:
        return np.zeros((len(situation), len(self.arms)))

    def distribution(self, preferences: np.ndarray) -> np.ndarray:
        return np.full(preferences.shape, 1.0 / len(self.arms))

    @classmethod
    def restore(cls, arms: Sequence[str], arrays: Arrays, facts: Facts) -> RandomChooser:
        return cls(arms)


class FirstLineChooser(Chooser):
    """The best arm of prompts with the same first tokens, or the best single arm if there are none.

    Where every prompt of a task begins with the same instruction, the first tokens identify the task, so
    a learned policy that is no better has only learned the instruction.
    """

    kind: ClassVar[str] = "table"

    def __init__(
        self,
        arms: Sequence[str],
        table: Mapping[tuple[int, ...], int],
        otherwise: int,
        num_tokens: int,
    ) -> None:
        """table: first `num_tokens` tokens of a prompt -> place of an arm."""
        self.arms = tuple(arms)
        self.table = dict(table)
        self.otherwise = otherwise
        self.num_tokens = num_tokens
        if not all(0 <= place < len(self.arms) for place in (*self.table.values(), otherwise)):
            raise ValueError("the table names an unknown arm")

    def preferences(self, features: np.ndarray, situation: Situation) -> np.ndarray:
        places = [
            self.table.get(tuple(prompt[: self.num_tokens]), self.otherwise)
            for prompt in situation.prompts
        ]
        return np.asarray(np.eye(len(self.arms))[places])

    def scores(self, preferences: np.ndarray) -> np.ndarray:
        return preferences

    def facts(self) -> dict[str, object]:
        return {
            "table": [[list(tokens), place] for tokens, place in self.table.items()],
            "otherwise": self.otherwise,
            "num_tokens": self.num_tokens,
        }

    @classmethod
    def restore(cls, arms: Sequence[str], arrays: Arrays, facts: Facts) -> FirstLineChooser:
        rows: list[tuple[list[int], int]] = list(facts["table"])  # type: ignore[call-overload]
        table = {tuple(tokens): int(place) for tokens, place in rows}
        return cls(arms, table, int(str(facts["otherwise"])), int(str(facts["num_tokens"])))
