"""Measures the cost table: every piece of work several times, in turn, the median of each kept.

All sittings are repeated one after the other in changing order, so that drift of the machine hits
every cell alike. What is measured is in `sittings.py`; here is how often, and what is kept.
"""

from __future__ import annotations

import random
from collections import defaultdict
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Final

import torch

from paceline.assembly import Pace, Parts
from paceline.bench.circumstances import cpu_capability, cpu_model
from paceline.bench.sittings import Grid, all_sittings, cached_rows
from paceline.contracts import identity_of_arms
from paceline.costs.table import PROPOSE, CostTable, Measurement
from paceline.models.language_model import LanguageModel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from paceline.bench.sittings import Cell, Sitting

    Progress = Callable[[str, int, int], None]

BUDGET: Final = 10.0  # seconds
_FEWEST: Final = 3  # repeats of everything, so that one interruption is not in the median
_FEWEST_OF_CHEAP, _MOST = 4, 20


def measure_cost_table(
    source: Parts | Pace,
    on_progress: Progress = lambda stage, done, total: None,
    budget: float | None = None,
) -> CostTable:
    """Measure target and drafters on this machine.

    budget: seconds to spend, BUDGET by default; three repeats are made however slow the models are,
    and more of the cheap work, which is the noisier. on_progress(stage, done, total) counts sittings.
    """
    parts = source.parts if isinstance(source, Pace) else source
    grid = Grid.of(parts)
    order = random.Random(0)
    found: dict[Cell, list[float]] = defaultdict(list)
    with torch.inference_mode(), cached_rows(parts, grid) as rows:
        sittings = all_sittings(parts, grid, rows)
        total = (1 + _FEWEST) * len(sittings)
        took: list[float] = []
        for number, sitting in enumerate(sittings, start=1):
            began = perf_counter()
            sitting(0, order)  # warms up, and tells what a repeat takes
            took.append(perf_counter() - began)
            on_progress("profile", number, total)
        turns = _turns(sittings, took, BUDGET if budget is None else budget, order)
        for number, (repeat, sitting) in enumerate(turns, start=len(sittings) + 1):
            for cell, seconds in sitting(repeat, order):
                found[cell].append(seconds)
            on_progress("profile", number, len(sittings) + len(turns))
    measured = [Measurement(*cell, seconds=median(times)) for cell, times in found.items()]
    return CostTable(_fingerprint(parts), sorted(_plausible(measured), key=_by_place))


def _turns(
    sittings: Sequence[Sitting], took: Sequence[float], budget: float, order: random.Random
) -> list[tuple[int, Sitting]]:
    """(repeat, sitting) in the order of running: all of them at first, then those below average."""
    mean = sum(took) / len(took)
    cheap = [sitting for sitting, seconds in zip(sittings, took, strict=True) if seconds <= mean]
    left = budget - (1 + _FEWEST) * sum(took)
    of_cheap = sum(seconds for seconds in took if seconds <= mean)
    num_cheap = min(max(_FEWEST + int(left / of_cheap), _FEWEST_OF_CHEAP), _MOST)
    turns: list[tuple[int, Sitting]] = []
    for repeat in range(num_cheap):
        chosen = list(sittings if repeat < _FEWEST else cheap)
        order.shuffle(chosen)
        turns += [(repeat, sitting) for sitting in chosen]
    return turns


def _plausible(measured: Sequence[Measurement]) -> list[Measurement]:
    """Without contexts at which an arm never drafted though it does elsewhere.

    They lie beyond a short drafter's own context; the table must not take a refusal for a price.
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


def _by_place(m: Measurement) -> tuple[str, str, int, int, int]:
    return (m.subject, m.operation, m.rows, m.context, m.tokens)


def _fingerprint(parts: Parts) -> dict[str, str]:
    """On what and of what a table is measured, one comparable line an entry."""
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
    }
