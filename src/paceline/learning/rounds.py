"""The rounds of many prompts under many arms in flat arrays, so that a few passes price them all.

This is the fast twin of `replay.rounds_of` and `rewards.request_seconds`, which handle one prompt and
arm: it simulates and prices thousands of prompts under some fifty arms in seconds. Contexts and
lengths are whole numbers, so each price is read from a grid and equals the table's to the last bit.
Symbols: N prompts, A arms, D drafters, M positions of all prompts, R rounds of all prompts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from paceline.compiled import compiled
from paceline.config import DEFAULT_OBJECTIVE
from paceline.contracts import NONE, split_arm
from paceline.costs.pricing import (
    by_objective,
    draft_seconds,
    prompt_seconds,
    round_seconds,
)
from paceline.replay import rounds_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from paceline.costs.pricing import Objective, SecondsFn
    from paceline.store.records import CollectedPrompt, ReplayedDrafter


@dataclass(frozen=True, slots=True)
class ArmRounds:
    """One arm's rounds on N prompts; those of prompt i begin at `offsets[i]`."""

    drafted: np.ndarray  # [R] int16
    emitted: np.ndarray  # [R] int32, tokens emitted before the round
    offsets: np.ndarray  # [N + 1] int64
    proposed: np.ndarray | None = None  # [R] int16, of a cascade; see `pricing.ArmRates`

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Return the sums [N] over each prompt's rounds of values [R]."""
        running = np.concatenate(([0.0], np.cumsum(values, dtype=np.float64)))
        return np.asarray(running[self.offsets[1:]] - running[self.offsets[:-1]])

    def rows(self, places: np.ndarray) -> ArmRounds:
        """Return the same for some of the prompts. places: [n]."""
        chosen, offsets = _slices(self.offsets, places)
        proposed = None if self.proposed is None else self.proposed[chosen]
        return ArmRounds(self.drafted[chosen], self.emitted[chosen], offsets, proposed)


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
    """All arms' rounds on N prompts, with one row in flight.

    positions: None where nothing was replayed everywhere. replays: of the arms whose rounds depend on
    the load, by place, a replay per prompt.
    """

    arms: tuple[str, ...]  # A
    num_prompt: np.ndarray  # [N]
    by_arm: tuple[ArmRounds, ...]  # A
    positions: Positions | None = None
    replays: Mapping[int, tuple[ReplayedDrafter, ...]] = field(default_factory=dict)

    def num_rounds(self) -> np.ndarray:
        """Return the rounds, [N, A] int64."""
        return np.stack([np.diff(own.offsets) for own in self.by_arm], axis=1)

    def num_drafted(self) -> np.ndarray:
        """Return the drafted tokens, [N, A] float64."""
        return np.stack([own.sums(own.drafted) for own in self.by_arm], axis=1)

    def num_empty(self) -> np.ndarray:
        """Return the rounds without a draft, [N, A] float64."""
        return np.stack([own.sums(own.drafted == 0) for own in self.by_arm], axis=1)

    def num_calls(self) -> np.ndarray:
        """Return the proposals of the costly kind, [N, A] float64."""
        return np.stack([own.sums(_proposed(own) > 0) for own in self.by_arm], axis=1)

    def num_proposed(self) -> np.ndarray:
        """Return the tokens of these proposals, [N, A] float64."""
        return np.stack([own.sums(_proposed(own)) for own in self.by_arm], axis=1)

    @property
    def composed(self) -> tuple[int, ...]:
        """Places of the cascades among the arms."""
        return tuple(i for i, own in enumerate(self.by_arm) if own.proposed is not None)

    def rows(self, places: np.ndarray) -> RoundTable:
        """Return the same for some of the prompts. places: [n]."""
        by_arm = tuple(own.rows(places) for own in self.by_arm)
        positions = None if self.positions is None else self.positions.rows(places)
        replays = {
            place: tuple(own[i] for i in places.tolist()) for place, own in self.replays.items()
        }
        return RoundTable(self.arms, self.num_prompt[places], by_arm, positions, replays)

    def _at(self, rows: int) -> list[ArmRounds]:
        """Return each arm's rounds with `rows` requests in flight."""
        by_arm = list(self.by_arm)
        for place, own in self.replays.items() if rows > 1 else ():
            walked = [replay.under_load(rows) for replay in own if replay.under_load is not None]
            if walked:
                by_arm[place] = _join([w.table for w in walked], [w.proposed for w in walked])
        return by_arm

    def seconds(
        self, seconds: SecondsFn, rows: int = 1, objective: Objective = DEFAULT_OBJECTIVE
    ) -> np.ndarray:
        """Return the predicted seconds of each whole request, [N, A], as `rewards.request_seconds`."""
        return np.stack(
            [
                self._seconds_of(arm, own, seconds, rows, objective)
                for arm, own in zip(self.arms, self._at(rows), strict=True)
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
        longest = max(own.drafted.max(initial=0), _proposed(own).max(initial=0))
        lengths = np.arange(int(longest) + 1)
        contexts = np.arange(int(context.max(initial=0)) + 1)

        def price(num_drafting: int) -> np.ndarray:
            shape = lengths[:, None], contexts[None]
            if own.proposed is None:
                grid = round_seconds(seconds, drafter, *shape, rows, num_drafting)
                return np.asarray(before + own.sums(grid[own.drafted, context]))
            plain = round_seconds(seconds, NONE, *shape, rows, num_drafting)
            draft = draft_seconds(seconds, drafter, *shape, num_drafting) / num_drafting
            spent = plain[own.drafted, context] + draft[own.proposed, context]
            return np.asarray(before + own.sums(spent))

        whole: np.ndarray = by_objective(price, rows, objective)
        return whole


def round_table(prompts: Sequence[CollectedPrompt], arms: Sequence[str]) -> RoundTable:
    """Return every arm's rounds on collected prompts. Raises StoreError if an arm was not replayed."""
    num_prompt = np.array([len(p.prompt_tokens) for p in prompts])
    flat: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    by_arm, composed = [], {}
    for place, arm in enumerate(arms):
        drafter, length = split_arm(arm)
        replays = [p.replays.get(drafter) for p in prompts]
        if all(replay is not None and replay.everywhere for replay in replays):
            if drafter not in flat:
                flat[drafter] = _flatten([r.table for r in replays if r is not None])
            by_arm.append(ArmRounds(*_walk_all(*flat[drafter], length or _ANY_LENGTH)))
        else:
            proposed = [None if replay is None else replay.proposed for replay in replays]
            by_arm.append(_join([rounds_of(p, arm) for p in prompts], proposed))
            known = tuple(r for r in replays if r is not None and r.under_load is not None)
            if len(known) == len(prompts):
                composed[place] = known
    positions = _positions(flat, prompts) if flat else None
    return RoundTable(tuple(arms), num_prompt, tuple(by_arm), positions, composed)


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


def _proposed(own: ArmRounds) -> np.ndarray:
    return own.drafted if own.proposed is None else own.proposed


def _join(rounds: Sequence[np.ndarray], proposed: Sequence[np.ndarray | None]) -> ArmRounds:
    """Return the arm's rounds from those of each prompt, [rounds, 2]. proposed: [rounds] of each."""
    offsets = np.concatenate(([0], np.cumsum([len(own) for own in rounds])))
    flat = np.concatenate(rounds).reshape(-1, 2)
    ends = np.concatenate([np.cumsum(own[:, 1] + 1) for own in rounds])
    # the prefill emits the first token
    emitted = 1 + ends - (flat[:, 1] + 1)
    known = [own for own in proposed if own is not None]
    joined = np.concatenate(known).astype(np.int16) if len(known) == len(rounds) else None
    return ArmRounds(flat[:, 0].astype(np.int16), emitted.astype(np.int32), offsets, joined)


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
