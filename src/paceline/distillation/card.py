"""What a drafter's folder says of itself: the card for people, training.json for programs.

Everything comes from what was run; nothing is typed in by hand. Knows no training.
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
class Source:
    """Where prompts came from and under what terms, as their data file says."""

    source: str
    license: str


def sources_of(path: Path) -> list[Source]:
    """The distinct `source` and `license` entries of a prompt file; none if it has none."""
    found = set()
    # not splitlines(): JSON strings may hold other Unicode line ends
    for line in Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n"):
        raw = json.loads(line)
        if raw.get("source"):
            found.add(Source(str(raw["source"]), str(raw.get("license", "not stated"))))
    return sorted(found, key=lambda s: (s.source, s.license))


_FLAGS: Final = ("size", "epochs", "seed", "threads")  # every other setting goes through --set


def command_line(data: list[str], out: str, settings: DistillSettings, measure: list[str]) -> str:
    """The command that trains this again, with the settings that differ from the default."""
    words = ["paceline distill", *(f"data/{name}.jsonl" for name in data)]
    words.append(f"--out {out}")
    words += [f"--measure data/{name}.jsonl" for name in measure]
    changed = settings.model_dump(exclude={"outputs"}, exclude_defaults=True, mode="json")
    for name, value in {"size": settings.size, **changed}.items():
        if name in _FLAGS:
            words.append(f"--{name} {value}")
        else:
            # JSON is YAML, and shells leave what stands in single quotes alone
            words.append(f"--set '{name}={json.dumps(value)}'")
    return " \\\n  ".join(words)


def circumstances(threads: int) -> dict[str, Any]:
    """What a time was measured on, and with which versions."""
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
    """The CPU as the system calls it; Linux keeps that in /proc."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def training_json(facts: Mapping[str, Any]) -> bytes:
    """The facts of a training, for programs."""
    return (json.dumps(facts, indent=1) + "\n").encode()


def quality_table(quality: Mapping[str, Any], trained: list[str]) -> str:
    """Validation by domain in Markdown."""
    lines = ["| task | trained on it | match rate | loss (nats/token) | tokens |"]
    lines.append("|---|---|---|---|---|")
    for domain, q in quality.items():
        mark = "yes" if domain in trained else "no"
        lines.append(
            f"| {domain} | {mark} | {q['match_rate']:.3f} | {q['loss']:.3f} | {q['num_tokens']:,} |"
        )
    return "\n".join(lines)


def card(facts: Mapping[str, Any]) -> str:
    """README.md of a drafter's folder."""
    front = f"---\nlicense: {facts['license']}\n---\n\n" if facts["license"] else ""
    parts = [
        f"{front}# {facts['name']}: a drafter for speculative decoding",
        *_what(facts),
        "## Training text",
        *_text(facts),
        "## Validation",
        "Match rate: the share of answer positions where the drafter's greedy token is the\n"
        "target's, that is, its greedy acceptance per position, on prompts kept out of training.\n"
        "Weights as saved, products in float32.",
        quality_table(facts["quality"], facts["trained_domains"]),
        "## How it was trained",
        _how(facts),
        f"```\n{facts['command']}\n```",
        "The prompt files are rebuilt as `docs/data.md` says. Settings, history and versions are\n"
        "in `training.json`.",
    ]
    return "\n\n".join(parts) + "\n"


def _what(facts: Mapping[str, Any]) -> list[str]:
    model = facts["model"]
    return [
        f"Proposes tokens for the target it was distilled from (weights `{facts['target']}`,\n"
        f"tokenizer `{facts['tokenizer']}`, which is this folder's too); of little use alone.",
        f"Llama architecture: {model['layers']} layers, hidden {model['hidden']}, MLP"
        f" {model['mlp']}, {model['heads']} heads with {model['kv_heads']} key-value\nheads, tied"
        f" embeddings, vocabulary {model['vocabulary']:,}, context {model['context']:,};"
        f" {model['parameters']:,} parameters, {facts['settings']['dtype']}.",
    ]


def _text(facts: Mapping[str, Any]) -> list[str]:
    settings, tokens = facts["settings"], facts["tokens"]
    lines = [
        f"| {name} | {file['texts']:,} | {'; '.join(s['source'] for s in file['sources'])} | "
        f"{'; '.join(s['license'] for s in file['sources'])} |"
        for name, file in facts["data"].items()
    ]
    terms = "The prompts keep the terms above."
    if facts["license"]:
        terms = f"Licence of the weights: {facts['license']}. {terms}"
    return [
        f"Every answer was written by the target itself (greedy, {facts['outputs_dtype']}, at most"
        f" {settings['max_new_tokens']} tokens); no\nreference answer was learned. Prompts whose id"
        f" hashes into the lowest {settings['validation_share']:.0%} were kept out for\nvalidation;"
        f" the other {facts['examples']:,} texts have {tokens['output']:,} tokens of answers and"
        f" {tokens['prompt']:,} of prompts.",
        "\n".join(["| prompts | texts | source | licence |", "|---|---|---|---|", *lines]),
        terms,
    ]


def _how(facts: Mapping[str, Any]) -> str:
    settings, where = facts["settings"], facts["circumstances"]
    start = "as the target's, projected" if settings["embedding_init"] == "svd" else "at random"
    arithmetic = "bfloat16 autocast" if settings["autocast"] else "float32"
    return (
        "Sequence-level distillation (Kim & Rush 2016, arXiv 1606.07947): cross-entropy on the\n"
        f"target's tokens, with weight {settings['prompt_weight']:g} on the prompt's. AdamW, peak"
        f" learning rate {settings['learning_rate']:g}, cosine with\nwarm-up; the embedding began"
        f" {start}. {settings['epochs']:g} passes, {facts['steps']:,} steps of at most"
        f" {settings['batch_tokens']:,} tokens;\nweights of step {facts['best_step']:,}, the best"
        f" on validation.\n\n{facts['cpu_seconds']:,.0f} s of CPU time, {facts['seconds']:,.0f} s"
        f" by the clock beside whatever else the machine did then:\n{where['processor']},"
        f" {where['threads']} thread(s), {arithmetic}, torch {where['torch']}, transformers"
        f" {where['transformers']},\npaceline {where['paceline']}, Python {where['python']},"
        f" seed {settings['seed']}."
    )
