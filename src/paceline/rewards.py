"""What a policy is rewarded for, computed from acceptance and costs. Pure; knows no model or file.

`speed` is the time that an arm saves of plain decoding (`none`), the rounds from replay and the
seconds from the cost table, in units of the mean prompt's time: the largest mean reward is the least
time for all prompts together, as a mean of the prompts' own speed ratios is not. `alignment` =
alpha * similarity + (1 - alpha) * cost score is the reward of arXiv 2408.08470; what it compares (the
drafter's own greedy output with the target's, by ROUGE-L unless told otherwise) and that the cost
score is the share of the target's time which the drafter saves, is our reading of it (not
confirmed). `clocked`, of requests as they were
served, is `learning.from_choices`'s.
Symbols: T output tokens, t seconds per token. A change in any figure raises REWARD_VERSION.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from rapidfuzz.distance import LCSseq, Levenshtein, Prefix

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
    objective: Objective = "latency",
) -> float:
    """Return the predicted seconds of one request, from its prefill to its last token.

    rounds: [rounds, 2], drafted and accepted tokens. The choice of the arm is not priced. A request
    without rounds ended with the token of its prefill, and the engine starts no drafter for it.
    `rows` and `objective` are those of `costs.pricing`.
    """
    drafter = split_arm(arm)[0] if len(rounds) else NONE
    drafted, accepted = rounds.reshape(-1, 2).T
    # a round emits its accepted tokens and one of the target; the last token is never cached
    context = num_prompt + np.cumsum(accepted + 1) - (accepted + 1)
    before = float(prompt_seconds(seconds, drafter, np.array([num_prompt]))[0])

    def price(num_drafting: int) -> float:
        spent = round_seconds(seconds, drafter, drafted, context, rows, num_drafting)
        return before + float(spent.sum())

    return by_objective(price, rows, objective)


def savings(seconds: NDArray[np.float64], none: int) -> NDArray[np.float64]:
    """[N, A] the speed reward: seconds saved over the mean prompt's with `none`, which has 0 itself.

    seconds: [N, A] of whole requests; none: the place of `none`. The mean over prompts is the share of
    all seconds that is saved.
    """
    plain = seconds[:, [none]]
    saved: NDArray[np.float64] = (plain - seconds) / plain.mean()
    return saved


def rouge_1_f1(a: Sequence[int], b: Sequence[int]) -> float:
    """ROUGE-1 F1 of two token sequences: twice the tokens in common, as often as both have them,
    over len a + len b; 1 if both are empty. After Lin (2004).
    """
    if not a and not b:
        return 1.0
    common = (Counter(a) & Counter(b)).total()
    return 2.0 * common / (len(a) + len(b))


def rouge_l_f1(a: Sequence[int], b: Sequence[int]) -> float:
    """ROUGE-L F1 of two token sequences: 2 LCS / (len a + len b); 1 if both are empty.

    The longest common subsequence (LCS) is exact. After Lin (2004), with precision and recall
    weighed alike.
    """
    if not a and not b:
        return 1.0
    common: int = LCSseq.similarity(a, b)
    return 2.0 * common / (len(a) + len(b))


def edit_similarity(a: Sequence[int], b: Sequence[int]) -> float:
    """1 - Levenshtein distance over the longer length; 1 if both are empty."""
    similarity: float = Levenshtein.normalized_similarity(a, b)
    return similarity


def prefix_similarity(a: Sequence[int], b: Sequence[int]) -> float:
    """The length of the longest common prefix over the longer length; 1 if both are empty."""
    common: int = Prefix.similarity(a, b)
    return common / max(len(a), len(b)) if a or b else 1.0


METRICS: Final[Mapping[str, Similarity]] = MappingProxyType(
    {
        "rouge_1": rouge_1_f1,
        "rouge_l": rouge_l_f1,
        "edit": edit_similarity,
        "prefix": prefix_similarity,
    }
)
"""How alike two token sequences are, 0 to 1, by the name in the configuration."""


def token_seconds(seconds: SecondsFn, arm: str, context: int) -> float:
    """t: what one token of the arm's own plain drafting costs; for `none`, one of the target's."""
    subject, operation = (TARGET, FORWARD) if arm == NONE else (split_arm(arm)[0], PROPOSE)
    return float(np.asarray(seconds(subject, operation, np.array(1), np.array(context), 1)))


def cost_score(t_arm: float, t_target: float) -> float:
    """The share of the target's time per token that the drafter saves, clipped to [0, 1]."""
    return min(max(1.0 - t_arm / t_target, 0.0), 1.0)


def alignment_reward(alpha: float, similarity: float, cost: float) -> float:
    """alpha * similarity + (1 - alpha) * cost score, all in [0, 1]."""
    return alpha * similarity + (1.0 - alpha) * cost


def alignments(
    seconds: SecondsFn,
    alpha: float,
    num_prompt: int,
    output: Sequence[int],
    draft_outputs: Mapping[str, Sequence[int]],
    metric: str = "rouge_l",
) -> dict[str, float]:
    """The alignment reward of `none` and of each drafter whose own greedy output is given.

    metric: one of `METRICS`.

    `none` writes the target's output (similarity 1) and saves nothing (cost score 0). The others
    are priced in the middle of the output.
    """
    context = num_prompt + len(output) // 2
    t_target = token_seconds(seconds, NONE, context)
    rewards = {NONE: alignment_reward(alpha, 1.0, 0.0)}
    for arm, own in draft_outputs.items():
        score = cost_score(token_seconds(seconds, arm, context), t_target)
        rewards[arm] = alignment_reward(alpha, METRICS[metric](output, own), score)
    return rewards
