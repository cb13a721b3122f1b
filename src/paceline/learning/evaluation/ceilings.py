"""Two ceilings for a choice of arms, from the rounds that were replayed at every position.

The **split-half ceiling** is for a choice that is made before decoding. The oracle is too high for that:
it picks the arm whose rounds happened to go well. Here each prompt's fastest arm is picked on one half
of its answer's positions and priced on the other half, both ways, so chance in the half that picks
earns nothing. Half of a short answer is little evidence, so the attainable speed may be somewhat above
it, and is below the oracle's. The **per-round oracle** takes the arm of every round afterwards: the
cheapest path through the positions, by dynamic programming from the end. Switching is free for it: no
drafter's start is priced, and every drafter has read all text. `per_round` gives it for a few of the
drafters, for example those of one cascade. Symbols: N prompts, A arms, D drafters, M positions of all
prompts, K longest draft, C contexts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.compiled import compiled
from paceline.contracts import NONE, split_arm
from paceline.costs.pricing import by_objective, prompt_seconds, round_seconds

if TYPE_CHECKING:
    from collections.abc import Collection

    from paceline.learning.dataset import Dataset
    from paceline.learning.rounds import Positions

SPLIT_HALF: Final = "split-half ceiling"
PER_ROUND: Final = "per-round oracle"
CEILINGS: Final = (SPLIT_HALF, PER_ROUND)
_ANY_LENGTH: Final = 2**14  # longer than any draft


def ceilings(data: Dataset, rows: int = 1) -> dict[str, np.ndarray]:
    """Return the predicted seconds [N] of whole requests by ceiling; empty without replays everywhere.

    rows: requests in flight. Under an objective between latency and throughput each round's price is
    mixed, which is at most the mixed price of the rounds together.
    """
    positions = data.rounds.positions
    if positions is None:
        return {}
    walked = _arguments(data, positions, positions.drafters, rows)
    before = np.stack(
        [prompt_seconds(data.costs.seconds, name, data.num_prompt) for name in positions.drafters],
        axis=1,
    )  # [N, D]
    halves, counts = _price_halves(*walked)
    best = _price_best_paths(*walked)
    return {
        SPLIT_HALF: _split_half(before, walked[4], halves, counts),
        PER_ROUND: before[:, 0] + best,
    }


def per_round(data: Dataset, among: Collection[str], rows: int = 1) -> np.ndarray:
    """Return the predicted seconds [N] of whole requests under the per-round oracle of some drafters.

    among: drafters whose arms it may take, in addition to `none`. Raises ValueError for a drafter
    that was not replayed at every position.
    """
    positions = data.rounds.positions
    known = () if positions is None else positions.drafters
    lacking = [name for name in among if name not in known]
    if positions is None or lacking:
        raise ValueError(f"not replayed at every position: {', '.join(lacking) or 'any drafter'}")
    walked = _arguments(data, positions, {NONE, *among}, rows)
    plain = prompt_seconds(data.costs.seconds, NONE, data.num_prompt)
    return np.asarray(plain + _price_best_paths(*walked))


def _arguments(
    data: Dataset, positions: Positions, among: Collection[str], rows: int
) -> tuple[np.ndarray, ...]:
    """Return the arguments of the kernels for the arms of some drafters."""
    named = [split_arm(arm) for arm in data.arms]
    kept = [(name, length) for name, length in named if name in among]
    drafter_of = np.array([positions.drafters.index(name) for name, _ in kept])
    longest = np.array([length or _ANY_LENGTH for _, length in kept])
    prices = _round_prices(data, positions, rows)
    walked = (positions.drafted, positions.accepted, positions.offsets, data.num_prompt)
    return (*walked, drafter_of, longest, prices)


def left_out(data: Dataset) -> list[str]:
    """Return the drafters that were not replayed everywhere, if others were: ceilings leave them out."""
    positions = data.rounds.positions
    if positions is None:
        return []
    return [name for name in data.drafters if name not in positions.drafters]


def _round_prices(data: Dataset, positions: Positions, rows: int) -> np.ndarray:
    """Return the seconds of a round [D, K + 1, C] by drafter, drafted tokens and cached tokens."""
    lengths = np.arange(int(positions.drafted.max(initial=0)) + 1)[:, None]
    ends = data.num_prompt + np.diff(positions.offsets)
    contexts = np.arange(int(ends.max(initial=0)) + 1)[None]
    planes = []
    for name in positions.drafters:

        def price(num_drafting: int, name: str = name) -> np.ndarray:
            return round_seconds(data.costs.seconds, name, lengths, contexts, rows, num_drafting)

        planes.append(by_objective(price, rows, data.objective))
    return np.ascontiguousarray(np.stack(planes))


def _split_half(
    before: np.ndarray, drafter_of: np.ndarray, halves: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Return [N] seconds: the arm of each half priced on the other, both ways.

    before: [N, D] seconds before the first round, `none` first. halves: [N, A, 2] seconds of each half.
    counts: [N, 2] its positions. An answer without two halves gets `none`.
    """
    N = len(before)
    start = before[:, drafter_of]  # [N, A]
    all_positions = counts.sum(axis=1, keepdims=True)
    whole = halves * (all_positions / np.maximum(counts, 1))[:, None, :]  # as if all were so
    picked = (start[:, :, None] + whole).argmin(axis=1)  # [N, 2]
    each = np.arange(N)
    scored = halves[each, picked[:, 0], 1] + halves[each, picked[:, 1], 0]
    started = (start[each, picked[:, 0]] + start[each, picked[:, 1]]) / 2
    plain = before[:, 0] + halves[:, int(drafter_of.argmin())].sum(axis=1)
    return np.asarray(np.where((counts > 0).all(axis=1), started + scored, plain))


