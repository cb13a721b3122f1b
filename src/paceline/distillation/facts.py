"""The facts of a distillation, for the drafter's `training.json` and its card. Knows no training."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
import transformers

from paceline.bench.circumstances import cpu_model
from paceline.distillation.card import command_line
from paceline.errors import ArtefactError
from paceline.models.encoder_decoder import is_encoder_decoder, num_layers_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from paceline.assembly import Pace
    from paceline.distillation.checkpoints import Training
    from paceline.distillation.measures import Measures
    from paceline.distillation.preparation import TrainingTexts
    from paceline.distillation.settings import DistillSettings

TRAINING: Final = "training.json"


@dataclass(frozen=True, slots=True)
class DistillReport:
    """The drafter of a distillation and its measures on validation prompts."""

    out: Path
    num_parameters: int
    num_examples: int
    measures: Measures  # of the weights as saved, on the tasks trained on and the other ones
    steps: int  # of the alignment
    best_step: int
    seconds: float  # of the pre-training and the alignment
    notes: list[str]  # for the user


def read_earlier_domains(start: Path | None) -> list[str]:
    """Return the tasks that `start_from` was trained on, as far as its folder says.

    Raises ArtefactError if its facts cannot be read.
    """
    path = None if start is None else start / TRAINING
    if path is None or not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return sorted({*found["trained_domains"], *found.get("earlier_domains", ())})
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ArtefactError(
            f"{path}: cannot be read ({error!r}); copy it again or remove it"
        ) from error


def make_facts(
    pace: Pace,
    student: PreTrainedModel,
    texts: TrainingTexts,
    settings: DistillSettings,
    report: DistillReport,
    phases: Sequence[Training],
    earlier_domains: Sequence[str] = (),
) -> dict[str, Any]:
    """Return plain values: the models, texts, measures, settings and circumstances of a run.

    earlier_domains: tasks that the weights of `start_from` were trained on.
    """
    out, target = report.out, pace.parts.target
    return {
        "name": out.name,
        "license": settings.license,
        "target": target.fingerprint(),
        "tokenizer": pace.parts.vocabulary.hash(),
        "outputs_dtype": str(target.dtype).removeprefix("torch."),
        "model": model_facts(student, report.num_parameters),
        **_text_facts(texts),
        "earlier_domains": list(earlier_domains),
        "measures": report.measures.to_history(),
        "steps": report.steps,
        "best_step": report.best_step,
        "tokens_read": sum(phase.tokens for phase in phases),
        "seconds": round(report.seconds, 1),
        "cpu_seconds": round(sum(phase.cpu_seconds for phase in phases), 1),
        "circumstances": circumstances(str(student.device), torch.get_num_threads()),
        "command": command_line(
            [file.name for file in texts.files],
            out.name if out.is_absolute() else out.as_posix(),
            settings,
            [file.name for file in texts.measured],
        ),
        "settings": _settings_facts(settings),
        "history": join_histories(phases),
    }


def _settings_facts(settings: DistillSettings) -> dict[str, Any]:
    """Return the settings without the folders of this machine."""
    facts = settings.model_dump(mode="json", exclude={"outputs", "events"})
    if settings.start_from is not None:
        facts["start_from"] = settings.start_from.name
    facts["pretrain_text"] = [path.name for path in settings.pretrain_text]
    return facts


def model_facts(student: PreTrainedModel, num_parameters: int) -> dict[str, Any]:
    """Return a model's architecture and sizes; a context of None has no end."""
    config = student.config.get_text_config(decoder=True)
    mlps = (
        getattr(config, name, None) for name in ("intermediate_size", "d_ff", "decoder_ffn_dim")
    )
    facts = {
        "architecture": type(student).__name__,
        "layers": num_layers_of(student),
        "hidden": config.hidden_size,
        "mlp": next((size for size in mlps if size), None),
        "heads": config.num_attention_heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "vocabulary": config.vocab_size,
        "context": getattr(config, "max_position_embeddings", None),
        "parameters": num_parameters,
    }
    if is_encoder_decoder(student):
        facts["encoder_layers"] = student.config.num_hidden_layers
    return facts


def _text_facts(texts: TrainingTexts) -> dict[str, Any]:
    training = texts.training
    return {
        "data": {
            file.name: {
                "prompts": len(file.answered),
                "answers": len(file.training),
                "validation": len(file.validation),
                "sources": [asdict(source) for source in file.sources],
            }
            for file in texts.files
        },
        "trained_domains": sorted({example.domain for example in training}),
        "examples": len(training),
        "tokens": {
            "output": sum(example.num_output for example in training),
            "prompt": sum(example.num_prompt for example in training),
            "text": sum(len(example.tokens) for example in texts.plain),
        },
    }


def join_histories(phases: Sequence[Training]) -> list[dict[str, Any]]:
    """Return the validations of all phases, with steps counted through them."""
    joined, before = [], 0
    for phase in phases:
        joined += [{**entry, "step": before + entry["step"]} for entry in phase.history]
        before += phase.step
    return joined


def circumstances(device: str, threads: int) -> dict[str, Any]:
    """Return the machine and the versions of a training."""
    return {
        "device": device,
        "processor": cpu_model(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "paceline": version("paceline"),
    }
