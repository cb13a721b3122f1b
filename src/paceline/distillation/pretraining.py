"""`pretrain`: a small model from scratch, trained on prompts with their references.

It needs no target, and can become one. The references are the labels; a model with an encoder reads
the prompts by it, a causal one as text before them. The weights with the least loss per token on
validation prompts are kept. Unfinished work is in `<out>.part`, and the same call continues it.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import AutoTokenizer, LlamaConfig

from paceline.distillation.card import read_sources
from paceline.distillation.curves import EventLog, check_extras, plot_curves
from paceline.distillation.encoder_decoder_students import t5_config
from paceline.distillation.facts import TRAINING, circumstances, model_facts
from paceline.distillation.model_folders import load_float32, publish_folder, save_student
from paceline.distillation.preparation import PairEncoder
from paceline.distillation.pretrain_card import pretrained_card
from paceline.distillation.prompts import check_prompts, choose_prompts
from paceline.distillation.reading import with_prompt_weight
from paceline.distillation.replays import replay_validation
from paceline.distillation.run import check_paths, locked
from paceline.distillation.student import check_shape, new_model, num_parameters
from paceline.distillation.texts import pair_example, read_references
from paceline.distillation.train import (
    Lesson,
    Trainer,
    TrainingProgress,
    choose_arithmetic,
    start_accelerator,
)
from paceline.errors import ConfigError, shorten
from paceline.files import write_atomically
from paceline.models.vocabulary import Vocabulary
from paceline.store import TrainedOn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from paceline.contracts import PromptRecord
    from paceline.distillation.batches import Example
    from paceline.distillation.checkpoints import Training
    from paceline.distillation.pretrain_settings import PretrainSettings

    OnProgress = Callable[[TrainingProgress], None]

PHASE: Final = "train"


@dataclass(frozen=True, slots=True)
class PretrainReport:
    """The model of a training from pairs, and its figures on validation prompts.

    losses: by task, nats per token of the references. match_rates: by task, the share of tokens that
    the model finds most likely.
    """

    out: Path
    num_parameters: int
    num_examples: int
    losses: dict[str, float]
    match_rates: dict[str, float]
    steps: int
    best_step: int
    seconds: float
    notes: list[str]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Prompts with their references as texts. left_out: pairs longer than the context."""

    training: list[Example]
    validation: list[Example]
    left_out: int
    trained_on: TrainedOn
    files: dict[str, Any]  # facts by file name


def pretrain(
    data: Sequence[Path],
    out: Path,
    settings: PretrainSettings,
    on_progress: OnProgress = lambda progress: None,
) -> PretrainReport:
    """Train a model of `settings.shape` on the prompts and references of `data`; write it to `out`.

    The prompts are those of `settings.part`, as in a distillation. Raises ConfigError for data,
    settings, a tokenizer or an `out` that cannot be used, and for a loss that is not finite.
    """
    data = [Path(path) for path in data]
    check_paths(data, (), out)
    check_shape(settings.shape, settings.architecture)
    check_prompts(data, settings)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    accelerator = start_accelerator(not torch.cuda.is_available())
    if accelerator.is_main_process:
        check_extras(has_events=settings.events is not None)
    settings = choose_arithmetic(settings, accelerator.device)
    tokenizer = load_own_tokenizer(settings)
    part = out.with_name(out.name + ".part")
    with locked(part, accelerator):
        model = make_model(settings, tokenizer)
        settings = with_prompt_weight(settings, model)
        pairs = read_pairs_of(data, tokenizer, settings)
        training = _train(model, pairs, settings, part, accelerator, on_progress, out.name)
        made = part / "model"
        if accelerator.is_main_process:
            ends = [tokenizer.eos_token_id]
            save_student(model, tokenizer, ends, made, settings.dtype)
        accelerator.wait_for_everyone()
        figures = _figures(load_float32(made), pairs.validation)
        report = PretrainReport(
            out,
            num_parameters(model),
            len(pairs.training),
            {task: own["loss"] for task, own in figures["domains"].items()},
            {task: own["match_rate"] for task, own in figures["domains"].items()},
            training.step,
            training.best_step,
            training.seconds,
            _notes(pairs, settings),
        )
        if accelerator.is_main_process:
            _describe(made, model, tokenizer, pairs, settings, report, training)
            publish_folder(made, out)
            shutil.rmtree(part)
        accelerator.wait_for_everyone()
    return report


def load_own_tokenizer(settings: PretrainSettings) -> Any:
    """Return the tokenizer of the settings. Raises ConfigError if it cannot be used."""
    folder = settings.tokenizer
    if not folder.is_dir():
        raise ConfigError(f"tokenizer {folder}: no such folder; correct the path")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # a damaged file raises almost any
        raise ConfigError(
            f"tokenizer {folder}: cannot be read ({shorten(str(error))}); copy it again"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"tokenizer {folder}: names no end token, so an answer would have no end; set eos_token"
        )
    if not settings.chat_template:
        tokenizer.chat_template = None
    return tokenizer


def make_model(settings: PretrainSettings, tokenizer: Any) -> PreTrainedModel:
    """Return the model with random weights: a T5 whose text starts with padding, or a Llama."""
    shape, vocab_size = settings.shape, Vocabulary.of(tokenizer).num_tokens
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if settings.architecture == "t5":
        start = end if pad is None else pad
        ids = {"eos_token_id": end, "pad_token_id": start}
        return new_model(t5_config(shape, vocab_size, start, **ids), settings.seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.mlp_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )
    return new_model(config, settings.seed)


