"""One collection on several machines: other prices lead to other arms, and the clock must agree.

A machine is a dtype of the target and a number of threads; the first one is home. Each is profiled in
a new process. The prompts that get another arm than at home are decoded there with both arms,
interleaved.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import torch

from paceline.assembly import Pace, build
from paceline.bench.timed import TimedPrompt, select, time_interleaved
from paceline.contracts import NONE, no_progress, split_arm
from paceline.costs.table import CostTable
from paceline.errors import ArtefactError
from paceline.experiments.assistant_selection.learned import (
    BEST_SINGLE,
    ORACLE,
    PREDICTED,
    Study,
)
from paceline.experiments.findings import SHARE, SPEED, Findings, Panel, Series, Table, columns
from paceline.learning.evaluation import Contender
from paceline.verbs.pipeline import profile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from paceline.config import Config
    from paceline.experiments.findings import Value
    from paceline.experiments.workbench import Workbench

LEARNER: Final = "acceptance"
MACHINES: Final = (("bfloat16", 2), ("bfloat16", 1), ("float32", 2), ("float32", 1))
"""(dtype, threads); home first."""
CLOCKED: Final = 24  # prompts decoded with both choices on each machine
REPEATS: Final = 3
_RESAMPLES: Final = 2000


class Machine(NamedTuple):
    """A dtype of the target and a number of threads."""

    dtype: str
    threads: int

    def __str__(self) -> str:
        return f"{self.dtype}, {self.threads} thread{'s' if self.threads > 1 else ''}"

    def configuration(self, config: Config) -> Config:
        """Return the configuration of this machine; drafters keep the dtype that they name."""
        target = config.target.model_copy(update={"dtype": self.dtype})
        return config.model_copy(update={"target": target, "threads": self.threads})

    def table(self, folder: Path) -> Path:
        """Return the file of this machine's cost table."""
        return folder / "machines" / f"costs-{self.dtype}-{self.threads}.json"


class Job(NamedTuple):
    """A prompt to decode with two arms."""

    prompt: TimedPrompt
    max_new_tokens: int
    home: str
    here: str


@dataclass(frozen=True, slots=True)
class _Priced:
    """The held-out prompts at one machine's prices, and the choices there."""

    machine: Machine
    arms: tuple[str, ...]
    seconds: np.ndarray  # [N, A]
    repriced: np.ndarray  # [N] indices of arms, chosen by the policy at this machine's prices
    single: int  # index of the best single arm

    def speed(self, chosen: np.ndarray) -> float:
        """Return the speed-up over `none` of [N] chosen arms, given as indices."""
        seconds = self.seconds[np.arange(len(chosen)), chosen].sum()
        return float(self.seconds[:, self.arms.index(NONE)].sum() / seconds)

    def share(self, drafter: str) -> float:
        """Return the share of prompts for which a drafter is chosen at any length."""
        names = [split_arm(self.arms[place])[0] for place in self.repriced]
        return names.count(drafter) / len(names)

    def drafters(self) -> list[str]:
        """Return the drafters of the arms, each once."""
        return list(dict.fromkeys(split_arm(arm)[0] for arm in self.arms))


def run(bench: Workbench) -> Findings:
    machines = [Machine(*one) for one in MACHINES]
    tables = {m: _costs(bench, m) for m in bench.track("profile every machine", machines)}
    home, *others = machines
    arms = bench.arms(list(bench.config.drafters))
    prompts = bench.collection.prompts
    at_home = Study.of(bench, prompts, arms, costs=tables[home])
    contenders = at_home.contenders([LEARNER])  # learned once, at home
    priced = {
        machine: _priced(machine, Study.of(bench, prompts, arms, costs=table), contenders[0])
        for machine, table in tables.items()
    }
    clocked = {machine: _clock(bench, at_home, priced[home], priced[machine]) for machine in others}
    return Findings(
        tables=[_choices_table(priced), _regret_table(priced), _clock_table(clocked)],
        panels=[_choices_panel(priced), _clock_panel(clocked)],
        settings=bench.settings() | {"home": str(home)},
        remarks=_remarks(priced, clocked),
        facts=_facts(priced, clocked),
    )


def _costs(bench: Workbench, machine: Machine) -> CostTable:
    """Return a machine's table from the folder; without one, measure it in a new process."""
    path = machine.table(bench.folder)
    try:
        table = CostTable.load(path)
        table.check(bench.config.drafters)
        return table
    except ArtefactError:
        paths = bench.config.paths.model_copy(update={"costs": path})
        config = machine.configuration(bench.config.model_copy(update={"paths": paths}))
        _elsewhere(profile, config, no_progress, bench.sizes.profile_seconds)
        return CostTable.load(path)


