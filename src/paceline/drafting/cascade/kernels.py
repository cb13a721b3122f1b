"""The rule of a cascade in machine code: which part drafts this round, and how many tokens.

A round that drafts n tokens emits 1 + P_1 + ... + P_n expected tokens, P_i the chance that token i is
accepted together with its parents, in the seconds that the round takes. The rule takes the part and the
length with the most expected tokens per second. Engine and replay call the same functions.

A chance is calibrated from replay by the token's *class*, and multiplied by a factor for what the
part has shown in this request. A lookup's classes are those of its evidence; a model's, before it is
asked, are the *bins* of how sure the lookups are, since a text that a lookup can continue is easy for a
model, too. While a model drafts, its own probabilities tell more: its chain ends where a further token
costs more than it promises, and the end that does not pay is cut off.

Symbols: L lookups, M models, P = L + M parts in this order, K nodes of a lookup's draft, W the longest
draft, T output tokens, C buckets of contexts.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from paceline.compiled import compiled
from paceline.drafting.cascade.classes import NUM_BINS, NUM_SURE

MAX_CHANCE: Final = 0.98
EXPECTED, ACCEPTED = 0, 1
"""Columns of what a part has shown: accepted tokens, and how many its classes expected."""

# tokens that agree with the calibration, which a request's own count is added to
_LOOKUP_WEIGHT: Final = 12.0
_MODEL_WEIGHT: Final = 6.0


@compiled
def factor_of(seen: np.ndarray, weight: float) -> float:
    """Return how much more a part's tokens are accepted than their classes say. seen: [2]."""
    factor: float = (seen[ACCEPTED] + weight) / (seen[EXPECTED] + weight)
    return factor


@compiled
def bin_of(
    evidence: np.ndarray, parents: np.ndarray, lengths: np.ndarray, tables: np.ndarray
) -> int:
    """Return the bin of a position by the lookups' drafts there.

    evidence, parents: [L, K]. lengths: [L]. tables: [L, NUM_CLASSES] chances.
    """
    best = 0.0
    for lookup in range(len(lengths)):
        for node in range(lengths[lookup]):
            if parents[lookup, node] < 0:
                best = max(best, tables[lookup, evidence[lookup, node]])
    return 0 if best == 0.0 else 1 + min(int(best * (NUM_BINS - 1)), NUM_BINS - 2)


@compiled
def bins_of(
    evidence: np.ndarray, parents: np.ndarray, lengths: np.ndarray, tables: np.ndarray
) -> np.ndarray:
    """Return `bin_of` of T positions, [T] int64. evidence, parents: [L, T, K]. lengths: [L, T]."""
    bins = np.zeros(lengths.shape[1], dtype=np.int64)
    for place in range(len(bins)):
        bins[place] = bin_of(evidence[:, place], parents[:, place], lengths[:, place], tables)
    return bins


