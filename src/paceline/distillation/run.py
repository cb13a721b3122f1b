"""`distill`: from prompt files to a drafter's folder, in three phases that a killed run continues.

Phase 1 pre-trains a student on text, phase 2 decodes the target's missing answers and its distributions
along them, phase 3 aligns the student with the target (arXiv 2403.00858). Phase 2 runs first, since its
validation answers choose the weights of both trainings. The saved student is
measured and written in transformers' format with a card and the hashes of the prompts that it was
trained on. Unfinished work is in `<out>.part`.
"""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from paceline.config import Config
from paceline.distillation.card import card
from paceline.distillation.curves import EventLog, check_extras, plot_curves
from paceline.distillation.distributions import LiveDistributions, check_top_k, gather_distributions
from paceline.distillation.facts import (
    TRAINING,
    DistillReport,
    make_facts,
    read_earlier_domains,
)
from paceline.distillation.measures import measure
from paceline.distillation.model_folders import load_float32, publish_folder, save_student
from paceline.distillation.outputs import open_target
from paceline.distillation.preparation import check_lengths, prepare_texts
from paceline.distillation.reading import check_target, with_prompt_weight
from paceline.distillation.replays import matches_of, replay_validation, with_losses
from paceline.distillation.student import check_tokenizer, make_student, num_parameters
from paceline.distillation.train import (
    Lesson,
    Trainer,
    TrainingProgress,
    choose_arithmetic,
    start_accelerator,
)
from paceline.errors import ConfigError
from paceline.files import write_atomically
from paceline.store import TrainedOn
from paceline.store.trained_on import NOTHING, join

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from paceline.assembly import Pace
    from paceline.distillation.batches import Example
    from paceline.distillation.checkpoints import Training
    from paceline.distillation.measures import Measures
    from paceline.distillation.preparation import TrainingTexts
    from paceline.distillation.prices import Prices
    from paceline.distillation.replays import TextReplay
    from paceline.distillation.settings import DistillSettings
    from paceline.distillation.train import Distributions

    OnProgress = Callable[[TrainingProgress], None]

LOCK = "lock"  # of the folder of unfinished work


def distill(
    pace_or_config: Pace | Config,
    data: Sequence[Path],
    out: Path,
    settings: DistillSettings,
    on_progress: OnProgress = lambda progress: None,
    also_measure: Sequence[Path] = (),
    prices: Prices | None = None,
) -> DistillReport:
    """Train a drafter for the target on the prompts of `data` and write it to `out`.

    also_measure: prompt files of other tasks, whose validation prompts are evaluated only. prices: of
    the student on this machine (`verbs.distillation`); the best weights are those with the largest
    predicted speed-up at these prices, and without them with the largest memory-bound speed-up at the
    share of the target's parameters. The same call continues a killed run.

    Raises ConfigError for data, settings or an `out` that cannot be used, for a loss that is not finite
    and where another process trains in the same folder; StoreError for answers of another target.
    """
    data, also_measure = [Path(p) for p in data], [Path(p) for p in also_measure]
    check_paths(data, also_measure, out)
    pace = pace_or_config
    if isinstance(pace, Config):
        pace = open_target(pace, settings.answers_drafter)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    part = out.with_name(out.name + ".part")
    accelerator = start_accelerator(pace.parts.target.device.type == "cpu")
    with locked(part, accelerator):
        run = _Run(pace, settings, part, accelerator, on_progress, prices, out.name)
        report = run.train(data, also_measure, out)
        if accelerator.is_main_process:
            publish_folder(part / "model", out)
            shutil.rmtree(part)
        accelerator.wait_for_everyone()
    return report


