"""Plain decoding by one process and by two at once, on the bundled target.

    python benchmarks/two_processes.py [--threads 2] [--turns 9] [--new-tokens 512]

Each process runs the compiled forward in bfloat16 and decodes the same prompt, one row, greedy. Cases,
in turns: one process alone; two at once, each with all threads or with half of them; one while another
program multiplies matrices with torch. All answers must be the same text.
"""

from __future__ import annotations

import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from engines_models import write_config
from peers.worker import Worker
from result_pages import describe_run, page, save, table
from timed_setup import count_steps, load_zoo, make_parser, parse, show_progress

from paceline.contracts import NONE

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

PROMPT: Final = list(range(100, 164))  # every text of this length takes as long
MARGIN: Final = 4  # products last this many times as long as decoding alone
PEERS: Final = Path(__file__).parent / "peers"


class Decoders:
    """The processes that decode, the program that multiplies, and what they are asked together."""

    def __init__(self, options: argparse.Namespace, folder: Path, stack: ExitStack) -> None:
        """folder: for configurations and messages. stack: ends the processes."""
        self._new_tokens, self._folder, self._stack = options.new_tokens, folder, stack
        self._started = 0
        whole, half = options.threads, options.threads // 2
        self.whole = [self._decoder(whole) for _ in range(2)]
        self.half = [self._decoder(half) for _ in range(2)]
        self._multiplier = self._start("run_matmul.py", str(whole), threads=whole)
        self._texts: set[tuple[int, ...]] = set()
        self._alone = max(self.decode([worker])[0] for worker in [*self.whole, *self.half])

    def _decoder(self, threads: int) -> Worker:
        folder = self._folder / str(threads)
        folder.mkdir(exist_ok=True)
        config = load_zoo("bfloat16", threads=threads)
        target = config.target.model_copy(update={"forward": "compiled"})
        config = config.model_copy(update={"target": target, "drafters": {}})
        return self._start("run_paceline.py", str(write_config(config, folder)), threads=threads)

    def _start(self, script: str, argument: str, threads: int) -> Worker:
        command = [sys.executable, str(PEERS / script), argument]
        self._started += 1
        worker = Worker(command, self._folder / f"{self._started}.log", threads)
        self._stack.callback(worker.stop)
        return worker

    def decode(self, workers: Sequence[Worker]) -> list[float]:
        """Return the seconds of each of these processes, which decode at once."""
        request = {"ids": [PROMPT], "n": self._new_tokens, "arm": NONE, "ignore_eos": True}
        with ThreadPoolExecutor(len(workers)) as pool:
            answers = list(pool.map(lambda worker: worker.ask(**request), workers))
        self._texts |= {tuple(answer["tokens"][0]) for answer in answers}
        if len(self._texts) > 1:
            raise SystemExit("the processes decoded different texts from one prompt")
        return [answer["seconds"] for answer in answers]

    def decode_beside_products(self) -> list[float]:
        """Return the seconds of one process while another program multiplies."""
        seconds = MARGIN * self._alone
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(self._multiplier.ask, seconds=seconds)
            found = self.decode(self.whole[:1])
            if other.done():
                raise SystemExit(f"the products ended after {seconds:.1f} s, before the text did")
        return found


def measure(options: argparse.Namespace, decoders: Decoders) -> list[dict[str, Any]]:
    """Return a row per case: median tokens per second of each process, and until the last ends."""
    whole, half = decoders.whole, decoders.half
    cases = {
        "one process": lambda: decoders.decode(whole[:1]),
        "two processes": lambda: decoders.decode(whole),
        "two processes, half of the threads each": lambda: decoders.decode(half),
        "one process, beside another program's products": decoders.decode_beside_products,
    }
    seconds: dict[str, list[list[float]]] = {name: [] for name in cases}
    with show_progress() as report:
        step = count_steps(report, "turns", options.turns)
        for _ in range(options.turns):
            for name, run in cases.items():
                seconds[name].append(run())
            step()
    return [
        {
            "case": name,
            "each": [options.new_tokens / median(own) for own in zip(*turns, strict=True)],
            "together": options.new_tokens * len(turns[0]) / median(map(max, turns)),
            "seconds": turns,
        }
        for name, turns in seconds.items()
    ]


def markdown(rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Return the page."""
    alone = rows[0]["together"]
    for row in rows:
        row["to one alone"] = row["together"] / alone
    shown = [row | {"each": " and ".join(f"{speed:.0f}" for speed in row["each"])} for row in rows]
    columns = {
        "case": "{case}",
        "tokens/s per process": "{each}",
        "together": "{together:.0f}",
        "together, to one process": "{to one alone:.2f}",
    }
    return "\n".join([*page("Two processes at once", facts), *table(shown, columns)]) + "\n"


def main() -> None:
    """Time the cases in turns."""
    parser = make_parser(__doc__)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--new-tokens", type=int, default=512)
    options = parse(parser)
    if options.threads < 2:
        parser.error(f"--threads is {options.threads}; it must be 2 or more, to be halved")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        rows = measure(options, Decoders(options, Path(folder), stack))
    facts = describe_run(
        f"One row, a prompt of {len(PROMPT)} tokens, {options.new_tokens} new tokens, greedy, "
        f"bfloat16, medians of {options.turns} turns. {options.threads} threads each, also the products."
    )
    save(
        options.out, "two_processes", markdown(rows, facts), {"circumstances": facts, "cases": rows}
    )


if __name__ == "__main__":
    main()