@compiled
def choose(
    evidence: np.ndarray,
    parents: np.ndarray,
    lengths: np.ndarray,
    limit: int,
    tables: np.ndarray,
    prospects: np.ndarray,
    seen: np.ndarray,
    verifying: np.ndarray,
    drafting: np.ndarray,
    rooms: np.ndarray,
    chances: np.ndarray,
) -> tuple[int, int, int, bool, float]:
    """Return (part, tokens to draft, bin, whether they branch, least hope) of the round.

    Part -1 drafts nothing. A model may go on while the chance of all its tokens is at least the least
    hope, see `least_hope`.

    evidence, parents: [L, K] of the lookups' drafts, of lengths [L]. tables: [L, NUM_CLASSES].
    prospects: [M, NUM_BINS, 2] chances of a model's first token and of each further one. seen: [P, 2].
    verifying: [W + 1] seconds of a round by drafted tokens, without a model. drafting: [M, W + 1] a
    model's seconds. rooms: [M] tokens that a model can draft. chances: [P, max(K, W)], receives P_i.
    """
    part, length, best = -1, 0, 1.0 / verifying[0]
    for lookup in range(len(lengths)):
        factor = factor_of(seen[lookup], _LOOKUP_WEIGHT)
        expected = 1.0
        for node in range(min(lengths[lookup], len(verifying) - 1)):
            chance = min(MAX_CHANCE, tables[lookup, evidence[lookup, node]] * factor)
            parent = parents[lookup, node]
            if parent >= 0:
                chance *= chances[lookup, parent]
            chances[lookup, node] = chance
            expected += chance
            if expected > best * verifying[node + 1]:
                part, length, best = lookup, node + 1, expected / verifying[node + 1]
    sure = bin_of(evidence, parents, lengths, tables)
    for model in range(len(prospects)):
        factor = factor_of(seen[len(lengths) + model], _MODEL_WEIGHT)
        chance, expected = 1.0, 1.0
        for k in range(1, min(limit, rooms[model], len(verifying) - 1) + 1):
            chance *= min(MAX_CHANCE, prospects[model, sure, min(k - 1, 1)] * factor)
            chances[len(lengths) + model, k - 1] = chance
            expected += chance
            seconds = verifying[k] + drafting[model, k]
            if expected > best * seconds:
                part, length, best = len(lengths) + model, k, expected / seconds
    branches = False
    for node in range(length if 0 <= part < len(lengths) else 0):
        branches |= parents[part, node] != node - 1
    least = 0.0
    if part >= len(lengths):
        model = part - len(lengths)
        factor = factor_of(seen[part], _MODEL_WEIGHT)
        following = min(MAX_CHANCE, prospects[model, sure, 1] * factor)
        least = least_hope(best, following, verifying, drafting[model], length)
    return part, length, sure, branches, least


@compiled
def least_hope(
    rate: float, following: float, verifying: np.ndarray, drafting: np.ndarray, length: int
) -> float:
    """Return the chance of a chain's tokens below which a further one does not pay.

    rate: expected tokens per second of the round. following: the chance of a further token. verifying,
    drafting: [W + 1]. length: about how long the chain is.
    """
    last = len(verifying) - 1
    shorter = min(length, last - 1)
    more = verifying[shorter + 1] - verifying[shorter] + drafting[last] / last
    hope: float = min(rate * max(more, 0.0) / following, 1.0)
    return hope


@compiled
def sure_class(sure: float) -> int:
    """Return the class of a model's probability."""
    return min(int(sure * NUM_SURE), NUM_SURE - 1)


@compiled
def cut_chain(
    sure: np.ndarray, table: np.ndarray, verifying: np.ndarray, spent: float, chances: np.ndarray
) -> int:
    """Return the number of a chain's tokens to verify for the most expected tokens per second.

    sure: [n <= W] its tokens' probabilities. table: [NUM_SURE] chances. spent: seconds of the draft.
    chances: receives P_i.
    """
    length, best = 0, 1.0 / (verifying[0] + spent)
    chance, expected = 1.0, 1.0
    for k in range(len(sure)):
        chance *= min(MAX_CHANCE, table[sure_class(sure[k])])
        chances[k] = chance
        expected += chance
        if expected > best * (verifying[k + 1] + spent):
            length, best = k + 1, expected / (verifying[k + 1] + spent)
    return length


@compiled
def learn(
    tokens: np.ndarray,
    parents: np.ndarray,
    base: np.ndarray,
    num_nodes: int,
    written: np.ndarray,
    seen: np.ndarray,
) -> None:
    """Count a draft's tokens by the text that was written instead. seen: [2] of the part.

    tokens, parents, base: [>= num_nodes], base the chance of each token by its class, given its parent.
    written: [n] tokens of the text from the draft's first place on.
    """
    last, depth, found = -1, 0, True
    while found and depth < len(written):
        found = False
        following = last
        for node in range(num_nodes):
            if parents[node] == last:
                seen[EXPECTED] += base[node]
                if not found and tokens[node] == written[depth]:
                    following, found = node, True
        if found:
            seen[ACCEPTED] += 1.0
        last, depth = following, depth + 1


