"""Self-speculation with skipped sub-layers: a searched set, hand-made sets and none, by the clock.

    python benchmarks/layer_skip.py [--subjects 0.3b zoo] [--dtype bfloat16]

The experiments of Draft & Verify (arXiv 2309.08168, sections 3.1 to 3.4) at this machine's size: a
search for the sub-layers to skip; the searched set against random, first, middle and last sets of the
same size; the adaptive exit against fixed draft lengths; a set per task against one for all. `0.3b` is a
Llama with random weights whose sub-layers are scaled down, three of four, so that the search has
something to find, and with a head as sharp as a trained model's; `zoo` is the bundled target. One
process, everything interleaved, batch 1, greedy; speeds include the prefill. No prompt is used both for
the search and for timing.
"""

from __future__ import annotations

import gc
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from result_pages import count_drafts, describe_run, page, save, speeds, table
from timed_setup import (
    SHAPE_03B,
    llama_shape,
    load_zoo,
    make_parser,
    pace_in_memory,
    parse,
    random_llama,
    show_progress,
)

from paceline.assembly import Pace, build
from paceline.bench.timed import TimedPrompt
from paceline.contracts import NONE
from paceline.drafting.layer_skip import LayerSkip, LayerSkipSettings
from paceline.experiments.by_clock import RecordingMethods, encode_prompts, time_methods
from paceline.experiments.demo_prompts import demo_prompts
from paceline.layer_search import SearchSettings, plot, search_layers
from paceline.models.sublayers import LayerSubset

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.contracts import Progress
    from paceline.layer_search import SearchReport

SHAPES = {
    "0.3b": {"vocab_size": 32_000, **SHAPE_03B},
    "smoke": {"vocab_size": 512, **llama_shape(64, 128, 6, 4, 2)},
}
REDUNDANT = 0.75  # share of the sub-layers that contribute little
REDUNDANT_SCALE = 0.005
SHARPNESS = 8.0  # standard deviation of the logits
FIXED_LENGTHS = (2, 4, 6, 8)
SETTINGS = SearchSettings()


@dataclass
class Subject:
    """A target with prompts by task to search on, and prompts to time."""

    name: str
    pace: Pace
    development: dict[str, list[list[int]]]
    timed: list[TimedPrompt]

    @property
    def num_layers(self) -> int:
        """Number of the target's layers."""
        return self.pace.parts.target.num_layers


def redundant_llama(name: str, dtype: str, per_task: int) -> Subject:
    """Return a random Llama most of whose sub-layers are redundant."""
    shape = SHAPES[name]
    model = random_llama(shape, context=1024, tied=False)
    order = random.Random(0)
    num_bits = 2 * shape["num_hidden_layers"]
    redundant = set(order.sample(range(num_bits), round(REDUNDANT * num_bits)))
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            if i in redundant:
                layer.self_attn.o_proj.weight *= REDUNDANT_SCALE
            if i + len(model.model.layers) in redundant:
                layer.mlp.down_proj.weight *= REDUNDANT_SCALE
        # about as large as the output of a whole MLP: else the text settles on one token
        model.model.embed_tokens.weight.normal_(std=0.15)
        model.lm_head.weight.normal_(std=SHARPNESS / shape["hidden_size"] ** 0.5)
    pace = pace_in_memory(model.to(getattr(torch, dtype)).eval(), {})
    texts = [[order.randrange(shape["vocab_size"]) for _ in range(64)] for _ in range(2 * per_task)]
    timed = [TimedPrompt(str(i), "random", tuple(t)) for i, t in enumerate(texts[per_task:])]
    return Subject(name, pace, {"random": texts[:per_task]}, timed)


def zoo(dtype: str, per_task: int) -> Subject:
    """Return the bundled target without drafters."""
    config = load_zoo(dtype).model_copy(update={"drafters": {}})
    pace = Pace(build(config))
    development: dict[str, list[list[int]]] = {}
    for_search, timed = demo_prompts(per_task, per_task)
    for prompt in encode_prompts(pace, for_search):
        development.setdefault(prompt.domain, []).append(list(prompt.tokens))
    return Subject("zoo", pace, development, encode_prompts(pace, timed))


# --- arms -----------------------------------------------------------------------------------------


def by_hand(num_layers: int, count: int) -> dict[str, LayerSubset]:
    """Return sets of `count` sub-layers by position, attention before MLP in every layer."""
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


def add_arm(subject: Subject, name: str, subset: LayerSubset, fixed: int | None = None) -> None:
    """Add an arm to the subject: with the published exit, or with a fixed draft length."""
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
    report: Progress,
) -> SearchReport:
    """Search the sub-layers to skip on these prompts."""
    settings = SETTINGS.model_copy(update={"max_new_tokens": n})
    with TemporaryDirectory() as folder:
        return search_layers(
            subject.pace,
            prompts,
            Path(folder) / "set.json",
            settings,
            trials,
            on_progress=lambda stage, done, total: report(f"{label}: {stage}", done, total),
        )


