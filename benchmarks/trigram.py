"""A tri-gram draft's costs: compiled search against its readable twin, learning, building, loading.

    python benchmarks/trigram.py [--out benchmarks/results] [--text-mb 4] [--places 100]

A table of installed packages' source, read with the bundled target's tokenizer; drafts at places of
files that are not in the table, after learning the text up to each place. CPU time of one thread, the
minimum of several runs per place, the median over places. Writes trigram.json and trigram.md.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

from aded_experiment import installed_source
from result_pages import save, table
from timed_setup import make_parser, parse, show_progress

from paceline.bench.circumstances import circumstances
from paceline.cli.options import configured
from paceline.drafting.draft_replay import SimpleRow
from paceline.drafting.trigram import kernels
from paceline.drafting.trigram.drafter import TrigramTree
from paceline.drafting.trigram.search import Learned, TreeSearch
from paceline.drafting.trigram.settings import TrigramTreeSettings
from paceline.drafting.trigram.table import load_table
from paceline.models.loading import load_tokenizer
from paceline.testing.trigram_reference import ReferenceStatistics, reference_tree
from paceline.verbs.trigrams import build_trigrams

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.drafting.trigram.table import Table

RUNS = 7
TWIN_PLACES = 12
SEARCHES = ("mcts", "greedy", "full")
BUDGETS = (16, 64)


def time_fastest(work: Callable[[], Any], runs: int = RUNS) -> float:
    """Return CPU seconds of the fastest run."""
    seconds = []
    for _ in range(runs):
        began = process_time()
        work()
        seconds.append(process_time() - began)
    return min(seconds)


def as_dictionary(table: Table) -> dict[tuple[int, int], list[tuple[int, float]]]:
    """Return pair of tokens -> (successor, weight) pairs, the format of the readable twin."""
    entries_of = {}
    successors, weights = table.successors.tolist(), table.weights.tolist()
    for t1 in range(len(table.starts) - 1):
        for pair in range(table.starts[t1], table.starts[t1 + 1]):
            first, last = table.offsets[pair], table.offsets[pair + 1]
            entries = zip(successors[first:last], weights[first:last], strict=True)
            entries_of[t1, int(table.seconds[pair])] = list(entries)
    return entries_of


def time_drafts(table: Table, text: list[int], places: list[int], **given: Any) -> dict[str, float]:
    """Return medians over places: a whole proposal, its search alone, and the twin's at some places."""
    tri = TrigramTree("tri", TrigramTreeSettings(**given), table)
    s = tri.settings
    compiled, learned = TreeSearch(table, s), Learned(s.max_pairs)
    rule = kernels.Rule(kernels.COUNTS, s.update_step, s.update_cap, s.decay, s.prior)
    twin = ReferenceStatistics(as_dictionary(table), rule, s.max_pairs)
    search = {"mcts": kernels.MCTS, "greedy": kernels.GREEDY, "full": kernels.FULL}[s.search]
    row = SimpleRow(text[: places[0]], places[0])
    tri.start([row])
    whole, alone, twins, nodes = [], [], [], []
    before = 2
    for place in places:
        row.tokens = here = text[:place]
        tri.propose([row], [s.depth])  # learns what is new, so that the runs below do not
        compiled.learn(learned, here[before - 2 :])
        whole.append(time_fastest(lambda: tri.propose([row], [s.depth])))
        alone.append(time_fastest(lambda h=here: compiled.draft(learned, h, s.depth)))
        tokens, parents = compiled.draft(learned, here, s.depth)
        nodes.append(len(tokens))
        if len(twins) < TWIN_PLACES:
            twin.learn(text, before, place)
            ends, most = (text[place - 2], text[place - 1]), s.num_draft_tokens
            arguments = (search, s.depth, s.iterations, s.paths, most, ends, s.seed, place)
            assert reference_tree(twin, (s.c1, s.c2), *arguments) == (tokens, parents)
            twins.append(time_fastest(lambda a=arguments: reference_tree(twin, (s.c1, s.c2), *a)))
        before = place
    return {
        "nodes": median(nodes),
        "milliseconds": 1e3 * median(whole),
        "slowest_milliseconds": 1e3 * max(whole),
        "search_milliseconds": 1e3 * median(alone),
        "twin_milliseconds": 1e3 * median(twins),
        "twin_over_compiled": median(b / a for a, b in zip(alone, twins, strict=False)),
    }


