"""Effect of alpha in the published reward: the better aligned drafter, or the cheaper one?

Drafters from a tenth of the target's size to all of it: a trained draft model, and copies of the target
with few layers, with most layers, and in int8. The reward `alignment` at five weights with four
similarities. `none` is excluded: similarity alone would always choose the target itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from paceline.contracts import NONE
from paceline.experiments.assistant_selection.learned import (
    ORACLE,
    PREDICTED,
    Study,
    always_drafting,
    interval,
    share,
    unrewarding_none,
)
from paceline.experiments.findings import SHARE, SPEED, Findings, Panel, Series, Table, columns
from paceline.experiments.target_copies import copy_drafter, outer_layers
from paceline.rewards import METRICS, cost_score, token_seconds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from paceline.config import DrafterSection
    from paceline.costs.table import CostTable
    from paceline.experiments.findings import Value
    from paceline.experiments.workbench import Workbench
    from paceline.store.records import CollectedPrompt

TRAINED: Final = "general"
COPIES: Final = ("half-target", "most-of-target", "int8-target")
DRAFTERS: Final = (TRAINED, *COPIES)  # from the cheapest to the most expensive
FOLDER: Final = "alignment-or-size"
COPY_TOKENS: Final = 4
HELD_OUT: Final = 0.5
ALPHAS: Final = (0.0, 0.25, 0.5, 0.75, 1.0)
LEARNER: Final = "policy_gradient"


def run(bench: Workbench) -> Findings:
    within = bench.with_drafters(FOLDER, _drafters(bench))
    arms = within.arms(DRAFTERS, own_lengths=True)
    prompts = within.aligned.prompts
    cells: dict[str, dict[float, _AlphaPolicy]] = {}
    pairs = [(metric, alpha) for metric in METRICS for alpha in ALPHAS]
    for metric, alpha in within.track("learn at every alpha", pairs):
        cell = _AlphaPolicy(within, prompts, arms, metric, alpha)
        cells.setdefault(metric, {})[alpha] = cell
    num_held_out = cells["rouge_l"][0.0].report.overall.num_prompts
    return Findings(
        tables=[_alpha_table(cells), _drafters_table(within.costs, prompts, cells["rouge_l"][0.0])],
        panels=[_shares_panel(cells["rouge_l"]), _speed_panel(cells)],
        settings=within.settings() | {"held-out prompts": num_held_out},
        remarks=_remarks(cells),
        facts={m: {str(a): cell.facts() for a, cell in of.items()} for m, of in cells.items()},
    )


def _drafters(bench: Workbench) -> dict[str, DrafterSection]:
    """Return the trained draft model of the configuration, and copies of the target."""
    bench.arms([TRAINED])  # raises if it is not configured
    num_layers = bench.pace.parts.target.num_layers
    kept = {
        "half-target": outer_layers(num_layers, max(num_layers // 2, 1)),
        "most-of-target": outer_layers(num_layers, max(num_layers * 4 // 5, 1)),
        "int8-target": list(range(num_layers)),
    }
    drafters = {TRAINED: bench.config.drafters[TRAINED]}
    for name, layers in kept.items():
        folder = bench.folder / FOLDER / "models" / name
        more = {"weights": "int8"} if name == "int8-target" else {}
        drafters[name] = copy_drafter(bench.config.target, folder, layers, COPY_TOKENS, **more)
    return drafters


class _AlphaPolicy:
    """A policy learned from the reward of one similarity at one alpha, judged on held-out prompts."""

    def __init__(
        self,
        bench: Workbench,
        prompts: Sequence[CollectedPrompt],
        arms: Sequence[str],
        metric: str,
        alpha: float,
    ) -> None:
        study = unrewarding_none(
            Study.of(
                bench,
                prompts,
                arms,
                reward="alignment",
                alpha=alpha,
                metric=metric,
                held_out=HELD_OUT,
            )
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
        scores = _cost_scores(bench.costs, study.held_out.arms, prompts)
        self.cost_score = float((distribution @ scores).mean())

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
        return {
            "shares": self.shares,
            "similarity": self.similarity,
            "cost score": self.cost_score,
            "speed-up": self.report.overall.strategies[self.name].speedup,
        }


def _similarities(
    prompts: Sequence[CollectedPrompt], arms: Sequence[str], metric: str
) -> np.ndarray:
    """Return the [N, A] similarity of each drafter's own text to the target's; 1 for `none`."""
    of = METRICS[metric]
    return np.array(
        [
            [1.0 if a == NONE else of(p.output_tokens, p.draft_outputs.get(a, ())) for a in arms]
            for p in prompts
        ]
    )


def _cost_scores(
    costs: CostTable, arms: Sequence[str], prompts: Sequence[CollectedPrompt]
) -> np.ndarray:
    """Return the [A] cost score of each arm at the mean context; 0 for `none`."""
    context = int(np.mean([len(p.prompt_tokens) + len(p.output_tokens) / 2 for p in prompts]))
    t_target = token_seconds(costs.seconds, NONE, context)
    return np.array([cost_score(token_seconds(costs.seconds, a, context), t_target) for a in arms])


def _alpha_table(cells: Mapping[str, Mapping[float, _AlphaPolicy]]) -> Table:
    heads = columns("similarity", ("alpha", "{:.2f}"))
    heads += columns(*((f"to `{name}`", SHARE) for name in DRAFTERS))
    heads += columns(("mean similarity", "{:.3f}"), ("mean cost score", "{:.3f}"))
    heads += columns("speed-up over none")
    rows: list[list[Value]] = []
    for metric, of in cells.items():
        for alpha, cell in of.items():
            row: list[Value] = [metric, alpha, *cell.shares.values(), cell.similarity]
            row += [cell.cost_score]
            rows.append([*row, interval(cell.report.overall.strategies[cell.name].speedup)])
    explanation = (
        "alpha is the weight of the similarity of a drafter's own text to the target's; 1 - alpha is "
        "the weight of the share of the target's time per token that it saves. "
        f"`{LEARNER}` on that reward, each drafter at its own draft length, `none` excluded; shares of "
        f"held-out prompts, and the means of both terms over the chosen drafters. {PREDICTED}"
    )
    return Table("Choices by alpha", explanation, heads, rows)


def _drafters_table(
    costs: CostTable, prompts: Sequence[CollectedPrompt], cell: _AlphaPolicy
) -> Table:
    heads = columns("drafter", ("cost score", "{:.3f}"), *((m, "{:.3f}") for m in METRICS))
    heads += columns(("speed-up over none", SPEED))
    scores = _cost_scores(costs, DRAFTERS, prompts)
    similar = {metric: _similarities(prompts, DRAFTERS, metric).mean(axis=0) for metric in METRICS}
    rows: list[list[Value]] = []
    for place, name in enumerate(DRAFTERS):
        row: list[Value] = [name, float(scores[place])]
        row += [float(similar[metric][place]) for metric in METRICS]
        rows.append([*row, cell.report.overall.arms[name].speedup.value])
    explanation = (
        "The two terms of the reward, as means over all prompts, and the speed-up of each drafter when "
        "all requests get it. half-target and most-of-target are the target with half and with four "
        f"fifths of its layers, not trained further; copies of the target draft {COPY_TOKENS} tokens."
    )
    return Table("The drafters", explanation, heads, rows)


def _shares_panel(of: Mapping[float, _AlphaPolicy]) -> Panel:
    alphas = list(of)
    series = [
        Series(name, list(alphas), [cell.shares[name] for cell in of.values()]) for name in DRAFTERS
    ]
    return Panel("chosen drafters, ROUGE-L", "share of held-out prompts", series, x_label="alpha")


def _speed_panel(cells: Mapping[str, Mapping[float, _AlphaPolicy]]) -> Panel:
    series = [
        Series(metric, list(of), [cell.speedup for cell in of.values()])
        for metric, of in cells.items()
    ]
    label = "predicted speed-up over none"
    return Panel("speed by alpha", label, series, x_label="alpha", baseline=1.0)


def _remarks(cells: Mapping[str, Mapping[float, _AlphaPolicy]]) -> list[str]:
    rouge = cells["rouge_l"]
    first, last = rouge[ALPHAS[0]], rouge[ALPHAS[-1]]
    best_alpha = max(rouge, key=lambda alpha: rouge[alpha].speedup)
    oracle = first.report.overall.strategies[ORACLE].speedup.value
    every = [(c.speedup, m, a) for m, of in cells.items() for a, c in of.items()]
    speed, metric, alpha = max(every)
    return [
        f"With ROUGE-L, cost alone (alpha 0) mostly chooses `{first.most}` and similarity alone (alpha "
        f"1) mostly `{last.most}`; the chosen text's similarity goes from {first.similarity:.3f} to "
        f"{last.similarity:.3f}.",
        f"Its fastest alpha is {best_alpha:.2f}, at {rouge[best_alpha].speedup:.2f}x over `none`; its "
        f"slowest alpha reaches {min(c.speedup for c in rouge.values()):.2f}x, the oracle "
        f"{oracle:.2f}x.",
        f"Over all similarities the fastest is {metric} at alpha {alpha:.2f}: {speed:.2f}x.",
    ]
