"""paceline against llama.cpp and vLLM, on the same weights, one process per engine, interleaved.

    python benchmarks/versus_engines.py [--peers llama.cpp,vllm] [--models zoo 0.3b] [--turns 5]
                                        [--peers-dir build/peers] [--resume]

Greedy, same prompts, seconds from prompt tokens to output tokens. One engine works at a time; the
others wait on their input and must use no processor time. Cases: 1 and 8 rows, a prefill of 512 tokens,
each at bfloat16 and at 8 bits (llama.cpp's q8_0). The
0.3 B Llama has random weights, so its speculation would mean nothing and is left out. The first use
installs each peer in an environment of its own; one that cannot run is named with its reason. The
policies of `auto` are learned here, on prompts that are not timed.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

import torch
from engines_facts import DECODE, FORWARD, PREFILL, READ, Call, Facts
from engines_models import TIMED_DRAFTERS, random_weights, zoo_weights
from engines_report import draw, markdown, summarise
from peers.catalog import PACELINE, PLAIN, RECIPES, Engines, Method, Weights, install_engines
from peers.installation import PeerError
from peers.worker import Worker
from result_pages import describe_run, save
from timed_setup import make_parser, messages, parse, show_progress
from transformers import AutoTokenizer

from paceline.bench.circumstances import cpu_model
from paceline.contracts import NONE
from paceline.experiments.demo_prompts import demo_prompts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from paceline.contracts import PromptRecord

ROWS: Final = (1, 8)
PREFILL_TOKENS: Final = 512
WIDTHS: Final = (1, 2, 5, 8, 12, 16, 32, 64)
READ_BYTES: Final = 2**30
READS: Final = 4  # per turn
PLAIN_MODES: Final = (PLAIN, NONE)


@dataclass(frozen=True, slots=True)
class Case:
    """What all its methods do: decode these batches of prompts."""

    kind: str
    name: str
    batches: dict[str, list[list[int]]]  # id -> prompts' tokens
    new_tokens: int
    ignore_eos: bool
    methods: tuple[Method, ...]

    def requests(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the id and the request of each batch."""
        for name, ids in self.batches.items():
            yield name, {"ids": ids, "n": self.new_tokens, "ignore_eos": self.ignore_eos}


# --- cases ----------------------------------------------------------------------------------------


def make_cases(
    weights: Weights, prompts: dict[str, list[int]], engines: Engines, new_tokens: int
) -> list[Case]:
    """Return the cases of one model. prompts: tokens by id."""
    cases = []
    for precision in weights.configs:
        label = f"{weights.name} {precision}"
        for rows in ROWS:
            methods = tuple(engines.methods(weights, precision, rows))
            name = f"{label}, {rows} row{'s' if rows > 1 else ''}"
            several, eos = batches(prompts, rows), weights.ignore_eos
            cases.append(Case(DECODE, name, several, new_tokens, eos, methods))
        plain = tuple(m for m in engines.methods(weights, precision, 1) if m.mode in PLAIN_MODES)
        name = f"{label}, prefill of {PREFILL_TOKENS} tokens"
        cases.append(Case(PREFILL, name, long_prompt(prompts), 1, eos, plain))
    return cases


