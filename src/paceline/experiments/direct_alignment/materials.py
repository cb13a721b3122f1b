"""The texts and distributions that all runs of a comparison share, made once.

The target's answers and its distributions along them are stores of `distillation`, which a killed
preparation continues. Everything that a run needs is then written to one file, which the workers map
into their memory. Knows no run.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

import torch

from paceline.distillation.distributions import gather_distributions
from paceline.distillation.outputs import decode_outputs, open_outputs, read_examples
from paceline.distillation.prompts import choose_prompts
from paceline.distillation.settings import AnswerSampling
from paceline.distillation.student import make_student, num_parameters
from paceline.distillation.texts import read_texts
from paceline.errors import ConfigError
from paceline.experiments.direct_alignment.plan import SAMPLED, balance
from paceline.experiments.prompt_files import TASKS
from paceline.store import read_prompts, take_part_of_files

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from paceline.assembly import Pace
    from paceline.contracts import Progress, PromptRecord
    from paceline.distillation.batches import Example
    from paceline.distillation.distributions import StoredDistributions
    from paceline.distillation.settings import DistillSettings
    from paceline.experiments.direct_alignment.plan import Budget, Run

_GREEDY: Final = AnswerSampling()
_SAMPLED: Final = AnswerSampling(temperature=SAMPLED)
_FILE: Final = "texts.pt"


@dataclass(frozen=True, slots=True)
class Materials:
    """The texts of all runs, and the target's distributions along the answers.

    greedy, sampled: answers to train on by task, in the order in which a smaller number takes them.
    """

    greedy: Mapping[str, Sequence[Example]]
    sampled: Mapping[str, Sequence[Example]]
    validation: Sequence[Example]
    judging: Sequence[Example]
    judging_sampled: Sequence[Example]
    plain: Sequence[Example]
    distributions: StoredDistributions
    parameter_ratio: float  # of a student to the target
    target: str  # the target's fingerprint
    settings: DistillSettings  # that all runs share

    @property
    def name(self) -> str:
        """A hash of all that a run's result depends on and that its plan does not name."""
        shared = self.settings.model_dump_json(exclude_unset=True, exclude={"outputs"})
        digest = hashlib.sha256(f"{self.target} {shared}".encode())
        for group in (
            *(self.greedy[task] for task in TASKS),
            *(self.sampled[task] for task in TASKS),
            self.validation,
            self.judging,
            self.judging_sampled,
            self.plain,
        ):
            digest.update(f"{len(group)} ".encode())
            for example in group:
                digest.update(f"{example.id} {example.num_prompt} ".encode())
                digest.update(example.tokens.tobytes())
        return digest.hexdigest()[:12]

    def training(self, run: Run) -> list[Example]:
        """Return the answers that a run learns."""
        numbers = balance({task: len(self.greedy[task]) for task in TASKS}, run.num_answers)
        chosen = []
        for task in run.tasks:
            num, sampled = numbers[task], self.sampled[task]
            greedy = list(self.greedy[task][:num])
            if run.answers == "greedy":
                chosen += greedy
                continue
            chosen += greedy if run.answers == "both" else []
            same = {example.tokens.tobytes() for example in greedy}
            chosen += [
                example
                for example in sampled[:num]
                if run.answers == "sampled" or example.tokens.tobytes() not in same
            ]
        return chosen

    def save(self, folder: Path) -> Path:
        """Write the file that `load` reads."""
        path = folder / _FILE
        part = path.with_name(path.name + ".part")
        torch.save(self, part)
        part.replace(path)
        return path


def load(path: Path) -> Materials:
    """Return saved materials, whose distributions stay in the file until they are read."""
    # written by this program in the same run
    found: Materials = torch.load(path, weights_only=False, mmap=True)
    return found


# --- making ---------------------------------------------------------------------------------------