class _Run:
    """One distillation: its models, its texts and its unfinished work."""

    def __init__(
        self,
        pace: Pace,
        settings: DistillSettings,
        part: Path,
        accelerator: Accelerator,
        on_progress: OnProgress,
        prices: Prices | None,
        name: str,
    ) -> None:
        settings = choose_arithmetic(settings, accelerator.device)
        self.pace, self.settings, self.part = pace, settings, part
        self.accelerator, self.name = accelerator, name
        self.round_costs = None if prices is None else prices.round_costs
        self.is_main = accelerator.is_main_process
        self.on_progress = on_progress if self.is_main else _say_nothing
        if self.is_main:
            check_extras(has_events=settings.events is not None)
        check_top_k(pace.parts.target, settings)
        check_target(pace.parts.target)
        start = settings.start_from
        check_tokenizer(start, pace.parts.vocabulary)
        self.earlier = None if start is None else TrainedOn.load(start)
        self.earlier_domains = read_earlier_domains(start)
        self.student = make_student(pace.parts.target, settings)
        self.settings = with_prompt_weight(settings, pace.parts.target.model, self.student)
        own = num_parameters(self.student)
        self.ratio = own / num_parameters(pace.parts.target.model)
        self.phases: list[Training] = []

    def train(self, data: Sequence[Path], also_measure: Sequence[Path], out: Path) -> DistillReport:
        """Run the phases, save and measure the student, and describe it in its folder."""
        # the first process writes what all of them read
        with self.accelerator.main_process_first(), _answers_lock(self.settings.outputs):
            texts = prepare_texts(
                self.pace, data, also_measure, self.settings, self._report, self.student
            )
            check_lengths(self.student, texts)
            distributions = self._distributions(texts)
        lesson = Lesson(texts.training, texts.plain, distributions)
        if self.settings.pretrain_tokens:
            self._phase(lesson, texts.validation, distributions, self.settings.pretrain_tokens)
        self._phase(lesson, texts.validation, distributions)
        made = self.part / "model"
        if self.is_main:
            parts, ends = self.pace.parts, self.pace.stop_token_ids()
            save_student(self.student, parts.tokenizer, ends, made, self.settings.dtype)
        self.accelerator.wait_for_everyone()
        measures = self._measure(replay_validation(load_float32(made), texts.unseen, distributions))
        report = DistillReport(
            out,
            num_parameters(self.student),
            len(texts.training),
            measures,
            self.phases[-1].step,
            self.phases[-1].best_step,
            sum(phase.seconds for phase in self.phases),
            texts.notes,
        )
        if self.is_main:
            self._describe(made, texts, report)
        return report

    def _report(self, phase: str, done: int, total: int) -> None:
        self.on_progress(TrainingProgress(phase, done, total))

    def _distributions(self, texts: TrainingTexts) -> Distributions:
        """Return the target's distributions along the texts, after computing the missing ones."""
        settings, target = self.settings, self.pace.parts.target
        if settings.teacher == "live":
            return LiveDistributions.of(target, settings.teacher_temperature)
        wanted = [(file.folder, file.learned_by(settings.loss)) for file in texts.files]
        wanted += [(file.folder, file.validation) for file in texts.measured]
        return gather_distributions(target, wanted, settings, self._report)

    def _phase(
        self,
        lesson: Lesson,
        validation: Sequence[Example],
        distributions: Distributions,
        pretrain_tokens: int = 0,
    ) -> None:
        """Train the student in one phase, from its checkpoint if there is one."""
        settings, part = self.settings, self.part
        path = part / ("pretrain.pt" if pretrain_tokens else "align.pt")
        before = self.phases[-1].step if self.phases else 0
        trainer = Trainer(self.student, lesson, settings, path, self.accelerator, pretrain_tokens)
        self._keep_prices(trainer.training)
        events = self._open_events(before + trainer.training.step)

        def validate(student: PreTrainedModel) -> tuple[float, dict[str, Any]]:
            replays = replay_validation(student, validation, distributions)
            measures = self._measure(replays)
            figures = with_losses(measures.to_history(), replays)
            return measures.mean.predicted_speedup, figures

        def on_validated(entry: dict[str, Any]) -> None:
            if events is not None:
                events.add({**entry, "step": before + entry["step"]})

        self.phases.append(trainer.run(validate, self.on_progress, on_validated))
        if events is not None:
            events.close()

    def _keep_prices(self, training: Training) -> None:
        """Go on with the prices of the run's beginning, or its scores could not be compared."""
        if training.round_costs is not None:
            self.round_costs = np.array(training.round_costs)
        elif self.round_costs is not None:
            training.round_costs = self.round_costs.tolist()

    def _open_events(self, step: int) -> EventLog | None:
        """Return the log for TensorBoard, from a step on; None in other processes or without one."""
        folder = self.settings.events
        if folder is None or not self.is_main:
            return None
        return EventLog(folder / self.name, step)

    def _measure(self, replays: Sequence[TextReplay]) -> Measures:
        return measure(matches_of(replays), self.ratio, self.round_costs)

    def _describe(self, made: Path, texts: TrainingTexts, report: DistillReport) -> None:
        """Write the card, the figures, their curves and the record of the prompts."""
        facts = make_facts(
            self.pace,
            self.student,
            texts,
            self.settings,
            report,
            self.phases,
            self.earlier_domains,
        )
        write_atomically(made / TRAINING, (json.dumps(facts, indent=1) + "\n").encode())
        write_atomically(made / "README.md", card(facts).encode())
        plot_curves(facts["history"], made / "training.png", report.out.name)
        record = join([texts.trained_on, self.earlier or NOTHING])
        assert record is not None
        record.save(made)


def _say_nothing(progress: TrainingProgress) -> None:
    """Ignore the progress of all processes but the first."""


def _answers_lock(outputs: Path) -> FileLock:
    """Return the lock of a folder of answers: distillations that share them wait for each other."""
    outputs.mkdir(parents=True, exist_ok=True)
    return FileLock(outputs / "answers.lock")


@contextmanager
def locked(part: Path, accelerator: Accelerator) -> Iterator[None]:
    """Hold the folder of the unfinished work. Raises ConfigError if another process does."""
    if not accelerator.is_main_process:
        yield
        return
    part.mkdir(parents=True, exist_ok=True)
    lock = FileLock(part / LOCK)  # removed with the folder at the end
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ConfigError(
            f"{part}: another process trains there; wait for it or name another folder to write"
        ) from error
    with lock:
        yield


def check_paths(data: Sequence[Path], also_measure: Sequence[Path], out: Path) -> None:
    """Raise ConfigError unless the files can be read and the folder can be written."""
    data, also_measure = [Path(p) for p in data], [Path(p) for p in also_measure]
    if not data:
        raise ConfigError("name at least one file of prompts")
    names = [path.stem for path in data]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"two data files have the same name, which is their answers' name too: {', '.join(names)}; "
            "rename one"
        )
    for path in [*data, *also_measure]:
        if not path.is_file():
            raise ConfigError(f"{path}: no such file of prompts; correct the path")
    if out.exists() and not (out / TRAINING).is_file():
        raise ConfigError(f"{out}: exists and is not a distilled drafter; name another folder")
