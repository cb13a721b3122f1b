"""The search: a target and prompts in, a skip set out.

It decodes development prompts once and then tries subset after subset. After every trial it rewrites
the file that `layer_skip` reads, with all trials in it, so an interrupted search has its best subset
on disk and resumes from there.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from time import perf_counter
from typing import TYPE_CHECKING, Any

from paceline.assembly import Pace
from paceline.contracts import no_progress
from paceline.costs import CostTable
from paceline.drafting.skip_set import SkipSet
from paceline.errors import ArtefactError, ConfigError
from paceline.layer_search.costs import measure_costs
from paceline.layer_search.proposals import bits_of, import_optuna, next_subset, subset_of
from paceline.layer_search.settings import SearchSettings
from paceline.layer_search.subset_replay import decode
from paceline.layer_search.trials import PredictedTrials, TimedTrials, Trial
from paceline.models.self_checks import check_sublayers
from paceline.plotting import import_figure

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from paceline.assembly import Parts
    from paceline.contracts import Progress
    from paceline.layer_search.proposals import Bits


@dataclass(frozen=True, slots=True)
class SearchReport:
    """The trials in their order, and the seconds per token of plain decoding."""

    num_layers: int
    plain_seconds_per_token: float
    trials: list[Trial]

    @property
    def best(self) -> Trial:
        return min(self.trials, key=lambda trial: trial.seconds_per_token)

    def speedup(self, trial: Trial) -> float:
        """Return the speed-up over plain decoding, prefill left out of both."""
        return self.plain_seconds_per_token / trial.seconds_per_token


def search_layers(
    source: Parts | Pace,
    prompts: Sequence[Sequence[int]],
    out: Path,
    settings: SearchSettings,
    trials: int = 200,
    minutes: float | None = None,
    costs: CostTable | None = None,
    on_progress: Progress = no_progress,
    on_best: Callable[[SearchReport], None] = lambda report: None,
) -> SearchReport:
    """Search until there are `trials` trials, or for `minutes`; write `out` after each trial.

    prompts: token ids of development prompts. costs: the table of an earlier search; by default the
    file next to `out`, which is measured and written if it is missing. The measured objective takes
    no table. Raises ConfigError if `out` holds another search, ArtefactError for another target's
    costs.
    """
    import_optuna()
    pace = source if isinstance(source, Pace) else Pace(source)
    target = pace.parts.target
    check_sublayers(target)
    facts = _facts(pace, prompts, settings)
    costs = _find_costs(costs, out, pace.parts, settings, on_progress)
    if costs is not None:
        facts["costs"] = costs.hash()
    report = _resume(out, facts)
    runs = _prepare_trials(pace, prompts, settings, costs, on_progress)
    try:
        report = report or SearchReport(target.num_layers, runs.plain_seconds_per_token(), [])
        deadline = math.inf if minutes is None else perf_counter() + 60 * minutes
        while len(report.trials) < trials and perf_counter() < deadline:
            bits = next_subset(_log_seconds(report), 2 * target.num_layers, settings.seed)
            if bits is None:
                break
            report.trials.append(runs.run(subset_of(bits)))
            _save(out, report, facts)
            on_progress("search", len(report.trials), trials)
            if report.best is report.trials[-1]:
                on_best(report)
    finally:
        runs.close()
    if not report.trials:
        raise ConfigError("no time for a single trial; raise the minutes")
    return report


def _prepare_trials(
    pace: Pace,
    prompts: Sequence[Sequence[int]],
    settings: SearchSettings,
    costs: CostTable | None,
    on_progress: Progress,
) -> PredictedTrials | TimedTrials:
    """Decode the target's outputs for trials. costs: None to try subsets against the clock."""
    on_progress("decode", 0, 1)
    trajectories = decode(pace, prompts, settings.max_new_tokens)
    on_progress("decode", 1, 1)
    if not trajectories:
        raise ConfigError("the target's answers are too short to search on; give other prompts")
    if costs is None:
        return TimedTrials(pace.parts, trajectories, settings)
    return PredictedTrials(pace.parts.target, trajectories, settings, costs)


