"""How near the engine comes to what this machine can do, and to transformers' generate.

    python benchmarks/engine.py [--models zoo zoo-exact 0.3b 1b 8b] [--dtypes bfloat16 float32]
                                [--device cuda]

One process, everything interleaved, medians. The larger models have random weights: a Llama shape
whose upper layers are scaled down, so that a drafter made of its lowest layers agrees with it often,
as a trained drafter would. `ideal` is what a speculative run would take if nothing but forwards cost
time: rounds x (bare verify forward + bare draft forwards). Bandwidth is the larger of a plain read
of a large tensor and of a packed product's weights, measured between the runs; on CUDA it is that of a
copy within the device, read and written bytes together. What cannot run is reported with its reason.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import random
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from paceline.assembly import Pace, build, build_from_objects
from paceline.bench.circumstances import circumstances, headline
from paceline.cli.progress import progress
from paceline.config import Config, EngineSection, ModelSection, load_config
from paceline.contracts import NONE, Completion, Request
from paceline.drafting.draft_model import DraftModel
from paceline.drafting.prompt_lookup import PromptLookup, PromptLookupSettings
from paceline.errors import ModelError
from paceline.experiments.demo_prompts import load_written
from paceline.models.language_model import LanguageModel
from paceline.models.loading import resolve_device
from paceline.models.packing import Span
from paceline.models.products import Product
from paceline.testing.tokenizers import byte_tokenizer

SHAPES: dict[str, dict[str, int]] = {
    "0.3b": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
VOCABULARY = 32_000
DRAFT_LAYERS = 2
UPPER_SCALE = 0.02  # of what the upper layers add; the drafter agrees at about 8 places of 10
WIDTHS = (1, 8, 32)
CONTEXT = 256  # positions cached where single forwards are timed


@dataclass
class Subject:
    """A target with its drafters in our engine, and transformers' own copies of both."""

    name: str
    pace: Pace
    arms: list[str]  # four, for the batch
    draft_arm: str
    prompts: list[list[int]]
    theirs: Any
    their_drafter: Any


