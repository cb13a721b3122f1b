"""paceline: CONFIGURATION. A request with "width" is answered with the seconds of one forward.

Such a request names the model in "arm": `target`, or a drafter with a model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from line_protocol import Answer, Request, serve

if TYPE_CHECKING:
    from paceline import Pace
    from paceline.models.language_model import LanguageModel

CONTEXT = 256  # positions cached where single forwards are timed
FORWARDS = 7  # per request, of which the median counts


def load() -> Callable[[Request], Answer]:
    """Load the models and return their decode."""
    import paceline

    pace = paceline.load(sys.argv[1])

    def decode(request: Request) -> Answer:
        if "width" in request:
            return {
                "tokens": [],
                "seconds": forward_seconds(pace, request["arm"], request["width"]),
            }
        completions = pace.generate(
            request["ids"],
            max_new_tokens=request["n"],
            drafter=request["arm"],
            ignore_eos=request["ignore_eos"],
            generation_config="none",
        )
        return {"tokens": [list(completion.token_ids) for completion in completions]}

    return decode


def forward_seconds(pace: Pace, name: str, width: int) -> float:
    """Return the median seconds of a forward of `width` tokens with their logits, after CONTEXT ones."""
    import torch

    from paceline.models.packing import Span

    parts = pace.parts
    drafters: Mapping[str, Any] = parts.drafters
    model: LanguageModel = parts.target if name == "target" else drafters[name].model
    tokens = torch.arange(CONTEXT) % model.num_logits
    slot = model.acquire()
    with torch.inference_mode():
        model.forward(tokens, [Span(slot, 0, CONTEXT)])
        seconds = []
        for _ in range(FORWARDS):
            began = perf_counter()
            model.unembed(model.forward(tokens[:width], [Span(slot, CONTEXT, width)]))
            seconds.append(perf_counter() - began)
    model.release(slot)
    return median(seconds)


if __name__ == "__main__":
    serve(load)
