"""Number of prompts after which a policy has nearly its full gain.

Policies are learned from random parts of the training prompts, several parts of each size, and
compared on the same held-out prompts with the policy that is learned from all of them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from paceline.contracts import no_progress
from paceline.experiments.assistant_selection.learned import (
    BEST_SINGLE,
    ORACLE,
    PREDICTED,
    Study,
)
from paceline.experiments.findings import SPEED, Findings, Panel, Series, Table, columns
from paceline.learning.dataset import MIN_PROMPTS
from paceline.learning.evaluation import Contender
from paceline.learning.learners import LEARNERS as BY_NAME

if TYPE_CHECKING:
    from paceline.experiments.findings import Value
    from paceline.experiments.workbench import Workbench

SIZES: Final = (30, 100, 300, 1000, 3000, 10000)
LEARNERS: Final = ("acceptance", "policy_gradient", "knn")
DRAWS: Final = 5  # parts of each size, each with another seed
FEWER_DRAWS: Final = 3  # parts of more than `MANY` prompts, which differ less and take longer
MANY: Final = 1000
ENOUGH: Final = 0.95  # of the full policy's gain


@dataclass(frozen=True, slots=True)
class _Learned:
    """The policies of one learner at one size: speed-ups over `none` of all draws."""

    num_prompts: int
    speedups: np.ndarray  # [draws]

    def gains(self, full: float, level: float = 1.0) -> np.ndarray:
        """Return the [draws] shares of the full policy's gain over a level, 1 for plain decoding."""
        return np.asarray((self.speedups - level) / (full - level))


