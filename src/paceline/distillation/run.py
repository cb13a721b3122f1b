"""`distill`: from prompt files to a drafter's folder.

Decodes the target's missing answers, trains a student on the answers, evaluates the saved student and
writes transformers' format with a card and the hashes of the prompts that it was trained on. Unfinished
work is in `<out>.part`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from paceline.assembly import Pace
from paceline.config import Config
from paceline.distillation.card import (
    PromptSource,
    card,
    circumstances,
    command_line,
    read_sources,
)
from paceline.distillation.outputs import (
    answered_prompts,
    decode_outputs,
    open_outputs,
    open_target,
    read_examples,
)
from paceline.distillation.prompts import choose_prompts
from paceline.distillation.settings import SHAPES, AnswerSampling
from paceline.distillation.student import build_student, num_parameters
from paceline.distillation.train import (
    DomainQuality,
    Training,
    TrainingProgress,
    measure_quality,
    train,
)
from paceline.errors import ConfigError
from paceline.files import write_atomically
from paceline.models.loading import quiet_transformers
from paceline.store import TrainedOn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

    from paceline.contracts import PromptRecord
    from paceline.distillation.batches import Example
    from paceline.distillation.prompts import PromptFile
    from paceline.distillation.settings import DistillSettings

_TRAINING = "training.json"


@dataclass(frozen=True, slots=True)
class DistillReport:
    """The drafter of a distillation and its quality on validation prompts."""

    out: Path
    num_parameters: int
    num_examples: int
    quality: dict[str, DomainQuality]  # by domain, of the weights as saved
    steps: int
    best_step: int
    seconds: float  # of training


@dataclass(frozen=True, slots=True)
class DataFile:
    """A prompt file and the target's answers to its prompts."""

    name: str
    examples: list[Example]
    validation: list[Example]
    sources: list[PromptSource]
    answered: list[PromptRecord]  # the prompts of `examples`

    @property
    def texts(self) -> list[Example]:
        return [*self.examples, *self.validation]


def distill(
    pace_or_config: Pace | Config,
    data: Sequence[Path],
    out: Path,
    settings: DistillSettings,
    on_progress: Callable[[TrainingProgress], None] = lambda progress: None,
    also_measure: Sequence[Path] = (),
) -> DistillReport:
    """Train a drafter for the target on the prompts of `data` and write it to `out`.

    also_measure: prompt files of other tasks, whose validation prompts are evaluated only. The same
    call continues a killed run. Raises ConfigError for data or an `out` that cannot be used,
    StoreError for answers of another target.
    """
    _check(data, also_measure, out)
    pace = pace_or_config
    if isinstance(pace, Config):
        pace = open_target(pace, settings.answers_drafter)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    chosen = choose_prompts(data, settings, also_measure)
    trained = [_read(pace, file, settings, on_progress) for file in chosen.files]
    examples, validation = _join(trained)
    target: PreTrainedModel = pace.parts.target.model
    student = build_student(target, SHAPES[settings.size], settings.embedding_init, settings.seed)
    part = out.with_name(out.name + ".part")
    result = train(student, examples, validation, settings, part / "checkpoint.pt", on_progress)
    made = part / "model"
    _save(student, pace, made, settings)
    others = [_read(pace, file, settings, on_progress) for file in chosen.measured]
    unseen = validation + [e for file in others for e in file.validation]
    quality = measure_quality(_load(made), unseen)
    report = DistillReport(
        out, num_parameters(student), len(examples), quality,
        result.history[-1]["step"], result.best_step, result.seconds,
    )  # fmt: skip
    facts = _facts(pace, trained, others, examples, settings, report, result)
    write_atomically(made / _TRAINING, (json.dumps(facts, indent=1) + "\n").encode())
    write_atomically(made / "README.md", card(facts).encode())
    TrainedOn.of(r.prompt for file in trained for r in file.answered).save(made)
    _publish(made, out)
    shutil.rmtree(part)
    return report


def _check(data: Sequence[Path], also_measure: Sequence[Path], out: Path) -> None:
    if not data:
        raise ConfigError("name at least one file of prompts")
    names = [Path(path).stem for path in data]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"two data files have the same name, which is their answers' name too: {', '.join(names)}; "
            "rename one"
        )
    for path in [*data, *also_measure]:
        if not Path(path).is_file():
            raise ConfigError(f"{path}: no such file of prompts; correct the path")
    if out.exists() and not (out / _TRAINING).is_file():
        raise ConfigError(f"{out}: exists and is not a distilled drafter; name another folder")


