"""vLLM on the CPU, in one process: MODEL_FOLDER DTYPE THREADS plain|ngram|suffix|DRAFTER_FOLDER."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from line_protocol import Answer, Request, serve

SPECULATION: dict[str, dict[str, Any]] = {
    "ngram": {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_max": 4,
        "prompt_lookup_min": 2,
    },
    "suffix": {
        "method": "suffix",
        "num_speculative_tokens": 8,
        # every turn repeats the prompts, so it would draft from their own earlier answers
        "suffix_decoding_max_cached_requests": 0,
    },
}
DRAFT_TOKENS = 3


def load() -> Callable[[Request], Answer]:
    """Load the model and return its decode."""
    folder, dtype, threads, mode = sys.argv[1:5]
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",  # GB
        VLLM_CPU_OMP_THREADS_BIND=f"0-{int(threads) - 1}",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
    )
    from vllm import LLM, SamplingParams

    drafter = {"method": "draft_model", "model": mode, "num_speculative_tokens": DRAFT_TOKENS}
    engine = LLM(
        folder,
        dtype=dtype,
        max_model_len=1024,
        max_num_seqs=16,
        enable_prefix_caching=False,
        disable_log_stats=True,
        speculative_config=None if mode == "plain" else SPECULATION.get(mode, drafter),
    )

    def decode(request: Request) -> Answer:
        sampling = SamplingParams(
            temperature=0, max_tokens=request["n"], ignore_eos=request["ignore_eos"]
        )
        prompts = [{"prompt_token_ids": ids} for ids in request["ids"]]
        answers = engine.generate(prompts, sampling, use_tqdm=False)
        return {"tokens": [list(answer.outputs[0].token_ids) for answer in answers]}

    return decode


if __name__ == "__main__":
    serve(load)
