"""From a cost table to what an arm costs: exactly along given rounds, or live for all arms at once.

Two objectives. `latency` is the seconds a token of one request that drafts while the other rows in
flight decode plainly; `throughput` the machine's seconds a token if all of them used the same arm. A
weight between them, 0 for latency and 1 for throughput, mixes the logarithms. Alone in flight a
request has one price. Prompts are priced as prefilled one by one. Knows no model and no policy.
Symbols: A arms, D drafters, C contexts, K the longest draft, P prompt lengths, R rows in flight.
"""

from __future__ import annotations

from bisect import bisect
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeVar

import numpy as np

from paceline.contracts import NONE, split_arm
from paceline.costs.table import ENGINE, FORWARD, PREFILL, PROPOSE, ROUND, START, TARGET
from paceline.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import ArrayLike, NDArray

    from paceline.costs.table import CostTable

Objective = Literal["latency", "throughput"] | float
Seconds = TypeVar("Seconds", float, "NDArray[np.float64]")

_BEYOND: Final = (2, 4, 8, 16)  # times the longest measured context, where prices are read as well


class SecondsFn(Protocol):
    """Prices work as `CostTable.seconds` does, for arrays of tokens and contexts at once."""

    def __call__(
        self,
        subject: str,
        operation: str,
        tokens: NDArray[Any],
        context: NDArray[Any],
        rows: int,
        /,
    ) -> ArrayLike: ...


# --- the one path from table to price -------------------------------------------------------------


def weight_of(objective: Objective) -> float:
    """How much throughput weighs. Raises ConfigError for what is no objective."""
    named = {"latency": 0.0, "throughput": 1.0}
    weight = named.get(objective) if isinstance(objective, str) else float(objective)
    if weight is None or not 0.0 <= weight <= 1.0:
        raise ConfigError(
            f"objective '{objective}': must be latency, throughput or a weight between 0 and 1"
        )
    return weight


def by_objective(price: Callable[[int], Seconds], rows: int, objective: Objective) -> Seconds:
    """price: seconds a token where so many of the rows draft."""
    weight = weight_of(objective)
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
) -> NDArray[np.float64]:
    """Seconds of rounds by what a row drafts in each and the tokens cached before it, which are
    broadcast. `num_drafting` of the rows draft alike and share the seconds, the others draft nothing.
    """
    nothing = np.zeros((), dtype=np.int64)
    total = np.asarray(seconds(TARGET, FORWARD, 1 + num_drafting * drafted, context, rows))
    total = total + np.asarray(seconds(ENGINE, ROUND, nothing, nothing, rows))
    if drafter != NONE:
        total = total + np.asarray(seconds(drafter, PROPOSE, drafted, context, num_drafting))
    shape = np.broadcast_shapes(drafted.shape, context.shape)
    priced: NDArray[np.float64] = np.broadcast_to(total / num_drafting, shape)
    return priced


def prompt_seconds(
    seconds: SecondsFn, drafter: str, num_prompt: NDArray[np.integer[Any]]
) -> NDArray[np.float64]:
    """Seconds before the first round: the target's prefill and the drafter's own start."""
    nothing = np.zeros((), dtype=np.int64)
    total = np.asarray(seconds(TARGET, PREFILL, num_prompt, nothing, 1), dtype=np.float64)
    if drafter != NONE:
        total = total + np.asarray(seconds(drafter, START, num_prompt, nothing, 1))
    priced: NDArray[np.float64] = np.broadcast_to(total, num_prompt.shape)
    return priced


# --- live -----------------------------------------------------------------------------------------


