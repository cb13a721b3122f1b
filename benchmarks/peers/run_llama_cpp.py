"""llama.cpp's server from a wheel, with its speculation: GGUF THREADS SLOTS plain|ngram|DRAFTER_GGUF.

Rows are requests that are sent at the same time. They go through the server's HTTP interface, which
returns tokens; the direct call returns text only and serves one request at a time.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from line_protocol import Answer, Request, serve

CONTEXT_PER_SLOT = 1024
DRAFT_TOKENS = 4


def load() -> Callable[[Request], Answer]:
    """Start the server and return its decode."""
    import xllamacpp

    slots = int(sys.argv[3])
    server = xllamacpp.Server(
        settings(xllamacpp, sys.argv[1], int(sys.argv[2]), slots, sys.argv[4])
    )
    pool = ThreadPoolExecutor(slots)

    def decode(request: Request) -> Answer:
        ask = partial(complete, server.listening_address, request)
        return {"tokens": list(pool.map(ask, request["ids"]))}

    return decode


def settings(xllamacpp: Any, model: str, threads: int, slots: int, speculation: str) -> Any:
    """Return the server's parameters."""
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel = slots * CONTEXT_PER_SLOT, slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_gpu_layers, params.verbosity = 0, -1
    kinds, chosen = xllamacpp.common_speculative_type, params.speculative
    if speculation == "ngram":
        chosen.types = [kinds.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
    elif speculation != "plain":
        chosen.types = [kinds.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        chosen.draft.mparams.path, chosen.draft.n_max = speculation, DRAFT_TOKENS
        chosen.draft.cpuparams.n_threads = chosen.draft.cpuparams_batch.n_threads = threads
    return params


def complete(address: str, request: Request, ids: Sequence[int]) -> list[int]:
    """Return the greedy answer to one prompt."""
    body = {
        "prompt": ids,
        "n_predict": request["n"],
        "ignore_eos": request["ignore_eos"],
        "temperature": 0.0,
        "samplers": ["top_k"],
        "top_k": 1,
        "cache_prompt": False,
        "return_tokens": True,
    }
    headers = {"Content-Type": "application/json"}
    call = urllib.request.Request(f"{address}/completion", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(call) as reply:
        tokens: list[int] = json.load(reply)["tokens"]
    return tokens


if __name__ == "__main__":
    serve(load)
