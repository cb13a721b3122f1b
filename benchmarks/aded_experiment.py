"""Gains of tri-gram trees and of their parts: an ablation after ADED (arXiv 2407.12021).

Arms differ in search, node budget, update rule and initial statistics. They are compared with prompt
lookup and with retrieval from the same texts in the manner of REST (arXiv 2311.08252). Every arm is
replayed on the target's own answers and priced with a cost table measured here; some are also decoded
by the clock. Sampled texts are drawn with the noise of a seed, so in float32 they are the same for
every arm.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from paceline.assembly import Pace, build
from paceline.bench.circumstances import circumstances
from paceline.bench.timed import num_equal_outputs, select, tokens_per_second
from paceline.config import DrafterSection
from paceline.contracts import NONE, no_progress
from paceline.drafting.suffix_lookup import SharedText, SuffixLookup, SuffixLookupSettings
from paceline.drafting.trigram.corpora import TextFiles
from paceline.experiments.by_clock import (
    RecordingMethods,
    encode_prompts,
    replay_arm,
    time_methods,
    without_prefixes,
)
from paceline.experiments.demo_prompts import (
    PACKAGES,
    demo_prompts,
    harvest_functions,
    package_folder,
)
from paceline.rewards import request_seconds
from paceline.store.collection import open_trajectories, read_trajectories
from paceline.verbs.pipeline import collect, in_folder, profile
from paceline.verbs.trigrams import build_trigrams

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from paceline.bench.timed import TimedPrompt, Timing
    from paceline.config import Config
    from paceline.contracts import Progress
    from paceline.costs.table import CostTable
    from paceline.models.vocabulary import Tokenizer

TEMPERATURES: Final = (0.0, 0.8)
STARTS: Final = ("text", "own", "both")  # sources of the tables; "empty" is no table
SEARCHES: Final = ("mcts", "greedy", "full")
BUDGETS: Final = (4, 8, 16, 32, 64)
DEPTHS: Final = (2, 4, 8)  # in addition to the default
RETRIEVED: Final = ("text", "own")  # corpora of the retrieving arms
LOOKUP: Final = "lookup"
ALL_TASKS: Final = "all"
_BUDGET: Final = 8  # the best budget on a CPU, by replay
_RETRIEVED: Final = 16  # maximum draft length of a retrieving arm; its matches decide the length


@dataclass(frozen=True, slots=True)
class TrigramArm:
    """One variant. `start` names its table, "empty" for none; `clocked` variants are also decoded."""

    name: str
    start: str
    settings: dict[str, Any]
    clocked: bool = False


@dataclass(frozen=True, slots=True)
class AdedSizes:
    """Numbers of prompts, tokens, megabytes of text and repeats."""

    timed_per_task: int = 4
    collect_per_task: int = 40
    max_new_tokens: int = 96
    text_mb: float = 8.0
    repeats: int = 1


@dataclass(slots=True)
class ArmFigures:
    """The figures of one arm at one temperature; by task, and over all tasks under "all"."""

    tau: dict[str, float]  # tokens per target forward, by replay
    drafted: float  # nodes per round, by replay
    predicted: dict[str, float]  # speed over none, by replay and cost table
    clocked: dict[str, float] = field(default_factory=dict)  # speed over none, by the clock
    tokens_per_second: float = 0.0
    draft_ms: float = 0.0  # per round, by the clock, learning included
    equal_texts: int = 0


@dataclass(slots=True)
class AdedResult:
    """The figures of all arms, and the circumstances in which they were measured."""

    circumstances: dict[str, str | int]
    settings: dict[str, Any]
    tables: dict[str, dict[str, float]]  # start -> tokens, pairs, megabytes, seconds to build
    arms: list[TrigramArm]
    measured: dict[str, dict[str, ArmFigures]]  # temperature -> arm -> figures


def all_arms() -> list[TrigramArm]:
    """Return all variants.

    The default search and depth, 8 nodes, `counts` and a table of both kinds of text hold for each
    setting that a variant does not change.
    """
    arms = [
        TrigramArm(
            f"{search} {budget}",
            "both",
            {"search": search, "num_draft_tokens": budget},
            budget in (_BUDGET, 64),
        )
        for search in SEARCHES
        for budget in BUDGETS
    ]
    arms += [
        TrigramArm(f"depth {depth}", "both", {"depth": depth, "num_draft_tokens": _BUDGET})
        for depth in DEPTHS
    ]
    for start in ("empty", *STARTS):
        for update in ("none", "released", "counts"):
            if (start, update) in (("empty", "none"), ("both", "counts")):
                continue  # no statistics at all; or among the budgets
            clocked = update == "counts" or start == "both"
            settings = {"update": update, "num_draft_tokens": _BUDGET}
            arms.append(TrigramArm(f"{start}, {update}", start, settings, clocked))
    # not shared as in the released code: every text is decoded several times
    released = {"preset": "released", "share": False}
    return [*arms, TrigramArm("released preset", "both", released, True)]


def run(
    config: Config, folder: Path, sizes: AdedSizes, on_progress: Progress = no_progress
) -> AdedResult:
    """Run the experiment with the configuration's target; tables and answers go into `folder`."""
    config = in_folder(without_prefixes(config.model_copy(update={"drafters": {}})), folder)
    collected, timed = demo_prompts(sizes.collect_per_task, sizes.timed_per_task)
    collect(config, collected, sizes.max_new_tokens, on_progress=on_progress)
    text = _text_files(sizes)
    tables = _tables(config, folder, text, on_progress)
    variants = all_arms()
    parts = build(config.model_copy(update={"drafters": _sections(variants, folder)}))
    parts.drafters.update(_retrieving(config, text, parts.tokenizer))
    pace = Pace(parts)
    costs = profile(pace, on_progress)
    prompts = encode_prompts(pace, timed)
    retrieving = [retrieval(start) for start in RETRIEVED]
    clocked = [NONE, *(arm.name for arm in variants if arm.clocked), LOOKUP, *retrieving]
    measured = {}
    for temperature in TEMPERATURES:
        recorder = RecordingMethods(
            pace, temperature=temperature, max_new_tokens=sizes.max_new_tokens, seed=1
        )
        methods = {name: recorder.method(name) for name in clocked}
        stage = f"decode at temperature {temperature}"
        timings = time_methods(methods, prompts, sizes.repeats, stage, on_progress)
        figures = _by_replay(pace, costs, prompts, select(timings, NONE), sizes.max_new_tokens)
        for name in clocked:
            _add_clock(figures[name], name, timings, recorder, prompts)
        measured[str(temperature)] = figures
    return AdedResult(
        circumstances(),
        {
            "dtype": str(pace.parts.target.dtype).removeprefix("torch."),
            "prompts": len(prompts),
            "collected_prompts": len(collected),
            "max_new_tokens": sizes.max_new_tokens,
            "repeats": sizes.repeats,
        },
        tables,
        variants,
        measured,
    )


