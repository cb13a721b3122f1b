"""The description in a drafter's folder: README.md for people, training.json for programs.

All of it is computed from the run. Knows no training.
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
import transformers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from paceline.distillation.settings import DistillSettings


@dataclass(frozen=True, slots=True)
class PromptSource:
    """The source of prompts and its licence, as their data file names them."""

    source: str
    license: str


def read_sources(path: Path) -> list[PromptSource]:
    """Return the distinct `source` and `license` entries of a prompt file, which may have none."""
    found = set()
    # not splitlines(): JSON strings may contain other Unicode line ends
    for line in Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n"):
        raw = json.loads(line)
        if raw.get("source"):
            found.add(PromptSource(str(raw["source"]), str(raw.get("license", "not stated"))))
    return sorted(found, key=lambda s: (s.source, s.license))


_FLAGS: Final = ("size", "epochs", "seed", "threads")  # other settings use --set


def command_line(data: list[str], out: str, settings: DistillSettings, measure: list[str]) -> str:
    """Return the command that repeats the training, with the settings that differ from the default."""
    words = ["paceline distill", *(f"data/{name}.jsonl" for name in data)]
    words.append(f"--out {out}")
    words += [f"--measure data/{name}.jsonl" for name in measure]
    changed = settings.model_dump(exclude={"outputs"}, exclude_defaults=True, mode="json")
    for name, value in {"size": settings.size, **changed}.items():
        if name in _FLAGS:
            words.append(f"--{name} {value}")
        else:
            # JSON is YAML, and shells do not change text in single quotes
            words.append(f"--set '{name}={json.dumps(value)}'")
    return " \\\n  ".join(words)


def circumstances(threads: int) -> dict[str, Any]:
    """Return the machine and the versions of a training."""
    return {
        "device": "cpu",
        "processor": processor_name(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "paceline": version("paceline"),
    }


def processor_name() -> str:
    """Return the CPU's name from /proc on Linux, elsewhere from Python."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def quality_table(quality: Mapping[str, Any], trained: list[str]) -> str:
    """Return the validation per domain as a Markdown table."""
    lines = ["| task | trained on it | match rate | loss (nats/token) | tokens |"]
    lines.append("|---|---|---|---|---|")
    for domain, figures in quality.items():
        mark = "yes" if domain in trained else "no"
        lines.append(
            f"| {domain} | {mark} | {figures['match_rate']:.3f} | {figures['loss']:.3f} | "
            f"{figures['num_tokens']:,} |"
        )
    return "\n".join(lines)


def card(facts: Mapping[str, Any]) -> str:
    """Return the README.md of a drafter's folder."""
    front = f"---\nlicense: {facts['license']}\n---\n\n" if facts["license"] else ""
    parts = [
        f"{front}# {facts['name']}: a drafter for speculative decoding",
        *_model_paragraphs(facts),
        "## Training text",
        *_text_paragraphs(facts),
        "## Validation",
        "Match rate: the share of answer positions where the drafter's greedy token equals the\n"
        "target's (greedy acceptance per position), on prompts that were not used in training.\n"
        "Weights as saved, products in float32.",
        quality_table(facts["quality"], facts["trained_domains"]),
        "## How it was trained",
        _training_paragraph(facts),
        f"```\n{facts['command']}\n```",
        "`docs/data.md` describes how to rebuild the prompt files. Settings, history and versions are\n"
        "in `training.json`, hashes of the prompts trained on in `trained_on.npy`.",
    ]
    return "\n\n".join(parts) + "\n"


def _model_paragraphs(facts: Mapping[str, Any]) -> list[str]:
    model = facts["model"]
    return [
        f"Proposes tokens for the target it was distilled from (weights `{facts['target']}`,\n"
        f"tokenizer `{facts['tokenizer']}`, also in this folder). Not a model to be used alone.",
        f"Llama architecture: {model['layers']} layers, hidden {model['hidden']}, MLP"
        f" {model['mlp']}, {model['heads']} heads with {model['kv_heads']} key-value\nheads, tied"
        f" embeddings, vocabulary {model['vocabulary']:,}, context {model['context']:,};"
        f" {model['parameters']:,} parameters, {facts['settings']['dtype']}.",
    ]


def _text_paragraphs(facts: Mapping[str, Any]) -> list[str]:
    settings, tokens = facts["settings"], facts["tokens"]
    lines = [
        f"| {name} | {file['texts']:,} | {'; '.join(s['source'] for s in file['sources'])} | "
        f"{'; '.join(s['license'] for s in file['sources'])} |"
        for name, file in facts["data"].items()
    ]
    terms = "The prompts have the licences above."
    if facts["license"]:
        terms = f"Licence of the weights: {facts['license']}. {terms}"
    return [
        f"The target wrote every answer (greedy, {facts['outputs_dtype']}, at most"
        f" {settings['max_new_tokens']} tokens);\nno reference answer was used. Prompts whose id"
        f" hashes into the lowest {settings['validation_share']:.0%} are\nfor validation only;"
        f" the other {facts['examples']:,} texts have {tokens['output']:,} tokens of answers and"
        f" {tokens['prompt']:,} of prompts.",
        "\n".join(["| prompts | texts | source | licence |", "|---|---|---|---|", *lines]),
        terms,
    ]


def _training_paragraph(facts: Mapping[str, Any]) -> str:
    settings, where = facts["settings"], facts["circumstances"]
    start = "the target's, projected" if settings["embedding_init"] == "svd" else "random"
    arithmetic = "bfloat16 autocast" if settings["autocast"] else "float32"
    return (
        "Sequence-level distillation (Kim & Rush 2016, arXiv 1606.07947): cross-entropy on the\n"
        f"target's tokens, with weight {settings['prompt_weight']:g} on the prompt's. AdamW, peak"
        f" learning rate {settings['learning_rate']:g}, cosine with\nwarm-up; the initial embedding"
        f" was {start}. {settings['epochs']:g} passes, {facts['steps']:,} steps of at most"
        f" {settings['batch_tokens']:,} tokens;\nweights of step {facts['best_step']:,}, the best"
        f" on validation.\n\n{facts['cpu_seconds']:,.0f} s of CPU time, {facts['seconds']:,.0f} s"
        f" of wall-clock time, perhaps with other work on the machine:\n{where['processor']},"
        f" {where['threads']} thread(s), {arithmetic}, torch {where['torch']}, transformers"
        f" {where['transformers']},\npaceline {where['paceline']}, Python {where['python']},"
        f" seed {settings['seed']}."
    )