def run(bench: Workbench) -> Findings:
    study = Study.of(bench, bench.collection.prompts, bench.arms(list(bench.config.drafters)))
    num_train = len(study.train)
    sizes = [size for size in SIZES if size < num_train] or [max(MIN_PROMPTS, num_train // 2)]
    draws = {size: _num_draws(bench, size) for size in (*sizes, num_train)}
    runs = [(name, size, i) for name in LEARNERS for size, num in draws.items() for i in range(num)]
    speedups: dict[tuple[str, int], list[float]] = defaultdict(list)
    for learner, size, draw in bench.track("learn from parts", runs):
        speedups[learner, size].append(_speedup(study, learner, size, draw))
    found = {
        name: [_Learned(size, np.array(speedups[name, size])) for size in draws]
        for name in LEARNERS
    }
    report = study.report([])
    levels = {way: report.overall.strategies[way].speedup.value for way in (BEST_SINGLE, ORACLE)}
    return Findings(
        tables=[
            _table(found, len(study.held_out), levels[BEST_SINGLE]),
            _reached_table(found, levels),
        ],
        panels=[_panel(found)],
        settings=bench.settings() | {"prompts to learn from": num_train},
        remarks=_remarks(found, levels),
        facts=_facts(found, levels),
    )


def _num_draws(bench: Workbench, size: int) -> int:
    if bench.sizes.smoke:
        return 2
    return FEWER_DRAWS if size > MANY else DRAWS


def _speedup(study: Study, learner: str, size: int, draw: int) -> float:
    rng = np.random.default_rng([draw, size])
    part = study.train.rows(np.sort(rng.permutation(len(study.train))[:size]))
    settings = BY_NAME[learner].settings(study.settings.model_copy(update={"seed": draw}))
    chooser = BY_NAME[learner].fit(part, settings, no_progress).chooser
    (distribution,) = Contender(learner, (chooser,)).distributions(study.held_out)
    return study.held_out.speedup(distribution)


def _table(found: dict[str, list[_Learned]], num_held_out: int, single: float) -> Table:
    heads = columns("learner", ("prompts", "{:,}"), "policies", ("speed-up over none", SPEED))
    heads += columns(("lowest", SPEED), ("highest", SPEED), ("of the full gain", "{:.1%}"))
    heads += columns(("spread", "{:.1%}"), ("of that over the best single arm", "{:.1%}"))
    rows: list[list[Value]] = []
    for learner, of in found.items():
        full = float(of[-1].speedups.mean())
        for one in of:
            speeds, gains = one.speedups, one.gains(full)
            row: list[Value] = [learner, one.num_prompts, len(speeds)]
            row += [float(speeds.mean()), float(speeds.min()), float(speeds.max())]
            beyond = one.gains(full, single).mean() if full > single else None
            rows.append([*row, float(gains.mean()), float(gains.std()), beyond])
    explanation = (
        "Mean, lowest and highest of several policies, each learned with another seed from another "
        f"random part, on the same {num_held_out} held-out prompts. The full gain is the mean gain over "
        "plain decoding of the policies learned from all training prompts; the spread is the standard "
        "deviation over draws. The last column measures gains over the best single arm instead. "
        f"{PREDICTED.partition(',')[0]}."
    )
    return Table("Speed by number of examples", explanation, heads, rows)


def reached(of: list[_Learned], level: float = 1.0) -> int | None:
    """Return the fewest prompts from which on every size has `ENOUGH` of the gain over a level."""
    full = float(of[-1].speedups.mean())
    if full <= level:
        return None
    enough = [one.gains(full, level).mean() >= ENOUGH for one in of]
    first = len(of) - 1
    while first > 0 and enough[first - 1]:
        first -= 1
    return of[first].num_prompts if first < len(of) - 1 else None


def _reached_table(found: dict[str, list[_Learned]], levels: dict[str, float]) -> Table:
    heads = columns("learner", ("prompts for 95%", "{:,}"))
    heads += columns(("of that over the best single arm", "{:,}"), ("best single arm", SPEED))
    heads += columns(("full policy", SPEED), ("oracle", SPEED))
    rows: list[list[Value]] = []
    for learner, of in found.items():
        row: list[Value] = [learner, reached(of), reached(of, levels[BEST_SINGLE])]
        row += [levels[BEST_SINGLE], float(of[-1].speedups.mean()), levels[ORACLE]]
        rows.append(row)
    explanation = (
        "The fewest prompts, of the sizes tried, that reach 95% of the full policy's gain over plain "
        "decoding, or of its gain over the best single arm, there and at every larger size; a dash "
        "where only all prompts do."
    )
    return Table("Sufficient numbers of prompts", explanation, heads, rows)


def _panel(found: dict[str, list[_Learned]]) -> Panel:
    series = []
    for learner, of in found.items():
        gains = [one.gains(float(of[-1].speedups.mean())) for one in of]
        series.append(
            Series(
                learner,
                [float(one.num_prompts) for one in of],
                [float(gain.mean()) for gain in gains],
                [float(gain.min()) for gain in gains],
                [float(gain.max()) for gain in gains],
            )
        )
    return Panel(
        "gain by number of examples",
        "share of the full policy's gain over none",
        series,
        x_label="prompts learned from",
        baseline=ENOUGH,
        log_x=True,
    )


def _remarks(found: dict[str, list[_Learned]], levels: dict[str, float]) -> list[str]:
    remarks = []
    for learner, of in found.items():
        num, full = reached(of), float(of[-1].speedups.mean())
        fewest = of[0]
        when = (
            f"has {ENOUGH:.0%} of its gain over plain decoding from {num:,} prompts on"
            if num is not None
            else f"needs more than {of[-2].num_prompts:,} prompts for {ENOUGH:.0%} of its gain"
        )
        remarks.append(
            f"`{learner}` {when}; with {fewest.num_prompts} it is at {fewest.speedups.mean():.2f}x of "
            f"{full:.2f}x (best single arm {levels[BEST_SINGLE]:.2f}x, oracle {levels[ORACLE]:.2f}x)."
        )
    return remarks


def _facts(found: dict[str, list[_Learned]], levels: dict[str, float]) -> dict[str, Any]:
    return {
        "levels": levels,
        "speedups": {
            learner: {str(one.num_prompts): one.speedups.tolist() for one in of}
            for learner, of in found.items()
        },
    }