def _sections(variants: Sequence[TrigramArm], folder: Path) -> dict[str, DrafterSection]:
    sections = {}
    for arm in variants:
        table = {} if arm.start == "empty" else {"table": str(folder / f"{arm.start}.table")}
        sections[arm.name] = DrafterSection(kind="trigram_tree", settings={**arm.settings, **table})
    sections[LOOKUP] = DrafterSection(kind="prompt_lookup", settings={"num_draft_tokens": 12})
    return sections


# --- initial statistics ---------------------------------------------------------------------------


def _text_files(sizes: AdedSizes) -> list[Path]:
    num_harvested = sizes.collect_per_task + sizes.timed_per_task
    prompted = {function.path for function in harvest_functions(num_harvested)}
    return installed_source(int(sizes.text_mb * 1e6), prompted)


def _tables(
    config: Config, folder: Path, text: Sequence[Path], on_progress: Progress
) -> dict[str, dict[str, float]]:
    tables = {}
    for start in STARTS:
        out = folder / f"{start}.table"
        began = perf_counter()
        facts = build_trigrams(
            config,
            out,
            [] if start == "own" else text,
            start != "text",
            on_progress=lambda stage, done, total, start=start: on_progress(  # type: ignore[misc]
                f"table of {start}: {stage}", done, total
            ),
        )
        tables[start] = {
            "tokens": facts.num_tokens,
            "pairs": facts.num_pairs,
            "megabytes": out.stat().st_size / 1e6,
            "seconds": perf_counter() - began,
        }
    return tables


def retrieval(start: str) -> str:
    """Return the name of the arm that looks in the text of a table."""
    return f"retrieval, {start}"


