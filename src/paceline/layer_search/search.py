"""The verb itself: a target and prompts in, a skip set out.

Decodes development prompts once, then tries subset after subset. The file that `layer_skip` reads is
written anew after every trial with all of them in it, so a killed search has its best already on
disk and goes on from there.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from paceline.assembly import Pace
from paceline.costs import CostTable
from paceline.drafting.skip_set import SkipSet
from paceline.errors import ArtefactError, ConfigError
from paceline.layer_search.development import Development, decode, rounds_of
from paceline.layer_search.pricing import Prices, measure_costs, timed_per_token
from paceline.layer_search.proposals import bits_of, import_optuna, next_subset, subset_of
from paceline.models.self_checks import check_sublayers
from paceline.models.sublayers import LayerSubset

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from paceline.assembly import Parts
    from paceline.layer_search.development import Trajectory
    from paceline.layer_search.proposals import Bits
    from paceline.layer_search.settings import SearchSettings
    from paceline.models.language_model import LanguageModel

    Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Trial:
    """One subset tried: seconds per emitted token, and how its drafts fared."""

    skip_attention: Sequence[int]
    skip_mlp: Sequence[int]
    seconds_per_token: float
    block_efficiency: float
    acceptance: float

    @property
    def subset(self) -> LayerSubset:
        return LayerSubset(frozenset(self.skip_attention), frozenset(self.skip_mlp))


@dataclass(frozen=True, slots=True)
class SearchReport:
    """What was tried, in order, and what plain decoding costs."""

    num_layers: int
    plain_seconds_per_token: float
    trials: list[Trial]

    @property
    def best(self) -> Trial:
        return min(self.trials, key=lambda trial: trial.seconds_per_token)

    def speedup(self, trial: Trial) -> float:
        """Over plain decoding, prefill left out of both."""
        return self.plain_seconds_per_token / trial.seconds_per_token


def search_layers(
    source: Parts | Pace,
    prompts: Sequence[Sequence[int]],
    out: Path,
    settings: SearchSettings,
    trials: int = 200,
    minutes: float | None = None,
    costs: CostTable | None = None,
    on_progress: Progress = lambda stage, done, total: None,
    on_best: Callable[[SearchReport], None] = lambda report: None,
) -> SearchReport:
    """Search until there are `trials` of them, or for `minutes`; writes `out` after each.

    costs: a table of an earlier search, see `pricing`; by default the one beside `out`, measured now
    if there is none; not asked for by the measured objective. Raises ConfigError where `out` is
    another search's.
    """
    import_optuna()
    if costs is not None and settings.objective == "measured":
        raise ConfigError("the measured objective takes its prices from the clock, not from a file")
    pace = source if isinstance(source, Pace) else Pace(source)
    target = pace.parts.target
    check_sublayers(target)
    facts = _facts(pace, prompts, settings)
    if settings.objective == "predicted":
        costs = costs or _costs_beside(out, pace.parts, settings, on_progress)
        _check_costs(costs, target)
        facts["costs"] = costs.hash()
    report = _resumed(out, facts)
    attempt = _attempt(pace, prompts, settings, costs, on_progress)
    try:
        report = report or SearchReport(target.num_layers, attempt.plain(), [])
        deadline = math.inf if minutes is None else perf_counter() + 60 * minutes
        while len(report.trials) < trials and perf_counter() < deadline:
            bits = next_subset(_tried(report), 2 * target.num_layers, settings.seed)
            if bits is None:
                break
            report.trials.append(attempt(subset_of(bits)))
            _save(out, report, facts)
            on_progress("search", len(report.trials), trials)
            if report.best is report.trials[-1]:
                on_best(report)
    finally:
        attempt.close()
    if not report.trials:
        raise ConfigError("no time for a single trial; raise the minutes")
    return report


def _attempt(
    pace: Pace,
    prompts: Sequence[Sequence[int]],
    settings: SearchSettings,
    costs: CostTable | None,
    on_progress: Progress,
) -> _Predicted | _Measured:
    """What tries a subset, on the target's own outputs. costs: None for the clock."""
    on_progress("decode", 0, 1)
    trajectories = decode(pace, prompts, settings.max_new_tokens)
    on_progress("decode", 1, 1)
    if not trajectories:
        raise ConfigError("the target's answers are too short to search on; give other prompts")
    if costs is None:
        return _Measured(pace.parts, trajectories, settings)
    return _Predicted(pace.parts.target, trajectories, settings, costs)