def zoo(dtype: str, device: str, exact: bool = False) -> Subject:
    config = load_config("paceline.yaml")
    drafters = {
        name: section.model_copy(update={"settings": {**section.settings, "device": device}})
        if "model" in section.settings
        else section
        for name, section in config.drafters.items()
    }
    config = config.model_copy(
        update={
            "target": config.target.model_copy(update={"dtype": dtype, "device": device}),
            "drafters": drafters,
            "exact": exact,
            "engine": EngineSection(prefix_positions=0),
        }
    )
    pace = Pace(build(config))
    prompts = [
        pace.encode([{"role": "user", "content": p.prompt}])
        for domain in ("math", "translation")
        for p in load_written(domain)[:4]
    ]

    def load(folder: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        return model.to(device).eval()

    return Subject(
        "zoo",
        pace,
        ["math", "general", "lookup", "code"],
        "general",
        prompts,
        load(config.target.model),
        load(config.drafters["general"].settings["model"]),
    )


def random_llama(name: str, dtype: str, device: str) -> Subject:
    shape = SHAPES[name]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        **shape,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers[DRAFT_LAYERS:]:
            layer.self_attn.o_proj.weight *= UPPER_SCALE
            layer.mlp.down_proj.weight *= UPPER_SCALE
    model = model.to(getattr(torch, dtype)).eval()  # type: ignore[arg-type]
    model.generation_config.eos_token_id = None
    small = lowest_layers(model, DRAFT_LAYERS)
    smaller = lowest_layers(model, 1)
    engine = EngineSection(prefix_positions=0)
    in_memory = Config(target=ModelSection(model="in memory"), engine=engine)
    drafters: dict[str, Any] = {
        # built here, because a drafter made for a tokenizer would draft only the ids that it knows
        "small": DraftModel("small", LanguageModel(small, "small"), 4, VOCABULARY, VOCABULARY),
        "smaller": DraftModel(
            "smaller", LanguageModel(smaller, "smaller"), 4, VOCABULARY, VOCABULARY
        ),
        "lookup": PromptLookup("lookup", PromptLookupSettings()),
    }
    pace = Pace(build_from_objects(model, byte_tokenizer(), drafters, in_memory))
    order = random.Random(0)
    prompts = [[order.randrange(VOCABULARY) for _ in range(64)] for _ in range(8)]
    return Subject(name, pace, ["small", "smaller", "lookup", NONE], "small", prompts, model, small)


def lowest_layers(model: Any, num_layers: int) -> Any:
    """A model of the lowest layers, sharing all weights."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = num_layers
    with torch.device("meta"):
        small = LlamaForCausalLM(config)
    small.model.embed_tokens = model.model.embed_tokens
    small.model.layers = torch.nn.ModuleList(list(model.model.layers)[:num_layers])
    small.model.norm, small.model.rotary_emb = model.model.norm, model.model.rotary_emb
    small.lm_head = model.lm_head
    small.generation_config.eos_token_id = None
    return small.eval()


# --- what is measured -----------------------------------------------------------------------------


def clocked(act: Callable[[], Any]) -> float:
    began = perf_counter()
    act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - began


def forward_once(model: LanguageModel, tokens: torch.Tensor, slot: int, width: int) -> None:
    model.unembed(model.forward(tokens[:width], [Span(slot, CONTEXT, width)]))


def weight_bytes(model: LanguageModel) -> int:
    """Bytes that one forward must read: every weight once, of the embedding a row."""
    total = model.num_bytes()
    embedding = model.model.get_input_embeddings().weight
    tied = model.model.get_output_embeddings().weight is embedding
    return total if tied else total - embedding.nbytes


class CopyBandwidth:
    """Bytes a second, read and written, of a copy within the device."""

    def __init__(self, device: torch.device) -> None:
        self._from = torch.ones(256 * 2**20, device=device)  # 1 GiB
        self._to = torch.empty_like(self._from)
        self._found: list[float] = []

    def measure(self) -> None:
        clocked(lambda: self._to.copy_(self._from))
        seconds = clocked(lambda: self._to.copy_(self._from))
        self._found.append(2 * self._from.nbytes / seconds)

    @property
    def typical(self) -> float:
        return median(self._found)


class ReadBandwidth:
    """Bytes a second of a plain read and of packed products larger than any cache."""

    def __init__(self) -> None:
        self._plain = torch.ones(64 * 2**20)  # 256 MiB
        layers = [torch.nn.Linear(4096, 4096, bias=False).bfloat16() for _ in range(8)]
        self._products = [Product([layer]) for layer in layers]
        self._x = torch.ones(1, 4096, dtype=torch.bfloat16)
        self._found: tuple[list[float], list[float]] = ([], [])

    def measure(self) -> None:
        plain, packed = self._found
        plain.append(self._plain.nbytes / clocked(self._plain.sum))
        num_bytes = len(self._products) * 4096 * 4096 * 2
        packed.append(num_bytes / clocked(lambda: [product(self._x) for product in self._products]))

    @property
    def typical(self) -> float:
        """The larger of the two medians: a neighbour's silence must not set the bound."""
        return max(median(values) for values in self._found)


def decode(pace: Pace, prompt: list[int], arm: str, n: int) -> Completion:
    request = Request("", tuple(prompt), n, drafter=arm)
    return next(iter(pace.stream([request])))


def generate(subject: Subject, prompt: list[int], n: int, assisted: bool) -> None:
    ids = torch.tensor([prompt], device=subject.theirs.device)
    extra = {"assistant_model": subject.their_drafter} if assisted else {}
    with torch.inference_mode():
        subject.theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, **extra
        )


def same_length(subject: Subject) -> None:
    """transformers' assistant drafts as many tokens as ours, neither more nor fewer."""
    drafter = subject.pace.parts.drafters[subject.draft_arm]
    settings = subject.their_drafter.generation_config
    settings.num_assistant_tokens = drafter.num_draft_tokens
    settings.num_assistant_tokens_schedule = "constant"
    settings.assistant_confidence_threshold = 0.0


