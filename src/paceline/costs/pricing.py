"""Prices: from a cost table to the seconds of rounds, of prompts and of arms per token.

There are two objectives, and weights between them. `throughput`, the default, is the machine's
seconds per token. All rows are assumed to use the same arm, unless the other rows' drafters are
known. `latency` is the seconds per token of one request that drafts while the other rows in flight
decode plainly. With one row in flight both are the same; with several, `latency` does not charge a
draft for slowing the other rows down. A weight between them (0 is latency, 1 is throughput) mixes
the logarithms. Prompts are priced as if prefilled one by one.

Every row waits for every drafter that is called in a round. Where the other rows' drafters are known,
`ArmPricer` therefore charges a row with what its proposal adds to the calls of that round: little in a
batch of rows with the same drafter, a whole call for a drafter that no other row uses.

This module knows no model and no policy. An arm is a drafter, perhaps at a draft length (`math@3`).
Symbols: A arms, D drafters, C contexts, K the longest draft, P prompt lengths.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeVar

import numpy as np

from paceline.contracts import NONE, split_arm
from paceline.costs.table import ENGINE, FORWARD, PREFILL, PROPOSE, ROUND, START, TARGET
from paceline.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import ArrayLike, NDArray

    from paceline.costs.table import CostTable

Objective = Literal["latency", "throughput"] | float
Seconds = TypeVar("Seconds", float, "NDArray[np.float64]")
SecondsFn = Callable[[str, str, "NDArray[Any]", "NDArray[Any]", int], "ArrayLike"]
"""Prices work as `CostTable.seconds` does: subject, operation, tokens, context, rows."""

_BEYOND: Final = (2, 4, 8, 16)  # a grid reaches this many times the longest measured context
_ZERO: Final = np.zeros((), dtype=np.int64)
_NOBODY: Final[Mapping[str, int]] = MappingProxyType({})


# --- from table to price --------------------------------------------------------------------------


def by_objective(price: Callable[[int], Seconds], rows: int, objective: Objective) -> Seconds:
    """Return the price under an objective. Raises ConfigError for an invalid objective.

    price(n): the seconds per token where n of the rows draft.
    """
    named = {"latency": 0.0, "throughput": 1.0}
    weight = named.get(objective) if isinstance(objective, str) else float(objective)
    if weight is None or not 0.0 <= weight <= 1.0:
        raise ConfigError(
            f"objective '{objective}': must be latency, throughput or a weight between 0 and 1"
        )
    if weight == 0.0 or rows == 1:
        return price(1)
    if weight == 1.0:
        return price(rows)
    mixed: Seconds = price(1) ** (1.0 - weight) * price(rows) ** weight
    return mixed


def round_seconds(
    seconds: SecondsFn,
    drafter: str,
    drafted: NDArray[np.integer[Any]],
    context: NDArray[Any],
    rows: int = 1,
    num_drafting: int = 1,
    proposed: NDArray[np.integer[Any]] | None = None,
) -> NDArray[np.float64]:
    """Return the seconds of rounds, each with its draft, the target's forward and the engine's part.

    drafted: tokens that a row drafts in each round. context: tokens cached before each round; both
    are broadcast. `num_drafting` of the rows draft alike and share the seconds, the others draft
    nothing. proposed: the tokens that the proposals are priced by, if not all drafted ones: a cascade's
    model did not draft those of its lookups.
    """
    total = np.asarray(seconds(TARGET, FORWARD, 1 + num_drafting * drafted, context, rows))
    total = total + np.asarray(seconds(ENGINE, ROUND, _ZERO, _ZERO, rows))
    priced_by = drafted if proposed is None else proposed
    total = total + draft_seconds(seconds, drafter, priced_by, context, num_drafting)
    shape = np.broadcast_shapes(drafted.shape, context.shape)
    priced: NDArray[np.float64] = np.broadcast_to(total / num_drafting, shape)
    return priced


def draft_seconds(
    seconds: SecondsFn,
    drafter: str,
    drafted: NDArray[np.integer[Any]],
    context: NDArray[Any],
    rows: int = 1,
) -> NDArray[np.float64]:
    """Return the seconds of a proposal for `rows` rows, without its verification; 0 for `none`."""
    if drafter == NONE:
        return np.zeros(np.broadcast_shapes(drafted.shape, context.shape))
    return np.asarray(seconds(drafter, PROPOSE, drafted, context, rows))


def start_seconds(
    seconds: SecondsFn, drafter: str, num_tokens: NDArray[np.integer[Any]]
) -> NDArray[np.float64]:
    """Return the seconds that a drafter takes to read new tokens; 0 for `none`."""
    if drafter == NONE:
        return np.zeros(num_tokens.shape)
    return np.asarray(seconds(drafter, START, num_tokens, _ZERO, 1))


def prompt_seconds(
    seconds: SecondsFn, drafter: str, num_prompt: NDArray[np.integer[Any]]
) -> NDArray[np.float64]:
    """Return the seconds before the first round: the target's prefill and the drafter's start."""
    total = np.asarray(seconds(TARGET, PREFILL, num_prompt, _ZERO, 1), dtype=np.float64)
    total = total + start_seconds(seconds, drafter, num_prompt)
    priced: NDArray[np.float64] = np.broadcast_to(total, num_prompt.shape)
    return priced


# --- live prices ----------------------------------------------------------------------------------


class ArmRates(NamedTuple):
    """The work of A arms per emitted token, [A] each.

    Empty rounds draft nothing and are part of all rounds. calls, proposed: proposals of the costly
    kind, and their tokens. A drafter's are its drafting rounds and drafted tokens; a cascade's are only
    those of its models.
    """

    rounds: NDArray[np.float64]
    drafted: NDArray[np.float64]
    empty: NDArray[np.float64]
    calls: NDArray[np.float64]
    proposed: NDArray[np.float64]


class ArmPricer:
    """Seconds per token of every arm, from the rounds and drafted tokens that it needs per token.

    The table is read once, on a grid of its own points, so a price takes a few lookups. Rounds that
    draft nothing are priced separately: a lookup drafter drafts much or nothing, and the seconds of
    a forward are not linear between the two. A mean draft of 2.5 tokens is priced as half rounds of
    2 tokens and half rounds of 3.
    """

    def __init__(self, costs: CostTable, arms: Sequence[str]) -> None:
        """Read the prices of arms: drafters (`math`, `none`), or drafters at lengths (`math@3`).

        Raises ArtefactError if the table lacks a drafter.
        """
        self.arms = tuple(arms)
        named = [split_arm(arm)[0] for arm in arms]
        self._drafters = list(dict.fromkeys(named))
        costs.check(self._drafters)
        self._costs = costs
        self._drafter_of = np.array([self._drafters.index(name) for name in named])  # [A]
        grids = [costs.grid(name, PROPOSE) for name in self._drafters if name != NONE]
        self._longest = max([1, *(tokens[-1] for tokens, _ in grids)])  # K
        of_target = costs.grid(TARGET, FORWARD)[1]
        self._contexts = _grid_points(0, [*of_target, *(c for _, cs in grids for c in cs)])  # C
        prompts = costs.grid(TARGET, PREFILL)[0]
        prompts += [n for name in self._drafters for n in costs.grid(name, START)[0]]
        self._prompts = _grid_points(1, prompts)  # P
        lengths = np.array(self._prompts)
        before = [prompt_seconds(costs.seconds, name, lengths) for name in self._drafters]
        self._before = np.stack(before, axis=1)  # [P, D]
        self._free = self._drafter_of * (self._longest + 1)  # [A] a proposal of no token
        self._rounds: dict[tuple[int, int], NDArray[np.float64]] = {}
        self._proposals: dict[tuple[str, int, int], NDArray[np.float64]] = {}
        self._without_proposal(1, 1)
        self._of_proposals(_NOBODY, 1)

    def seconds_per_token(
        self,
        rates: ArmRates,
        context: float,
        rows: int,
        objective: Objective,
        num_tokens: float,
        num_prompt: float,
        others: Mapping[str, int] = _NOBODY,
    ) -> NDArray[np.float64]:
        """Return the expected seconds per token [A]; prefill and start are spread over `num_tokens`.

        context: tokens cached before a typical round. others: drafter -> the other rows that use it,
        `none` included. Other rows that are in none of the counts are assumed to take this row's arm,
        so without counts all rows share one proposal. With `latency` the counts have no effect.

        The engine's tokens per second are (S + t) / (T + d): S tokens and T seconds of the other rows'
        round, t tokens and d seconds that this row adds. If each row is charged an equal share of the
        shared forward and what its own proposal adds, the charges of all rows sum to T + d. So the arm
        with the fewest charged seconds per token is close to the best one as long as the rows are about
        as fast as each other, and the other rows' tokens need not be known.
        """
        empty = np.minimum(rates.empty, rates.rounds)
        drafting = rates.rounds - empty
        drafted = rates.drafted / np.maximum(drafting, 1e-12)
        proposed = rates.proposed / np.maximum(rates.calls, 1e-12)
        before = (
            _interpolate(self._prompts, self._before, num_prompt)[self._drafter_of] / num_tokens
        )

        def price(num_drafting: int) -> NDArray[np.float64]:
            known = others if num_drafting == rows else _NOBODY
            together = max(1, num_drafting - sum(known.values()))
            plain = _interpolate(
                self._contexts, self._without_proposal(rows, num_drafting), context
            )
            draft = _interpolate(self._contexts, self._of_proposals(known, together), context)
            total: NDArray[np.float64] = (
                before + empty * plain[0] + rates.rounds * draft[self._free]
            )
            total += drafting * _between(plain, 0, drafted, self._longest)
            at_length = _between(draft, self._free, proposed, self._longest)
            total += rates.calls * (at_length - draft[self._free])
            return total

        return by_objective(price, rows, objective)

    def _without_proposal(self, rows: int, num_drafting: int) -> NDArray[np.float64]:
        """Return seconds of rounds without the proposal, by drafted tokens [C, K + 1].

        They are read from the table at the first call.
        """
        found = self._rounds.get((rows, num_drafting))
        if found is None:
            contexts, lengths = self._grid()
            seconds = self._costs.seconds
            found = round_seconds(seconds, NONE, lengths, contexts, rows, num_drafting)
            self._rounds[rows, num_drafting] = found
        return found

    def _of_proposals(self, others: Mapping[str, int], together: int) -> NDArray[np.float64]:
        """Return the seconds that a row's proposal adds to a round, [C, D * (K + 1)] by drafted tokens.

        others: drafter -> rows that share the call anyway. together: rows that join it alike, this one
        included.
        """
        planes = [self._plane(name, others.get(name, 0), together) for name in self._drafters]
        return np.concatenate(planes, axis=1)

    def _plane(self, drafter: str, num_users: int, together: int) -> NDArray[np.float64]:
        """Return what each of `together` rows adds to a call for `num_users` rows, [C, K + 1]."""
        found = self._proposals.get((drafter, num_users, together))
        if found is None:
            contexts, lengths = self._grid()

            def call(rows: int) -> NDArray[np.float64]:
                return draft_seconds(self._costs.seconds, drafter, lengths, contexts, rows)

            found = call(num_users + together)
            if num_users:
                # in a noisy table a call for more rows may seem shorter
                found = np.maximum(found - call(num_users), 0.0)
            found = self._proposals[drafter, num_users, together] = found / together
        return found

    def _grid(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return contexts [C, 1] and drafted tokens [1, K + 1]."""
        return np.array(self._contexts)[:, None], np.arange(self._longest + 1)[None, :]


def _between(
    values: NDArray[np.float64],
    first: NDArray[np.int64] | int,
    lengths: NDArray[np.float64],
    longest: int,
) -> NDArray[np.float64]:
    """Return values [A] at lengths [A], linear between whole ones. Those of an arm begin at `first`."""
    lengths = np.minimum(lengths, longest)
    fewer = np.minimum(lengths.astype(np.int64), longest - 1)
    place, more = first + fewer, lengths - fewer
    between: NDArray[np.float64] = (1.0 - more) * values[place] + more * values[place + 1]
    return between


def _grid_points(first: int, measured: Iterable[int]) -> list[int]:
    """Return where a grid reads the table: at every measured point, and beyond the last one."""
    longest = max(*measured, first, 1)
    return sorted({first, *measured, *(longest * times for times in _BEYOND)})


def _interpolate(points: list[int], values: NDArray[np.float64], x: float) -> NDArray[np.float64]:
    """Interpolate values [n, ...] at points [n] linearly, beyond the ends along the last segment."""
    left = min(max(bisect(points, x) - 1, 0), len(points) - 2)
    weight = (x - points[left]) / (points[left + 1] - points[left])
    value: NDArray[np.float64] = values[left] + weight * (values[left + 1] - values[left])
    return value