def _elsewhere(work: Any, *arguments: Any) -> Any:
    """Call a function in a new process, which has its own number of threads."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def _priced(machine: Machine, study: Study, policy: Contender) -> _Priced:
    data = study.held_out
    (distribution,) = policy.distributions(data)  # priced with this study's table
    return _Priced(
        machine,
        data.arms,
        data.seconds,
        distribution.argmax(axis=1),
        int(study.train.seconds.sum(axis=0).argmin()),
    )


# --- by the clock ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Clocked:
    """The seconds of each prompt with home's arm and with this machine's own."""

    num_differ: int
    num_all: int
    home: np.ndarray  # [n]
    here: np.ndarray  # [n]
    predicted: float

    def ratio(self) -> tuple[float, float, float]:
        """Return (speed of the own choice over home's, low, high): a 95% interval over prompts."""
        rng = np.random.default_rng(0)
        draws = rng.integers(0, len(self.home), (_RESAMPLES, len(self.home)))
        ratios = self.home[draws].sum(axis=1) / self.here[draws].sum(axis=1)
        low, high = np.quantile(ratios, (0.025, 0.975))
        return float(self.home.sum() / self.here.sum()), float(low), float(high)


def _clock(bench: Workbench, study: Study, home: _Priced, here: _Priced) -> _Clocked | None:
    """Time the prompts whose arms differ, those with the largest predicted gain; None if none do."""
    data = study.held_out
    each = np.arange(len(data))
    gains = here.seconds[each, home.repriced] / here.seconds[each, here.repriced]
    differ = np.flatnonzero(home.repriced != here.repriced)
    chosen = differ[np.argsort(-gains[differ], kind="stable")][
        : 2 if bench.sizes.smoke else CLOCKED
    ]
    if not len(chosen):
        return None
    jobs = [
        Job(
            TimedPrompt(data.ids[i], data.domains[i], data.prompts[i]),
            int(data.limits[i]),
            data.arms[home.repriced[i]],
            data.arms[here.repriced[i]],
        )
        for i in chosen
    ]
    bench.on_progress(f"clock {here.machine}", 0, 1)
    config = here.machine.configuration(bench.config)
    repeats = 1 if bench.sizes.smoke else REPEATS
    seconds = _elsewhere(_time, config, jobs, repeats)
    bench.on_progress(f"clock {here.machine}", 1, 1)
    predicted = here.seconds[chosen, home.repriced[chosen]].sum()
    predicted /= here.seconds[chosen, here.repriced[chosen]].sum()
    return _Clocked(len(differ), len(data), seconds[:, 0], seconds[:, 1], float(predicted))


def _time(config: Config, jobs: Sequence[Job], repeats: int) -> np.ndarray:
    """Return the [n, 2] seconds of each job with home's arm and with this machine's."""
    pace = Pace(build(config))
    assert torch.get_num_threads() == config.threads
    by_tokens = {job.prompt.tokens: job for job in jobs}

    def decode(tokens: Sequence[int], is_home: bool) -> Sequence[int]:
        job = by_tokens[tuple(tokens)]
        return pace.complete(
            list(tokens),
            max_new_tokens=job.max_new_tokens,
            drafter=job.home if is_home else job.here,
            generation_config="none",
        ).token_ids

    methods = {
        "home": lambda tokens: decode(tokens, True),
        "here": lambda tokens: decode(tokens, False),
    }
    timings = time_interleaved(methods, [job.prompt for job in jobs], repeats)
    return np.array([[t.seconds for t in select(timings, which)] for which in methods]).T


# --- tables, panels and remarks -------------------------------------------------------------------


def _choices_table(priced: Mapping[Machine, _Priced]) -> Table:
    home = next(iter(priced.values()))
    heads = columns("machine", "best single arm", ("mean draft length", "{:.2f}"))
    heads += columns(*((name, SHARE) for name in home.drafters()))
    heads += columns(("different from home", SHARE))
    rows: list[list[Value]] = []
    for machine, one in priced.items():
        row: list[Value] = [str(machine), one.arms[one.single], _mean_length(one)]
        row += [one.share(name) for name in home.drafters()]
        rows.append([*row, float((one.repriced != home.repriced).mean())])
    explanation = (
        f"One `{LEARNER}` policy, learned from one collection; only its prices differ. Shares of "
        "held-out prompts by drafter, at any length; the mean is over arms that name their length."
    )
    return Table("Choices by machine", explanation, heads, rows)


def _mean_length(one: _Priced) -> float | None:
    lengths = [split_arm(one.arms[place])[1] for place in one.repriced]
    known = [length for length in lengths if length is not None]
    return float(np.mean(known)) if known else None


def _regret_table(priced: Mapping[Machine, _Priced]) -> Table:
    heads = columns("machine", ("own prices", SPEED))
    heads += columns(*((f"prices of {machine}", SPEED) for machine in priced))
    heads += columns((BEST_SINGLE, SPEED), (ORACLE, SPEED))
    rows: list[list[Value]] = []
    for machine, one in priced.items():
        row: list[Value] = [str(machine), one.speed(one.repriced)]
        row += [one.speed(other.repriced) for other in priced.values()]
        row.append(one.speed(np.full(len(one.repriced), one.single)))
        rows.append([*row, one.speed(one.seconds.argmin(axis=1))])
    explanation = (
        "Each machine's predicted speed-up over its own `none`, when the arms are chosen with its own "
        f"prices and with another machine's. {PREDICTED.partition(',')[0]}."
    )
    return Table("Choosing with another machine's prices", explanation, heads, rows)


def _clock_table(clocked: Mapping[Machine, _Clocked | None]) -> Table:
    heads = columns("machine", "other arm for", "clocked prompts", ("predicted", "{:.3f}x"))
    heads += columns("clocked, own choice over home's", ("faster prompts", SHARE))
    rows: list[list[Value]] = []
    for machine, one in clocked.items():
        if one is None:
            rows.append([str(machine), "no prompt", 0, None, None, None])
            continue
        ratio, low, high = one.ratio()
        row: list[Value] = [str(machine), f"{one.num_differ} of {one.num_all}", len(one.home)]
        row += [one.predicted, f"{ratio:.3f}x ({low:.3f} to {high:.3f})"]
        rows.append([*row, float((one.here < one.home).mean())])
    explanation = (
        "Prompts that get another arm than at home, those with the largest predicted gain, decoded "
        f"on the machine with both arms, interleaved; medians of {REPEATS} runs, seconds from request "
        "to last token, 95% bootstrap intervals over prompts."
    )
    return Table("By the clock", explanation, heads, rows)


def _choices_panel(priced: Mapping[Machine, _Priced]) -> Panel:
    machines = [str(machine).replace(", ", ",\n") for machine in priced]
    series = [
        Series(drafter, machines, [one.share(drafter) for one in priced.values()])
        for drafter in next(iter(priced.values())).drafters()
    ]
    return Panel("choices by machine", "share of held-out prompts", series, kind="bars")


def _clock_panel(clocked: Mapping[Machine, _Clocked | None]) -> Panel:
    known = {str(m).replace(", ", ",\n"): one for m, one in clocked.items() if one is not None}
    names = list(known)
    ratios = np.array([one.ratio() for one in known.values()]).reshape(-1, 3).T.tolist()
    series = [
        Series("predicted", names, [one.predicted for one in known.values()]),
        Series("clocked", names, *ratios),
    ]
    label = "own choice over home's choice"
    return Panel("prompts that get another arm", label, series, kind="bars", baseline=1.0)


def _remarks(
    priced: Mapping[Machine, _Priced], clocked: Mapping[Machine, _Clocked | None]
) -> list[str]:
    home = next(iter(priced.values()))
    remarks = []
    for machine, one in clocked.items():
        here = priced[machine]
        gained = here.speed(here.repriced) / here.speed(home.repriced)
        if one is None:
            remarks.append(f"{machine}: the same arms as at home for every prompt.")
            continue
        ratio, low, high = one.ratio()
        verdict = "agrees" if low > 1.0 else "disagrees" if high < 1.0 else "cannot tell"
        remarks.append(
            f"{machine}: {one.num_differ} of {one.num_all} prompts get another arm than at home, "
            f"a predicted gain of {gained:.3f}x over all prompts; on the clocked prompts, predicted "
            f"{one.predicted:.3f}x, clocked {ratio:.3f}x ({low:.3f} to {high:.3f}): the clock {verdict}."
        )
    return remarks


def _facts(
    priced: Mapping[Machine, _Priced], clocked: Mapping[Machine, _Clocked | None]
) -> dict[str, Any]:
    return {
        "chosen": {
            str(machine): [one.arms[place] for place in one.repriced]
            for machine, one in priced.items()
        },
        "clocked seconds": {
            str(machine): {"home": one.home.tolist(), "own": one.here.tolist()}
            for machine, one in clocked.items()
            if one is not None
        },
    }