@torch.inference_mode()
def measure(subject: Subject, n: int, repeats: int, on_turn: Callable[[], None]) -> dict[str, Any]:
    pace, arm = subject.pace, subject.draft_arm
    target = pace.parts.target
    drafter = pace.parts.drafters[arm]
    assert isinstance(drafter, DraftModel)
    on_cuda = target.device.type == "cuda"
    bandwidth = CopyBandwidth(target.device) if on_cuda else ReadBandwidth()
    tokens = torch.randint(target.num_logits, (CONTEXT,))
    slots = {}
    for model in (target, drafter.model):
        slots[model] = model.acquire()
        model.forward(tokens, [Span(slots[model], 0, CONTEXT)])
    same_length(subject)
    widths = sorted({*WIDTHS, 1 + drafter.num_draft_tokens})
    spent: dict[Any, list[float]] = {}
    runs: list[tuple[Completion, float]] = []
    host: list[float] = []
    for turn in range(repeats):
        prompt = subject.prompts[turn % len(subject.prompts)]
        for width in widths:
            act = lambda w=width: forward_once(target, tokens, slots[target], w)  # noqa: E731
            spent.setdefault(("T", width), []).append(median(clocked(act) for _ in range(3)))
        act = lambda: forward_once(drafter.model, tokens, slots[drafter.model], 1)  # noqa: E731
        spent.setdefault("draft step", []).append(median(clocked(act) for _ in range(3)))
        bandwidth.measure()
        began = perf_counter()
        plain = decode(pace, prompt, NONE, n)
        spent.setdefault("plain", []).append((perf_counter() - began) / len(plain.token_ids))
        rounds = max(1, len(plain.rounds))
        spent.setdefault("plain round", []).append(plain.seconds.verify / rounds)
        parts = plain.seconds
        work = parts.prefill + parts.draft + parts.verify
        host.append((plain.seconds_total - work) / rounds)
        began = perf_counter()
        drafted = decode(pace, prompt, arm, n)
        runs.append((drafted, perf_counter() - began))
        spent.setdefault("generate", []).append(
            clocked(lambda p=prompt: generate(subject, p, n, False)) / n
        )
        spent.setdefault("assisted", []).append(
            clocked(lambda p=prompt: generate(subject, p, n, True)) / n
        )
        batch = [
            Request(str(i), tuple(subject.prompts[i % 8]), n, drafter=subject.arms[i % 4])
            for i in range(8)
        ]
        began = perf_counter()
        emitted = sum(len(c.token_ids) for c in pace.stream(batch))
        spent.setdefault("8 rows", []).append((perf_counter() - began) / emitted)
        on_turn()
    for model, slot in slots.items():
        model.release(slot)
    typical = {key: median(values) for key, values in spent.items()}
    return figures(subject, target, drafter, typical, runs, host, bandwidth.typical, n)


def figures(
    subject: Subject,
    target: LanguageModel,
    drafter: DraftModel,
    typical: dict[Any, float],
    runs: list[tuple[Completion, float]],
    host: list[float],
    bandwidth: float,
    n: int,
) -> dict[str, Any]:
    K = drafter.num_draft_tokens
    verify, step = typical["T", 1 + K], typical["draft step"]
    decoding = [seconds - c.seconds.prefill for c, seconds in runs]
    ideal = [len(c.rounds) * verify + sum(r.drafted for r in c.rounds) * step for c, _ in runs]
    achieved = median(i / d for i, d in zip(ideal, decoding, strict=True))
    speculative = median(seconds / len(c.token_ids) for c, seconds in runs)
    single = typical["plain"]
    weights = weight_bytes(target)
    return {
        "model": subject.name,
        "forward": target.forward_kind,
        "device": target.device.type,
        "dtype": str(target.dtype).removeprefix("torch."),
        "mode": "exact" if target.exact else "normal",
        "weights_mb": weights / 1e6,
        "bandwidth_gb_s": bandwidth / 1e9,
        "plain_tokens_s": 1 / single,
        "plain_ms": typical["T", 1] * 1e3,
        "share_of_bandwidth": weights / typical["plain round"] / bandwidth,
        "plain_over_generate": typical["generate"] / single,
        "T8_over_T1": typical["T", 8] / typical["T", 1],
        "T32_over_T1": typical["T", 32] / typical["T", 1],
        "draft_step_over_T1": step / typical["T", 1],
        "acceptance": sum(r.accepted for c, _ in runs for r in c.rounds)
        / max(1, sum(r.drafted for c, _ in runs for r in c.rounds)),
        "draft_length": K,
        "achieved_over_ideal": achieved,
        "speculative_over_plain": single / speculative,
        "speculative_over_assisted": typical["assisted"] / speculative,
        "rows8_over_row1": single / typical["8 rows"],
        "host_ms_a_round": median(host) * 1e3,
        "tokens_a_run": n,
    }


NAMES = {
    "model": "model",
    "dtype": "dtype",
    "mode": "mode",
    "plain_tokens_s": "plain, tokens/s",
    "share_of_bandwidth": "share of bandwidth",
    "plain_over_generate": "plain / `generate`",
    "T8_over_T1": "T(8)/T(1)",
    "T32_over_T1": "T(32)/T(1)",
    "draft_step_over_T1": "draft step / T(1)",
    "acceptance": "accepted",
    "achieved_over_ideal": "achieved / ideal",
    "speculative_over_plain": "speculative / plain",
    "speculative_over_assisted": "speculative / assisted",
    "rows8_over_row1": "8 rows / 1 row",
    "host_ms_a_round": "host ms a round",
}


