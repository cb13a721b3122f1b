"""The line protocol of a peer, in its own environment: a JSON line in, a JSON line out, "ready" first.

In: {"ids": [prompts' tokens], "n": maximum number of new tokens, "arm": str, "ignore_eos": bool}.
Out: {"seconds": of the call, "tokens": [the answers' tokens]}. Needs only the standard library.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

Request = dict[str, Any]
Answer = dict[str, Any]


def serve(load: Callable[[], Callable[[Request], Answer]]) -> None:
    """Load an engine and answer requests until stdin ends.

    An answer that has "seconds" of its own keeps them. Whatever the engine prints goes to stderr.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    decode = load()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        began = perf_counter()
        answer = decode(request)
        answer.setdefault("seconds", perf_counter() - began)
        print(json.dumps(answer), file=answers, flush=True)
