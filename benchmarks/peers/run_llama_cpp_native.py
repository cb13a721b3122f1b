"""llama.cpp compiled for this processor, one row, plain decoding: GGUF THREADS.

Without the extra layouts of quantised weights: that of q8_0 for AMX ends this version with a
segmentation fault at the first batch. Weights in bfloat16 have none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from line_protocol import Answer, Request, serve

CONTEXT = 2048


def load() -> Callable[[Request], Answer]:
    """Load the model and return its decode."""
    from llama_cpp import Llama, llama_cpp

    defaults = llama_cpp.llama_model_default_params()
    defaults.use_extra_bufts = False
    llama_cpp.llama_model_default_params = lambda: defaults  # Llama has no argument for it

    path, threads = sys.argv[1], int(sys.argv[2])
    model = Llama(path, n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False)

    def decode(request: Request) -> Answer:
        [ids] = request["ids"]
        end = None if request["ignore_eos"] else model.token_eos()
        model.reset()  # so that each call pays its prefill
        tokens: list[int] = []
        for token in model.generate(ids, temp=0.0, top_k=1):
            tokens.append(int(token))
            if len(tokens) == request["n"] or token == end:
                break
        return {"tokens": [tokens]}

    return decode


if __name__ == "__main__":
    serve(load)