def time_learning(table: Table, text: list[int]) -> float:
    """Return tokens learned per second of CPU time, from an empty overlay."""
    tri = TrigramTree("tri", TrigramTreeSettings(max_pairs=1 << 20), table)
    row = SimpleRow(text, len(text))

    def work() -> None:
        tri.start([row])
        tri.prepare(row, len(text))

    return len(text) / time_fastest(work)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Build the table and measure drafts and learning."""
    config = configured(options.config).model_copy(update={"drafters": {}})
    tokenizer = load_tokenizer(config.target)
    files = installed_source(int((options.text_mb + 1.0) * 1e6), set())
    held_out, corpus = files[:4], files[4:]
    source = "\n".join(path.read_text(encoding="utf-8") for path in held_out)
    text = tokenizer(source, verbose=False)["input_ids"]
    places = [200 + 23 * k for k in range(options.places) if 200 + 23 * k < len(text)]
    with tempfile.TemporaryDirectory() as folder, show_progress() as report:
        out = Path(folder, "table")
        began = perf_counter()
        facts = build_trigrams(config, out, corpus, on_progress=report)
        built = perf_counter() - began
        began = perf_counter()
        table, _ = load_table(out)
        loaded = perf_counter() - began
        drafts = {}
        for number, (search, budget) in enumerate((s, b) for s in SEARCHES for b in BUDGETS):
            given = {"search": search, "num_draft_tokens": budget, "depth": 4}
            drafts[f"{search} {budget}"] = time_drafts(table, text, places, **given)
            report("drafts", number + 1, len(SEARCHES) * len(BUDGETS))
        return {
            "circumstances": circumstances(),
            "places": len(places),
            "drafts": drafts,
            "learned_tokens_per_second": time_learning(table, text),
            "table": {
                "tokens": facts.num_tokens,
                "pairs": facts.num_pairs,
                "trigrams": facts.num_trigrams,
                "megabytes": out.stat().st_size / 1e6,
                "build_seconds": built,
                "load_seconds": loaded,
            },
        }


def markdown(result: dict[str, Any]) -> str:
    """Return the page."""
    facts, built = result["circumstances"], result["table"]
    lines = [
        "# Tri-gram trees: the cost of a draft",
        "",
        f"{facts['cpu']}, CPU time of one thread, 150 iterations, depth 4, median over "
        f"{result['places']} places, commit {facts['commit']}, {facts['date']}.",
        "",
        *table(
            ({"name": name, **draft} for name, draft in result["drafts"].items()),
            {
                "search, maximum nodes": "{name}",
                "nodes": "{nodes:.0f}",
                "proposal, ms": "{milliseconds:.3f}",
                "slowest, ms": "{slowest_milliseconds:.3f}",
                "search alone, ms": "{search_milliseconds:.3f}",
                "twin, ms": "{twin_milliseconds:.2f}",
                "twin over search": "{twin_over_compiled:.0f}x",
            },
        ),
        "",
        f"Learning: {result['learned_tokens_per_second'] / 1e6:.1f} M tokens per second. The table: "
        f"{built['tokens'] / 1e6:.2f} M tokens read, {built['pairs']:,} pairs, "
        f"{built['megabytes']:.1f} MB, built in {built['build_seconds']:.1f} s, mapped in "
        f"{1e3 * built['load_seconds']:.1f} ms.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the results."""
    parser = make_parser(__doc__)
    parser.set_defaults(threads=1)
    parser.add_argument("--config", type=Path, default=Path("paceline.yaml"))
    parser.add_argument("--text-mb", type=float, default=4.0)
    parser.add_argument("--places", type=int, default=100)
    options = parse(parser)
    result = measure(options)
    save(options.out, "trigram", markdown(result), result)


if __name__ == "__main__":
    main()
