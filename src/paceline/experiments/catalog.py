"""The experiments by name, and the way to run one: a workbench in, findings and three files out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from paceline.bench.circumstances import circumstances
from paceline.config import nearest
from paceline.errors import ConfigError
from paceline.experiments.assistant_selection import published_timings
from paceline.experiments.report import figure_class, write_report
from paceline.experiments.workbench import SMOKE, Sizes, Workbench, quiet

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from paceline.config import Config
    from paceline.experiments.claims import Claim
    from paceline.experiments.findings import Findings
    from paceline.experiments.workbench import OnProgress

OUT: Final = Path("docs/experiments/assistant-selection")
FOLDER: Final = Path("runs/experiments")


@dataclass(frozen=True, slots=True)
class Experiment:
    """A question, what the paper says to it (None: it does not ask), and the function that answers."""

    name: str
    title: str
    claim: Claim | None
    run: Callable[[Workbench], Findings]


_ALL: Final = (
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
    """An experiment that was run, and the files it left."""

    experiment: Experiment
    findings: Findings
    files: list[Path]


def find_experiment(name: str) -> Experiment:
    if name not in EXPERIMENTS:
        raise ConfigError(f"there is no experiment '{name}'{nearest(name, list(EXPERIMENTS))}")
    return EXPERIMENTS[name]


def experiment(
    name: str,
    out: Path | str | None = None,
    config: Config | Path | str = Path("paceline.yaml"),
    data: Path | str | None = None,
    prompts: int | None = None,
    smoke: bool = False,
    folder: Path | str | None = None,
    on_progress: OnProgress = quiet,
) -> Finished:
    """Run an experiment; what it decodes and measures stays in `folder`, shared by all of them.

    out: where NAME.md, NAME.json and NAME.png go. data: folder of prompt files and published figures;
    prompts: so many of each task. smoke: sizes that only show that it works; its files and its
    working folder are others, so that it spoils nothing.
    """
    found = find_experiment(name)
    figure_class()  # before the work is done rather than after
    where = Path(folder) if folder is not None else FOLDER
    if smoke and folder is None:
        where = where.with_name(f"{where.name}-smoke")
    sizes = SMOKE if smoke else Sizes()
    sizes = sizes if prompts is None else sizes.with_prompts(prompts)
    bench = Workbench(config, where, None if data is None else Path(data), sizes, on_progress)
    findings = found.run(bench)
    to = Path(out) if out is not None else (where / "reports" if smoke else OUT)
    return Finished(found, findings, write_report(found, findings, circumstances(), to))