@compiled
def walk(
    evidence: np.ndarray,
    parents: np.ndarray,
    kept: np.ndarray,
    lengths: np.ndarray,
    drafted: np.ndarray,
    accepted: np.ndarray,
    sure: np.ndarray,
    tables: np.ndarray,
    prospects: np.ndarray,
    chances_if_sure: np.ndarray,
    verifying: np.ndarray,
    drafting: np.ndarray,
    reading: np.ndarray,
    num_prompt: int,
    max_total_output: int,
    bucket: int,
) -> np.ndarray:
    """Return the rounds of a cascade along an output, [rounds, 3] int64.

    The columns are drafted tokens, accepted ones, and tokens that a model drafted.
    evidence, parents, kept: [L, T - 1, K] of the lookups' drafts at each position; kept: whether the
    node equals the output, with its parents. lengths: [L, T - 1]. drafted, accepted: [M, T - 1] of the
    models at full length. sure: [M, T - 1] their probabilities along the output; below 0 where a model's
    chain has the length that was chosen. chances_if_sure: [M, NUM_SURE]. tables, prospects: as in
    `choose`. verifying: [C, W + 1] and drafting: [C, M,
    W + 1], by contexts of `bucket` tokens. reading: [M] seconds per token that a model has not read.
    """
    L, num_positions, K = evidence.shape
    M = len(drafted)
    seen = np.zeros((L + M, 2))
    chances = np.zeros((L + M, max(K, drafting.shape[2])))
    read = np.zeros(M, dtype=np.int64)  # position up to which each model has read
    priced = np.zeros((M, drafting.shape[2]))
    rooms = np.zeros(M, dtype=np.int64)
    rounds = np.zeros((num_positions, 3), dtype=np.int64)
    count = place = 0
    while place < num_positions:
        # `place` tokens were emitted after the prefill's own; the position is one higher
        limit = max(0, max_total_output - place - 2)
        at = min((num_prompt + place) // bucket, len(verifying) - 1)
        for model in range(M):
            priced[model] = drafting[at, model] + reading[model] * (place - read[model])
            rooms[model] = drafted[model, place]
        part, length, bin_here, _, least = choose(
            evidence[:, place], parents[:, place], lengths[:, place], limit, tables, prospects,
            seen, verifying[at], priced, rooms, chances,
        )  # fmt: skip
        right = 0
        if 0 <= part < L:
            right = _count_kept(
                evidence[part, place], parents[part, place], kept[part, place], length,
                tables[part], seen[part],
            )  # fmt: skip
        elif part >= L:
            model = part - L
            read[model] = place
            rounds[count, 2] = length
            if sure[model, place] >= 0.0:
                longest = min(limit, rooms[model], verifying.shape[1] - 1)
                along = _draft_along(sure[model], place, longest, chances_if_sure[model], least)
                rounds[count, 2] = len(along)
                length = cut_chain(
                    along, chances_if_sure[model], verifying[at], priced[model, len(along)],
                    chances[part],
                )  # fmt: skip
            right = min(length, accepted[model, place])
            for k in range(min(right + 1, length)):
                if place + k < num_positions:
                    seen[part, EXPECTED] += prospects[model, bin_here, min(k, 1)]
            seen[part, ACCEPTED] += right
        right = min(right, num_positions - place)
        rounds[count, 0], rounds[count, 1] = length, right
        count += 1
        place += right + 1
    return rounds[:count].copy()


@compiled
def _draft_along(
    sure: np.ndarray, place: int, longest: int, table: np.ndarray, least: float
) -> np.ndarray:
    """Return the probabilities of the tokens that a model drafts before its hope is too small.

    sure: [T - 1] along the output, which a chain leaves at its first wrong token; after the output's
    end the last one is repeated.
    """
    along = np.empty(longest)
    hope, count = 1.0, 0
    while count < longest:
        along[count] = sure[min(place + count, len(sure) - 1)]
        hope *= table[sure_class(along[count])]
        count += 1
        if hope < least:
            break
    return along[:count]


@compiled
def _count_kept(
    evidence: np.ndarray,
    parents: np.ndarray,
    kept: np.ndarray,
    num_nodes: int,
    table: np.ndarray,
    seen: np.ndarray,
) -> int:
    """Do as `learn` where it is known which nodes equal the text; return the accepted tokens."""
    right = 0
    for node in range(num_nodes):
        parent = parents[node]
        if parent < 0 or kept[parent]:
            seen[EXPECTED] += table[evidence[node]]
            right += kept[node]
    seen[ACCEPTED] += right
    return right
