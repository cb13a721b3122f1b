"""torch products as another program: THREADS. A request's "seconds" are how long it multiplies."""

from __future__ import annotations

import sys
from collections.abc import Callable
from time import perf_counter

from line_protocol import Answer, Request, serve

SIZE = 1024


def load() -> Callable[[Request], Answer]:
    """Return the function that multiplies two matrices again and again."""
    import torch

    torch.set_num_threads(int(sys.argv[1]))
    left, right = torch.rand(2, SIZE, SIZE)

    def multiply(request: Request) -> Answer:
        began, products = perf_counter(), 0
        while perf_counter() - began < request["seconds"]:
            torch.mm(left, right)
            products += 1
        return {"products": products}

    return multiply


if __name__ == "__main__":
    serve(load)
