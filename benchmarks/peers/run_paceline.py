"""paceline: CONFIGURATION. A request with "width" is answered with the seconds of one forward.

Such a request names the model in "arm": `target`, or a drafter with a model, of which a step of a
greedy chain is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from line_protocol import Answer, Request, serve

if TYPE_CHECKING:
    from paceline.models.language_model import LanguageModel

CONTEXT = 256  # positions cached where single forwards are timed
FORWARDS = 15  # per request, of which the median counts
CHAIN = 8  # steps of a drafter's chain over which one is averaged


def load() -> Callable[[Request], Answer]:
    """Load the models and return their decode."""
    import paceline

    pace = paceline.load(sys.argv[1])

    def decode(request: Request) -> Answer:
        if "width" in request:
            is_target = request["arm"] == "target"
            seconds = (
                forward_seconds(pace.parts.target, request["width"])
                if is_target
                else step_seconds(pace.parts.drafters[request["arm"]].model)
            )
            return {"tokens": [], "seconds": seconds}
        completions = pace.generate(
            request["ids"],
            max_new_tokens=request["n"],
            drafter=request["arm"],
            ignore_eos=request["ignore_eos"],
            generation_config="none",
        )
        return {"tokens": [list(completion.token_ids) for completion in completions]}

    return decode


def forward_seconds(model: LanguageModel, width: int) -> float:
    """Return the median seconds of a verification of `width` tokens after CONTEXT others."""
    from paceline.models.packing import Span

    tokens = list(range(width))
    with cached(model) as slot:
        span = Span(slot, CONTEXT, width)
        return median_seconds(lambda: model.score(tokens, [span], wants_logits=False))


def step_seconds(model: LanguageModel) -> float:
    """Return the seconds of a further step of a drafter's greedy chain after CONTEXT tokens."""
    from paceline.models.packing import Span

    with cached(model) as slot:
        span = Span(slot, CONTEXT, 1)
        one, more = (
            median_seconds(lambda n=n: model.draft_chain([0], [span], n, model.num_logits))
            for n in (1, 1 + CHAIN)
        )
    return (more - one) / CHAIN


@contextmanager
def cached(model: LanguageModel) -> Iterator[int]:
    """Lend the slot of a row with CONTEXT cached tokens."""
    import torch

    from paceline.models.packing import Span

    slot = model.acquire()
    with torch.inference_mode():
        model.forward(torch.arange(CONTEXT) % model.num_logits, [Span(slot, 0, CONTEXT)])
        yield slot
    model.release(slot)


def median_seconds(work: Callable[[], Any]) -> float:
    """Return the median seconds of FORWARDS calls."""
    seconds = []
    for _ in range(FORWARDS):
        began = perf_counter()
        work()
        seconds.append(perf_counter() - began)
    return median(seconds)


if __name__ == "__main__":
    serve(load)