def prepare(
    pace: Pace, data: Path | None, outputs: Path, budget: Budget, report: Progress
) -> Materials:
    """Return the materials after decoding what is missing.

    outputs: folder of the target's answers. Raises ConfigError without the data folder, or if a task
    lacks prompts of a part.
    """
    settings = budget.settings().model_copy(update={"outputs": outputs})
    files = task_files(data)
    chosen = choose_prompts(files, settings)
    judging = take_part_of_files([read_prompts([path]) for path in files], "judging")
    available = {file.name: len(file.training) for file in chosen.files}
    pool = balance(available, budget.answers[-1])
    for_sampled = balance(pool, budget.sampled)
    maker = _Maker(pace, settings, report)
    greedy, sampled, validation, judged, judged_sampled = {}, {}, [], [], []
    for file, kept in zip(chosen.files, judging, strict=True):
        task = file.name
        held_out, judges = file.validation[: budget.validation], kept[: budget.judging]
        _check(file.path, file.training, held_out, judges)
        learned = file.training[: pool[task]]
        greedy[task] = maker.answers(task, learned, _GREEDY)
        sampled[task] = maker.answers(task, learned[: for_sampled[task]], _SAMPLED)
        validation += maker.answers(task, held_out, _GREEDY)
        judged += maker.answers(task, judges, _GREEDY)
        judged_sampled += maker.answers(task, judges, _SAMPLED)
    answers = [e for own in (greedy, sampled) for task in TASKS for e in own[task]]
    distributions = maker.distributions([*answers, *validation, *judged, *judged_sampled])
    target = pace.parts.target
    plain = read_texts(
        files, pace.encode, target.context_length, budget.pretrain_tokens, 0, chosen.may_learn
    )
    student = num_parameters(make_student(target, settings))
    return Materials(
        greedy,
        sampled,
        validation,
        judged,
        judged_sampled,
        plain,
        distributions,
        student / num_parameters(target.model),
        target.fingerprint(),
        settings,
    )


def task_files(data: Path | None) -> list[Path]:
    """Return the prompt file of each task. Raises ConfigError if one is missing."""
    needed = ", ".join(f"{task}.jsonl" for task in TASKS)
    if data is None:
        raise ConfigError(
            f"this experiment needs a folder with {needed}; name it with --data or PACELINE_DATA"
        )
    for task in TASKS:
        if not (data / f"{task}.jsonl").is_file():
            raise ConfigError(f"{data}: no {task}.jsonl in this data folder; it needs {needed}")
    return [data / f"{task}.jsonl" for task in TASKS]


def _check(path: Path, *parts: Sequence[PromptRecord]) -> None:
    names = ("training", "validation", "judging")
    for name, own in zip(names, parts, strict=True):
        if not own:
            raise ConfigError(
                f"{path}: none of its prompts is in the part for {name}; add prompts to the file"
            )


class _Maker:
    """Answers and distributions of one target."""

    def __init__(self, pace: Pace, settings: DistillSettings, report: Progress) -> None:
        self._pace, self._settings, self._report = pace, settings, report

    def answers(
        self, task: str, prompts: Sequence[PromptRecord], sampling: AnswerSampling
    ) -> list[Example]:
        """Return the answers to prompts of a task, in their order, after decoding the missing ones."""
        settings = self._settings
        store = open_outputs(self._pace, settings.outputs / task, settings.max_new_tokens)
        named = [replace(record, domain=task) for record in prompts]
        stage = f"answers {task}" + (f", temperature {SAMPLED}" if sampling.temperature else "")
        decode_outputs(
            self._pace,
            named,
            (sampling,),
            store,
            settings.max_new_tokens,
            settings.answers_drafter,
            on_done=partial(self._report, stage),
        )
        return read_examples(store, named, (sampling,))

    def distributions(self, examples: Sequence[Example]) -> StoredDistributions:
        """Return the target's distributions along texts, after computing the missing ones."""
        outputs = self._settings.outputs
        texts = [(outputs / task, [e for e in examples if e.domain == task]) for task in TASKS]
        target = self._pace.parts.target
        return gather_distributions(target, texts, self._settings, self._report)
