"""The kernels compile for devices that are absent, within their registers and shared memory.

In a process of its own: this one's triton interprets. Takes as long as the compiler does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from support import HANGS

pytest.importorskip("triton")

# the least shared memory of a block among devices of compute capability 8 and 9
SHARED_BYTES = 99 * 1024
PROGRAM = """
import json, sys, warnings
warnings.simplefilter("ignore")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from paceline.models.cuda.paged_attention import _attend, _weigh

def built(kernel, types, constants, capability, **options):
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
    )
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)

(dtype, head_dim, block_m, has_bits, is_split, window, capped, has_biases, capability) = (
    json.loads(sys.argv[1])
)
vectors = dict.fromkeys(("firsts", "widths", "starts", "slots", "positions"), "*i64")
numbers = ("query_token_stride", "query_head_stride", "table_stride", "num_tokens", "num_words",
           "num_splits", "bias_stride")
types = {
    "query": dtype, "pool": dtype, "table": "*i32", **vectors, "bits": "*i32",
    "biases": "*fp32" if has_biases else dtype,
    "sums": "*fp32" if is_split else dtype, "weights": "*fp32" if is_split else dtype,
    **dict.fromkeys(numbers, "i32"), "scale": "fp32", "cap": "fp32",
}
constants = {
    "NUM_KV_HEADS": 8, "GROUPS": 4, "HEAD_DIM": head_dim,
    "BLOCK_D": triton.next_power_of_2(head_dim), "BLOCK_M": block_m, "BLOCK": 64, "WINDOW": window,
    "CAPPED": capped, "HAS_BITS": has_bits, "HAS_BIASES": has_biases, "IS_SPLIT": is_split,
    "PRECISION": "tf32x3", "WIDEN": False,
}
warps = 8 if block_m * head_dim > 4096 else 4
row_bytes = head_dim * (2 if dtype == "*bf16" else 4)
attend = built(_attend, types, constants, capability, num_warps=warps,
               num_stages=2 if row_bytes <= 256 else 1)
weigh = built(
    _weigh,
    {"sums": "*fp32", "weights": "*fp32", "places": "*i64", "out": dtype, "num_lines": "i32",
     "num_splits": "i32"},
    {"NUM_HEADS": 32, "HEAD_DIM": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim),
     "BLOCK_S": 32},
    capability,
)
print(json.dumps([attend.metadata.shared, weigh.metadata.shared]))
"""


@pytest.mark.wide
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "variant",
    [
        ["*bf16", 128, 16, True, True, 0, False, False],
        ["*bf16", 128, 64, True, True, 4096, False, False],
        ["*bf16", 128, 64, False, False, 0, False, False],
        ["*bf16", 256, 32, True, True, 4096, True, False],
        ["*fp32", 64, 32, True, True, 0, False, False],
        ["*bf16", 128, 64, True, True, 0, False, True],
    ],
    ids=["a token", "a tree", "a prompt", "capped windows", "float32", "ALiBi"],
)
def test_kernels_compile(variant: list[object], capability: int) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    argument = json.dumps([*variant, capability])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, argument],
        env=environment, capture_output=True, text=True, check=False, timeout=HANGS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert max(json.loads(done.stdout.splitlines()[-1])) <= SHARED_BYTES
