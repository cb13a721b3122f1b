"""The rounds of many prompts under many arms in flat arrays, so that a few passes price them all.

This is the fast twin of `replay.rounds_of` and `rewards.request_seconds`, which handle one prompt and
arm: it simulates and prices thousands of prompts under some fifty arms in seconds. Contexts and
lengths are whole numbers, so each price is read from a grid and equals the table's to the last bit.
Symbols: N prompts, A arms, D drafters, M positions of all prompts, R rounds of all prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from paceline.compiled import compiled
from paceline.contracts import NONE, split_arm
from paceline.costs.pricing import by_objective, prompt_seconds, round_seconds
from paceline.replay import rounds_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.costs.pricing import Objective, SecondsFn
    from paceline.store.records import CollectedPrompt


@dataclass(frozen=True, slots=True)
class ArmRounds:
    """One arm's rounds on N prompts; those of prompt i begin at `offsets[i]`."""

    drafted: np.ndarray  # [R] int16
    emitted: np.ndarray  # [R] int32, tokens emitted before the round
    offsets: np.ndarray  # [N + 1] int64

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Return the sums [N] over each prompt's rounds of values [R]."""
        running = np.concatenate(([0.0], np.cumsum(values, dtype=np.float64)))
        return np.asarray(running[self.offsets[1:]] - running[self.offsets[:-1]])

    def rows(self, places: np.ndarray) -> ArmRounds:
        """Return the same for some of the prompts. places: [n]."""
        chosen, offsets = _slices(self.offsets, places)
        return ArmRounds(self.drafted[chosen], self.emitted[chosen], offsets)


@dataclass(frozen=True, slots=True)
class Positions:
    """The round that would begin at each position, of the drafters that were replayed everywhere.

    Those of prompt i begin at `offsets[i]`; the first is after one emitted token. `none` is among them.
    """

    drafters: tuple[str, ...]  # D
    drafted: np.ndarray  # [D, M] int16, at full length
    accepted: np.ndarray  # [D, M] int16
    offsets: np.ndarray  # [N + 1] int64

    def rows(self, places: np.ndarray) -> Positions:
        """Return the same for some of the prompts. places: [n]."""
        chosen, offsets = _slices(self.offsets, places)
        return Positions(self.drafters, self.drafted[:, chosen], self.accepted[:, chosen], offsets)


@dataclass(frozen=True, slots=True)
class RoundTable:
    """All arms' rounds on N prompts. positions: None where nothing was replayed everywhere."""

    arms: tuple[str, ...]  # A
    num_prompt: np.ndarray  # [N]
    by_arm: tuple[ArmRounds, ...]  # A
    positions: Positions | None = None

    def num_rounds(self) -> np.ndarray:
        """Return the rounds, [N, A] int64."""
        return np.stack([np.diff(own.offsets) for own in self.by_arm], axis=1)

    def num_drafted(self) -> np.ndarray:
        """Return the drafted tokens, [N, A] float64."""
        return np.stack([own.sums(own.drafted) for own in self.by_arm], axis=1)

    def num_empty(self) -> np.ndarray:
        """Return the rounds without a draft, [N, A] float64."""
        return np.stack([own.sums(own.drafted == 0) for own in self.by_arm], axis=1)

    def rows(self, places: np.ndarray) -> RoundTable:
        """Return the same for some of the prompts. places: [n]."""
        by_arm = tuple(own.rows(places) for own in self.by_arm)
        positions = None if self.positions is None else self.positions.rows(places)
        return RoundTable(self.arms, self.num_prompt[places], by_arm, positions)

    def seconds(self, seconds: SecondsFn, rows: int = 1, objective: Objective = 0.0) -> np.ndarray:
        """Return the predicted seconds of each whole request, [N, A], as `rewards.request_seconds`."""
        return np.stack(
            [
                self._seconds_of(arm, own, seconds, rows, objective)
                for arm, own in zip(self.arms, self.by_arm, strict=True)
            ],
            axis=1,
        )

    def _seconds_of(
        self, arm: str, own: ArmRounds, seconds: SecondsFn, rows: int, objective: Objective
    ) -> np.ndarray:
        drafter = split_arm(arm)[0]
        context = np.repeat(self.num_prompt - 1, np.diff(own.offsets)) + own.emitted  # [R]
        none, started = (
            prompt_seconds(seconds, name, self.num_prompt) for name in ("none", drafter)
        )
        before = np.where(np.diff(own.offsets) > 0, started, none)  # [N]
        lengths = np.arange(int(own.drafted.max(initial=0)) + 1)
        contexts = np.arange(int(context.max(initial=0)) + 1)

        def price(num_drafting: int) -> np.ndarray:
            grid = round_seconds(
                seconds, drafter, lengths[:, None], contexts[None], rows, num_drafting
            )
            return np.asarray(before + own.sums(grid[own.drafted, context]))

        whole: np.ndarray = by_objective(price, rows, objective)
        return whole


