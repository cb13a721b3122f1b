"""Self-speculation with skipped sub-layers: found, chosen by hand, and never, by the clock.

    python benchmarks/layer_skip.py [--subjects 0.3b zoo] [--dtype bfloat16]

The experiments of Draft & Verify (arXiv 2309.08168, sections 3.1 to 3.4) at this machine's size:
a search for the sub-layers to skip; the found set against random, first, middle and last ones of the
same number; the adaptive exit against fixed draft lengths; a set of each task's own against one for
all. `0.3b` is a Llama of random weights three quarters of whose sub-layers were scaled down, so that
there is something to find, with a head as sharp as a trained model's; `zoo` is the bundled target.
One process, everything interleaved, batch 1, greedy; speeds count prefill and all. Development and
timed prompts share nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from paceline.assembly import Pace, build, build_from_objects
from paceline.bench.circumstances import circumstances, headline
from paceline.bench.timed import (
    TimedPrompt,
    num_equal_outputs,
    select,
    time_interleaved,
    tokens_per_second,
)
from paceline.cli.progress import progress
from paceline.config import Config, EngineSection, ModelSection, load_config
from paceline.contracts import NONE, Completion, Request
from paceline.drafting.layer_skip import LayerSkip, LayerSkipSettings
from paceline.experiments.demo_prompts import demo_prompts
from paceline.layer_search import SearchSettings, plot, search_layers
from paceline.models.sublayers import LayerSubset
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.contracts import Progress
    from paceline.layer_search import SearchReport

SHAPES = {
    "0.3b": {
        "vocab_size": 32_000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    "smoke": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
REDUNDANT = 0.75  # share of the sub-layers that hardly matter
REDUNDANT_SCALE = 0.005
SHARPNESS = 8.0  # standard deviation of the logits
FIXED_LENGTHS = (2, 4, 6, 8)
SETTINGS = SearchSettings()


@dataclass
class Subject:
    """A target with prompts by task, some to search on and others to time."""

    name: str
    pace: Pace
    development: dict[str, list[list[int]]]
    timed: list[TimedPrompt]

    @property
    def num_layers(self) -> int:
        return self.pace.parts.target.num_layers


def random_llama(name: str, dtype: str, per_task: int) -> Subject:
    shape = SHAPES[name]
    config = LlamaConfig(
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        **shape,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    order = random.Random(0)
    num_bits = 2 * shape["num_hidden_layers"]
    redundant = set(order.sample(range(num_bits), round(REDUNDANT * num_bits)))
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            if i in redundant:
                layer.self_attn.o_proj.weight *= REDUNDANT_SCALE
            if i + len(model.model.layers) in redundant:
                layer.mlp.down_proj.weight *= REDUNDANT_SCALE
        # about what a whole MLP adds: the text wanders instead of settling on one token
        model.model.embed_tokens.weight.normal_(std=0.15)
        model.lm_head.weight.normal_(std=SHARPNESS / shape["hidden_size"] ** 0.5)
    model = model.to(getattr(torch, dtype)).eval()  # type: ignore[arg-type]
    model.generation_config.eos_token_id = None
    engine = EngineSection(prefix_positions=0)
    in_memory = Config(target=ModelSection(model="in memory"), engine=engine)
    pace = Pace(build_from_objects(model, byte_tokenizer(), {}, in_memory))
    texts = [[order.randrange(shape["vocab_size"]) for _ in range(64)] for _ in range(2 * per_task)]
    timed = [TimedPrompt(str(i), "random", tuple(t)) for i, t in enumerate(texts[per_task:])]
    return Subject(name, pace, {"random": texts[:per_task]}, timed)


def zoo(dtype: str, per_task: int) -> Subject:
    config = load_config("paceline.yaml")
    config = config.model_copy(
        update={
            "target": config.target.model_copy(update={"dtype": dtype}),
            "drafters": {},
            "engine": EngineSection(prefix_positions=0),
        }
    )
    pace = Pace(build(config))
    development: dict[str, list[list[int]]] = {}
    timed = []
    for_search, to_time = demo_prompts(per_task, per_task)
    for p in for_search:
        tokens = pace.encode([{"role": "user", "content": p.prompt}])
        development.setdefault(p.domain, []).append(tokens)
    for p in to_time:
        tokens = pace.encode([{"role": "user", "content": p.prompt}])
        timed.append(TimedPrompt(p.id, p.domain, tuple(tokens)))
    return Subject("zoo", pace, development, timed)


# --- what is tried --------------------------------------------------------------------------------


def by_hand(num_layers: int, count: int) -> dict[str, LayerSubset]:
    """Sets of `count` sub-layers chosen by where they stand, attention before MLP in every layer."""
    total = 2 * num_layers

    def subset(places: Sequence[int]) -> LayerSubset:
        attention = frozenset(p // 2 for p in places if p % 2 == 0)
        return LayerSubset(attention, frozenset(p // 2 for p in places if p % 2))

    middle = (total - count) // 2
    return {
        "random": subset(random.Random(1).sample(range(total), count)),
        "first": subset(range(count)),
        "middle": subset(range(middle, middle + count)),
        "last": subset(range(total - count, total)),
    }


def drafter(subject: Subject, name: str, subset: LayerSubset, fixed: int | None = None) -> None:
    """Give the subject one more arm: the published exit, or a fixed length."""
    settings = LayerSkipSettings(
        skip_attention=tuple(subset.attention),
        skip_mlp=tuple(subset.mlp),
        num_draft_tokens=fixed or SETTINGS.num_draft_tokens,
        stop="threshold" if fixed is None else "fixed",
    )
    parts = subject.pace.parts
    parts.drafters[name] = LayerSkip(name, parts.target, subset, settings)


def search(
    subject: Subject,
    label: str,
    prompts: Sequence[Sequence[int]],
    trials: int,
    n: int,
    on: Progress,
) -> SearchReport:
    settings = SETTINGS.model_copy(update={"max_new_tokens": n})
    with TemporaryDirectory() as folder:
        return search_layers(
            subject.pace,
            prompts,
            Path(folder) / "set.json",
            settings,
            trials,
            on_progress=lambda stage, done, of: on(f"{label}: {stage}", done, of),
        )


def timed_rows(
    subject: Subject,
    arms: Sequence[str],
    prompts: Sequence[TimedPrompt],
    n: int,
    label: str,
    on: Progress,
) -> list[dict[str, Any]]:
    """One row an arm: tokens/s, over `none`, and how its drafts fared."""
    engine = Pace(subject.pace.parts)
    done: dict[str, list[Completion]] = {arm: [] for arm in arms}

    def decode(arm: str, prompt: Sequence[int]) -> Sequence[int]:
        request = Request("", tuple(prompt), n, drafter=arm)
        (completion,) = engine.stream([request])
        done[arm].append(completion)
        return completion.token_ids

    count = 0

    def on_run() -> None:
        nonlocal count
        count += 1
        on(label, count, len(arms) * len(prompts))

    methods = {arm: partial(decode, arm) for arm in arms}
    timings = time_interleaved(methods, prompts, on_run=on_run)
    plain = tokens_per_second(select(timings, NONE))
    rows = []
    for arm in arms:
        rounds = [r for c in done[arm][1:] for r in c.rounds]  # the first only warms up
        drafted, accepted = sum(r.drafted for r in rounds), sum(r.accepted for r in rounds)
        speed = tokens_per_second(select(timings, arm))
        rows.append(
            {
                "arm": arm,
                "tokens_s": speed,
                "speedup": speed / plain,
                "acceptance": accepted / max(1, drafted),
                "drafted_a_round": drafted / max(1, len(rounds)),
                "block_efficiency": accepted / max(1, len(rounds)) + 1,
                "same_text": num_equal_outputs(timings, arm, NONE) / len(prompts),
            }
        )
    return rows


def measure(
    subject: Subject, trials: int, n: int, n_search: int, out: Path, on: Progress
) -> dict[str, Any]:
    name = subject.name
    everything = [prompt for prompts in subject.development.values() for prompt in prompts]
    found = search(subject, f"{name} search", everything, trials, n_search, on)
    plot(found, out / f"layer_skip_search_{name}.png")
    best = found.best
    drafter(subject, "searched", best.subset)
    for place, subset in by_hand(subject.num_layers, len(best.subset)).items():
        drafter(subject, place, subset)
    for length in FIXED_LENGTHS:
        drafter(subject, f"searched, K = {length}", best.subset, length)
    arms = list(subject.pace.parts.drafters)
    result: dict[str, Any] = {
        "subject": name,
        "dtype": str(subject.pace.parts.target.dtype).removeprefix("torch."),
        "num_sublayers": 2 * subject.num_layers,
        "num_skipped": len(best.subset),
        "skip_attention": list(best.skip_attention),
        "skip_mlp": list(best.skip_mlp),
        "predicted": found.speedup(best),
        "trials": len(found.trials),
        "arms": timed_rows(subject, arms, subject.timed, n, f"{name} timed", on),
    }
    if len(subject.development) > 1:
        result["tasks"] = per_task(subject, trials, n, n_search, on)
    return result


def per_task(
    subject: Subject, trials: int, n: int, n_search: int, on: Progress
) -> list[dict[str, Any]]:
    """A set of each task's own beside the one that was searched on all of them."""
    rows = []
    for task, prompts in subject.development.items():
        own = search(subject, f"{subject.name} {task}", prompts, trials, n_search, on)
        drafter(subject, "own", own.best.subset)
        timed = [p for p in subject.timed if p.domain == task]
        arms = [NONE, "searched", "own"]
        found = timed_rows(subject, arms, timed, n, f"{subject.name} {task} timed", on)
        speeds = {row["arm"]: row["speedup"] for row in found}
        rows.append(
            {
                "task": task,
                "one_set": speeds["searched"],
                "own_set": speeds["own"],
                "own_predicted": own.speedup(own.best),
                "own_skipped": len(own.best.subset),
            }
        )
    return rows


