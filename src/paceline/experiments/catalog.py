"""The experiments by name, and the function that runs one and writes its report."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from paceline.bench.circumstances import circumstances
from paceline.contracts import no_progress
from paceline.errors import ConfigError, suggest_name
from paceline.experiments.assistant_selection import (
    alignment_or_size,
    many_tasks,
    new_machine,
    number_of_examples,
    online,
    plain_decoding,
    published_timings,
    reward_compared,
    self_drafting,
    two_specialists,
)
from paceline.experiments.findings import Claim, Experiment
from paceline.experiments.report import write_report
from paceline.experiments.workbench import SMOKE, Sizes, Workbench
from paceline.plotting import import_figure

if TYPE_CHECKING:
    from collections.abc import Mapping

    from paceline.config import Config
    from paceline.contracts import Progress
    from paceline.experiments.findings import Findings

OUT: Final = Path("docs/experiments/assistant-selection")
FOLDER: Final = Path("runs/experiments")


def _paper(text: str) -> Claim:
    """Return a claim of arXiv 2408.08470, of which only a summary was read."""
    return Claim(text=text, source="summary")


_ALL: Final = (
    Experiment(
        "two-specialists",
        "Learning to choose between two domain specialists",
        _paper(
            "with a specialist drafter for each of two tasks, the policy finds the drafter of each "
            "domain and gains speed without being told which is which"
        ),
        two_specialists.run,
    ),
    Experiment(
        "alignment-or-size",
        "Alignment against size: what alpha does",
        _paper(
            "with drafters of different size and alignment, alpha moves the policy between "
            "better-aligned and cheaper drafters"
        ),
        alignment_or_size.run,
    ),
    Experiment(
        "number-of-examples",
        "How many examples a policy needs",
        _paper("fewer than 10,000 examples reach the performance of the whole set"),
        number_of_examples.run,
    ),
    Experiment(
        "plain-decoding-as-an-arm",
        "Plain decoding as an arm, with and without useful drafters",
        _paper(
            "with plain decoding as an arm, useless drafters are ignored and decoding speed is kept "
            "or improved"
        ),
        plain_decoding.run,
    ),
    Experiment(
        "many-tasks",
        "Many tasks and drafters made for none of them: Spec-Bench",
        _paper(
            "drafters for many tasks, on Spec-Bench with a 33-billion target and smaller drafters, "
            "are chosen among with gain; figures not confirmed"
        ),
        many_tasks.run,
    ),
    Experiment(
        "self-drafting",
        "Self-drafting: sets of skipped sub-layers as arms",
        _paper("where the drafter lives inside the target, the policy limits the loss"),
        self_drafting.run,
    ),
    Experiment(
        "reward-compared",
        "The alignment reward against predicted speed, same learner",
        None,
        reward_compared.run,
    ),
    Experiment(
        "online",
        "A learned policy, bandits and Hedge on a steady and on a shifting stream",
        None,
        online.run,
    ),
    Experiment(
        "new-machine",
        "A new machine: the same collection at other prices",
        None,
        new_machine.run,
    ),
    Experiment(
        "published-timings",
        "What choosing would have gained on published timings",
        None,
        published_timings.run,
    ),
)
EXPERIMENTS: Final[Mapping[str, Experiment]] = MappingProxyType({e.name: e for e in _ALL})


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished experiment: its findings and the files of its report."""

    experiment: Experiment
    findings: Findings
    files: list[Path]


def find_experiment(name: str) -> Experiment:
    """Return an experiment by name. Raises ConfigError with the nearest name if there is none."""
    if name not in EXPERIMENTS:
        raise ConfigError(f"there is no experiment '{name}'{suggest_name(name, EXPERIMENTS)}")
    return EXPERIMENTS[name]


def experiment(
    name: str,
    out: Path | str | None = None,
    config: Config | Path | str = Path("paceline.yaml"),
    data: Path | str | None = None,
    prompts: int | None = None,
    smoke: bool = False,
    folder: Path | str | None = None,
    on_progress: Progress = no_progress,
    store: Path | str | None = None,
) -> Finished:
    """Run an experiment and write its report; all experiments share the collection in `folder`.

    out: folder of NAME.md, NAME.json and NAME.png. data: folder of prompt files and published figures.
    prompts: number of prompts per task, by default all of a given `store`. store: an existing
    collection to use instead of the folder's own. smoke: tiny sizes that only show that it works, with
    other folders for its files. Raises ConfigError if there is no such experiment or a file is missing.
    """
    found = find_experiment(name)
    import_figure()  # fails before the work is done
    where = Path(folder) if folder is not None else FOLDER
    if smoke and folder is None:
        where = where.with_name(f"{where.name}-smoke")
    sizes = SMOKE if smoke else Sizes()
    if prompts is not None or (store is not None and not smoke):
        sizes = replace(sizes, prompts=prompts)
    bench = Workbench(
        config,
        where,
        None if data is None else Path(data),
        sizes,
        on_progress,
        None if store is None else Path(store),
    )
    findings = found.run(bench)
    if (doubt := bench.doubt()) is not None:
        findings.remarks.append(f"The cost table is in doubt: {doubt}.")
    to = Path(out) if out is not None else (where / "reports" if smoke else OUT)
    return Finished(found, findings, write_report(found, findings, circumstances(), to))