@compiled
def _price_halves(
    drafted: np.ndarray,
    accepted: np.ndarray,
    offsets: np.ndarray,
    num_prompt: np.ndarray,
    drafter_of: np.ndarray,
    longest: np.ndarray,
    prices: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return ([N, A, 2] seconds of the first and the second half, [N, 2] their positions).

    A round that begins in a half may emit tokens beyond it, so the half's seconds are those per token
    of its rounds, for the half's own number of tokens.
    """
    N, A = len(num_prompt), len(drafter_of)
    halves = np.zeros((N, A, 2))
    counts = np.zeros((N, 2), dtype=np.int64)
    for i in range(N):
        base, size = offsets[i], offsets[i + 1] - offsets[i]
        counts[i, 0], counts[i, 1] = size // 2, size - size // 2
        for a in range(A):
            d, length = drafter_of[a], longest[a]
            for half in range(2):
                begin = 0 if half == 0 else size // 2
                end = begin + counts[i, half]
                place, spent = begin, 0.0
                while place < end:
                    drafts = min(drafted[d, base + place], length)
                    spent += prices[d, drafts, num_prompt[i] + place]
                    place += min(accepted[d, base + place], length) + 1
                emitted = min(place, size) - begin
                if emitted > 0:
                    halves[i, a, half] = spent / emitted * counts[i, half]
    return halves, counts


@compiled
def _price_best_paths(
    drafted: np.ndarray,
    accepted: np.ndarray,
    offsets: np.ndarray,
    num_prompt: np.ndarray,
    drafter_of: np.ndarray,
    longest: np.ndarray,
    prices: np.ndarray,
) -> np.ndarray:
    """Return [N] the seconds of the cheapest rounds that emit each answer, with any arm in any round."""
    N, A = len(num_prompt), len(drafter_of)
    best = np.zeros(N)
    rest = np.zeros(np.diff(offsets).max() + 1)  # seconds from a position on
    for i in range(N):
        base, size = offsets[i], offsets[i + 1] - offsets[i]
        rest[size] = 0.0
        for place in range(size - 1, -1, -1):
            least = np.inf
            for a in range(A):
                d, length = drafter_of[a], longest[a]
                drafts = min(drafted[d, base + place], length)
                after = min(place + min(accepted[d, base + place], length) + 1, size)
                seconds = prices[d, drafts, num_prompt[i] + place] + rest[after]
                least = min(least, seconds)
            rest[place] = least
        best[i] = rest[0]
    return best