def timed_rows(
    subject: Subject,
    arms: Sequence[str],
    prompts: Sequence[TimedPrompt],
    n: int,
    label: str,
    report: Progress,
) -> list[dict[str, Any]]:
    """Return one row per arm: tokens/s, speed over `none`, and acceptance of its drafts."""
    pace = Pace(subject.pace.parts)  # a new one, because arms were added
    recorder = RecordingMethods(pace, max_new_tokens=n, ignore_eos=True)
    methods = {arm: recorder.method(arm) for arm in arms}
    timings = time_methods(methods, prompts, stage=label, on_progress=report)
    rows = []
    for arm in arms:
        rounds, drafted, accepted = count_drafts(recorder.of(arm, prompts))
        speed = speeds(timings, arm)
        rows.append(
            {
                "arm": arm,
                "tokens_s": speed["tokens_per_second"],
                "speedup": speed["over_none"],
                "acceptance": accepted / max(1, drafted),
                "drafted_a_round": drafted / max(1, rounds),
                "block_efficiency": accepted / max(1, rounds) + 1,
                "same_text": speed["equal_to_none"] / len(prompts),
            }
        )
    return rows


def measure(
    subject: Subject, trials: int, n: int, n_search: int, out: Path, report: Progress
) -> dict[str, Any]:
    """Search, time all arms, and where there are several tasks compare a set per task."""
    name = subject.name
    everything = [prompt for prompts in subject.development.values() for prompt in prompts]
    found = search(subject, f"{name} search", everything, trials, n_search, report)
    plot(found, out / f"layer_skip_search_{name}.png")
    best = found.best
    add_arm(subject, "searched", best.subset)
    for place, subset in by_hand(subject.num_layers, len(best.subset)).items():
        add_arm(subject, place, subset)
    for length in FIXED_LENGTHS:
        add_arm(subject, f"searched, K = {length}", best.subset, length)
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
        "arms": timed_rows(subject, arms, subject.timed, n, f"{name} timed", report),
    }
    if len(subject.development) > 1:
        result["tasks"] = per_task(subject, trials, n, n_search, report)
    return result


def per_task(
    subject: Subject, trials: int, n: int, n_search: int, report: Progress
) -> list[dict[str, Any]]:
    """Compare each task's own set with the one that was searched on all tasks."""
    rows = []
    for task, prompts in subject.development.items():
        own = search(subject, f"{subject.name} {task}", prompts, trials, n_search, report)
        add_arm(subject, "own", own.best.subset)
        timed = [p for p in subject.timed if p.domain == task]
        arms = [NONE, "searched", "own"]
        found = timed_rows(subject, arms, timed, n, f"{subject.name} {task} timed", report)
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


# --- results --------------------------------------------------------------------------------------


COLUMNS = {
    "arm": "{arm}",
    "tokens/s": "{tokens_s:.1f}",
    "over none": "{speedup:.2f}",
    "accepted": "{acceptance:.2f}",
    "drafted per round": "{drafted_a_round:.1f}",
    "tokens per round": "{block_efficiency:.2f}",
    "same text": "{same_text:.0%}",
}
TASK_COLUMNS = {
    "task": "{task}",
    "one set for all": "{one_set:.2f}",
    "the task's own set": "{own_set:.2f}",
}


def markdown(results: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Return the page."""
    lines = page("Drafting with the target's own layers, some left out", facts)[:-1]
    for r in results:
        lines += [
            "",
            f"## {r['subject']}, {r['dtype']}",
            "",
            f"{r['num_skipped']} of {r['num_sublayers']} sub-layers skipped after {r['trials']} "
            f"trials, predicted {r['predicted']:.2f}x without prefill.",
            "",
        ]
        lines += table(r["arms"], COLUMNS)
        if "tasks" in r:
            lines += ["", *table(r["tasks"], TASK_COLUMNS)]
    return "\n".join(lines) + "\n"


def draw_bars(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw every arm's speed over `none`, one panel per subject."""
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
    """Measure all subjects and write the results."""
    parser = make_parser(__doc__)
    parser.add_argument("--subjects", nargs="+", default=["0.3b", "zoo"], choices=[*SHAPES, "zoo"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--trials", type=int, default=80)
    parser.add_argument("--per-task", type=int, default=4, help="prompts to search on, and to time")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--search-tokens", type=int, default=32)
    options = parse(parser)
    options.out.mkdir(parents=True, exist_ok=True)
    results = []
    with show_progress() as report:
        for name in options.subjects:
            make = zoo if name == "zoo" else partial(redundant_llama, name)
            subject = make(options.dtype, options.per_task)
            n, n_search = options.tokens, options.search_tokens
            results.append(measure(subject, options.trials, n, n_search, options.out, report))
            del subject
            gc.collect()
    facts = describe_run(
        f"Batch 1, greedy, {options.tokens} new tokens, {options.per_task} timed prompts per task, "
        "every arm on every prompt in changing order; searched, random, first, middle and last "
        "stop drafting by the adaptive exit."
    )
    content = {"circumstances": facts, "results": results}
    save(options.out, "layer_skip", markdown(results, facts), content)
    draw_bars(results, options.out / "layer_skip.png")


if __name__ == "__main__":
    main()
