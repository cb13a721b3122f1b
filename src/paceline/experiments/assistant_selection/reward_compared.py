"""The published reward against predicted speed, with the same learner on the same prompts.

`alignment` compares a drafter's own text with the target's; `speed` prices the tokens that verification
would have accepted. Both are known for every arm of every prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.contracts import NONE
from paceline.experiments.assistant_selection.learned import (
    BEST_SINGLE,
    ORACLE,
    PREDICTED,
    Study,
    always_drafting,
    interval,
    interval_series,
    share,
    speed_panel,
    speedup,
    unrewarding_none,
)
from paceline.experiments.findings import SHARE, SPEED, Findings, Panel, Series, Table, columns

if TYPE_CHECKING:
    from paceline.experiments.findings import Value
    from paceline.experiments.workbench import Workbench
    from paceline.learning.dataset import Dataset
    from paceline.learning.evaluation import EvaluationReport

LEARNER: Final = "policy_gradient"
ALPHAS: Final = (0.0, 0.25, 0.5, 0.75, 1.0)
SPEED_REWARD: Final = "speed"


def run(bench: Workbench) -> Findings:
    prompts = bench.aligned.prompts
    writing = [n for n in bench.config.drafters if all(n in p.draft_outputs for p in prompts)]
    arms = bench.arms(writing, own_lengths=True)
    found: dict[str, _Rewarded] = {}
    for alpha in bench.track("learn from every reward", (None, *ALPHAS)):
        if alpha is None:
            found[SPEED_REWARD] = _Rewarded(Study.of(bench, prompts, arms))
            continue
        study = Study.of(bench, prompts, arms, reward="alignment", alpha=alpha)
        found[f"alignment, alpha {alpha:.2f}"] = _Rewarded(study)
    return Findings(
        tables=[_table(found)],
        panels=[_panel(found)],
        settings=bench.settings() | {"drafters": ", ".join(writing)},
        remarks=_remarks(found),
        facts={name: {"report": one.report, "right": one.right} for name, one in found.items()},
    )


class _Rewarded:
    """The policies that one learner makes from one reward, with `none` among its arms and without."""

    def __init__(self, study: Study) -> None:
        (free,) = study.contenders([LEARNER])
        if study.settings.reward == "alignment":
            # similarity would choose the target itself; the reward is meant to compare drafters
            (drafting,) = unrewarding_none(study).contenders([LEARNER])
        else:
            drafting = free
        forced = always_drafting(drafting, study.held_out)
        self.report: EvaluationReport = study.report([free, forced])
        self.free, self.forced = free.name, forced.name
        self.right, self.order = _agreement(study.held_out)


def _agreement(data: Dataset) -> tuple[float, float]:
    """Return (share of prompts whose best rewarded drafter is the fastest, share of pairs in order).

    Pairs are pairs of drafters that differ in seconds; one is in order if its rewards order it as its
    seconds do. A tie of rewards counts one half.
    """
    drafters = [i for i, arm in enumerate(data.arms) if arm != NONE]
    rewards, speeds = data.rewards[:, drafters], -data.seconds[:, drafters]
    right = float((rewards.argmax(axis=1) == speeds.argmax(axis=1)).mean())
    first, second = np.triu_indices(len(drafters), 1)
    by_reward = np.sign(rewards[:, first] - rewards[:, second])
    by_speed = np.sign(speeds[:, first] - speeds[:, second])
    differ = by_speed != 0
    return right, float((1.0 + by_reward * by_speed)[differ].mean() / 2)


def _table(found: dict[str, _Rewarded]) -> Table:
    heads = columns("reward", ("best rewarded is fastest", SHARE), ("pairs in order", SHARE))
    heads += columns(f"speed-up, no `{NONE}`", "slowest task", ("of the oracle", "{:.1%}"))
    heads += columns((f"speed-up with `{NONE}`", SPEED), (f"to `{NONE}`", SHARE))
    rows: list[list[Value]] = []
    for name, one in found.items():
        figures, slowest = one.report.overall.strategies[one.forced], one.report.slowest[one.forced]
        row: list[Value] = [name, one.right, one.order, interval(figures.speedup)]
        row += [f"{slowest.task} {slowest.speedup.value:.2f}x", figures.of_oracle]
        rows.append([*row, speedup(one.report, one.free), share(one.report, one.free, NONE)])
    explanation = (
        f"`{LEARNER}` on every reward; drafters that write a text of their own, each at its own draft "
        "length. The first two figures describe the rewards themselves, on held-out prompts: how often "
        "the drafter with the largest reward is the fastest, and the share of pairs of drafters that a "
        f"reward puts in the order of their speeds. {PREDICTED}"
    )
    return Table("One learner, two rewards", explanation, heads, rows)


def _panel(found: dict[str, _Rewarded]) -> Panel:
    names = [name.replace(", ", ",\n") for name in found]
    speeds = [one.report.overall.strategies[one.forced].speedup for one in found.values()]
    policy = interval_series(f"policy, no {NONE}", names, speeds)
    levels = [
        Series(way, names, [speedup(one.report, way) for one in found.values()])
        for way in (BEST_SINGLE, ORACLE)
    ]
    return speed_panel("by reward", [policy, *levels])


def _remarks(found: dict[str, _Rewarded]) -> list[str]:
    by_speed = found[SPEED_REWARD]
    aligned = {name: one for name, one in found.items() if name != SPEED_REWARD}
    speeds = {name: speedup(one.report, one.forced) for name, one in aligned.items()}
    best, worst = max(speeds, key=lambda n: speeds[n]), min(speeds, key=lambda n: speeds[n])
    own = speedup(by_speed.report, by_speed.forced)
    single = speedup(by_speed.report, BEST_SINGLE)
    pure = aligned[f"alignment, alpha {ALPHAS[-1]:.2f}"]
    return [
        f"The speed reward reaches {own:.2f}x, the alignment reward {speeds[worst]:.2f}x ({worst}) to "
        f"{speeds[best]:.2f}x ({best}), the best single arm {single:.2f}x.",
        f"Similarity alone names the fastest drafter in {pure.right:.0%} of prompts and orders "
        f"{pure.order:.0%} of pairs as their speeds do.",
        f"With `{NONE}` among the arms, similarity alone chooses it for "
        f"{share(pure.report, pure.free, NONE):.0%}: the target's own text is always the most similar.",
    ]
