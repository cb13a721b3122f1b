"""The engine against the limits of this machine and against transformers' generate.

    python benchmarks/engine.py [--models zoo 0.3b 1b 8b] [--dtypes bfloat16 float32]
                                [--device cuda]

One process, everything interleaved, medians. The larger models have random weights: a Llama shape
whose upper layers are scaled down, so that a drafter made of its lowest layers agrees with it as often
as a trained drafter would. `ideal` is the time of a speculative run if only forwards took time:
rounds x (bare verify forward + bare draft forwards). Bandwidth is the larger of a plain read of a large
tensor and of the weights of linear layers, measured between the runs; on CUDA it is that of a copy
within the device, read and written bytes together. A model that cannot run is reported with its reason.
"""

from __future__ import annotations

import copy
import gc
import random
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from result_pages import count_drafts, describe_run, page, save, table
from timed_setup import (
    SHAPE_03B,
    count_steps,
    fix_draft_length,
    generate,
    llama_shape,
    load_zoo,
    make_parser,
    messages,
    pace_in_memory,
    parse,
    random_llama,
    show_progress,
)
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from paceline.assembly import Pace, build
from paceline.contracts import NONE, Completion, Request
from paceline.drafting.draft_model import DraftModel
from paceline.drafting.prompt_lookup import PromptLookup, PromptLookupSettings
from paceline.errors import ModelError
from paceline.experiments.demo_prompts import load_written
from paceline.models.language_model import LanguageModel
from paceline.models.loading import resolve_device
from paceline.models.packing import Span
from paceline.models.products import Product

SHAPES: dict[str, dict[str, int]] = {
    "0.3b": SHAPE_03B,
    "1b": llama_shape(2048, 5632, 22, 32, 4),
    "8b": llama_shape(4096, 14336, 32, 32, 8),
}
VOCABULARY = 32_000
DRAFT_LAYERS = 2
UPPER_SCALE = 0.02  # of the upper layers' outputs; the drafter agrees at about 8 places of 10
WIDTHS = (1, 8, 32)
CONTEXT = 256  # positions cached where single forwards are timed


@dataclass
class Subject:
    """A target with its drafters in our engine, and transformers' copies of both."""

    name: str
    pace: Pace
    arms: list[str]  # four, for the batch
    draft_arm: str
    prompts: list[list[int]]
    theirs: Any
    their_drafter: Any