# --- pairs ----------------------------------------------------------------------------------------


def read_pairs_of(data: Sequence[Path], tokenizer: Any, settings: PretrainSettings) -> Pairs:
    """Return the prompts of the files with their references.

    Raises ConfigError for a prompt without a reference, and if all are too long.
    """
    encode = PairEncoder(tokenizer, [tokenizer.eos_token_id])
    training: list[Example] = []
    validation: list[Example] = []
    learned: list[str] = []
    files, left_out = {}, 0
    for file in choose_prompts(data, settings).files:
        references = read_references(file.path)

        def fitting(records: Sequence[PromptRecord]) -> list[Example]:
            pairs = [
                pair_example(r.id, r.domain, *encode(r.prompt, references[r.prompt]))  # noqa: B023
                for r in records
            ]
            return [pair for pair in pairs if len(pair.tokens) <= settings.context]

        own = fitting(file.training), fitting(file.validation)
        training += own[0]
        validation += own[1]
        kept = {example.id for example in own[0]}
        learned += [record.prompt for record in file.training if record.id in kept]
        left_out += len(file.training) + len(file.validation) - len(own[0]) - len(own[1])
        files[file.name] = {
            "prompts": len(own[0]),
            "validation": len(own[1]),
            "sources": [asdict(source) for source in read_sources(file.path)],
        }
    if not training or not validation:
        raise ConfigError(
            f"{len(training)} pairs to train on and {len(validation)} to validate on have at most "
            f"{settings.context} tokens: both are needed; raise 'context' or give more prompts"
        )
    return Pairs(training, validation, left_out, TrainedOn.of(learned), files)


def _notes(pairs: Pairs, settings: PretrainSettings) -> list[str]:
    if not pairs.left_out:
        return []
    return [f"{pairs.left_out} pairs were left out, which have more than {settings.context} tokens"]


# --- training -------------------------------------------------------------------------------------


def _train(
    model: PreTrainedModel,
    pairs: Pairs,
    settings: PretrainSettings,
    part: Path,
    accelerator: Accelerator,
    on_progress: OnProgress,
    name: str,
) -> Training:
    """Train the model, which has the weights of the best validation afterwards."""
    lesson = Lesson(pairs.training)
    trainer = Trainer(model, lesson, settings, part / f"{PHASE}.pt", accelerator, phase=PHASE)
    has_events = settings.events is not None and accelerator.is_main_process
    events = None
    if has_events:
        assert settings.events is not None
        events = EventLog(settings.events / name, trainer.training.step)

    def validate(model: PreTrainedModel) -> tuple[float, dict[str, Any]]:
        figures = _figures(model, pairs.validation)
        return -figures["loss"], figures

    def on_validated(entry: dict[str, Any]) -> None:
        if events is not None:
            events.add(entry)

    report = on_progress if accelerator.is_main_process else lambda progress: None
    training = trainer.run(validate, report, on_validated)
    if events is not None:
        events.close()
    return training


def _figures(model: PreTrainedModel, validation: Sequence[Example]) -> dict[str, Any]:
    """Return the loss, nats per token, and the match rate: by task, and their means over tasks."""
    by_task: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for replay in replay_validation(model, validation, None):
        by_task.setdefault(replay.example.domain, []).append((replay.losses, replay.matches))
    domains = {}
    for task, own in sorted(by_task.items()):
        losses, matches = (torch.cat(part).double() for part in zip(*own, strict=True))
        domains[task] = {
            "loss": round(float(losses.mean()), 5),
            "match_rate": round(float(matches.mean()), 5),
        }

    def mean(name: str) -> float:
        return round(math.fsum(own[name] for own in domains.values()) / len(domains), 5)

    return {"loss": mean("loss"), "match_rate": mean("match_rate"), "domains": domains}


def _describe(
    made: Path,
    model: PreTrainedModel,
    tokenizer: Any,
    pairs: Pairs,
    settings: PretrainSettings,
    report: PretrainReport,
    training: Training,
) -> None:
    """Write the card, the figures, their curves and the record of the prompts."""
    own = settings.model_dump(mode="json", exclude={"events", "outputs"})
    facts: dict[str, Any] = {
        "name": report.out.name,
        "license": settings.license,
        "tokenizer": Vocabulary.of(tokenizer).hash(),
        "model": model_facts(model, report.num_parameters),
        "data": pairs.files,
        "trained_domains": sorted({example.domain for example in pairs.training}),
        "examples": len(pairs.training),
        "tokens": {
            "output": sum(example.num_output for example in pairs.training),
            "prompt": sum(example.num_prompt for example in pairs.training),
        },
        "losses": report.losses,
        "match_rates": report.match_rates,
        "steps": report.steps,
        "best_step": report.best_step,
        "tokens_read": training.tokens,
        "seconds": round(report.seconds, 1),
        "cpu_seconds": round(training.cpu_seconds, 1),
        "circumstances": circumstances(str(model.device), torch.get_num_threads()),
        "settings": own | {"tokenizer": settings.tokenizer.name},
        "history": training.history,
    }
    write_atomically(made / TRAINING, (json.dumps(facts, indent=1) + "\n").encode())
    write_atomically(made / "README.md", pretrained_card(facts).encode())
    plot_curves(facts["history"], made / "training.png", report.out.name)
    pairs.trained_on.save(made)