class ArmPricer:
    """Seconds a token of every arm, from how many rounds and drafted tokens each needs for a token.

    The table is read once on a grid of its own points, so that a price is a few lookups. Rounds that
    draft nothing are priced apart, as a lookup drafts much or nothing and a forward's seconds bend
    between; a mean of 2.5 tokens in the others is priced as rounds of 2 and of 3 by halves.
    """

    def __init__(self, costs: CostTable, arms: Sequence[str]) -> None:
        """arms: drafters (`math`, `none`), or drafters at draft lengths (`math@3`).

        Raises ArtefactError if the table lacks one.
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
        self._contexts = _knots(0, [*of_target, *(c for _, cs in grids for c in cs)])  # C
        prompts = costs.grid(TARGET, PREFILL)[0]
        prompts += [n for name in self._drafters for n in costs.grid(name, START)[0]]
        self._prompts = _knots(1, prompts)  # P
        at = np.array(self._prompts)
        before = [prompt_seconds(costs.seconds, name, at) for name in self._drafters]
        self._before = np.stack(before, axis=1)  # [P, D]
        starts = self._before - prompt_seconds(costs.seconds, NONE, at)[:, None]
        self._starts = dict(zip(self._drafters, starts.T.tolist(), strict=True))
        self._rounds: dict[tuple[int, int], NDArray[np.float64]] = {}
        self._surface(1, 1)

    def seconds_per_token(
        self,
        rounds_per_token: NDArray[np.float64],
        drafted_per_token: NDArray[np.float64],
        empty_per_token: NDArray[np.float64],
        context: float,
        rows: int,
        objective: Objective,
        num_tokens: float,
        num_prompt: float,
    ) -> NDArray[np.float64]:
        """[A] expected seconds a token, prefill and start spread over `num_tokens`.

        rounds_per_token, drafted_per_token, empty_per_token: [A], of emitted tokens; empty are the
        rounds, among all, that draft nothing. context: tokens cached before a typical round.
        """
        empty = np.minimum(empty_per_token, rounds_per_token)
        drafting = rounds_per_token - empty
        drafted = np.minimum(drafted_per_token / np.maximum(drafting, 1e-12), self._longest)
        fewer = np.minimum(drafted.astype(np.int64), self._longest - 1)
        more = drafting * (drafted - fewer)  # the share of rounds that draft one more
        less = drafting - more
        nothing = self._drafter_of * (self._longest + 1)
        place = nothing + fewer
        before = _at(self._prompts, self._before, num_prompt)[self._drafter_of] / num_tokens

        def price(num_drafting: int) -> NDArray[np.float64]:
            plane = _at(self._contexts, self._surface(rows, num_drafting), context)
            total: NDArray[np.float64] = before + empty * plane[nothing]
            total += less * plane[place] + more * plane[place + 1]
            return total

        return by_objective(price, rows, objective)

    def _surface(self, rows: int, num_drafting: int) -> NDArray[np.float64]:
        """[C, D * (K + 1)] seconds of a round, read from the table when first asked for."""
        surface = self._rounds.get((rows, num_drafting))
        if surface is None:
            contexts = np.array(self._contexts)[:, None]
            lengths = np.arange(self._longest + 1)[None, :]
            planes = [
                round_seconds(self._costs.seconds, name, lengths, contexts, rows, num_drafting)
                for name in self._drafters
            ]
            surface = np.concatenate(planes, axis=1)
            self._rounds[rows, num_drafting] = surface
        return surface


def reference_seconds_per_token(
    costs: CostTable,
    arm: str,
    rounds_per_token: float,
    drafted_per_token: float,
    empty_per_token: float,
    context: float,
    rows: int,
    objective: Objective,
    num_tokens: float,
    num_prompt: float,
) -> float:
    """What `ArmPricer.seconds_per_token` gives one arm, read from the table itself."""
    drafter = split_arm(arm)[0]
    drafting = rounds_per_token - empty_per_token
    drafted = drafted_per_token / drafting if drafting else 0.0
    whole = int(drafted)

    def price(num_drafting: int) -> float:
        lengths, at = np.array([0, whole, whole + 1]), np.array([context])
        nothing, fewer, more = round_seconds(
            costs.seconds, drafter, lengths, at, rows, num_drafting
        )
        typical = fewer + (drafted - whole) * (more - fewer)
        before = prompt_seconds(costs.seconds, drafter, np.array([num_prompt]))[0]
        return float(empty_per_token * nothing + drafting * typical + before / num_tokens)

    return by_objective(price, rows, objective)


def _knots(first: int, measured: Iterable[int]) -> list[int]:
    """Where a grid is read: at all that was measured, and beyond, where the last segment goes on."""
    longest = max(*measured, first, 1)
    return sorted({first, *measured, *(longest * times for times in _BEYOND)})


def _at(knots: list[int], values: NDArray[np.float64], x: float) -> NDArray[np.float64]:
    """Linear between the knots [n] of values [n, ...], and on beyond the last."""
    left = min(max(bisect(knots, x) - 1, 0), len(knots) - 2)
    weight = (x - knots[left]) / (knots[left + 1] - knots[left])
    value: NDArray[np.float64] = values[left] + weight * (values[left + 1] - values[left])
    return value
