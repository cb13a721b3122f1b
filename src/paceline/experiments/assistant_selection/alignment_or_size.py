"""What alpha does in the published reward: the better aligned drafter, or the cheaper one?

Three drafters of one and four million parameters; the reward `alignment` at five weights under four
similarities. A policy without `none`: with it, similarity alone would always take the target itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from paceline.contracts import NONE
from paceline.experiments.assistant_selection.learned import (
    ORACLE,
    PREDICTED,
    SHARE,
    SPEED,
    Study,
    always_drafting,
    interval,
    share,
    unrewarding_none,
)
from paceline.experiments.findings import Column, Findings, Panel, Series, Table
from paceline.rewards import METRICS, cost_score, token_seconds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from paceline.contracts import CollectedPrompt
    from paceline.costs.table import CostTable
    from paceline.experiments.findings import Value
    from paceline.experiments.workbench import Workbench

DRAFTERS: Final = ("code", "general", "general-4m")
ALPHAS: Final = (0.0, 0.25, 0.5, 0.75, 1.0)
LEARNER: Final = "policy_gradient"


def run(bench: Workbench) -> Findings:
    arms = bench.arms(DRAFTERS, own_lengths=True)
    prompts = bench.aligned.prompts
    total, done = len(METRICS) * len(ALPHAS), 0
    cells: dict[str, dict[float, _Cell]] = {}
    for metric in METRICS:
        for alpha in ALPHAS:
            bench.on_progress("learn at every alpha", done, total)
            done += 1
            cell = _Cell(bench, prompts, arms, metric, alpha)
            cells.setdefault(metric, {})[alpha] = cell
    bench.on_progress("learn at every alpha", total, total)
    return Findings(
        tables=[_alpha_table(cells), _drafters_table(bench.costs, prompts, cells["rouge_l"][0.0])],
        panels=[_shares_panel(cells["rouge_l"]), _speed_panel(cells)],
        settings=bench.settings(),
        remarks=_remarks(cells),
        facts={m: {str(a): cell.facts() for a, cell in of.items()} for m, of in cells.items()},
    )


class _Cell:
    """A policy learned from the reward of one similarity at one alpha, on the held-out prompts."""

    def __init__(
        self,
        bench: Workbench,
        prompts: Sequence[CollectedPrompt],
        arms: Sequence[str],
        metric: str,
        alpha: float,
    ) -> None:
        study = unrewarding_none(
            Study.of(bench, prompts, arms, reward="alignment", alpha=alpha, metric=metric)
        )
        (trained,) = study.contenders([LEARNER])
        policy = always_drafting(trained, study.held_out)
        self.report = study.report([policy])
        self.name = policy.name
        held = {prompt.id: prompt for prompt in prompts}
        (distribution,) = policy.distributions(study.held_out)
        similar = _similarities(
            [held[id] for id in study.held_out.ids], study.held_out.arms, metric
        )
        self.similarity = float((distribution * similar).sum(axis=1).mean())

    @property
    def shares(self) -> dict[str, float]:
        return {name: share(self.report, self.name, name) for name in DRAFTERS}

    @property
    def most(self) -> str:
        return max(self.shares, key=lambda name: self.shares[name])

    @property
    def speedup(self) -> float:
        return self.report.overall.strategies[self.name].speedup.value

    def facts(self) -> dict[str, Any]:
        return {"shares": self.shares, "similarity": self.similarity, "report": self.report}


def _similarities(
    prompts: Sequence[CollectedPrompt], arms: Sequence[str], metric: str
) -> np.ndarray:
    """[N, A] of each drafter's own text to the target's; of `none`, 1."""
    of = METRICS[metric]
    return np.array(
        [
            [1.0 if a == NONE else of(p.output_tokens, p.draft_outputs.get(a, ())) for a in arms]
            for p in prompts
        ]
    )


def _alpha_table(cells: Mapping[str, Mapping[float, _Cell]]) -> Table:
    columns = [Column("similarity"), Column("alpha", "{:.2f}")]
    columns += [Column(f"to `{name}`", SHARE) for name in DRAFTERS]
    columns += [Column("mean similarity", "{:.3f}"), Column("speed-up over none")]
    rows: list[list[Value]] = []
    for metric, of in cells.items():
        for alpha, cell in of.items():
            row: list[Value] = [metric, alpha, *cell.shares.values(), cell.similarity]
            rows.append([*row, interval(cell.report.overall.strategies[cell.name].speedup)])
    explanation = (
        "alpha weighs the similarity of a drafter's own text to the target's; 1 - alpha the share of "
        f"the target's time a token that it saves. `{LEARNER}` on that reward, each drafter at its own "
        "draft length, `none` left out; shares of held-out prompts, and the mean similarity of what "
        f"was chosen. {PREDICTED}"
    )
    return Table("What alpha chooses", explanation, columns, rows)


def _drafters_table(costs: CostTable, prompts: Sequence[CollectedPrompt], cell: _Cell) -> Table:
    columns = [Column("drafter"), Column("cost score", "{:.3f}")]
    columns += [Column(metric, "{:.3f}") for metric in METRICS]
    columns += [Column("speed-up over none", SPEED)]
    context = int(np.mean([len(p.prompt_tokens) + len(p.output_tokens) / 2 for p in prompts]))
    t_target = token_seconds(costs.seconds, NONE, context)
    similar = {metric: _similarities(prompts, DRAFTERS, metric).mean(axis=0) for metric in METRICS}
    rows: list[list[Value]] = []
    for place, name in enumerate(DRAFTERS):
        row: list[Value] = [name]
        row.append(cost_score(token_seconds(costs.seconds, name, context), t_target))
        row += [float(similar[metric][place]) for metric in METRICS]
        rows.append([*row, cell.report.overall.arms[name].speedup.value])
    explanation = (
        "The two terms of the reward, means over all prompts, and what each drafter brings when all "
        "requests get it."
    )
    return Table("The drafters", explanation, columns, rows)


def _shares_panel(of: Mapping[float, _Cell]) -> Panel:
    alphas = list(of)
    series = [
        Series(name, list(alphas), [cell.shares[name] for cell in of.values()]) for name in DRAFTERS
    ]
    return Panel("who is chosen, ROUGE-L", "share of held-out prompts", series, x_label="alpha")


def _speed_panel(cells: Mapping[str, Mapping[float, _Cell]]) -> Panel:
    series = [
        Series(metric, list(of), [cell.speedup for cell in of.values()])
        for metric, of in cells.items()
    ]
    return Panel(
        "what that brings", "predicted speed-up over none", series, x_label="alpha", baseline=1.0
    )


def _remarks(cells: Mapping[str, Mapping[float, _Cell]]) -> list[str]:
    rouge = cells["rouge_l"]
    first, last = rouge[ALPHAS[0]], rouge[ALPHAS[-1]]
    best_alpha = max(rouge, key=lambda alpha: rouge[alpha].speedup)
    oracle = first.report.overall.strategies[ORACLE].speedup.value
    every = [(c.speedup, m, a) for m, of in cells.items() for a, c in of.items()]
    speed, metric, alpha = max(every)
    return [
        f"With ROUGE-L, cost alone (alpha 0) mostly takes `{first.most}` and similarity alone (alpha "
        f"1) mostly `{last.most}`; the chosen text's similarity goes from {first.similarity:.3f} to "
        f"{last.similarity:.3f}.",
        f"The fastest of its alphas is {best_alpha:.2f}, at {rouge[best_alpha].speedup:.2f}x over "
        f"`none`; the slowest choice of alpha brings {min(c.speedup for c in rouge.values()):.2f}x, "
        f"the oracle {oracle:.2f}x.",
        f"Over all similarities the fastest is {metric} at alpha {alpha:.2f}: {speed:.2f}x.",
    ]
