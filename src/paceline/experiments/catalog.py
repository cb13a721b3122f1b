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
from paceline.experiments.direct_alignment.experiment import compare_alignments
from paceline.experiments.direct_alignment.page import NAME as ALIGNMENT_NAME
from paceline.experiments.direct_alignment.page import TITLE as ALIGNMENT_TITLE
from paceline.experiments.direct_alignment.plan import SMOKE as SMOKE_BUDGET
from paceline.experiments.direct_alignment.plan import find_budget
from paceline.experiments.findings import Claim, Experiment, Question
from paceline.experiments.report import write_report
from paceline.experiments.workbench import SMOKE, Sizes, Workbench
from paceline.plotting import import_figure

if TYPE_CHECKING:
    from collections.abc import Mapping

    from paceline.config import Config
    from paceline.contracts import Progress
    from paceline.experiments.findings import Findings

OUT: Final = Path("docs/experiments/assistant-selection")
ALIGNMENT_OUT: Final = Path("docs/experiments/direct-alignment")
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
"""Those of the page on choosing the assistant."""
ALIGNMENT: Final = Question(
    ALIGNMENT_NAME,
    ALIGNMENT_TITLE,
    Claim(
        text="a drafter that is trained with TVD++ on the target's own answers reaches up to 2.3 tokens "
        "per target forward (arXiv 2403.00858)",
        source="abstract",
    ),
)
QUESTIONS: Final[Mapping[str, Question]] = MappingProxyType(
    {**EXPERIMENTS, ALIGNMENT_NAME: ALIGNMENT}
)
"""All experiments."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished experiment: its findings and the files of its report."""

    experiment: Question
    findings: Findings
    files: list[Path]


def find_experiment(name: str) -> Question:
    """Return an experiment by name. Raises ConfigError with the nearest name if there is none."""
    if name not in QUESTIONS:
        raise ConfigError(f"there is no experiment '{name}'{suggest_name(name, QUESTIONS)}")
    return QUESTIONS[name]


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
    budget: str | None = None,
    workers: int | None = None,
) -> Finished:
    """Run an experiment and write its report; all experiments share the collection in `folder`.

    out: folder of NAME.md, NAME.json and NAME.png. data: folder of prompt files and published figures.
    prompts: number of prompts per task, by default all of a given `store`. store: an existing
    collection to use instead of the folder's own. smoke: tiny sizes that only show that it works, with
    other folders for its files.

    `direct-alignment` takes no `prompts` but a budget, `small` or `full`, and a number of processes that
    train at the same time; its `store` is a folder of the target's answers, its `out` that of the
    results, and the page is next to it. Raises ConfigError if there is no such experiment, if a file is
    missing or if the experiment does not take a parameter.
    """
    question = find_experiment(name)
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
    if question is ALIGNMENT:
        return _compare_alignments(bench, out, prompts, budget, workers)
    if budget is not None or workers is not None:
        raise ConfigError(f"'{name}' has no budget and no workers; remove them")
    found = EXPERIMENTS[name]
    findings = found.run(bench)
    if (doubt := bench.doubt()) is not None:
        findings.remarks.append(f"The cost table is in doubt: {doubt}.")
    to = Path(out) if out is not None else (where / "reports" if smoke else OUT)
    return Finished(found, findings, write_report(found, findings, circumstances(), to))


def _compare_alignments(
    bench: Workbench,
    out: Path | str | None,
    prompts: int | None,
    budget: str | None,
    workers: int | None,
) -> Finished:
    if prompts is not None:
        raise ConfigError(f"'{ALIGNMENT_NAME}' has its prompts from its budget; remove prompts")
    if budget is not None and bench.sizes.smoke:
        raise ConfigError("a smoke run has its own budget; remove one of both")
    chosen = SMOKE_BUDGET if bench.sizes.smoke else find_budget(budget or "small")
    default = bench.folder / "reports" / ALIGNMENT_NAME if bench.sizes.smoke else ALIGNMENT_OUT
    to = default if out is None else Path(out)
    findings, files = compare_alignments(bench, chosen, workers or 1, to)
    return Finished(ALIGNMENT, findings, files)