def _log_seconds(report: SearchReport) -> dict[Bits, float]:
    """Return the logarithm of each tried subset's seconds, a smoother function than the seconds."""
    return {
        bits_of(trial.subset, report.num_layers): math.log(trial.seconds_per_token)
        for trial in report.trials
    }


# --- files ----------------------------------------------------------------------------------------


def _find_costs(
    given: CostTable | None,
    out: Path,
    parts: Parts,
    settings: SearchSettings,
    on_progress: Progress,
) -> CostTable | None:
    """Return the given table or the one next to `out`; None for the measured objective."""
    if settings.objective == "measured":
        if given is None:
            return None
        raise ConfigError("the measured objective takes its prices from the clock, not from a file")
    path = out.with_suffix(".costs.json")
    if given is not None:
        table = given
    elif path.is_file():
        table = CostTable.load(path)
    else:
        table = measure_costs(parts, settings.num_draft_tokens, partial(on_progress, "costs"))
        table.save(path)
    if table.fingerprint.get("target") != parts.target.fingerprint():
        raise ArtefactError("the cost file was measured for another target; name another file")
    return table


def _facts(
    pace: Pace, prompts: Sequence[Sequence[int]], settings: SearchSettings
) -> dict[str, Any]:
    digest = hashlib.sha256(repr([list(prompt) for prompt in prompts]).encode()).hexdigest()[:16]
    return {
        "target": pace.parts.target.fingerprint(),
        "dtype": str(pace.parts.target.dtype).removeprefix("torch."),
        "settings": settings.model_dump(mode="json"),
        "prompts": digest,
    }


def _save(out: Path, report: SearchReport, facts: dict[str, Any]) -> None:
    best = report.best
    recorded = {
        "speedup": report.speedup(best),
        "plain_seconds_per_token": report.plain_seconds_per_token,
        **facts,
        "trials": [asdict(trial) for trial in report.trials],
    }
    target = recorded.pop("target")
    SkipSet(best.subset, report.num_layers, target, recorded).save(out)


def _resume(out: Path, facts: dict[str, Any]) -> SearchReport | None:
    """Return the report of `out`, None without a file. Raises ConfigError for another search's."""
    if not out.is_file():
        return None
    saved = SkipSet.load(out)
    recorded = {**saved.facts, "target": saved.target}
    for key, value in facts.items():
        if recorded.get(key) != value:
            raise ConfigError(f"{out}: holds a search with another '{key}'; name another file")
    try:
        trials = [Trial(**raw) for raw in recorded["trials"]]
        return SearchReport(saved.num_layers, float(recorded["plain_seconds_per_token"]), trials)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactError(f"{out}: damaged search ({error}); name another file") from error


def plot(report: SearchReport, path: Path) -> None:
    """Write a PNG: the speed-up by trial, and the sub-layers that the best subset leaves out."""
    figure = import_figure("search")(figsize=(8, 5), layout="constrained")
    course, layers = figure.subplots(2, 1, height_ratios=[3, 1])
    speeds = [report.speedup(trial) for trial in report.trials]
    numbers = range(1, len(speeds) + 1)
    course.plot(numbers, speeds, ".", color="0.6", label="a trial")
    course.step(numbers, list(accumulate(speeds, max)), where="post", label="best so far")
    course.axhline(1.0, color="0.3", linewidth=0.8, linestyle=":", label="target alone")
    course.set(xlabel="trial", ylabel="speed over plain decoding")
    course.legend()
    best = report.best
    skipped = [best.skip_attention, best.skip_mlp]
    kept = [[i not in row for i in range(report.num_layers)] for row in skipped]
    layers.imshow(kept, cmap="Greens", vmin=-0.3, vmax=1.6, aspect="auto")
    layers.set_yticks([0, 1], ["attention", "MLP"])
    layers.set_xticks(range(report.num_layers), minor=True)
    layers.set(xlabel="layer", title=f"kept (dark): {report.speedup(best):.2f}x")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
