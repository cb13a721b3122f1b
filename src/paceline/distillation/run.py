"""The verb itself: prompts in, a drafter's folder out.

Decodes what the target has not answered yet, trains a student on it, measures the student as it was
saved, and writes transformers' format with a card. Everything unfinished lies in `<out>.part`.
"""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as transformers_logging

from paceline.assembly import Pace, build
from paceline.config import Config
from paceline.distillation.card import (
    Source,
    card,
    circumstances,
    command_line,
    sources_of,
    training_json,
)
from paceline.distillation.outputs import (
    decode_outputs,
    open_outputs,
    read_examples,
)
from paceline.distillation.student import SHAPES, build_student, num_parameters
from paceline.distillation.train import Progress, Quality, Training, measure_quality, train
from paceline.errors import ConfigError
from paceline.store import is_validation, read_prompts, take_by_hash, write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedModel

    from paceline.distillation.batches import Example
    from paceline.distillation.settings import DistillSettings

_TRAINING = "training.json"


@dataclass(frozen=True, slots=True)
class DistillReport:
    """What a distillation made, and how good it is on validation prompts."""

    out: Path
    num_parameters: int
    num_examples: int
    quality: dict[str, Quality]  # by domain, of the weights as saved
    steps: int
    best_step: int
    seconds: float  # of training


@dataclass(frozen=True, slots=True)
class DataFile:
    """A prompt file and the target's answers to those of its prompts that are used."""

    name: str
    examples: list[Example]
    sources: list[Source]


def distill(
    pace_or_config: Pace | Config,
    data: Sequence[Path],
    out: Path,
    settings: DistillSettings,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    also_measure: Sequence[Path] = (),
) -> DistillReport:
    """Train a drafter for the target on the prompts of `data` and write it to `out`.

    also_measure: prompt files of other tasks, of which only validation prompts are answered and
    measured. A killed run is continued by the same call. Raises ConfigError for data or an `out`
    that cannot be used.
    """
    _check(data, also_measure, out)
    pace = pace_or_config
    if isinstance(pace, Config):
        pace = Pace(build(pace))
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    trained = [_read(pace, path, settings, on_progress) for path in data]
    examples = [e for file in trained for e in file.examples]
    validation = [e for e in examples if is_validation(e.id, settings.validation_share)]
    examples = [e for e in examples if not is_validation(e.id, settings.validation_share)]
    if not examples:
        raise ConfigError("nothing to learn from: the target answered none of the prompts")
    target: PreTrainedModel = pace.parts.target.model
    student = build_student(target, SHAPES[settings.size], settings.embedding_init, settings.seed)
    part = out.with_name(out.name + ".part")
    result = train(student, examples, validation, settings, part / "checkpoint.pt", on_progress)
    made = part / "model"
    _save(student, pace, made, settings)
    others = [
        _read(pace, path, settings, on_progress, only_validation=True)
        for path in also_measure
        if Path(path) not in map(Path, data)
    ]
    unseen = validation + [e for file in others for e in file.examples]
    quality = measure_quality(_load(made), unseen)
    report = DistillReport(
        out, num_parameters(student), len(examples), quality,
        result.history[-1]["step"], result.best_step, result.seconds,
    )  # fmt: skip
    facts = _facts(pace, trained, others, settings, report, result)
    write_atomically(made / _TRAINING, training_json(facts))
    write_atomically(made / "README.md", card(facts).encode())
    _publish(made, out)
    shutil.rmtree(part)
    return report


def _check(data: Sequence[Path], also_measure: Sequence[Path], out: Path) -> None:
    """Find cheap mistakes before the target is loaded or asked."""
    if not data:
        raise ConfigError("name at least one file of prompts")
    names = [Path(path).stem for path in data]
    if len(set(names)) < len(names):
        raise ConfigError("two data files have the same name; answers are kept by file name")
    for path in [*data, *also_measure]:
        if not Path(path).is_file():
            raise ConfigError(f"{path}: no such file of prompts")
    if out.exists() and not (out / _TRAINING).is_file():
        raise ConfigError(f"{out}: exists and is not a distilled drafter; name another folder")


def _read(
    pace: Pace,
    path: Path,
    settings: DistillSettings,
    on_progress: Callable[[Progress], None],
    only_validation: bool = False,
) -> DataFile:
    """Answers to a file's prompts, decoded now where they are missing."""
    path = Path(path)
    prompts = take_by_hash(read_prompts([path]), settings.cap_of(path.stem))
    if only_validation:
        prompts = [r for r in prompts if is_validation(r.id, settings.validation_share)]
    store = open_outputs(pace, settings.outputs / path.stem, settings.max_new_tokens)
    done = 0

    def count(n: int) -> None:
        nonlocal done
        done += n
        on_progress(Progress("decode", done, len(prompts)))

    decode_outputs(pace, prompts, store, settings.max_new_tokens, on_done=count)
    return DataFile(path.stem, read_examples(store, prompts), sources_of(path))


def _save(student: PreTrainedModel, pace: Pace, folder: Path, settings: DistillSettings) -> None:
    """Weights, configuration and the target's tokenizer, as AutoModelForCausalLM expects them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    student.to(dtype)  # type: ignore[arg-type]
    end = sorted(pace.stop_token_ids())
    student.generation_config = GenerationConfig(
        eos_token_id=end[0] if len(end) == 1 else end or None,
        pad_token_id=student.config.pad_token_id,
    )
    with _no_bars():
        student.save_pretrained(folder)
    pace.parts.tokenizer.save_pretrained(folder)


def _load(folder: Path) -> PreTrainedModel:
    """The drafter as a user will load it, in float32 arithmetic."""
    with _no_bars():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


@contextmanager
def _no_bars() -> Iterator[None]:
    """transformers draws bars of its own over ours."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def _facts(
    pace: Pace,
    trained: Sequence[DataFile],
    others: Sequence[DataFile],
    settings: DistillSettings,
    report: DistillReport,
    result: Training,
) -> dict[str, Any]:
    """All that the card and training.json say."""
    shape = SHAPES[settings.size]
    target = pace.parts.target
    texts = [e for file in trained for e in file.examples]
    learned = [e for e in texts if not is_validation(e.id, settings.validation_share)]
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
        "data": {
            file.name: {
                "texts": len(file.examples),
                "sources": [asdict(source) for source in file.sources],
            }
            for file in trained
        },
        "trained_domains": sorted({e.domain for e in texts}),
        "examples": len(learned),
        "tokens": {
            "output": sum(e.num_output for e in learned),
            "prompt": sum(e.num_prompt for e in learned),
        },
        "quality": {domain: asdict(q) for domain, q in report.quality.items()},
        "steps": report.steps,
        "best_step": report.best_step,
        "seconds": round(result.seconds, 1),
        "cpu_seconds": round(result.cpu_seconds, 1),
        "circumstances": circumstances(torch.get_num_threads()),
        "command": command_line(
            [file.name for file in trained],
            report.out.name if report.out.is_absolute() else report.out.as_posix(),
            settings,
            [file.name for file in others],
        ),
        "settings": settings.model_dump(mode="json", exclude={"outputs"}),
        "history": result.history,
    }


def _publish(made: Path, out: Path) -> None:
    """Put the finished folder in its place; a drafter that was there gives way."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        shutil.rmtree(out)
    made.replace(out)
