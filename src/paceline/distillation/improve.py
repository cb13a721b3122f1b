"""`improve`: train a drafter further on served requests; adopt it where held-out acceptance rises.

The drafter starts from its own weights. Held-out conversations, which neither train nor choose
anything, judge it before and after: it is adopted if the whole 95% interval of the rise of block
efficiency is above 0, else nothing changes. Unfinished work is in `<folder>.improving`.
Symbols: K the drafter's draft length.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from paceline.distillation.adoption import (
    describe,
    free_name,
    make_candidate,
    publish,
    weight_files,
)
from paceline.distillation.comparison import compare, measure_intervals
from paceline.distillation.distributions import LiveDistributions, gather_distributions
from paceline.distillation.facts import circumstances
from paceline.distillation.improve_report import ImproveReport
from paceline.distillation.improve_texts import TextRecord, add_data, read_log
from paceline.distillation.logged import SERVED, prompt_key
from paceline.distillation.measures import LONGEST, measure
from paceline.distillation.model_folders import load_float32
from paceline.distillation.prompt_texts import PromptReader
from paceline.distillation.reading import check_target, longest_text, with_prompt_weight
from paceline.distillation.replays import matches_of, replay_validation, with_losses
from paceline.distillation.run import locked
from paceline.distillation.student import make_student, num_parameters
from paceline.distillation.train import Lesson, Trainer, TrainingProgress, start_accelerator
from paceline.errors import ConfigError
from paceline.files import write_atomically
from paceline.store import TrainedOn
from paceline.store.trained_on import join

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from paceline.assembly import Pace
    from paceline.distillation.batches import Example
    from paceline.distillation.improve_settings import ImproveSettings
    from paceline.distillation.improve_texts import ImproveTexts
    from paceline.distillation.prompt_texts import PromptText
    from paceline.distillation.replays import TextReplay
    from paceline.distillation.train import Distributions
    from paceline.store import LoggedDecision

    OnProgress = Callable[[TrainingProgress], None]

_RESULT: Final = "result.json"


@dataclass(frozen=True, slots=True)
class DrafterFolder:
    """A drafter that is improved: its name, its model's folder and its draft length K."""

    name: str
    folder: Path
    num_draft_tokens: int


def improve(
    pace: Pace,
    drafter: DrafterFolder,
    decisions: Sequence[LoggedDecision],
    settings: ImproveSettings,
    on_progress: OnProgress = lambda progress: None,
    out: Path | None = None,
    data: Sequence[Path] = (),
) -> ImproveReport:
    """Train a drafter further on the requests that the target of `pace` served.

    Adopted weights replace those in the drafter's folder, which is kept as `<folder>.before`; with
    `out`, the folder stays as it is and a copy with the new weights is written there. data: prompt files
    whose answers are mixed in, decoded where they are missing. The same call continues a killed run.

    Raises ConfigError for a log with too few requests, a drafter that cannot be trained, an `out` that
    exists, and as `distill` does.
    """
    folder = drafter.folder.resolve()
    if out is not None and out.exists():
        raise ConfigError(f"{out}: exists; name another folder to write")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    accelerator = start_accelerator(pace.parts.target.device.type == "cpu")
    if accelerator.num_processes > 1:
        raise ConfigError("an improvement runs in one process; start it without accelerate launch")
    settings = settings.model_copy(update={"start_from": folder})
    part = (out or folder).absolute()
    part = part.with_name(part.name + ".improving")
    with locked(part, accelerator):
        run = _Improvement(
            pace, replace(drafter, folder=folder), settings, part, accelerator, on_progress
        )
        report = run.finish() or run.train(decisions, out, [Path(path) for path in data])
        run.remove()
    return report