class _Predicted:
    """Tries a subset on recorded outputs, with a price list."""

    def __init__(
        self,
        target: LanguageModel,
        trajectories: Sequence[Trajectory],
        settings: SearchSettings,
        costs: CostTable,
    ) -> None:
        self._settings = settings
        self._prices = Prices(costs, target.num_layers, settings.num_draft_tokens)
        self._development = Development(target, trajectories, settings.num_draft_tokens)

    def plain(self) -> float:
        return self._prices.plain()

    def __call__(self, subset: LayerSubset) -> Trial:
        judgements = self._development.judge(subset)
        rounds = rounds_of(judgements, self._development.trajectories, self._settings)
        return _trial(subset, self._prices.per_token(rounds, subset), rounds)

    def close(self) -> None:
        self._development.close()


class _Measured:
    """Tries a subset by decoding against the clock."""

    def __init__(
        self, parts: Parts, trajectories: Sequence[Trajectory], settings: SearchSettings
    ) -> None:
        self._decode = partial(timed_per_token, parts, trajectories, settings)

    def plain(self) -> float:
        return self._decode(None)[0]

    def __call__(self, subset: LayerSubset) -> Trial:
        seconds, done = self._decode(subset)
        rounds = [np.array([(r.drafted, r.accepted) for r in c.rounds]) for c in done]
        return _trial(subset, seconds, rounds)

    def close(self) -> None:
        """Nothing is held."""


def _trial(subset: LayerSubset, seconds: float, rounds: Sequence[np.ndarray]) -> Trial:
    drafted, accepted = np.concatenate(rounds).T
    return Trial(
        tuple(sorted(subset.attention)),
        tuple(sorted(subset.mlp)),
        seconds,
        float((accepted + 1).mean()),
        float(accepted.sum() / max(1, drafted.sum())),
    )


def _tried(report: SearchReport) -> dict[Bits, float]:
    """Subsets and the logarithm of their seconds: a smoother function than the seconds."""
    return {
        bits_of(trial.subset, report.num_layers): math.log(trial.seconds_per_token)
        for trial in report.trials
    }


# --- files ----------------------------------------------------------------------------------------


def _costs_beside(
    out: Path, parts: Parts, settings: SearchSettings, on_progress: Progress
) -> CostTable:
    path = out.with_suffix(".costs.json")
    if path.is_file():
        return CostTable.load(path)
    table = measure_costs(parts, settings, lambda n, of: on_progress("costs", n, of))
    table.save(path)
    return table


def _check_costs(costs: CostTable, target: LanguageModel) -> None:
    if costs.fingerprint.get("target") != target.fingerprint():
        raise ArtefactError("the cost file was measured for another target; name another file")


def _facts(
    pace: Pace, prompts: Sequence[Sequence[int]], settings: SearchSettings
) -> dict[str, Any]:
    """What makes a search this search, ready for JSON."""
    digest = hashlib.sha256(repr([list(prompt) for prompt in prompts]).encode()).hexdigest()[:16]
    return {
        "target": pace.parts.target.fingerprint(),
        "dtype": str(pace.parts.target.dtype).removeprefix("torch."),
        "settings": settings.model_dump(mode="json"),
        "prompts": digest,
    }


def _save(out: Path, report: SearchReport, facts: dict[str, Any]) -> None:
    best = report.best
    remembered = {
        "speedup": report.speedup(best),
        "plain_seconds_per_token": report.plain_seconds_per_token,
        **facts,
        "trials": [asdict(trial) for trial in report.trials],
    }
    target = remembered.pop("target")
    SkipSet(best.subset, report.num_layers, target, remembered).save(out)


def _resumed(out: Path, facts: dict[str, Any]) -> SearchReport | None:
    """The search that `out` holds, if it is this one."""
    if not out.is_file():
        return None
    found = SkipSet.load(out)
    then = {**found.facts, "target": found.target}
    for key, value in facts.items():
        if then.get(key) != value:
            raise ConfigError(f"{out}: holds a search with another '{key}'; name another file")
    try:
        trials = [Trial(**raw) for raw in then["trials"]]
        return SearchReport(found.num_layers, float(then["plain_seconds_per_token"]), trials)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactError(f"{out}: damaged search ({error}); name another file") from error
