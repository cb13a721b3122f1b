"""What tri-gram trees gain, and by which of their parts: an ablation after ADED (arXiv 2407.12021).

Arms differ in search, node budget, update rule and what the statistics start from; prompt lookup
stands beside them, and retrieval from the same texts in the manner of REST (arXiv 2311.08252). Every arm
is replayed on the target's own answers and priced with a cost table measured here; some are decoded by
the clock too. Sampled texts are drawn with a seed's own noise, so that in float32 they are the same for
every arm.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from paceline.assembly import Pace, build
from paceline.bench.circumstances import circumstances
from paceline.bench.timed import TimedPrompt, num_equal_outputs, select, time_interleaved
from paceline.bench.timed import tokens_per_second as speed_of
from paceline.config import DrafterSection, PathsSection
from paceline.contracts import NONE
from paceline.drafting.shared_text import SharedText
from paceline.drafting.suffix_lookup import SuffixLookup, SuffixLookupSettings
from paceline.drafting.trigram.corpora import TextFiles
from paceline.experiments.demo_prompts import (
    PACKAGES,
    demo_prompts,
    harvest_functions,
    package_folder,
)
from paceline.replay.rounds import max_output, replay
from paceline.rewards import request_seconds
from paceline.store.collection import open_trajectories, read_trajectories
from paceline.verbs.pipeline import collect, profile
from paceline.verbs.trigrams import build_trigrams

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np

    from paceline.bench.timed import Timing
    from paceline.config import Config
    from paceline.contracts import Completion
    from paceline.costs.table import CostTable
    from paceline.models.vocabulary import Tokenizer

    OnProgress = Callable[[str, int, int], None]

TEMPERATURES: Final = (0.0, 0.8)
STARTS: Final = ("text", "own", "both")  # what tables are built from, beside none at all
SEARCHES: Final = ("mcts", "greedy", "full")
BUDGETS: Final = (4, 8, 16, 32, 64)
DEPTHS: Final = (2, 4, 8)  # beside the default
RETRIEVED: Final = (
    "text",
    "own",
)  # what the retrieving arms look in, beside the request's own text
LOOKUP: Final = "lookup"
ALL_TASKS: Final = "all"
_BUDGET: Final = 8  # what replay finds best on a CPU
_RETRIEVED: Final = 16  # most tokens of a retrieving arm; its matches decide how many it drafts


@dataclass(frozen=True, slots=True)
class Arm:
    """One variant. `start` names the table, "empty" for none; `clocked` ones are decoded too."""

    name: str
    start: str
    settings: dict[str, Any]
    clocked: bool = False


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything."""

    timed_per_task: int = 4
    collect_per_task: int = 40
    max_new_tokens: int = 96
    text_mb: float = 8.0
    repeats: int = 1


@dataclass(slots=True)
class Measured:
    """One arm at one temperature; by task, and over all of them under "all"."""

    tau: dict[str, float]  # tokens a target forward, by replay
    drafted: float  # nodes a round, by replay
    predicted: dict[str, float]  # speed over none, by replay and cost table
    clocked: dict[str, float] = field(default_factory=dict)  # speed over none, by the clock
    tokens_per_second: float = 0.0
    draft_ms: float = 0.0  # of a round, by the clock, learning included
    equal_texts: int = 0


@dataclass(slots=True)
class AdedResult:
    circumstances: dict[str, str | int]
    settings: dict[str, Any]
    tables: dict[str, dict[str, float]]  # start -> tokens, pairs, megabytes, seconds to build
    arms: list[Arm]
    measured: dict[str, dict[str, Measured]]  # temperature -> arm


def arms() -> list[Arm]:
    """All variants. Where nothing else is varied: the default search and depth, 8 nodes, `counts`,
    and a table of both kinds of text.
    """
    found = [
        Arm(
            f"{search} {budget}",
            "both",
            {"search": search, "num_draft_tokens": budget},
            budget == _BUDGET or budget == 64,
        )
        for search in SEARCHES
        for budget in BUDGETS
    ]
    found += [
        Arm(f"depth {depth}", "both", {"depth": depth, "num_draft_tokens": _BUDGET})
        for depth in DEPTHS
    ]
    for start in ("empty", "text", "own", "both"):
        for update in ("none", "released", "counts"):
            if (start, update) in (("empty", "none"), ("both", "counts")):
                continue  # no statistics at all; or among the budgets
            name = f"{start}, {update}"
            clocked = update == "counts" or start == "both"
            settings = {"update": update, "num_draft_tokens": _BUDGET}
            found.append(Arm(name, start, settings, clocked))
    return [*found, Arm("released preset", "both", {"preset": "released"}, True)]


