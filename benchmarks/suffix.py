"""The suffix index's costs: per token of text, per round, memory and first use; and the costs of the
index of collected answers.

    python benchmarks/suffix.py [--tokens 32768] [--repeats 5] [--answer-tokens 10000000]

CPU seconds of one thread, medians. Texts: random ids, this repository's own source, and texts that are
hard for such structures: one token, two in turn, Fibonacci words, de Bruijn sequences. `bulk` reads the
whole text at once, as the index reads a prompt. `round` is `propose` for one row and the three tokens
since the last one, at the end of the text. First use is building a drafter in a new process, without
and with compiled code on disk.

The answers are pieces of each text of 50 to 400 tokens; a twentieth of their tokens is replaced at
random. `answers` is a round with an index of as many tokens as `shared` has. The large index is of the
own source: build is all of `write_answers`, with the tri-gram table; open is the first opening in a new
process; match is the kernel's call for 32 tokens, the second time for the same tokens.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

import numpy as np
from result_pages import describe_run, save, table
from timed_setup import count_steps, make_parser, parse, show_progress

from paceline.config import ModelSection
from paceline.drafting.answer_kernels import match_and_grow
from paceline.drafting.answers import Answers
from paceline.drafting.draft_replay import SimpleRow
from paceline.drafting.prompt_lookup import PromptLookup, PromptLookupSettings
from paceline.drafting.suffix_index import SuffixIndex
from paceline.drafting.suffix_lookup import SuffixLookup, SuffixLookupSettings
from paceline.drafting.trigram.answer_table import write_answer_table
from paceline.models.loading import load_tokenizer
from paceline.store.answers import Answer, open_answers, write_answers
from paceline.store.contexts import MAX_CONTEXT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from paceline.drafting.base import Drafter

ROOT = Path(__file__).resolve().parents[1]
MAX_MATCH = SuffixLookupSettings().max_match
ROUNDS = 200
NUM_DRAFTERS = 5
TOKENS_PER_ROUND = 3
SHARED_TOKENS = 2**18
REPLACED = 0.05  # of the tokens of an answer
MADE_WITH = ("tokenizer", "target")

OPEN = """
import sys, time
from pathlib import Path
from paceline.store.answers import open_answers
began = time.perf_counter()
index = open_answers(Path(sys.argv[1]), *sys.argv[2:])
print(time.perf_counter() - began)
"""

FIRST_USE = """
import time
from paceline.drafting.prompt_lookup import PromptLookup, PromptLookupSettings
began = time.process_time()
PromptLookup("x", PromptLookupSettings())
print(time.process_time() - began)
"""


def de_bruijn(k: int) -> Iterator[int]:
    """Yield an endless sequence over k ids with all pairs, then all triples and so on."""
    order = 2
    while True:
        word = [0] * (k * order)

        def lyndon(t: int, p: int, word: list[int] = word, order: int = order) -> Iterator[int]:
            if t > order:
                if order % p == 0:
                    yield from word[1 : p + 1]
                return
            word[t] = word[t - p]
            yield from lyndon(t + 1, p)
            for j in range(word[t - p] + 1, k):
                word[t] = j
                yield from lyndon(t + 1, t)

        yield from lyndon(1, 1)
        order += 1


def fibonacci(n: int) -> list[int]:
    """Return the first n letters of the infinite Fibonacci word."""
    a, b = [0], [0, 1]
    while len(b) < n:
        a, b = b, b + a
    return b[:n]


def own_source(n: int) -> list[int]:
    """Return n tokens of the repository's source, repeated, in the bundled target's tokens."""
    tokenizer = load_tokenizer(ModelSection(model=str(ROOT / "zoo" / "target")))
    files = sorted((ROOT / "src").rglob("*.py"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    ids: list[int] = tokenizer(text)["input_ids"]
    return (ids * (n // len(ids) + 1))[:n]


def texts(n: int) -> dict[str, list[int]]:
    """Return name -> text of n tokens."""
    choose = random.Random(0)
    return {
        "own source": own_source(n),
        "random, 32,000 ids": [choose.randrange(32_000) for _ in range(n)],
        "random, 4 ids": [choose.randrange(4) for _ in range(n)],
        "one token": [0] * n,
        "two in turn": [0, 1] * (n // 2),
        "Fibonacci word": fibonacci(n),
        "de Bruijn, 2 ids": list(islice(de_bruijn(2), n)),
        "de Bruijn, 180 ids": list(islice(de_bruijn(180), n)),
    }


def time_bulk(text: list[int]) -> tuple[float, float]:
    """Return CPU microseconds and bytes per token of one index that reads the text."""
    began = process_time()
    index = SuffixIndex(MAX_MATCH, len(text))
    index.extend(text)
    return (process_time() - began) / len(text) * 1e6, index.num_bytes() / len(text)


def time_round(drafter: Drafter, text: list[int]) -> float:
    """Return CPU microseconds of a proposal at the end of the text, with catching up."""
    first = len(text) - ROUNDS * TOKENS_PER_ROUND
    tokens = text[:first]
    row = SimpleRow(tokens, first)
    drafter.start([row])
    while not drafter.prepare(row, 512):
        pass
    spent = []
    for end in range(first + TOKENS_PER_ROUND, len(text) + 1, TOKENS_PER_ROUND):
        tokens.extend(text[len(tokens) : end])
        began = process_time()
        drafter.propose([row], [64])
        spent.append(process_time() - began)
    drafter.finish([row])
    return median(spent) * 1e6


def share_text(text: list[int]) -> SuffixLookup:
    """Return a drafter that is full of shared text, made of pieces of this text."""
    settings = SuffixLookupSettings(share=True, shared_tokens=SHARED_TOKENS)
    drafter = SuffixLookup("x", settings)
    assert drafter.shared is not None
    choose = random.Random(1)
    for _ in range(SHARED_TOKENS // 500):
        start = choose.randrange(len(text) - 500)
        drafter.shared.add(text[start : start + 500])
    return drafter


def pieces(text: list[int], num_tokens: int) -> Iterator[Answer]:
    """Yield pieces of a text, with replaced tokens, until there are this many tokens."""
    choose, tokens, done = np.random.default_rng(2), np.array(text), 0
    while done < num_tokens:
        length = int(choose.integers(50, 400))
        start = int(choose.integers(len(tokens) - length))
        piece = tokens[start : start + length].copy()
        replaced = choose.random(length) < REPLACED
        piece[replaced] = tokens[choose.integers(len(tokens), size=replaced.sum())]
        done += length + 1
        yield Answer(str(done), piece.tolist())


def answers_of(text: list[int], folder: Path) -> SuffixLookup:
    """Return a drafter with the index of pieces of a text."""
    write_answers(folder, list(pieces(text, SHARED_TOKENS)), *MADE_WITH, 2 * SHARED_TOKENS)
    answers = Answers("x", folder, *MADE_WITH)
    return SuffixLookup("x", SuffixLookupSettings(answers=folder), answers=answers)


def measure_answers(num_tokens: int) -> dict[str, float]:
    """Return the seconds to build and open a large index, and the microseconds of a match."""
    text = own_source(1 << 20)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = list(pieces(text, num_tokens))
        began = perf_counter(), process_time()
        write_answers(folder, given, *MADE_WITH, 2 * num_tokens, write_answer_table)
        build_s, build_cpu_s = perf_counter() - began[0], process_time() - began[1]
        command = [sys.executable, "-c", OPEN, name, *MADE_WITH]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        index = open_answers(folder, *MADE_WITH)
        assert index is not None
        nothing, out = np.empty(0, np.int64), np.empty((3, 1, 16), np.int64)
        spent: tuple[list[float], list[float]] = ([], [])
        choose = random.Random(3)
        for _ in range(1 + ROUNDS):
            start = choose.randrange(len(text) - MAX_CONTEXT)
            suffix = np.array(text[start : start + MAX_CONTEXT], dtype=np.int32)
            for times in spent:
                at = perf_counter()
                match_and_grow(
                    index.tokens, index.order, nothing, suffix, 1, 2.0, 0.0, 64, 4, 0.1, 0.0, out, 0
                )
                times.append(perf_counter() - at)
        return {
            "tokens": index.facts.num_tokens,
            "answers": index.facts.num_answers,
            "megabytes": sum(path.stat().st_size for path in index.folder.iterdir()) / 1e6,
            "build_s": build_s,
            "build_cpu_s": build_cpu_s,
            "open_ms": float(done.stdout) * 1e3,
            "first_match_us": median(spent[0][1:]) * 1e6,
            "match_us": median(spent[1][1:]) * 1e6,
        }


def drafters(folder: Path) -> dict[str, Callable[[list[int]], Drafter]]:
    """Return name -> function that makes the drafter for a text."""
    lookup = SuffixLookupSettings()
    wide = SuffixLookupSettings(
        num_draft_tokens=64, paths=64, min_match=1, length_offset=64, min_probability=0.0
    )
    return {
        "prompt_lookup": lambda text: PromptLookup("x", PromptLookupSettings()),
        "suffix_lookup": lambda text: SuffixLookup("x", lookup),
        "of 64 tokens, any path": lambda text: SuffixLookup("x", wide),
        "shared": share_text,
        "answers": lambda text: answers_of(text, folder),
    }


def measure(
    name: str, text: list[int], repeats: int, on_turn: Callable[[], None]
) -> dict[str, Any]:
    """Return a row of the table."""
    turns = []
    for _ in range(repeats):
        turns.append(time_bulk(text))
        on_turn()
    row: dict[str, Any] = {
        "text": name,
        "bulk_us": median(turn[0] for turn in turns),
        "bytes_a_token": turns[0][1],
    }
    with tempfile.TemporaryDirectory() as folder:
        for label, make in drafters(Path(folder)).items():
            drafter = make(text)
            row[label] = median(time_round(drafter, text) for _ in range(repeats))
            on_turn()
    return row


def first_use() -> dict[str, float]:
    """Return CPU seconds of building a drafter in a new process: compiling, and from disk."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}

        def build() -> float:
            command = [sys.executable, "-c", FIRST_USE]
            done = subprocess.run(
                command, env=environment, check=True, capture_output=True, text=True
            )
            return float(done.stdout)

        return {"compiled_s": build(), "from_disk_s": median(build() for _ in range(3))}


