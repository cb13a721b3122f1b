"""Rewards of a policy, computed from acceptance and costs. Pure; knows no model and no file.

`speed` is the time that an arm saves of plain decoding (`none`), in units of the mean prompt's time,
with rounds from replay and seconds from the cost table. Its largest mean is the least time for all
prompts together, which a mean of speed ratios is not. `alignment` = alpha * similarity + (1 - alpha) *
cost score is the reward of arXiv 2408.08470. In our reading (not confirmed) it compares the drafter's
own greedy output with the target's, and the cost score is the share of the target's time that the
drafter saves. The reward `clocked`, of served requests, is in `learning.from_choices`.
Symbol: t, seconds per token. A change in any figure raises REWARD_VERSION.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from rapidfuzz.distance import LCSseq, Levenshtein, Prefix

from paceline.config import DEFAULT_OBJECTIVE
from paceline.contracts import NONE, split_arm
from paceline.costs.pricing import by_objective, prompt_seconds, round_seconds
from paceline.costs.table import FORWARD, PROPOSE, TARGET

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from paceline.costs.pricing import Objective, SecondsFn

REWARD_VERSION: Final = 2
Similarity = Callable[[Sequence[int], Sequence[int]], float]


def request_seconds(
    seconds: SecondsFn,
    arm: str,
    num_prompt: int,
    rounds: NDArray[np.integer[Any]],
    rows: int = 1,
    objective: Objective = DEFAULT_OBJECTIVE,
    proposed: NDArray[np.integer[Any]] | None = None,
) -> float:
    """Return the predicted seconds of one request, from its prefill to its last token.

    rounds: [rounds, 2], drafted and accepted tokens. The choice of the arm is not priced. A request
    without rounds ended with the token of its prefill, and the engine starts no drafter for it.
    `rows` and `objective` are those of `costs.pricing`. proposed: [rounds], see `round_seconds`.
    """
    drafter = split_arm(arm)[0] if len(rounds) else NONE
    drafted, accepted = rounds.reshape(-1, 2).T
    # a round emits its accepted tokens and one of the target; the last token is never cached
    context = num_prompt + np.cumsum(accepted + 1) - (accepted + 1)
    before = float(prompt_seconds(seconds, drafter, np.array([num_prompt]))[0])

    def price(num_drafting: int) -> float:
        spent = round_seconds(seconds, drafter, drafted, context, rows, num_drafting, proposed)
        return before + float(spent.sum())

    return by_objective(price, rows, objective)


def savings(seconds: NDArray[np.float64], none: int) -> NDArray[np.float64]:
    """Return the speed reward [N, A]: the seconds saved over those of the mean prompt with `none`.

    seconds: [N, A] of whole requests. none: the column of `none`, whose reward is 0. The mean over
    prompts is the saved share of all seconds.
    """
    plain = seconds[:, [none]]
    saved: NDArray[np.float64] = (plain - seconds) / plain.mean()
    return saved


def rouge_1_f1(a: Sequence[int], b: Sequence[int]) -> float:
    """Return the ROUGE-1 F1 of two token sequences, 1 if both are empty (Lin, 2004).

    It is twice the size of the multisets' intersection over len a + len b.
    """
    if not a and not b:
        return 1.0
    common = (Counter(a) & Counter(b)).total()
    return 2.0 * common / (len(a) + len(b))


def rouge_l_f1(a: Sequence[int], b: Sequence[int]) -> float:
    """Return the ROUGE-L F1 of two token sequences, 1 if both are empty (Lin, 2004).

    It is twice the length of the longest common subsequence over len a + len b.
    """
    if not a and not b:
        return 1.0
    common: int = LCSseq.similarity(a, b)
    return 2.0 * common / (len(a) + len(b))


METRICS: Final[Mapping[str, Similarity]] = MappingProxyType(
    {
        "rouge_1": rouge_1_f1,
        "rouge_l": rouge_l_f1,
        # 1 - Levenshtein distance, and the common prefix, over the longer length
        "edit": Levenshtein.normalized_similarity,
        "prefix": Prefix.normalized_similarity,
    }
)
"""Similarities of two token sequences, 0 to 1, by the name in the configuration."""


def token_seconds(seconds: SecondsFn, arm: str, context: int) -> float:
    """Return the seconds t of one token that the arm's drafter drafts; for `none`, of the target."""
    subject, operation = (TARGET, FORWARD) if arm == NONE else (split_arm(arm)[0], PROPOSE)
    return float(np.asarray(seconds(subject, operation, np.array(1), np.array(context), 1)))


def cost_score(t_arm: float, t_target: float) -> float:
    """Return the share of the target's time per token that the drafter saves, clipped to [0, 1]."""
    return min(max(1.0 - t_arm / t_target, 0.0), 1.0)


def alignment_reward(alpha: float, similarity: float, cost: float) -> float:
    """Return alpha * similarity + (1 - alpha) * cost, all in [0, 1]."""
    return alpha * similarity + (1.0 - alpha) * cost


def alignments(
    seconds: SecondsFn,
    alpha: float,
    num_prompt: int,
    output: Sequence[int],
    draft_outputs: Mapping[str, Sequence[int]],
    metric: str = "rouge_l",
) -> dict[str, float]:
    """Return the alignment reward of `none` and of each drafter with its own greedy output.

    output: the target's. metric: one of `METRICS`. `none` has similarity 1 and cost score 0. The
    others are priced in the middle of the output.
    """
    context = num_prompt + len(output) // 2
    t_target = token_seconds(seconds, NONE, context)
    rewards = {NONE: alignment_reward(alpha, 1.0, 0.0)}
    for arm, own in draft_outputs.items():
        score = cost_score(token_seconds(seconds, arm, context), t_target)
        rewards[arm] = alignment_reward(alpha, METRICS[metric](output, own), score)
    return rewards
