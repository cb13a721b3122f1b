"""OpenMP workers: no thread keeps its own while another one decodes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from paceline.engine import openmp

# In a process of its own, with two threads: how many threads there are, and whose.
PROGRAM = """
import os, time, torch, paceline
from paceline.contracts import Decision
from paceline.engine.openmp import release_pool
from paceline.testing.tiny_models import tiny_model
from paceline.testing.tokenizers import byte_tokenizer

def count():
    return len(os.listdir("/proc/self/task"))

def compute():
    a = torch.randn(700, 700)
    for _ in range(20):
        (a @ a).exp().sum()

torch.set_num_threads(2)
seen = []
pace = paceline.load(target=tiny_model(), tokenizer=byte_tokenizer(), drafters={})
pace.complete("abc", drafter="none", max_new_tokens=4)  # from here on there are the usual threads
alone = count()
compute()
with_workers = count()
def choose(context):
    compute()  # now the driver's thread has workers, and the caller has none
    seen.append(count())
    return Decision("none")
pace.engine.choose = choose
pace.complete("abc", max_new_tokens=4)
print(alone, with_workers, seen[0], count())
"""


@pytest.mark.skipif(openmp._pause is None, reason="another OpenMP runtime, which has no such call")
def test_callers_and_driver_never_have_workers_at_the_same_time() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    alone, with_workers, decoding, after = map(int, done.stdout.split())

    assert with_workers == alone + 1  # the caller's worker
    assert decoding == alone + 1  # the driver's worker instead
    assert after == alone