def _read(
    pace: Pace,
    file: PromptFile,
    settings: DistillSettings,
    on_progress: Callable[[TrainingProgress], None],
) -> DataFile:
    """Return the answers to a file's prompts, after decoding the missing ones."""
    store = open_outputs(pace, settings.outputs / file.name, settings.max_new_tokens)
    greedy = (AnswerSampling(),)
    for prompts, samplings in ((file.training, settings.samplings), (file.validation, greedy)):
        decode_outputs(
            pace,
            prompts,
            samplings,
            store,
            settings.max_new_tokens,
            settings.answers_drafter,
            on_done=lambda done, total: on_progress(TrainingProgress("decode", done, total)),
        )
    examples = read_examples(store, file.training, settings.samplings)
    return DataFile(
        file.name,
        examples,
        read_examples(store, file.validation, greedy),
        read_sources(file.path),
        answered_prompts(examples, file.training, settings.samplings),
    )


def _join(files: Sequence[DataFile]) -> tuple[list[Example], list[Example]]:
    """Return the examples of all files to train on, and those to validate on."""
    examples = [e for file in files for e in file.examples]
    validation = [e for file in files for e in file.validation]
    if not examples:
        raise ConfigError(
            f"no text to train on: {len(validation)} prompts have an answer, all of them for "
            "validation; give more prompts or a smaller validation_share"
        )
    return examples, validation


def _save(student: PreTrainedModel, pace: Pace, folder: Path, settings: DistillSettings) -> None:
    """Write weights, configuration and the target's tokenizer for AutoModelForCausalLM."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    student.to(dtype)  # type: ignore[arg-type]
    end = sorted(pace.stop_token_ids())
    student.generation_config = GenerationConfig(
        eos_token_id=end[0] if len(end) == 1 else end or None,
        pad_token_id=student.config.pad_token_id,
    )
    with quiet_transformers():
        student.save_pretrained(folder)
    pace.parts.tokenizer.save_pretrained(folder)


def _load(folder: Path) -> PreTrainedModel:
    with quiet_transformers():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def _facts(
    pace: Pace,
    trained: Sequence[DataFile],
    others: Sequence[DataFile],
    examples: Sequence[Example],
    settings: DistillSettings,
    report: DistillReport,
    result: Training,
) -> dict[str, Any]:
    out = report.out
    return {
        **_drafter_facts(pace, settings, report),
        **_text_facts(trained, examples),
        "quality": {domain: asdict(q) for domain, q in report.quality.items()},
        "steps": report.steps,
        "best_step": report.best_step,
        "seconds": round(result.seconds, 1),
        "cpu_seconds": round(result.cpu_seconds, 1),
        "circumstances": circumstances(torch.get_num_threads()),
        "command": command_line(
            [file.name for file in trained],
            out.name if out.is_absolute() else out.as_posix(),
            settings,
            [file.name for file in others],
        ),
        "settings": settings.model_dump(mode="json", exclude={"outputs"}),
        "history": result.history,
    }


def _drafter_facts(pace: Pace, settings: DistillSettings, report: DistillReport) -> dict[str, Any]:
    shape = SHAPES[settings.size]
    target = pace.parts.target
    return {
        "name": report.out.name,
        "license": settings.license,
        "target": target.fingerprint(),
        "tokenizer": pace.parts.vocabulary.hash(),
        "outputs_dtype": str(target.dtype).removeprefix("torch."),
        "model": {
            "layers": shape.num_layers,
            "hidden": shape.hidden_size,
            "mlp": shape.mlp_size,
            "heads": shape.num_heads,
            "kv_heads": shape.num_kv_heads,
            "vocabulary": target.num_logits,
            "context": target.context_length,
            "parameters": report.num_parameters,
        },
    }


def _text_facts(trained: Sequence[DataFile], examples: Sequence[Example]) -> dict[str, Any]:
    return {
        "data": {
            file.name: {
                "texts": len(file.texts),
                "sources": [asdict(source) for source in file.sources],
            }
            for file in trained
        },
        "trained_domains": sorted({e.domain for e in examples}),
        "examples": len(examples),
        "tokens": {
            "output": sum(e.num_output for e in examples),
            "prompt": sum(e.num_prompt for e in examples),
        },
    }


def _publish(made: Path, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        shutil.rmtree(out)
    made.replace(out)
