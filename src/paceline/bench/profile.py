"""Measurement of the cost table: every workload several times, the median of each cell kept.

All workloads are repeated one after the other in changing order, so that drift of the machine affects
every cell alike. The workloads themselves are in `cost_measurement`.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Final

import torch

from paceline.assembly import Pace, Parts
from paceline.bench.circumstances import cpu_capability, cpu_model
from paceline.bench.cost_measurement import (
    ROUNDS_PER_LENGTH,
    SLOWDOWN,
    plain_driver,
    time_drafts,
    time_forwards,
    time_prefill,
    time_rounds,
)
from paceline.bench.measured_rows import cached_rows
from paceline.contracts import NONE, identity_of_arms, no_progress
from paceline.costs.table import FORWARD, PROPOSE, TARGET, CostTable, Measurement
from paceline.models.language_model import LanguageModel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from paceline.bench.cost_measurement import Cell, Workload
    from paceline.contracts import Progress
    from paceline.engine.rows import Row

BUDGET: Final = 10.0  # seconds
_FEWEST: Final = 3  # repeats of every workload, so that one interruption is not in the median
_FEWEST_OF_CHEAP, _MOST = 4, 20
_PLACE: Final = attrgetter("subject", "operation", "rows", "context", "tokens")

_PROMPTS: Final = (16, 64, 128, 256, 512)  # and the limit of the context
_LONGEST_PROMPT: Final = 1024  # longer ones follow from the table's last segment
_CONTEXTS: Final = (32, 128, 384, 768)
_WIDTHS: Final = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 17, 24, 33, 48, 65)
_DRAFTS: Final = (0, 1, 2, 4, 8, 16, 32, 64)
# batches are measured more coarsely: a packed forward costs by its tokens, whichever rows they are of
_ROWS: Final = (1, 2, 4, 8, 16)
_CONTEXT_OF_ROWS: Final = 384  # the longest at which a batch verifies
_DRAFTS_OF_ROWS: Final = (1, 4, 16)


def measure_cost_table(
    source: Parts | Pace,
    on_progress: Progress = no_progress,
    budget: float | None = None,
) -> CostTable:
    """Measure target and drafters on this machine and return their cost table.

    budget: seconds to spend, BUDGET by default. Every workload gets three repeats even where that
    takes longer; cheap workloads, which are noisier, get more. on_progress(stage, done, total)
    counts runs of workloads. Raises DrafterError if a drafter fails.
    """
    parts = source.parts if isinstance(source, Pace) else source
    grid = Grid.of(parts)
    with torch.inference_mode(), cached_rows(parts, grid.cached_lengths) as rows:
        cells = measure_cells(
            _all_workloads(parts, grid, rows),
            partial(on_progress, "profile"),
            BUDGET if budget is None else budget,
        )
    measured = _without_refusals(with_slower_verification(cells))
    return CostTable(fingerprint(parts), sorted(measured, key=_PLACE))


def measure_cells(
    workloads: Sequence[Workload],
    on_run: Callable[[int, int], None],
    budget: float = 0.0,
    fewest: int = _FEWEST,
) -> dict[Cell, float]:
    """Run workloads in turn and return the median seconds of each cell.

    fewest: repeats of each workload, after one that warms up; cheap workloads are repeated until the
    budget of seconds is spent. on_run(done, total) is called after each run.
    """
    order = random.Random(0)
    durations: list[float] = []
    for workload in workloads:
        began = perf_counter()
        workload(0, order)
        durations.append(perf_counter() - began)
        on_run(len(durations), (1 + fewest) * len(workloads))
    runs = _plan(workloads, durations, budget, fewest, order)
    times: dict[Cell, list[float]] = defaultdict(list)
    for number, (repeat, workload) in enumerate(runs, start=len(workloads) + 1):
        for cell, seconds in workload(repeat, order):
            times[cell].append(seconds)
        on_run(number, len(workloads) + len(runs))
    return {cell: median(seconds) for cell, seconds in times.items()}


def _plan(
    workloads: Sequence[Workload],
    durations: Sequence[float],
    budget: float,
    fewest: int,
    order: random.Random,
) -> list[tuple[int, Workload]]:
    """Return (repeat, workload) in the order of running: all at first, then those below average."""
    mean = sum(durations) / len(durations)
    cheap = [workload for workload, s in zip(workloads, durations, strict=True) if s <= mean]
    left = budget - (1 + fewest) * sum(durations)
    repeats = fewest + int(left / sum(s for s in durations if s <= mean))
    runs: list[tuple[int, Workload]] = []
    for repeat in range(min(max(repeats, fewest, _FEWEST_OF_CHEAP), _MOST)):
        chosen = list(workloads if repeat < fewest else cheap)
        order.shuffle(chosen)
        runs += [(repeat, workload) for workload in chosen]
    return runs


def with_slower_verification(cells: Mapping[Cell, float]) -> list[Measurement]:
    """Return the measurements, where a proposal's seconds include those that it adds to verification.

    After a drafter ran, less of the target is in the processor's caches than after a plain round. The
    ratio is the median over an arm's lengths and contexts, because single ones are noisy.
    Rounds with and without a draft, and of one row and of several, have ratios of their own.
    """
    measured, ratios = [], defaultdict(list)
    for (subject, operation, tokens, context, rows), value in cells.items():
        if operation == SLOWDOWN:
            ratios[subject, tokens > 0, rows > 1].append(value)
        else:
            measured.append(Measurement(subject, operation, tokens, context, rows, value))
    table = CostTable({}, measured)
    for i, m in enumerate(measured):
        if m.operation == PROPOSE:
            added = max(0.0, median(ratios[m.subject, m.tokens > 0, m.rows > 1]) - 1.0)
            alone = table.seconds(TARGET, FORWARD, 1 + m.rows * m.tokens, m.context, m.rows)
            measured[i] = replace(m, seconds=m.seconds + added * alone)
    return measured


def _without_refusals(measured: Sequence[Measurement]) -> list[Measurement]:
    """Return the measurements without contexts at which only this context stops an arm from drafting.

    Such contexts exceed a short drafter's own; the table must not take a refusal for a price.
    """
    longest: dict[str, int] = defaultdict(int)
    at_context: dict[tuple[str, int], int] = defaultdict(int)
    for m in measured:
        if m.operation == PROPOSE:
            longest[m.subject] = max(longest[m.subject], m.tokens)
            place = (m.subject, m.context)
            at_context[place] = max(at_context[place], m.tokens)
    return [
        m
        for m in measured
        if m.operation != PROPOSE or at_context[m.subject, m.context] or not longest[m.subject]
    ]


def fingerprint(parts: Parts) -> dict[str, str]:
    """Return the machine, the models and the drafters of a table, one comparable line per entry."""
    device = parts.target.device
    lines = identity_of_arms({name: d.identity() for name, d in parts.drafters.items()})
    models = {"target": parts.target}
    for name, drafter in parts.drafters.items():
        model = getattr(drafter, "model", None)
        if isinstance(model, LanguageModel):
            models[f"arm {name}"] = model
    return {
        "cpu": cpu_model(),
        "instruction sets": cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "target": parts.target.fingerprint(),
        **{f"arm {name}": line for name, line in lines.items()},
        **{f"dtype of {n}": str(m.dtype).removeprefix("torch.") for n, m in models.items()},
        **{f"forward of {name}": line for name, line in parts.forwards().items()},
    }


# --- what is measured -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Grid:
    """Prompts, contexts, widths and rows to measure, within the target's context and draft lengths."""

    prompts: list[int]
    contexts: list[int]
    widths: list[int]
    rows: list[int]
    contexts_of_rows: list[int]

    @classmethod
    def of(cls, parts: Parts) -> Grid:
        lengths = [drafter.num_draft_tokens for drafter in parts.drafters.values()]
        longest = max(lengths)
        widths = {w for w in _WIDTHS if w <= longest + 1} | {1 + k for k in lengths}
        context = parts.target.context_length
        # a workload's text grows by a token per round
        growth = ROUNDS_PER_LENGTH * (1 + len(_DRAFTS))
        room = context - longest - growth - 2
        contexts = [c for c in _CONTEXTS if c <= room] or [max(1, room)]
        limit = min(parts.target.max_prompt, _LONGEST_PROMPT)
        prompts = [n for n in _PROMPTS if n < limit] + [limit]
        of_rows = [c for c in contexts if c <= _CONTEXT_OF_ROWS]
        of_rows = sorted({of_rows[0], of_rows[-1]}) if of_rows else contexts[:1]
        engine = parts.config.engine
        most = engine.max_rows
        if engine.max_positions is not None:
            most = max(1, min(most, engine.max_positions // (max(contexts) + growth + longest + 1)))
        rows = sorted({r for r in _ROWS if r <= most} | {min(most, _ROWS[-1])})
        return cls(prompts, contexts, sorted(widths), rows, of_rows)

    @property
    def contexts_of_drafts(self) -> list[int]:
        """Contexts at which drafters start and propose: fewer than for the target, which costs more."""
        return sorted({*self.contexts[::2], self.contexts[-1]})

    @property
    def cached_lengths(self) -> list[int]:
        """Cached tokens of each row: the first row reaches the longest context."""
        return [max(self.contexts), *[max(self.contexts_of_rows)] * (self.rows[-1] - 1)]

    @property
    def shapes(self) -> list[list[int]]:
        """Drafted tokens by row, of batches in which no row drafts, one row does, or all alike."""
        longest = self.widths[-1] - 1
        lengths = sorted({min(length, longest) for length in _DRAFTS_OF_ROWS} - {0})
        shapes = []
        for num in self.rows[1:]:
            alone = [[lengths[-1], *[0] * (num - 1)]] if lengths else []
            shapes += [[0] * num, *alone, *([length] * num for length in lengths)]
        return shapes


def _all_workloads(parts: Parts, grid: Grid, rows: Sequence[Row]) -> list[Workload]:
    """Return every workload of a cost table. rows: those of `cached_rows`."""
    driver = plain_driver(parts, grid.rows[-1])
    arms = {name: drafter for name, drafter in parts.drafters.items() if name != NONE}
    alone = [[width - 1] for width in grid.widths]
    workloads: list[Workload] = []
    workloads += [partial(time_forwards, parts, rows, c, alone) for c in grid.contexts]
    workloads += [
        partial(time_forwards, parts, rows, c, grid.shapes) for c in grid.contexts_of_rows
    ]
    workloads += [partial(time_prefill, parts, driver, n) for n in grid.prompts]
    for arm, drafter in arms.items():
        longest = drafter.num_draft_tokens
        lengths = sorted({k for k in _DRAFTS if k <= longest} | {longest})
        one_row = partial(time_drafts, parts, arm, lengths, [1], rows)
        workloads += [partial(one_row, context) for context in grid.contexts_of_drafts]
        if more := grid.rows[1:]:
            ends = sorted({1, longest})
            workloads.append(partial(time_drafts, parts, arm, ends, more, rows, grid.contexts[0]))
    workloads += [partial(time_rounds, parts, driver, name, 1) for name in [NONE, *arms][:2]]
    workloads += [partial(time_rounds, parts, driver, NONE, num) for num in grid.rows[1:]]
    return workloads