def markdown(
    rows: list[dict[str, Any]],
    first: dict[str, float],
    large: dict[str, float],
    facts: dict[str, Any],
) -> str:
    """Return the page."""
    names = [name for name in rows[0] if name not in ("text", "bulk_us", "bytes_a_token")]
    lines = [
        "# The suffix index",
        "",
        f"{facts['cpu']}, one thread, numba {facts['numba']}, commit {facts['commit']}, "
        f"{facts['date']}. {facts['setting']}",
        "",
        *table(
            rows,
            {
                "text": "{text}",
                "bulk, us per token": "{bulk_us:.2f}",
                "bytes per token": "{bytes_a_token:.0f}",
                **{f"{name}, us per round": f"{{{name}:.1f}}" for name in names},
            },
        ),
        "",
        f"Building the first drafter of a process: {first['compiled_s']:.1f} s where the code is "
        f"compiled, {first['from_disk_s']:.2f} s where compiled code is on disk.",
        "",
        f"An index of {large['answers']:,.0f} answers with {large['tokens']:,.0f} tokens, "
        f"{large['megabytes']:.0f} MB: built in {large['build_s']:.1f} s ({large['build_cpu_s']:.1f} s "
        f"of CPU time), opened in {large['open_ms']:.1f} ms. A match with its tree takes "
        f"{large['first_match_us']:.1f} us the first time, {large['match_us']:.1f} us the second.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every text and the first use."""
    parser = make_parser(__doc__)
    parser.set_defaults(threads=1)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--answer-tokens", type=int, default=10_000_000)
    options = parse(parser)
    if options.tokens < 2 * ROUNDS * TOKENS_PER_ROUND:
        parser.error(f"--tokens must be at least {2 * ROUNDS * TOKENS_PER_ROUND}")
    rows = []
    with show_progress() as report:
        for name, text in texts(options.tokens).items():
            on_turn = count_steps(report, name, options.repeats + NUM_DRAFTERS)
            rows.append(measure(name, text, options.repeats, on_turn))
    facts = describe_run(
        f"Texts of {options.tokens} tokens; CPU time; medians of {options.repeats} turns, {ROUNDS} "
        f"rounds per turn. Shared text: {SHARED_TOKENS} tokens."
    )
    facts["numba"] = version("numba")
    first, large = first_use(), measure_answers(options.answer_tokens)
    result = {"circumstances": facts, "rows": rows, "first_use": first, "answers": large}
    save(options.out, "suffix", markdown(rows, first, large, facts), result)


if __name__ == "__main__":
    main()