# --- what is written ------------------------------------------------------------------------------


def markdown(results: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    lines = [
        "# Drafting with the target's own layers, some left out",
        "",
        f"{headline(facts)} {facts['setting']}",
    ]
    for r in results:
        lines += [
            "",
            f"## {r['subject']}, {r['dtype']}",
            "",
            f"{r['num_skipped']} of {r['num_sublayers']} sub-layers skipped after {r['trials']} "
            f"trials, predicted {r['predicted']:.2f}x without prefill.",
            "",
            "| arm | tokens/s | over none | accepted | drafted a round | tokens a round | same text |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {a['arm']} | {a['tokens_s']:.1f} | {a['speedup']:.2f} | {a['acceptance']:.2f} | "
            f"{a['drafted_a_round']:.1f} | {a['block_efficiency']:.2f} | {a['same_text']:.0%} |"
            for a in r["arms"]
        ]
        if "tasks" in r:
            lines += ["", "| task | one set for all | a set of its own |", "|---|---|---|"]
            lines += [
                f"| {t['task']} | {t['one_set']:.2f} | {t['own_set']:.2f} |" for t in r["tasks"]
            ]
    return "\n".join(lines) + "\n"


def draw_bars(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Every arm's speed over none, a panel a subject."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(results), 4), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, r in zip(panels, results, strict=True):
        arms = [a for a in r["arms"] if a["arm"] != NONE][::-1]
        axes.barh([a["arm"] for a in arms], [a["speedup"] for a in arms], color="C0")
        axes.axvline(1.0, color="0.3", linestyle=":")
        axes.set(title=f"{r['subject']}, {r['dtype']}", xlabel="tokens/s over none")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--subjects", nargs="+", default=["0.3b", "zoo"], choices=[*SHAPES, "zoo"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--trials", type=int, default=80)
    parser.add_argument("--per-task", type=int, default=4, help="prompts to search on, and to time")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--search-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    results = []
    with progress(console) as report:
        for name in options.subjects:
            make = zoo if name == "zoo" else partial(random_llama, name)
            subject = make(options.dtype, options.per_task)
            n, n_search = options.tokens, options.search_tokens
            results.append(measure(subject, options.trials, n, n_search, options.out, report))
            del subject
            gc.collect()
    facts: dict[str, Any] = circumstances()
    facts["setting"] = (
        f"Batch 1, greedy, {options.tokens} new tokens, {options.per_task} timed prompts a task, "
        "every arm on every prompt in changing order; searched, random, first, middle and last "
        "stop drafting by the adaptive exit."
    )
    text = markdown(results, facts)
    (options.out / "layer_skip.md").write_text(text)
    content = {"circumstances": facts, "results": results}
    (options.out / "layer_skip.json").write_text(json.dumps(content, indent=1) + "\n")
    draw_bars(results, options.out / "layer_skip.png")
    console.print(text, markup=False, highlight=False)


if __name__ == "__main__":
    main()