def zoo(dtype: str, device: str) -> Subject:
    """Return the bundled models."""
    config = load_zoo(dtype, device=device)
    pace = Pace(build(config))
    prompts = [
        pace.encode(messages(p.prompt))
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


def layered_llama(name: str, dtype: str, device: str) -> Subject:
    """Return a random Llama with drafters made of its lowest layers."""
    shape = {"vocab_size": VOCABULARY, **SHAPES[name]}
    model = random_llama(shape, context=2048, tied=True, device=device)
    with torch.no_grad():
        for layer in model.model.layers[DRAFT_LAYERS:]:
            layer.self_attn.o_proj.weight *= UPPER_SCALE
            layer.mlp.down_proj.weight *= UPPER_SCALE
    model = model.to(getattr(torch, dtype)).eval()
    small = lowest_layers(model, DRAFT_LAYERS)
    smaller = lowest_layers(model, 1)
    drafters: dict[str, Any] = {
        # built here, because a drafter built for a tokenizer drafts only the ids of that tokenizer
        "small": DraftModel("small", LanguageModel(small, "small"), 4, VOCABULARY, VOCABULARY),
        "smaller": DraftModel(
            "smaller", LanguageModel(smaller, "smaller"), 4, VOCABULARY, VOCABULARY
        ),
        "lookup": PromptLookup("lookup", PromptLookupSettings()),
    }
    pace = pace_in_memory(model, drafters)
    order = random.Random(0)
    prompts = [[order.randrange(VOCABULARY) for _ in range(64)] for _ in range(8)]
    return Subject(name, pace, ["small", "smaller", "lookup", NONE], "small", prompts, model, small)


def lowest_layers(model: Any, num_layers: int) -> Any:
    """Return a model of the lowest layers that shares all weights."""
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


# --- measuring ------------------------------------------------------------------------------------


def clocked(act: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    began = perf_counter()
    act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - began


def forward_once(model: LanguageModel, tokens: torch.Tensor, slot: int, width: int) -> None:
    """Run one forward of `width` tokens after a cached context."""
    model.unembed(model.forward(tokens[:width], [Span(slot, CONTEXT, width)]))


def weight_bytes(model: LanguageModel) -> int:
    """Return the bytes that a forward must read: every weight once, one row of the embedding."""
    total = model.num_bytes()
    embedding = model.model.get_input_embeddings().weight
    tied = model.model.get_output_embeddings().weight is embedding
    return total if tied else total - embedding.nbytes


class CopyBandwidth:
    """Bytes per second, read and written, of a copy within the device."""

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
    """Bytes per second of a plain read and of linear layers larger than any cache."""

    def __init__(self) -> None:
        self._plain = torch.ones(64 * 2**20)  # 256 MiB
        layers = [torch.nn.Linear(4096, 4096, bias=False).bfloat16() for _ in range(8)]
        self._products = [Product([layer]) for layer in layers]
        self._x = torch.ones(1, 4096, dtype=torch.bfloat16)
        self._found: tuple[list[float], list[float]] = ([], [])

    def measure(self) -> None:
        plain, linear = self._found
        plain.append(self._plain.nbytes / clocked(self._plain.sum))
        num_bytes = len(self._products) * 4096 * 4096 * 2
        linear.append(num_bytes / clocked(lambda: [product(self._x) for product in self._products]))

    @property
    def typical(self) -> float:
        """The larger of the two medians, which a few quick runs on an idle machine cannot raise."""
        return max(median(values) for values in self._found)


def decode(pace: Pace, prompt: list[int], arm: str, n: int) -> Completion:
    request = Request("", tuple(prompt), n, drafter=arm)
    return next(iter(pace.stream([request])))


class Turns:
    """Seconds of a subject's forwards and runs, one of each per turn."""

    def __init__(self, subject: Subject, target: LanguageModel, drafter: DraftModel) -> None:
        self.subject, self.target, self.drafter = subject, target, drafter
        on_cuda = target.device.type == "cuda"
        self.bandwidth = CopyBandwidth(target.device) if on_cuda else ReadBandwidth()
        self._spent: dict[Any, list[float]] = {}
        self.runs: list[tuple[Completion, float]] = []
        self.host: list[float] = []

    @property
    def typical(self) -> dict[Any, float]:
        """Medians by what was timed."""
        return {key: median(values) for key, values in self._spent.items()}

    def _note(self, key: Any, seconds: float) -> None:
        self._spent.setdefault(key, []).append(seconds)

    def time_forwards(self, tokens: torch.Tensor, slots: dict[LanguageModel, int]) -> None:
        """Time bare forwards of the target at several widths and of the drafter."""
        models = [(("T", width), self.target, width) for width in self._widths()]
        for key, model, width in [*models, ("draft step", self.drafter.model, 1)]:
            act = partial(forward_once, model, tokens, slots[model], width)
            self._note(key, median(clocked(act) for _ in range(3)))
        self.bandwidth.measure()

    def _widths(self) -> list[int]:
        return sorted({*WIDTHS, 1 + self.drafter.num_draft_tokens})

    def time_runs(self, prompt: list[int], n: int) -> None:
        """Time our plain and speculative runs, transformers' two, and a batch of eight rows."""
        pace, arm, theirs = self.subject.pace, self.subject.draft_arm, self.subject.their_drafter
        began = perf_counter()
        plain = decode(pace, prompt, NONE, n)
        self._note("plain", (perf_counter() - began) / len(plain.token_ids))
        rounds = max(1, len(plain.rounds))
        self._note("plain round", plain.seconds.verify / rounds)
        parts = plain.seconds
        work = parts.prefill + parts.draft + parts.verify
        self.host.append((plain.seconds_total - work) / rounds)
        began = perf_counter()
        drafted = decode(pace, prompt, arm, n)
        self.runs.append((drafted, perf_counter() - began))
        for key, extra in (("generate", {}), ("assisted", {"assistant_model": theirs})):
            act = partial(generate, self.subject.theirs, prompt, n, **extra)
            self._note(key, clocked(act) / n)
        prompts, arms = self.subject.prompts, self.subject.arms
        batch = [Request(str(i), tuple(prompts[i % 8]), n, drafter=arms[i % 4]) for i in range(8)]
        began = perf_counter()
        emitted = sum(len(c.token_ids) for c in pace.stream(batch))
        self._note("8 rows", (perf_counter() - began) / emitted)


@torch.inference_mode()
def measure(subject: Subject, n: int, repeats: int, on_turn: Callable[[], None]) -> dict[str, Any]:
    """Return a subject's row of the table."""
    target = subject.pace.parts.target
    drafter = subject.pace.parts.drafters[subject.draft_arm]
    assert isinstance(drafter, DraftModel)
    tokens = torch.randint(target.num_logits, (CONTEXT,))
    slots = {model: model.acquire() for model in (target, drafter.model)}
    for model, slot in slots.items():
        model.forward(tokens, [Span(slot, 0, CONTEXT)])
    fix_draft_length(subject.their_drafter, drafter.num_draft_tokens)
    turns = Turns(subject, target, drafter)
    for turn in range(repeats):
        turns.time_forwards(tokens, slots)
        turns.time_runs(subject.prompts[turn % len(subject.prompts)], n)
        on_turn()
    for model, slot in slots.items():
        model.release(slot)
    return figures(turns, n)


def figures(turns: Turns, n: int) -> dict[str, Any]:
    """Return a subject's row from its turns."""
    typical, runs, target = turns.typical, turns.runs, turns.target
    bandwidth = turns.bandwidth.typical
    K = turns.drafter.num_draft_tokens
    verify, step = typical["T", 1 + K], typical["draft step"]
    _, num_drafted, num_accepted = count_drafts(c for c, _ in runs)
    decoding = [seconds - c.seconds.prefill for c, seconds in runs]
    ideal = [len(c.rounds) * verify + sum(r.drafted for r in c.rounds) * step for c, _ in runs]
    achieved = median(i / d for i, d in zip(ideal, decoding, strict=True))
    speculative = median(seconds / len(c.token_ids) for c, seconds in runs)
    single = typical["plain"]
    weights = weight_bytes(target)
    return {
        "model": turns.subject.name,
        "forward": target.forward_name,
        "device": target.device.type,
        "dtype": str(target.dtype).removeprefix("torch."),
        "weights_mb": weights / 1e6,
        "bandwidth_gb_s": bandwidth / 1e9,
        "plain_tokens_s": 1 / single,
        "plain_ms": typical["T", 1] * 1e3,
        "share_of_bandwidth": weights / typical["plain round"] / bandwidth,
        "plain_over_generate": typical["generate"] / single,
        "T8_over_T1": typical["T", 8] / typical["T", 1],
        "T32_over_T1": typical["T", 32] / typical["T", 1],
        "draft_step_over_T1": step / typical["T", 1],
        "acceptance": num_accepted / max(1, num_drafted),
        "draft_length": K,
        "achieved_over_ideal": achieved,
        "speculative_over_plain": single / speculative,
        "speculative_over_assisted": typical["assisted"] / speculative,
        "rows8_over_row1": single / typical["8 rows"],
        "host_ms_a_round": median(turns.host) * 1e3,
        "tokens_a_run": n,
    }


COLUMNS = {
    "model": "{model}",
    "dtype": "{dtype}",
    "forward": "{forward}",
    "plain, tokens/s": "{plain_tokens_s:.3g}",
    "share of bandwidth": "{share_of_bandwidth:.2f}",
    "plain / `generate`": "{plain_over_generate:.2f}",
    "T(8)/T(1)": "{T8_over_T1:.2f}",
    "T(32)/T(1)": "{T32_over_T1:.2f}",
    "draft step / T(1)": "{draft_step_over_T1:.2f}",
    "accepted": "{acceptance:.2f}",
    "achieved / ideal": "{achieved_over_ideal:.2f}",
    "speculative / plain": "{speculative_over_plain:.2f}",
    "speculative / assisted": "{speculative_over_assisted:.2f}",
    "8 rows / 1 row": "{rows8_over_row1:.2f}",
    "host ms per round": "{host_ms_a_round:.2f}",
}


def markdown(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Return the page of all rows."""
    lines = page("The engine against this machine", facts, "transformers")
    lines += table(rows, COLUMNS)
    reads = ", ".join(
        f"{r['model']} {r['dtype']} {r['weights_mb']:.0f} MB at {r['bandwidth_gb_s']:.1f} GB/s"
        for r in rows
    )
    lines += ["", f"Bytes that a forward reads, and bandwidth measured between its runs: {reads}."]
    return "\n".join(lines) + "\n"


def resident_mb() -> float:
    """Return this process's resident memory in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def measure_memory(num_requests: int, device: str, on_turn: Callable[[], None]) -> dict[str, float]:
    """Return resident memory after the first 100 requests of mixed length and after all of them."""
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


def write(
    folder: Path,
    rows: list[dict[str, Any]],
    refused: list[str],
    facts: dict[str, Any],
    memory: dict[str, float] | None,
) -> None:
    """Write the table as Markdown and JSON."""
    text = markdown(rows, facts)
    text += "".join(f"\nNot run: {line}.\n" for line in refused)
    if memory is not None:
        text += (
            f"\nResident memory after {memory['requests']} requests of mixed length over that after "
            f"100: {memory['ratio']:.3f} ({memory['after_100_mb']:.0f} to {memory['last_mb']:.0f} MB).\n"
        )
    result = {"circumstances": facts, "rows": rows, "refused": refused, "memory": memory}
    save(folder, "engine", text, result)


def load_subject(name: str, dtype: str, device: str) -> Subject:
    """Load or make a model by its name. Raises ModelError if it cannot run here."""
    if name == "zoo":
        return zoo(dtype, device)
    return layered_llama(name, dtype, device)


def main() -> None:
    """Measure all models and write the results."""
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="*", default=["zoo", "0.3b"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2000, help="of the memory test; 0 skips it")
    options = parse(parser)
    try:
        resolve_device(options.device)
    except ModelError as error:
        parser.error(str(error))
    rows = []
    refused: list[str] = []
    with show_progress() as report:
        for name, dtype in product(options.models, options.dtypes):
            try:
                subject = load_subject(name, dtype, options.device)
            except ModelError as error:
                refused.append(f"{name} {dtype}: {error}")
                continue
            on_turn = count_steps(report, f"{name} {dtype}", options.repeats)
            rows.append(measure(subject, options.tokens, options.repeats, on_turn))
            del subject
            gc.collect()
        device = torch.cuda.get_device_name() if options.device == "cuda" else "the CPU"
        facts = describe_run(
            f"On {device}. Batch 1 but for the 8 rows, greedy, {options.tokens} new tokens, medians "
            f"of {options.repeats} interleaved turns."
        )
        memory = None
        if options.requests:
            if rows:  # written before the long part that follows
                write(options.out, rows, refused, facts, None)
            on_request = count_steps(report, "memory", options.requests)
            memory = measure_memory(options.requests, options.device, on_request)
    write(options.out, rows, refused, facts, memory)


if __name__ == "__main__":
    main()