def round_table(prompts: Sequence[CollectedPrompt], arms: Sequence[str]) -> RoundTable:
    """Return every arm's rounds on collected prompts. Raises StoreError if an arm was not replayed."""
    num_prompt = np.array([len(p.prompt_tokens) for p in prompts])
    flat: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    by_arm = []
    for arm in arms:
        drafter, length = split_arm(arm)
        replays = [p.replays.get(drafter) for p in prompts]
        if all(replay is not None and replay.everywhere for replay in replays):
            if drafter not in flat:
                flat[drafter] = _flatten([r.table for r in replays if r is not None])
            by_arm.append(ArmRounds(*_walk_all(*flat[drafter], length or _ANY_LENGTH)))
        else:
            by_arm.append(_join([rounds_of(p, arm) for p in prompts]))
    positions = _positions(flat, prompts) if flat else None
    return RoundTable(tuple(arms), num_prompt, tuple(by_arm), positions)


_ANY_LENGTH = 2**14  # longer than any draft


def _positions(
    flat: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]], prompts: Sequence[CollectedPrompt]
) -> Positions:
    """Return the rounds at every position. flat: drafter -> drafted, accepted, offsets."""
    lengths = [max(len(prompt.output_tokens) - 1, 0) for prompt in prompts]
    nothing = np.zeros(sum(lengths), dtype=np.int16)
    return Positions(
        drafters=(NONE, *flat),
        drafted=np.stack([nothing, *(drafted for drafted, _, _ in flat.values())]),
        accepted=np.stack([nothing, *(accepted for _, accepted, _ in flat.values())]),
        offsets=np.concatenate(([0], np.cumsum(lengths))),
    )


def _slices(offsets: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (places of the values, offsets) of some of the prompts. places: [n] prompts."""
    begins, counts = offsets[places], np.diff(offsets)[places]
    kept = np.concatenate(([0], np.cumsum(counts)))
    return np.arange(kept[-1]) + np.repeat(begins - kept[:-1], counts), kept


def _flatten(tables: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (drafted [M], accepted [M], offsets [N + 1]) of tables [T - 1, 2]."""
    offsets = np.concatenate(([0], np.cumsum([len(table) for table in tables])))
    table = np.concatenate(tables).astype(np.int16).reshape(-1, 2)
    return np.ascontiguousarray(table[:, 0]), np.ascontiguousarray(table[:, 1]), offsets


def _join(rounds: Sequence[np.ndarray]) -> ArmRounds:
    """Return the arm's rounds from those of each prompt, [rounds, 2]."""
    offsets = np.concatenate(([0], np.cumsum([len(own) for own in rounds])))
    flat = np.concatenate(rounds).reshape(-1, 2)
    ends = np.concatenate([np.cumsum(own[:, 1] + 1) for own in rounds])
    # the prefill emits the first token
    emitted = 1 + ends - (flat[:, 1] + 1)
    return ArmRounds(flat[:, 0].astype(np.int16), emitted.astype(np.int32), offsets)


@compiled
def _walk_all(
    drafted: np.ndarray, accepted: np.ndarray, offsets: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (drafted [R], emitted [R], offsets [N + 1]): `replay.walk` of all prompts at one length."""
    N = len(offsets) - 1
    starts = np.zeros(N + 1, dtype=np.int64)
    own = np.empty(len(drafted), dtype=np.int16)
    emitted = np.empty(len(drafted), dtype=np.int32)
    count = 0
    for i in range(N):
        place = offsets[i]
        while place < offsets[i + 1]:
            own[count] = min(drafted[place], length)
            emitted[count] = 1 + place - offsets[i]
            count += 1
            place += min(accepted[place], length) + 1
        starts[i + 1] = count
    return own[:count].copy(), emitted[:count].copy(), starts