class _Improvement:
    """One improvement: its models and its unfinished work."""

    def __init__(
        self,
        pace: Pace,
        drafter: DrafterFolder,
        settings: ImproveSettings,
        part: Path,
        accelerator: Accelerator,
        on_progress: OnProgress,
    ) -> None:
        self.pace, self.drafter, self.settings, self.part = pace, drafter, settings, part
        self.accelerator, self.on_progress = accelerator, on_progress
        self.adopted = part / "adopted"
        self.reader = PromptReader.of(pace.parts)
        self.trained_on = TrainedOn.load(drafter.folder)

    def finish(self) -> ImproveReport | None:
        """Publish the weights that a killed run has adopted; return None if there are none."""
        if not (self.adopted / _RESULT).is_file():
            return None
        report = ImproveReport.from_json((self.adopted / _RESULT).read_text(encoding="utf-8"))
        assert report.kept is not None
        publish(self.adopted, self.drafter.folder, report.kept)
        return report

    def train(
        self, decisions: Sequence[LoggedDecision], out: Path | None, data: Sequence[Path]
    ) -> ImproveReport:
        """Train, judge, and adopt the weights if they are better."""
        check_target(self.pace.parts.target)
        student = make_student(self.pace.parts.target, self.settings)
        self.settings = with_prompt_weight(self.settings, self.pace.parts.target.model, student)
        texts = self._texts(decisions, student)
        if data and self.settings.data_share:
            add_data(texts, self.pace, data, self.settings, self._report)
        distributions = self._distributions(texts)
        held_out, folder = texts.split.held_out, self.drafter.folder
        before = replay_validation(load_float32(folder), held_out, distributions)
        self._align(student, texts, distributions)
        made = self.part / "candidate"
        make_candidate(folder, student, made)
        after = replay_validation(load_float32(made), held_out, distributions)
        report = self._judge(texts, before, after)
        if not report.rise.block_efficiency.is_gain:
            return report
        return self._adopt(report, texts, made, out)

    def _report(self, phase: str, done: int, total: int) -> None:
        self.on_progress(TrainingProgress(phase, done, total))

    def remove(self) -> None:
        """Remove the unfinished work."""
        shutil.rmtree(self.part)

    # --- texts ----------------------------------------------------------------------------------

    def _texts(self, decisions: Sequence[LoggedDecision], student: PreTrainedModel) -> ImproveTexts:
        """Return the log's texts in parts. Raises ConfigError if they are too few."""
        target = self.pace.parts.target
        digest = hashlib.sha256(target.fingerprint().encode())
        for file in weight_files(self.drafter.folder):
            digest.update(file.read_bytes())
        context = min(longest_text(target.model), longest_text(student))
        record = TextRecord(self.part, digest.digest())
        try:
            return read_log(self.pace, decisions, self.settings, context, self._may_judge, record)
        except ConfigError:
            self.remove()
            raise

    def _may_judge(self, example: Example) -> bool:
        return self.trained_on is None or self._prompt(example).text not in self.trained_on

    def _prompt(self, example: Example) -> PromptText:
        return self.reader.read(example.tokens[: example.num_prompt].tolist())

    def _distributions(self, texts: ImproveTexts) -> Distributions:
        """Return the target's distributions along the texts, after computing the missing ones."""
        settings, target = self.settings, self.pace.parts.target
        if settings.teacher == "live":
            return LiveDistributions.of(target, settings.teacher_temperature)
        judged = [*texts.split.validation, *texts.split.held_out]
        learns_text = settings.loss == "cross_entropy"  # which reads no distribution
        wanted = {
            self.part / "answers": judged if learns_text else [*judged, *texts.split.training]
        }
        if not learns_text:
            wanted |= texts.data
        return gather_distributions(target, list(wanted.items()), settings, self._report)

    # --- training and judging -------------------------------------------------------------------

    def _align(
        self, student: PreTrainedModel, texts: ImproveTexts, distributions: Distributions
    ) -> None:
        """Train the student, which has the weights of the best validation afterwards."""
        length = self.drafter.num_draft_tokens
        ratio = num_parameters(student) / num_parameters(self.pace.parts.target.model)

        def validate(student: PreTrainedModel) -> tuple[float, dict[str, Any]]:
            replays = replay_validation(student, texts.split.validation, distributions)
            measures = measure(matches_of(replays), ratio, longest=max(LONGEST, length))
            figures = with_losses(measures.to_history(), replays)
            return float(measures.mean.block_efficiency[length]), figures

        lesson = Lesson(texts.training, (), distributions)
        path = self.part / "align.pt"
        trainer = Trainer(student, lesson, self.settings, path, self.accelerator)
        trainer.run(validate, self.on_progress)

    def _judge(
        self, texts: ImproveTexts, before: Sequence[TextReplay], after: Sequence[TextReplay]
    ) -> ImproveReport:
        length = self.drafter.num_draft_tokens
        old, new = matches_of(before), matches_of(after)
        return ImproveReport(
            drafter=self.drafter.name,
            num_draft_tokens=length,
            out=None,
            kept=None,
            counts=texts.counts,
            before=measure_intervals(old, length)[SERVED],
            after=measure_intervals(new, length)[SERVED],
            rise=compare(old, new, length)[SERVED],
            left_out=texts.left_out,
        )

    # --- adoption -------------------------------------------------------------------------------

    def _adopt(
        self, report: ImproveReport, texts: ImproveTexts, made: Path, out: Path | None
    ) -> ImproveReport:
        """Describe the new weights and put them in their place."""
        folder = self.drafter.folder
        prompts, notes = self._prompts(texts)
        kept = folder if out is not None else free_name(folder)
        report = replace(report, out=out or folder, kept=kept, notes=notes)
        describe(made, self._entry(report), prompts)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            made.replace(out)
            return report
        write_atomically(made / _RESULT, report.to_json().encode())
        made.replace(self.adopted)  # from here on, a killed run is finished by the next one
        publish(self.adopted, folder, kept)
        return report

    def _prompts(self, texts: ImproveTexts) -> tuple[TrainedOn | None, list[str]]:
        """Return the record of all prompts trained on, and notes about it; None if it is unknown."""
        if self.trained_on is None:
            return None, [
                "the drafter has no record of its training prompts, so that of the logged ones is not "
                "written either"
            ]
        keys = {prompt_key(e): e for e in texts.split.training}
        read = [self._prompt(example) for example in keys.values()]
        logged = TrainedOn.of(prompt.text for prompt in read)
        data = texts.data_prompts if texts.data else None
        record = join([self.trained_on, logged, *([data] if data is not None else [])])
        whole = sum(not prompt.is_message for prompt in read)
        notes = []
        if whole:
            notes.append(
                f"{whole} of {len(read)} logged prompts are no single message whose text is known "
                "(conversations, or another chat template): the record of training prompts has them "
                "as a whole, so their messages are not recognised elsewhere"
            )
        return record, notes

    def _entry(self, report: ImproveReport) -> dict[str, Any]:
        """Return the facts of an adopted improvement, without texts and folders."""
        settings = self.settings.model_dump(mode="json", exclude_unset=True)
        unnamed = ("outputs", "start_from", "threads")
        return {
            "name": (report.out or self.drafter.folder).name,
            "target": self.pace.parts.target.fingerprint(),
            "num_draft_tokens": report.num_draft_tokens,
            "counts": report.counts,
            "before": asdict(report.before),
            "after": asdict(report.after),
            "rise": asdict(report.rise),
            "settings": {k: v for k, v in settings.items() if k not in unnamed},
            "circumstances": circumstances(
                str(self.pace.parts.target.device), torch.get_num_threads()
            ),
        }
