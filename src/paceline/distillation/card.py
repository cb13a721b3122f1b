"""The card of a drafter, README.md in its folder, in the format of the Hugging Face Hub.

All of it is computed from the run's facts (`facts`). Knows no training.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pyarrow.parquet as pq

from paceline.store.prompts import read_json_lines

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from paceline.distillation.settings import DistillSettings


_SOURCE: Final = ("source", "license")


@dataclass(frozen=True, slots=True)
class PromptSource:
    """The source of prompts and its licence, as their data file names them."""

    source: str
    license: str


def read_sources(path: Path) -> list[PromptSource]:
    """Return the distinct `source` and `license` entries of a prompt file, which may have none."""
    found = {
        PromptSource(str(row["source"]), str(row.get("license") or "not stated"))
        for row in _read_rows(Path(path))
        if row.get("source")
    }
    return sorted(found, key=lambda s: (s.source, s.license))


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        named = pq.read_schema(path).names
        return pq.read_table(path, columns=[n for n in _SOURCE if n in named]).to_pylist()
    return [row for _, row in read_json_lines(path)]


_FLAGS: Final = ("size", "epochs", "seed", "threads")  # other settings use --set


def command_line(data: list[str], out: str, settings: DistillSettings, measure: list[str]) -> str:
    """Return the command that repeats the training, with the settings that differ from the default."""
    words = ["paceline distill", *(f"data/{name}.jsonl" for name in data)]
    words.append(f"--out {out}")
    words += [f"--measure data/{name}.jsonl" for name in measure]
    changed = settings.model_dump(exclude={"outputs", "events"}, exclude_defaults=True, mode="json")
    if settings.pretrain_text:
        changed["pretrain_text"] = [f"data/{path.name}" for path in settings.pretrain_text]
    if settings.start_from is not None:
        changed["start_from"] = settings.start_from.name
    for name, value in {"size": settings.size, **changed}.items():
        if name in _FLAGS:
            words.append(f"--{name} {value}")
        else:
            # JSON is YAML, and shells do not change text in single quotes
            words.append(f"--set '{name}={json.dumps(value)}'")
    return " \\\n  ".join(words)


_LOSSES: Final[Mapping[str, str]] = {
    "cross_entropy": "cross-entropy on the target's tokens",
    "kl": "forward KL divergence",
    "reverse_kl": "reverse KL divergence",
    "jensen_shannon": "Jensen-Shannon divergence",
    "tvd": "total variation distance",
    "tvd++": "TVD++ (arXiv 2403.00858), rewards standardised over the batch",
    "tvd++_position": "TVD++ (arXiv 2403.00858), rewards standardised per position",
    "negative_log_acceptance": "negative log acceptance (arXiv 2602.23881)",
    "lk_hybrid": "hybrid of KL divergence and total variation (arXiv 2602.23881)",
}
_LENGTHS: Final = ("3", "5")  # draft lengths of the block efficiency


def card(facts: Mapping[str, Any]) -> str:
    """Return the README.md of a drafter's folder."""
    parts = [
        _front_matter(facts) + f"# {facts['name']}: a drafter for speculative decoding",
        *_model_paragraphs(facts),
        "## Training text",
        *_text_paragraphs(facts),
        "## Acceptance",
        *_measure_paragraphs(facts),
        "## How it was trained",
        *_training_paragraphs(facts),
        f"```\n{facts['command']}\n```",
        "`docs/data.md` describes how to rebuild the prompt files. Settings, history and versions are\n"
        "in `training.json`, the curves in `training.png`, hashes of the prompts trained on in\n"
        "`trained_on.npy`.",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(facts: Mapping[str, Any]) -> str:
    """Return the metadata that the Hub reads."""
    return front_matter(facts, ("speculative-decoding", "draft-model"))


def front_matter(facts: Mapping[str, Any], tags: Sequence[str]) -> str:
    """Return the Hub's metadata of a model: licence, task and tags."""
    has_encoder = "encoder_layers" in facts["model"]
    task = "text2text-generation" if has_encoder else "text-generation"
    lines = ["library_name: transformers", f"pipeline_tag: {task}"]
    if facts["license"]:
        lines.insert(0, f"license: {facts['license']}")
    lines += ["tags:", *(f"- {tag}" for tag in tags)]
    return "\n".join(["---", *lines, "---"]) + "\n\n"


def _model_paragraphs(facts: Mapping[str, Any]) -> list[str]:
    return [
        f"Proposes tokens for the target it was distilled from (weights `{facts['target']}`,\n"
        f"tokenizer `{facts['tokenizer']}`, also in this folder). Not a model to be used alone.",
        describe_model(facts),
    ]


def describe_model(facts: Mapping[str, Any]) -> str:
    """Return a sentence on a model's architecture and sizes."""
    model = facts["model"]
    layers = f"{model['layers']} layers"
    if "encoder_layers" in model:
        layers = f"{model['encoder_layers']} encoder and {model['layers']} decoder layers"
    context = "relative positions without a last one"
    if model["context"] is not None:
        context = f"context {model['context']:,}"
    return (
        f"{model['architecture']}: {layers}, hidden {model['hidden']}, MLP"
        f" {model['mlp']}, {model['heads']} heads with {model['kv_heads']} key-value\nheads,"
        f" vocabulary {model['vocabulary']:,}, {context};"
        f" {model['parameters']:,} parameters, {facts['settings']['dtype']}."
    )


def _text_paragraphs(facts: Mapping[str, Any]) -> list[str]:
    settings, tokens = facts["settings"], facts["tokens"]
    lines = [
        f"| {name} | {file['prompts']:,} | {file['answers']:,} | "
        f"{'; '.join(s['source'] for s in file['sources'])} | "
        f"{'; '.join(s['license'] for s in file['sources'])} |"
        for name, file in facts["data"].items()
    ]
    terms = "The prompts have the licences above."
    if facts["license"]:
        terms = f"Licence of the weights: {facts['license']}. {terms}"
    part = (
        "The prompts for collecting\nand judging are not used: 12% of all ids, by hash, and other"
        " prompts with their texts."
        if settings["part"] == "training"
        else "Prompts of\nall parts are used."
    )
    return [
        f"The target wrote every answer ({_samplings(settings)}, {facts['outputs_dtype']}, at most"
        f" {settings['max_new_tokens']} tokens);\nno reference was learned as an answer. {part} Of the"
        f" prompts\nused, {settings['validation_share']:.0%} are for validation."
        f" The {facts['examples']:,} answers have {tokens['output']:,} tokens, their prompts"
        f" {tokens['prompt']:,}.",
        "\n".join(
            ["| file | prompts | answers | source | licence |", "|---|---|---|---|---|", *lines]
        ),
        terms,
    ]


def _samplings(settings: Mapping[str, Any]) -> str:
    names = []
    for sampling in settings["samplings"]:
        if sampling["temperature"] == 0:
            names.append("greedy")
        else:
            top_p = f" with top-p {sampling['top_p']:g}" if sampling["top_p"] < 1 else ""
            names.append(f"temperature {sampling['temperature']:g}{top_p}")
    return ", ".join(names)


def _measure_paragraphs(facts: Mapping[str, Any]) -> list[str]:
    """Return the measures per task on validation prompts."""
    measures = facts["measures"]
    priced = (
        "measured prices of this model and its target"
        if measures["is_priced"]
        else "the share of parameters alone, as for memory-bound speed-up"
    )
    lines = [
        "| task | trained on it | match rate | acceptance | tau, K = 3 | tau, K = 5 | MBSU, K = 3 | "
        "speed-up |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task, own in measures["domains"].items():
        earlier = "before" if task in facts.get("earlier_domains", ()) else "no"
        mark = "yes" if task in facts["trained_domains"] else earlier
        taus = " | ".join(_at(own["block_efficiency"], k) for k in _LENGTHS)
        lines.append(
            f"| {task} | {mark} | {own['match_rate']:.3f} | {own['acceptance']:.3f} | {taus} | "
            f"{_at(own['mbsu'], _LENGTHS[0])} | {own['predicted_speedup']:.2f} |"
        )
    return [
        "On prompts that were not used in training. Match rate: the share of positions where the\n"
        "drafter's greedy token is the target's. Acceptance: the mean of sum min(p, q), the chance\n"
        "that a sampled token is accepted. Block efficiency tau: tokens per target forward, greedy,\n"
        "drafts of K tokens. MBSU: memory-bound speed-up. Speed-up: predicted over plain decoding at\n"
        f"the best K, from {priced}. Weights as saved,\nproducts in float32.",
        "\n".join(lines),
    ]


def _at(figures: Mapping[str, float], length: str) -> str:
    """Return a figure at a draft length; prices may be of shorter drafts only."""
    return f"{figures[length]:.2f}" if length in figures else "-"


def _training_paragraphs(facts: Mapping[str, Any]) -> list[str]:
    settings, where = facts["settings"], facts["circumstances"]
    arithmetic = "bfloat16 autocast" if settings["autocast"] else "float32"
    average = f"; weights averaged with decay {settings['ema_decay']:g}"
    text = (
        f" {settings['text_share']:.0%} of the steps learned pre-training text."
        if settings["text_share"]
        else ""
    )
    return [
        f"{_start(settings)}Alignment with the target:\n{_LOSSES[settings['loss']]}, with weight"
        f" {settings['prompt_weight']:g} on the prompt's tokens{_teacher(settings)}.{text}",
        f"AdamW, peak learning rate {settings['learning_rate']:g}, cosine with warm-up"
        f"{average if settings['ema_decay'] else ''}. {settings['epochs']:g} pass(es) over the"
        f" answers,\n{facts['steps']:,} steps of at most"
        f" {settings['batch_tokens'] * settings['accumulate']:,} tokens; the weights are those of step"
        f" {facts['best_step']:,}, which have the\nbest predicted speed-up on validation prompts.",
        f"{facts['cpu_seconds']:,.0f} s of CPU time, {facts['seconds']:,.0f} s of wall-clock time,"
        f" perhaps with other work on the machine:\n{where['device']}, {where['processor']},"
        f" {where['threads']} thread(s), {arithmetic}, torch {where['torch']}, transformers"
        f" {where['transformers']},\npaceline {where['paceline']}, Python {where['python']},"
        f" seed {settings['seed']}.",
    ]


def _start(settings: Mapping[str, Any]) -> str:
    """Return sentences on the student's first weights, with a space after them."""
    if settings["start_from"] is not None:
        start = f"Started from `{settings['start_from']}`. "
    elif settings["target_layers"] is not None or settings["target_encoder_layers"] is not None:
        start = f"Started as layers {_layers(settings)} of the target. "
    elif settings["embedding_init"] == "svd":
        start = "Started at random; the embedding is the target's, projected. "
    else:
        start = "Started at random. "
    if settings["pretrain_tokens"]:
        names = ", ".join(settings["pretrain_text"])
        start += f"Pre-trained on {settings['pretrain_tokens']:,} tokens of {names}. "
    return start


def _layers(settings: Mapping[str, Any]) -> str:
    """Return the copied layers; of an encoder or decoder that is not named, all are."""
    named = {"": settings["target_layers"], "of the encoder ": settings["target_encoder_layers"]}
    parts = [f"{part}{', '.join(map(str, indices))}" for part, indices in named.items() if indices]
    return " and ".join(parts)


def _teacher(settings: Mapping[str, Any]) -> str:
    if settings["loss"] == "cross_entropy":
        return ""
    which = (
        "all of its probabilities"
        if settings["teacher"] == "live"
        else f"its {settings['teacher_top_k']} largest probabilities and the rest"
    )
    temperature = settings["teacher_temperature"]
    return f",\nfrom {which}" + (f" at temperature {temperature:g}" if temperature != 1 else "")
