"""Milliseconds of a verification by number of tokens, for each precision, and of a plain read of memory.

    python benchmarks/forwards.py [--models zoo 0.3b] [--turns 15]

Forwards with the most likely id of every token, after CONTEXT cached tokens of a row; 512 tokens are a
prompt, of which the last one's id is wanted. All models are in memory and take turns; a figure is the
median over turns of the median of CALLS calls. Also further steps of the drafters' greedy chains.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any, Final

import torch
from result_pages import describe_run, page, save, table
from timed_setup import (
    SHAPE_03B,
    count_steps,
    load_zoo,
    make_parser,
    parse,
    random_llama,
    show_progress,
)

from paceline.config import ModelSection
from paceline.models.language_model import LanguageModel
from paceline.models.loading import load_language_model
from paceline.models.packing import Span

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONTEXT: Final = 200
WIDTHS: Final = (1, 2, 5, 8, 12, 16, 32, 64)
PROMPT: Final = 512
ROWS: Final = 8
PAUSE: Final = 0.1  # seconds in which torch's workers, which have just read, fall asleep
CALLS: Final = 5  # of a cell per turn
CHAIN: Final = 8  # steps over which a drafter's is averaged
READ_BYTES: Final = 2**30
PRECISIONS: Final = {"zoo": ("bfloat16", "int8", "float32"), "0.3b": ("bfloat16", "int8")}
DRAFTERS: Final = ("math", "general")  # a specialist and the one for all tasks


@dataclass
class Subject:
    """A model in one precision, with cached rows."""

    name: str
    model: LanguageModel
    slots: list[int]

    def works(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Yield the columns of the table and what is timed for them."""
        model, slots = self.model, self.slots
        for width in WIDTHS:
            yield (
                str(width),
                lambda w=width: model.score(
                    range(w), [Span(slots[0], CONTEXT, w)], wants_logits=False
                ),
            )
        spans = [Span(slot, CONTEXT, 1) for slot in slots]
        yield f"{ROWS} rows of 1", lambda: model.score(range(ROWS), spans, wants_logits=False)
        prompt = [i % CONTEXT for i in range(PROMPT)]
        yield str(PROMPT), lambda: model.logits_after(prompt, [Span(slots[1], 0, PROMPT)])


def subject(name: str, model: LanguageModel) -> Subject:
    """Return a model with ROWS rows of CONTEXT cached tokens."""
    slots = []
    for _ in range(ROWS):
        slots.append(model.acquire())
        model.forward(torch.arange(CONTEXT), [Span(slots[-1], 0, CONTEXT)])
    return Subject(name, model, slots)


def load(names: list[str]) -> Iterator[Subject]:
    """Load the models in every precision."""
    folder = load_zoo("bfloat16").target.model
    for name in names:
        for precision in PRECISIONS[name]:
            weights = "int8" if precision == "int8" else "own"
            dtype = "bfloat16" if precision == "int8" else precision
            if name == "zoo":
                section = ModelSection(model=folder, dtype=dtype, weights=weights)
                model = load_language_model(section, name)
            else:
                shape = {**SHAPE_03B, "vocab_size": 8192}
                llama = random_llama(shape, context=2048, tied=True).to(getattr(torch, dtype))
                model = LanguageModel(llama, name, weights=weights)
            yield subject(f"{name} {precision}", model)


def milliseconds(work: Callable[[], Any]) -> float:
    """Return the median milliseconds of CALLS calls, after one that brings the model into the caches."""
    work()
    spent = []
    for _ in range(CALLS):
        began = perf_counter()
        work()
        spent.append(perf_counter() - began)
    return 1e3 * median(spent)


def step(model: LanguageModel, slot: int) -> float:
    """Return the milliseconds of a further step of a greedy chain."""
    span, ids = Span(slot, CONTEXT, 1), model.num_logits
    one = milliseconds(lambda: model.draft_chain([0], [span], 1, ids))
    more = milliseconds(lambda: model.draft_chain([0], [span], 1 + CHAIN, ids))
    return (more - one) / CHAIN


def main() -> None:
    """Time all forwards and write the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--turns", type=int, default=15)
    options = parse(parser)
    config, buffer = load_zoo("bfloat16"), torch.ones(READ_BYTES // 4)
    drafters = {
        name: subject(
            name,
            load_language_model(ModelSection(model=config.drafters[name].settings["model"]), name),
        )
        for name in DRAFTERS
    }
    spent: dict[tuple[str, str], list[float]] = {}
    with torch.inference_mode(), show_progress() as report:
        subjects = list(load(options.models))
        advance = count_steps(report, "turns", options.turns + 1)
        for turn in range(options.turns + 1):
            found = {("read", ""): milliseconds(buffer.sum)}
            sleep(PAUSE)
            for one in subjects:
                found |= {(one.name, name): milliseconds(work) for name, work in one.works()}
            for name, drafter in drafters.items():
                found[name, "step"] = step(drafter.model, drafter.slots[0])
            for cell, number in found.items():
                if turn:  # the first one warms up
                    spent.setdefault(cell, []).append(number)
            advance()
    write({cell: median(numbers) for cell, numbers in spent.items()}, subjects, options)


def _key(column: str) -> str:
    """Return a name for a column that `str.format` takes as one."""
    return "tokens_" + column.replace(" ", "_")


def write(found: dict[tuple[str, str], float], subjects: list[Subject], options: Any) -> None:
    """Write the page and its figures."""
    facts = describe_run(
        f"Medians of {options.turns} interleaved turns, {CONTEXT} cached tokens, {options.threads} "
        f"threads; forwards: {', '.join(dict.fromkeys(one.model.forward_name for one in subjects))}."
    )
    columns = [*map(str, WIDTHS), f"{ROWS} rows of 1", str(PROMPT)]
    rows = [
        {"model": one.name, **{_key(name): f"{found[one.name, name]:.3g}" for name in columns}}
        for one in subjects
    ]
    read = READ_BYTES / found["read", ""] / 1e6
    lines = page("Forwards by number of tokens, in milliseconds", facts)
    lines += table(rows, {"model": "{model}", **{name: f"{{{_key(name)}}}" for name in columns}})
    lines += ["", f"Plain read of 1 GiB: {read:.1f} GB/s. A further step of a drafter's chain:", ""]
    lines += [f"- `{name}`: {found[name, 'step']:.4f} ms" for name in DRAFTERS]
    figures = {" ".join(filter(None, cell)): number for cell, number in found.items()}
    save(
        options.out,
        "forwards",
        "\n".join(lines) + "\n",
        {"circumstances": facts, "milliseconds": figures, "read_gb_s": read},
    )


if __name__ == "__main__":
    main()