class _Corpus(SharedText):
    """Texts that are given at the start; the answers of requests are not added."""

    def __init__(self, texts: Sequence[Sequence[int]], max_match: int) -> None:
        # an index takes half of the memory, and every text has an end
        super().__init__(max_match, 2 * (sum(map(len, texts)) + len(texts)))
        for text in texts:
            super().add(text)

    def add(self, tokens: Sequence[int]) -> None:
        """Ignore the answer of a request."""


def _retrieving(
    config: Config, text: Sequence[Path], tokenizer: Tokenizer
) -> dict[str, SuffixLookup]:
    """Return drafters that look in the request's own text and, where that promises more, in a corpus."""
    settings = SuffixLookupSettings(num_draft_tokens=_RETRIEVED, share=True)
    files = TextFiles(text, tokenizer)
    texts = {
        "text": files.tokens([piece for piece, _ in files.pieces()]),
        "own": [t.output_tokens for t in read_trajectories(open_trajectories(config.paths.store))],
    }
    return {
        retrieval(start): SuffixLookup(
            retrieval(start), settings, _Corpus(texts[start], settings.max_match)
        )
        for start in RETRIEVED
    }


def installed_source(most_bytes: int, without: set[Path]) -> list[Path]:
    """Return Python files of installed packages, each package in turn, but for those in `without`."""
    streams = []
    for name in PACKAGES:
        root = package_folder(name)
        if root is not None:
            streams.append(sorted(path for path in root.rglob("*.py") if path not in without))
    chosen: list[Path] = []
    num_bytes = 0
    for turn in range(max(map(len, streams), default=0)):
        for stream in streams:
            if turn < len(stream) and num_bytes < most_bytes:
                try:
                    num_bytes += len(stream[turn].read_text(encoding="utf-8").encode())
                except (OSError, UnicodeDecodeError):
                    continue
                chosen.append(stream[turn])
    return chosen


# --- measuring ------------------------------------------------------------------------------------


def _by_replay(
    pace: Pace,
    costs: CostTable,
    prompts: Sequence[TimedPrompt],
    plain: Sequence[Timing],
    max_new_tokens: int,
) -> dict[str, ArmFigures]:
    """Return the figures of every arm along the texts of plain decoding."""
    texts = {timing.prompt: timing.output_tokens for timing in plain}
    rounds = {
        name: {
            p.id: replay_arm(pace, name, p.tokens, texts[p.id], max_new_tokens).table
            for p in prompts
        }
        for name in pace.parts.drafters
    }
    seconds = {
        name: {
            p.id: request_seconds(costs.seconds, name, len(p.tokens), of_arm[p.id]) for p in prompts
        }
        for name, of_arm in rounds.items()
    }
    return {
        name: _figures(prompts, of_arm, seconds[name], seconds[NONE])
        for name, of_arm in rounds.items()
    }


def _figures(
    prompts: Sequence[TimedPrompt],
    rounds: Mapping[str, np.ndarray],
    seconds: Mapping[str, float],
    seconds_of_none: Mapping[str, float],
) -> ArmFigures:
    tau, predicted = {}, {}
    for task in (*dict.fromkeys(p.domain for p in prompts), ALL_TASKS):
        own = [p.id for p in prompts if task in (p.domain, ALL_TASKS)]
        num_rounds = sum(len(rounds[id]) for id in own)
        tau[task] = 1.0 + sum(int(rounds[id][:, 1].sum()) for id in own) / max(1, num_rounds)
        predicted[task] = sum(seconds_of_none[id] for id in own) / sum(seconds[id] for id in own)
    num_all = sum(len(r) for r in rounds.values())
    drafted = sum(int(r[:, 0].sum()) for r in rounds.values()) / max(1, num_all)
    return ArmFigures(tau, drafted, predicted)


def _add_clock(
    figures: ArmFigures,
    name: str,
    timings: Sequence[Timing],
    recorder: RecordingMethods,
    prompts: Sequence[TimedPrompt],
) -> None:
    """Add the clocked figures of an arm."""
    own = select(timings, name)
    for task in figures.tau:
        domain = None if task == ALL_TASKS else task
        plain = tokens_per_second(select(timings, NONE, domain))
        figures.clocked[task] = tokens_per_second(select(own, domain=domain)) / plain
    figures.tokens_per_second = tokens_per_second(own)
    completions = recorder.of(name, prompts)
    num_rounds = sum(len(completion.rounds) for completion in completions)
    drafting = sum(completion.seconds.draft for completion in completions)
    figures.draft_ms = 1e3 * drafting / max(1, num_rounds)
    figures.equal_texts = num_equal_outputs(timings, name, NONE)
