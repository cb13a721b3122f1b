"""The card of a model that `pretrain` made, README.md in its folder, in the format of the Hub.

All of it is computed from the run's facts. Knows no training.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from paceline.distillation.card import describe_model, front_matter
from paceline.distillation.pretrain_settings import OF_A_TARGET, PretrainSettings

if TYPE_CHECKING:
    from collections.abc import Mapping

_FLAGS: Final = ("architecture", "epochs", "seed", "threads")  # other settings use --set


def pretrained_card(facts: Mapping[str, Any]) -> str:
    """Return the README.md of a model's folder."""
    parts = [
        front_matter(facts, ("speculative-decoding",))
        + f"# {facts['name']}: a small language model",
        f"{describe_model(facts)}\nTrained from random weights on prompts with their references; other"
        " prompts are outside its\ntraining.",
        "## Training text",
        *_text_paragraphs(facts),
        "## On validation prompts",
        "Prompts that were not trained on, with weights as saved and products in float32. Loss: nats\n"
        "per token of the reference. Match rate: the share of its tokens that the model finds most\n"
        "likely.",
        _table(facts),
        "## How it was trained",
        *_training_paragraphs(facts),
        f"```\n{_command_line(facts)}\n```",
        "Settings, history and versions are in `training.json`, the curves in `training.png`, hashes of"
        "\nthe prompts trained on in `trained_on.npy`.",
    ]
    return "\n\n".join(parts) + "\n"


def _text_paragraphs(facts: Mapping[str, Any]) -> list[str]:
    settings, tokens = facts["settings"], facts["tokens"]
    lines = [
        f"| {name} | {file['prompts']:,} | {'; '.join(s['source'] for s in file['sources'])} | "
        f"{'; '.join(s['license'] for s in file['sources'])} |"
        for name, file in facts["data"].items()
    ]
    part = (
        "The prompts for collecting and judging are not used: 12% of\nall ids, by hash."
        if settings["part"] == "training"
        else "Prompts of all parts are used."
    )
    return [
        f"{facts['examples']:,} prompts with references; {tokens['output']:,} tokens of references,"
        f" {tokens['prompt']:,} of prompts. {part}\nOf the prompts used,"
        f" {settings['validation_share']:.0%} are for validation.",
        "\n".join(["| file | prompts | source | licence |", "|---|---|---|---|", *lines]),
    ]


def _table(facts: Mapping[str, Any]) -> str:
    lines = [
        f"| {task} | {loss:.3f} | {facts['match_rates'][task]:.3f} |"
        for task, loss in facts["losses"].items()
    ]
    return "\n".join(["| task | loss | match rate |", "|---|---|---|", *lines])


def _training_paragraphs(facts: Mapping[str, Any]) -> list[str]:
    settings, where = facts["settings"], facts["circumstances"]
    arithmetic = "bfloat16 autocast" if settings["autocast"] else "float32"
    return [
        f"Cross-entropy on the references. AdamW, peak learning rate {settings['learning_rate']:g},"
        f" cosine with warm-up. {settings['epochs']:g} pass(es),\n{facts['steps']:,} steps of at most"
        f" {settings['batch_tokens'] * settings['accumulate']:,} tokens; the weights are those of step"
        f" {facts['best_step']:,}, which have the\nleast loss on validation prompts.",
        f"{facts['cpu_seconds']:,.0f} s of CPU time, {facts['seconds']:,.0f} s of wall-clock time,"
        f" perhaps with other work on the machine:\n{where['device']}, {where['processor']},"
        f" {where['threads']} thread(s), {arithmetic}, torch {where['torch']}, transformers"
        f" {where['transformers']},\npaceline {where['paceline']}, Python {where['python']},"
        f" seed {settings['seed']}.",
    ]


def _command_line(facts: Mapping[str, Any]) -> str:
    """Return the command that repeats the training, with the settings that differ from the default."""
    settings = facts["settings"]
    words = ["paceline pretrain", *(f"data/{name}.jsonl" for name in facts["data"])]
    words += [f"--out {facts['name']}", f"--tokenizer {settings['tokenizer']}"]
    for name, value in settings.items():
        is_default = name != "shape" and value == PretrainSettings.model_fields[name].default
        if name == "tokenizer" or name in OF_A_TARGET or is_default:
            continue
        if name in _FLAGS:
            words.append(f"--{name} {value}")
        else:
            words.append(f"--set '{name}={json.dumps(value)}'")
    return " \\\n  ".join(words)