def batches(prompts: dict[str, list[int]], rows: int) -> dict[str, list[list[int]]]:
    """Return batches of `rows` prompts in which every prompt occurs equally often, or nearly."""
    ids = list(prompts)
    found = {}
    for first in range(0, len(ids), max(1, rows // 2)):
        chosen = [ids[(first + i) % len(ids)] for i in range(rows)]
        found[" ".join(chosen)] = [prompts[name] for name in chosen]
    return found


def long_prompt(prompts: dict[str, list[int]]) -> dict[str, list[list[int]]]:
    """Return one prompt of PREFILL_TOKENS tokens, made of all prompts."""
    joined = [token for tokens in prompts.values() for token in tokens]
    repeated = joined * (1 + PREFILL_TOKENS // len(joined))
    return {"all prompts": [repeated[:PREFILL_TOKENS]]}


# --- runs -----------------------------------------------------------------------------------------


class Run:
    """The processes of one model's methods, and the calls to them that are not in the facts yet."""

    def __init__(self, facts: Facts, not_run: dict[str, str], log: Path, threads: int) -> None:
        """not_run: method -> reason, extended here. log: folder of the processes' messages."""
        self._facts, self._not_run = facts, not_run
        self._log, self._threads = log, threads
        self._workers: dict[tuple[str, ...], Worker] = {}
        self._failed: dict[tuple[str, ...], str] = {}

    def start(self, methods: Sequence[Method]) -> None:
        """Start the processes, one after the other; a process that fails is noted with its reason."""
        for command in dict.fromkeys(method.command for method in methods):
            log = self._log / f"{len(self._workers) + len(self._failed)}.log"
            print("Starting", " ".join(Path(part).name for part in command[1:]))
            try:
                self._workers[command] = Worker(command, log, self._threads)
            except PeerError as error:
                self._failed[command] = str(error)

    def stop(self) -> None:
        """End all processes."""
        for worker in self._workers.values():
            worker.stop()

    def ask(self, case: str, method: Method, **request: Any) -> dict[str, Any] | None:
        """Return a method's answer; None, with the reason noted, from a process that failed."""
        try:
            if method.command not in self._failed:
                return self._workers[method.command].ask(arm=method.arm, **request)
        except PeerError as error:
            self._failed[method.command] = str(error)
        self._not_run[f"{method.peer} {method.mode}, {case}"] = self._failed[method.command]
        return None

    def warm_up(self, cases: Sequence[Case]) -> None:
        """Call every method of every case once, untimed."""
        for case in cases:
            for method in case.methods:
                self.ask(case.name, method, **next(case.requests())[1])

    def time_case(self, case: Case, turn: int) -> None:
        """Time every method on every batch, in an order that changes with turn and batch."""
        for name, request in case.requests():
            order = random.Random(f"{turn} {name}")
            for method in order.sample(case.methods, len(case.methods)):
                if self._facts.has((case.name, method.peer, method.mode, turn, name)):
                    continue
                answer = self.ask(case.name, method, **request)
                if answer is not None:
                    self._note(case, method, turn, name, answer)

    def _note(
        self, case: Case, method: Method, turn: int, prompt: str, answer: dict[str, Any]
    ) -> None:
        outputs = answer["tokens"]
        read = sum(map(len, case.batches[prompt])) if case.kind == PREFILL else None
        self._facts.add(
            Call(
                case.kind,
                case.name,
                method.peer,
                method.mode,
                turn,
                prompt,
                answer["seconds"],
                read or sum(map(len, outputs)),
                outputs if turn == 0 else None,
            )
        )

    def time_forwards(self, weights: Weights, case: Case, turn: int) -> None:
        """Time single forwards of paceline's target, at all widths, and steps of its drafters."""
        [method] = [m for m in case.methods if m.peer == PACELINE and m.mode == NONE]
        name = f"{case.name.partition(',')[0]}, forward"
        drafters = TIMED_DRAFTERS if weights.drafter else ()
        timed = [*(("target", width) for width in WIDTHS), *((name, 1) for name in drafters)]
        for model, width in timed:
            mode = f"{model}, {width}"
            if self._facts.has((name, PACELINE, mode, turn, "")):
                continue
            forward = Method(PACELINE, mode, method.command, model)
            answer = self.ask(name, forward, width=width)
            if answer is not None:
                seconds = answer["seconds"]
                self._facts.add(Call(FORWARD, name, PACELINE, mode, turn, "", seconds, width))


def time_reads(facts: Facts, case: str, turn: int) -> None:
    """Time sums over a buffer of READ_BYTES bytes, the measure of bandwidth."""
    buffer = torch.ones(READ_BYTES // 4)
    for i in range(READS):
        if facts.has((case, "torch", f"sum {i}", turn, "")):
            continue
        began = perf_counter()
        buffer.sum()
        seconds = perf_counter() - began
        facts.add(Call(READ, case, "torch", f"sum {i}", turn, "", seconds, READ_BYTES))


def run_model(weights: Weights, cases: Sequence[Case], run: Run, facts: Facts, turns: int) -> None:
    """Time all cases of a model, turn after turn."""
    try:
        run.start([method for case in cases for method in case.methods])
        run.warm_up(cases)
        with show_progress() as report:
            for turn in range(turns):
                time_reads(facts, f"{weights.name}, read", turn)
                for i, case in enumerate(cases):
                    run.time_case(case, turn)
                    if case.kind == PREFILL:
                        run.time_forwards(weights, case, turn)
                    report(
                        f"{weights.name}: timed runs", turn * len(cases) + i + 1, turns * len(cases)
                    )
    finally:
        run.stop()


def compare(options: argparse.Namespace, peers: Sequence[str], facts: Facts) -> None:
    """Install the peers, time every model, and write facts, table and figure."""
    learned, timed = demo_prompts(options.collect_per_task, options.per_task)
    engines = install_engines(peers, options.peers_dir, options.build.absolute(), options.threads)
    not_run = dict(engines.refused)
    weight_bytes: dict[str, float] = {}
    for name in options.models:
        folder = options.build.absolute() / name
        weights = (
            zoo_weights(folder, options, learned)
            if name == "zoo"
            else random_weights(folder, options)
        )
        weight_bytes |= weights.num_bytes()
        try:
            engines.convert(weights)
        except PeerError as error:
            not_run[f"llama.cpp's weights of {name}"] = str(error)
        prompts = encode(weights, timed)
        cases = make_cases(weights, prompts, engines, options.max_new_tokens)
        run = Run(facts, not_run, folder / "log", options.threads)
        run_model(weights, cases, run, facts, options.turns)
    # facts that are resumed may hold other models
    chosen = [call for call in facts.calls if call.case.split()[0].strip(",") in options.models]
    tables = summarise(chosen, weight_bytes)
    write(tables, not_run, engines.versions, options)


def encode(weights: Weights, records: Sequence[PromptRecord]) -> dict[str, list[int]]:
    """Return the prompts' tokens by id, one message each."""
    tokenizer: Any = AutoTokenizer.from_pretrained(weights.folder)
    return {
        record.id: tokenizer.apply_chat_template(
            messages(record.prompt), add_generation_prompt=True, return_dict=False
        )
        for record in records
    }


def calls_depend_on(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options and the machine that calls of one file must share."""
    names = ("threads", "per_task", "max_new_tokens", "collect_per_task")
    return {"cpu": cpu_model(), **{name: getattr(options, name) for name in names}}


def write(
    tables: dict[str, Any], not_run: dict[str, str], versions: str, options: argparse.Namespace
) -> None:
    """Write the page, its figures as JSON, and the bars."""
    facts = describe_run(
        f"{versions}. Greedy, {4 * options.per_task} prompts, at most {options.max_new_tokens} new "
        f"tokens, medians of {options.turns} interleaved turns, seconds end to end, one process per "
        "engine, one working at a time."
    )
    text = markdown(tables, not_run, facts)
    save(
        options.out, "versus_engines", text, {"circumstances": facts, **tables, "not_run": not_run}
    )
    draw(tables["methods"], options.out / "versus_engines.png")


def main() -> None:
    """Run the comparison."""
    parser = make_parser(__doc__, per_task=3)
    parser.add_argument("--peers", default="llama.cpp,vllm", help="of llama.cpp,vllm; may be empty")
    parser.add_argument("--peers-dir", type=Path, default=Path("build/peers"))
    parser.add_argument("--build", type=Path, default=Path("build/versus_engines"))
    parser.add_argument("--models", nargs="+", choices=["zoo", "0.3b"], default=["zoo", "0.3b"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--collect-per-task", type=int, default=60, help="prompts to learn from")
    parser.add_argument("--resume", action="store_true", help="continue the facts in --out")
    options = parse(parser)
    named = [peer for peer in options.peers.split(",") if peer]
    if unknown := [peer for peer in named if peer not in RECIPES]:
        parser.error(f"--peers: unknown {', '.join(unknown)}; known: {', '.join(RECIPES)}")
    path = options.out / "versus_engines.jsonl"
    try:
        facts = Facts(path, calls_depend_on(options), options.resume)
    except ValueError as error:
        parser.error(f"{error}; give the same options, or run without --resume")
    compare(options, named, facts)


if __name__ == "__main__":
    main()
