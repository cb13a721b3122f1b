"""The suffix index's costs: per token of text, per round, memory and first use.

    python benchmarks/suffix.py [--tokens 32768] [--repeats 5]

CPU seconds of one thread, medians. Texts: random ids, this repository's own source, and texts that are
hard for such structures: one token, two in turn, Fibonacci words, de Bruijn sequences. `bulk` reads the
whole text at once, as the index reads a prompt. `round` is `propose` for one row and the three tokens
since the last one, at the end of the text. First use is building a drafter in a new process, without
and with compiled code on disk.
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
from time import process_time
from typing import TYPE_CHECKING, Any

from result_pages import describe_run, save, table
from timed_setup import count_steps, make_parser, parse, show_progress

from paceline.config import ModelSection
from paceline.drafting.draft_replay import SimpleRow
from paceline.drafting.prompt_lookup import PromptLookup, PromptLookupSettings
from paceline.drafting.suffix_index import SuffixIndex
from paceline.drafting.suffix_lookup import SuffixLookup, SuffixLookupSettings
from paceline.models.loading import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from paceline.drafting.base import Drafter

ROOT = Path(__file__).resolve().parents[1]
MAX_MATCH = SuffixLookupSettings().max_match
ROUNDS = 200
TOKENS_PER_ROUND = 3
SHARED_TOKENS = 2**18

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


def drafters() -> dict[str, Callable[[list[int]], Drafter]]:
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
    for label, make in drafters().items():
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


def markdown(rows: list[dict[str, Any]], first: dict[str, float], facts: dict[str, Any]) -> str:
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
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every text and the first use."""
    parser = make_parser(__doc__)
    parser.set_defaults(threads=1)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--repeats", type=int, default=5)
    options = parse(parser)
    if options.tokens < 2 * ROUNDS * TOKENS_PER_ROUND:
        parser.error(f"--tokens must be at least {2 * ROUNDS * TOKENS_PER_ROUND}")
    rows = []
    with show_progress() as report:
        for name, text in texts(options.tokens).items():
            on_turn = count_steps(report, name, options.repeats + len(drafters()))
            rows.append(measure(name, text, options.repeats, on_turn))
    facts = describe_run(
        f"Texts of {options.tokens} tokens; CPU time; medians of {options.repeats} turns, {ROUNDS} "
        f"rounds per turn. Shared text: {SHARED_TOKENS} tokens."
    )
    facts["numba"] = version("numba")
    first = first_use()
    result = {"circumstances": facts, "rows": rows, "first_use": first}
    save(options.out, "suffix", markdown(rows, first, facts), result)


if __name__ == "__main__":
    main()