def run(
    config: Config,
    folder: Path,
    sizes: Sizes,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> AdedResult:
    """The whole experiment with the configuration's target; tables and answers go into `folder`."""
    config = config.model_copy(
        update={
            "drafters": {},
            "paths": PathsSection(store=folder / "collection"),
            # every arm decodes the same prompts, and each must pay for its own prefill
            "engine": config.engine.model_copy(update={"prefix_positions": 0}),
        }
    )
    collected, timed = demo_prompts(sizes.collect_per_task, sizes.timed_per_task)
    collect(config, collected, sizes.max_new_tokens, on_progress=on_progress)
    text = _text_files(sizes)
    tables = _tables(config, folder, text, on_progress)
    variants = arms()
    parts = build(config.model_copy(update={"drafters": _sections(variants, folder)}))
    parts.drafters.update(_retrieving(config, text, parts.tokenizer))
    pace = Pace(parts)
    costs = profile(pace, on_progress)
    prompts = [
        TimedPrompt(p.id, p.domain, tuple(pace.encode([{"role": "user", "content": p.prompt}])))
        for p in timed
    ]
    retrieving = [retrieval(start) for start in RETRIEVED]
    clocked = [NONE, *(arm.name for arm in variants if arm.clocked), LOOKUP, *retrieving]
    measured = {}
    for temperature in TEMPERATURES:
        recorder = _Recorder(pace, temperature, sizes.max_new_tokens)
        timings = _by_the_clock(recorder, clocked, prompts, sizes, on_progress)
        found = _by_replay(pace, costs, prompts, select(timings, NONE), sizes.max_new_tokens)
        for name in clocked:
            _add_clock(found[name], name, timings, recorder)
        measured[str(temperature)] = found
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


def _sections(variants: Sequence[Arm], folder: Path) -> dict[str, DrafterSection]:
    sections = {}
    for arm in variants:
        table = {} if arm.start == "empty" else {"table": str(folder / f"{arm.start}.table")}
        sections[arm.name] = DrafterSection(kind="trigram_tree", settings={**arm.settings, **table})
    sections[LOOKUP] = DrafterSection(kind="prompt_lookup", settings={"num_draft_tokens": 12})
    return sections


# --- what the statistics start from ---------------------------------------------------------------


def _text_files(sizes: Sizes) -> list[Path]:
    num_harvested = sizes.collect_per_task + sizes.timed_per_task
    prompted = {function.path for function in harvest_functions(num_harvested)}
    return installed_source(int(sizes.text_mb * 1e6), prompted)


def _tables(
    config: Config, folder: Path, text: Sequence[Path], on_progress: OnProgress
) -> dict[str, dict[str, float]]:
    found = {}
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
        found[start] = {
            "tokens": facts.num_tokens,
            "pairs": facts.num_pairs,
            "megabytes": out.stat().st_size / 1e6,
            "seconds": perf_counter() - began,
        }
    return found


def retrieval(start: str) -> str:
    """The name of the arm that looks in the text a table starts from."""
    return f"retrieval, {start}"


class _Corpus(SharedText):
    """Texts that were there before; the answers of requests do not join them."""

    def __init__(self, texts: Sequence[Sequence[int]], max_match: int) -> None:
        # an index is half of the room, and every text has an end
        super().__init__(max_match, 2 * (sum(map(len, texts)) + len(texts)))
        for text in texts:
            super().add(text)

    def add(self, tokens: Sequence[int]) -> None:
        pass


def _retrieving(
    config: Config, text: Sequence[Path], tokenizer: Tokenizer
) -> dict[str, SuffixLookup]:
    """Suffix lookup in the request's own text and, where that promises more, in a corpus."""
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
    """Python files of installed packages, each package in turn, those of the prompts left out."""
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


class _Recorder:
    """Runs an arm at one temperature and keeps its completions."""

    def __init__(self, pace: Pace, temperature: float, max_new_tokens: int) -> None:
        self._pace = pace
        self.temperature = temperature
        self._settings: dict[str, Any] = {
            "temperature": temperature,
            "max_new_tokens": max_new_tokens,
            "seed": 1,
            "generation_config": "none",
        }
        self.completions: dict[str, list[Completion]] = {}

    def method(self, name: str) -> Callable[[Sequence[int]], Sequence[int]]:
        def run_one(tokens: Sequence[int]) -> Sequence[int]:
            done = self._pace.complete(list(tokens), drafter=name, **self._settings)  # type: ignore[arg-type]
            self.completions.setdefault(name, []).append(done)
            return done.token_ids

        return run_one


def _by_the_clock(
    recorder: _Recorder,
    names: Sequence[str],
    prompts: Sequence[TimedPrompt],
    sizes: Sizes,
    on_progress: OnProgress,
) -> list[Timing]:
    done, total = 0, len(names) * len(prompts) * sizes.repeats
    stage = f"decode at temperature {recorder.temperature}"

    def on_run() -> None:
        nonlocal done
        done += 1
        on_progress(stage, done, total)

    methods = {name: recorder.method(name) for name in names}
    return time_interleaved(methods, prompts, sizes.repeats, on_run=on_run)


def _by_replay(
    pace: Pace,
    costs: CostTable,
    prompts: Sequence[TimedPrompt],
    plain: Sequence[Timing],
    max_new_tokens: int,
) -> dict[str, Measured]:
    """Every arm along plain decoding's texts."""
    context = pace.parts.target.context_length
    texts = {timing.prompt: timing.output_tokens for timing in plain}
    found = {}
    seconds_of_none: dict[str, float] = {}
    for name, drafter in pace.parts.drafters.items():
        rounds = {
            p.id: replay(
                drafter,
                p.tokens,
                texts[p.id],
                max_output(max_new_tokens, len(p.tokens), context),
            ).rounds
            for p in prompts
        }
        priced = {
            p.id: request_seconds(costs.seconds, name, len(p.tokens), rounds[p.id]) for p in prompts
        }
        seconds_of_none = seconds_of_none or priced  # `none` is the first
        found[name] = _measured(prompts, rounds, priced, seconds_of_none)
    return found


def _measured(
    prompts: Sequence[TimedPrompt],
    rounds: Mapping[str, np.ndarray],
    priced: Mapping[str, float],
    seconds_of_none: Mapping[str, float],
) -> Measured:
    tau, predicted = {}, {}
    for task in (*dict.fromkeys(p.domain for p in prompts), ALL_TASKS):
        own = [p.id for p in prompts if task in (p.domain, ALL_TASKS)]
        num_rounds = sum(len(rounds[id]) for id in own)
        tau[task] = 1.0 + sum(int(rounds[id][:, 1].sum()) for id in own) / max(1, num_rounds)
        predicted[task] = sum(seconds_of_none[id] for id in own) / sum(priced[id] for id in own)
    num_all = sum(len(r) for r in rounds.values())
    drafted = sum(int(r[:, 0].sum()) for r in rounds.values()) / max(1, num_all)
    return Measured(tau, drafted, predicted)


def _add_clock(
    measured: Measured, name: str, timings: Sequence[Timing], recorder: _Recorder
) -> None:
    own = select(timings, name)
    for task in measured.tau:
        domain = None if task == ALL_TASKS else task
        plain = speed_of(select(timings, NONE, domain))
        measured.clocked[task] = speed_of(select(own, domain=domain)) / plain
    measured.tokens_per_second = speed_of(own)
    done = recorder.completions[name]
    num_rounds = sum(len(completion.rounds) for completion in done)
    drafting = sum(completion.seconds.draft for completion in done)
    measured.draft_ms = 1e3 * drafting / max(1, num_rounds)
    measured.equal_texts = num_equal_outputs(timings, name, NONE)