def markdown(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    lines = [
        "# The engine against this machine",
        "",
        f"{headline(facts, 'transformers')} {facts['setting']}",
        "",
        "| " + " | ".join(NAMES.values()) + " |",
        "|" + "---|" * len(NAMES),
    ]
    for row in rows:
        cells = [row[key] for key in NAMES]
        shown = [c if isinstance(c, str) else f"{c:.0f}" if c > 50 else f"{c:.2f}" for c in cells]
        lines.append("| " + " | ".join(shown) + " |")
    reads = ", ".join(
        f"{r['model']} {r['dtype']} {r['weights_mb']:.0f} MB at {r['bandwidth_gb_s']:.1f} GB/s"
        for r in rows
    )
    lines += ["", f"Bytes a forward reads, and the bandwidth measured between its runs: {reads}."]
    return "\n".join(lines) + "\n"


def resident_mb() -> float:
    """Resident memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def memory(num_requests: int, device: str, on_turn: Callable[[], None]) -> dict[str, float]:
    """Resident memory after the first 100 requests of mixed length and after all of them."""
    subject = zoo("float32", device)
    order = random.Random(1)

    def requests() -> Iterator[Request]:
        for i in range(num_requests):
            prompt = [order.randrange(8000) for _ in range(order.choice([5, 40, 150, 400]))]
            arm = order.choice(["none", *subject.arms])
            yield Request(str(i), tuple(prompt), order.randrange(1, 24), drafter=arm)

    after_100 = 0.0
    for done, _ in enumerate(subject.pace.stream(requests()), start=1):
        if done == 100:
            gc.collect()
            after_100 = resident_mb()
        on_turn()
    gc.collect()
    last = resident_mb()
    return {"requests": num_requests, "after_100_mb": after_100, "last_mb": last,
            "ratio": last / after_100}  # fmt: skip


def save(
    folder: Path,
    rows: list[dict[str, Any]],
    refused: list[str],
    facts: dict[str, Any],
    found: dict[str, float] | None,
) -> str:
    """Write the table as markdown and JSON; returns the markdown."""
    text = markdown(rows, facts)
    text += "".join(f"\nNot run: {line}.\n" for line in refused)
    if found is not None:
        text += (
            f"\nResident memory after {found['requests']} requests of mixed length over that after "
            f"100: {found['ratio']:.3f} ({found['after_100_mb']:.0f} to {found['last_mb']:.0f} MB).\n"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "engine.md").write_text(text)
    result = {"circumstances": facts, "rows": rows, "refused": refused, "memory": found}
    (folder / "engine.json").write_text(json.dumps(result, indent=1) + "\n")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="*", default=["zoo", "zoo-exact", "0.3b"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--requests", type=int, default=2000, help="of the memory test; 0 skips it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    try:
        resolve_device(options.device)
    except ModelError as error:
        parser.error(str(error))
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    console = Console()
    rows = []
    refused: list[str] = []
    with progress(console) as report:
        for name in options.models:
            for dtype in options.dtypes:
                try:
                    subject = (
                        zoo(dtype, options.device, exact=name == "zoo-exact")
                        if name.startswith("zoo")
                        else random_llama(name, dtype, options.device)
                    )
                except ModelError as error:
                    refused.append(f"{name} {dtype}: {error}")
                    continue
                label, done = f"{name} {dtype}", 0

                def on_turn(label: str = label) -> None:
                    nonlocal done
                    done += 1
                    report(label, done, options.repeats)

                rows.append(measure(subject, options.tokens, options.repeats, on_turn))
                del subject
                gc.collect()
        facts: dict[str, Any] = circumstances()
        on = facts["device"] if options.device == "cuda" else "the CPU"
        facts["setting"] = (
            f"On {on}. Batch 1 but for the 8 rows, greedy, {options.tokens} new tokens, medians of "
            f"{options.repeats} interleaved turns."
        )
        if rows:
            save(options.out, rows, refused, facts, None)  # before the long part that follows
        found = None
        if options.requests:
            served = 0

            def on_request() -> None:
                nonlocal served
                served += 1
                report("memory", served, options.requests)

            found = memory(options.requests, options.device, on_request)
    text = save(options.out, rows, refused, facts, found)
    console.print(text, markup=False, highlight=False)


if __name__ == "__main__":
    main()
