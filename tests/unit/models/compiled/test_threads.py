"""Results do not depend on threads: callers at once, their number, forks, processes, the end."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from support.compiled_models import compile_model, hidden_of, random_model, random_text

from paceline.models.compiled.entry import MAX_THREADS, TAG, TEAM_BYTES
from paceline.models.compiled.native import control_functions
from paceline.models.compiled.tables import THREADS
from paceline.models.compiled.team import Workspace, aligned
from paceline.models.packing import Span

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from paceline.models.compiled.forward import CompiledForward

DTYPES = ("bfloat16", "float32")
TESTS = Path(__file__).resolve().parents[3]


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Return torch's function that sets the number of threads, which is restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@cache
def forward_of(dtype: str) -> CompiledForward:
    return compile_model(random_model(dtype))


def work(number: int, dtype: str = "float32") -> torch.Tensor:
    """Return hidden states and logits of a random prompt, single tokens and a tree."""
    forward = forward_of(dtype)
    rows, text = forward.new_cache(), random_text(150, number)
    slot = rows.acquire()
    parts = [forward.hidden(text[:130], [Span(slot, 0, 130)], None, rows)]
    for start in range(130, 150):
        parts.append(forward.hidden(text[start : start + 1], [Span(slot, start, 1)], None, rows))
    parts.append(forward.hidden(text[:3], [Span(slot, 150, 3)], [[-1, 0]], rows))
    hidden = torch.cat(parts)
    return torch.cat([hidden.float(), forward.logits(hidden)], dim=1)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_callers_at_once_get_what_each_would_alone(
    dtype: str, threads: int, set_threads: Callable[[int], None]
) -> None:
    expected = [work(number, dtype) for number in range(6)]

    def repeat(number: int) -> list[torch.Tensor]:
        set_threads(threads)
        return [work(number, dtype) for _ in range(4)]

    with ThreadPoolExecutor(6) as pool:
        for mine, found in zip(expected, pool.map(repeat, range(6)), strict=True):
            assert all(torch.equal(mine, other) for other in found)


def test_callers_at_once_may_share_a_model_whose_texts_grow() -> None:
    texts = [random_text(40 * k + 20, k) for k in range(20)]
    expected = [hidden_of(compile_model(random_model()), text) for text in texts]
    for _ in range(5):
        forward = compile_model(random_model())  # with a table of few angles
        with ThreadPoolExecutor(5) as pool:
            found = list(pool.map(partial(hidden_of, forward), texts))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_number_of_threads(
    dtype: str, set_threads: Callable[[int], None]
) -> None:
    set_threads(1)
    alone = work(0, dtype)
    for threads in (2, 3, 4, 1, 4, 2):
        set_threads(threads)
        assert torch.equal(work(0, dtype), alone), threads


def run_script(body: str, **environment: str) -> subprocess.Popen[str]:
    """Start a Python process with `work` and `alone`, the result of work(0) on one thread."""
    head = (
        "import os, sys, time\n"
        "import torch\n"
        "torch.set_num_threads(1)\n"
        "from unit.models.compiled.test_threads import work\n"
        "alone = work(0)\n"
        "torch.set_num_threads(3)\n"
    )
    paths = os.pathsep.join([str(TESTS), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", head + body],
        env=os.environ | {"PYTHONPATH": paths} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def check_end(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=300)
    assert (output, process.returncode) == ("", 0)


FORK = """
work(0)
for turn in range(4):  # followers awake, then asleep
    child = os.fork()
    if child == 0:
        same = torch.equal(work(0), alone)
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if torch.equal(work(0), alone) else 2)
        other = os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1])
        sys.exit(0 if same and other == 0 else 1)
    assert torch.equal(work(0), alone)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, turn
    time.sleep(0.1 * turn)
"""
LOADER = """
class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return work(index)
expected = [work(index) for index in range(4)]
loader = torch.utils.data.DataLoader(Rows(), batch_size=None, num_workers=2,
                                     multiprocessing_context="fork")
for _ in range(2):
    assert all(torch.equal(a, b) for a, b in zip(loader, expected, strict=True))
assert torch.equal(work(0), alone)
"""
ANGLES = """
from support.compiled_models import compile_model, hidden_of, random_model, random_text
texts = [random_text(n, n) for n in (10, 700)]
expected = [hidden_of(compile_model(random_model()), text) for text in texts]
forward = compile_model(random_model())
assert torch.equal(hidden_of(forward, texts[0]), expected[0])
torch.ones(400_000).cos()  # this thread has workers, which a child has not
child = os.fork()
if child == 0:  # needs more angles than the parent has computed
    os._exit(0 if torch.equal(hidden_of(forward, texts[1]), expected[1]) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
BIASES = """
from support.compiled_models import random_text
from support.t5_models import begin, feed, hidden_alone, load_t5, random_t5
text = random_text(700)
expected = hidden_alone(load_t5(random_t5()), [1, 2, 3], text)
model = load_t5(random_t5())
slot = begin(model, [1, 2, 3])
assert torch.equal(feed(model, {slot: (0, text[:10])})[slot], expected[:10])
torch.ones(400_000).cos()  # this thread has workers, which a child has not
child = os.fork()
if child == 0:  # needs biases of more distances than the parent has computed
    os._exit(0 if torch.equal(feed(model, {slot: (10, text[10:])})[slot], expected[10:]) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
BUSY_FORK = """
import threading
stop = threading.Event()
def other():
    while not stop.is_set():
        assert torch.equal(work(0), alone)
threads = [threading.Thread(target=other) for _ in range(2)]
[thread.start() for thread in threads]
for _ in range(5):
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(work(0), alone) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
stop.set()
[thread.join() for thread in threads]
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.parametrize(
    "body",
    [FORK, LOADER, BUSY_FORK, ANGLES, BIASES],
    ids=["fork", "loader", "busy", "angles", "biases"],
)
def test_a_forked_child_runs_the_model_too(body: str) -> None:
    check_end(run_script(body))


def test_processes_at_once_are_right() -> None:
    body = "for _ in range(20):\n    assert torch.equal(work(0), alone)\n"
    for process in [run_script(body) for _ in range(3)]:
        check_end(process)


LATE = """
from support.compiled_models import compile_model, hidden_of, random_model, random_text
models = [compile_model(random_model(num_hidden_layers=n)) for n in (1, 5)]
texts = [random_text(n, n) for n in (1, 40, 3)]
expected = [[hidden_of(model, text) for text in texts] for model in models]
for turn in range(2000):
    torch.set_num_threads(2 + turn % 23)
    k, n = turn % 2, turn % 3
    assert torch.equal(hidden_of(models[k], texts[n]), expected[k][n]), turn
"""


def test_a_thread_that_is_late_for_a_job_disturbs_no_later_one() -> None:
    check_end(run_script(LATE))


def test_a_late_follower_runs_nothing_while_a_table_is_written() -> None:
    # all of a job's own fields may be 0 then, the address of its code too
    _, follow = control_functions()
    workspace, team = Workspace(), aligned(TEAM_BYTES).view(np.int64)
    workspace.job[THREADS], team[TAG // 8] = 2, 7

    assert follow(team.ctypes.data, workspace.address, 1, 0, 10) == 7


ENDS = {
    "awake": "work(0)",
    "asleep": "work(0); time.sleep(0.2)",
    "one_thread": "",
    "exit_in_a_thread": (
        "import threading\nt = threading.Thread(target=work, args=(0,)); t.start(); t.join()"
    ),
    "more_threads_than_a_team_has": f"torch.set_num_threads({MAX_THREADS + 50}); work(0)",
}


@pytest.mark.parametrize("end", ENDS)
def test_the_interpreter_ends_quietly(end: str) -> None:
    check_end(run_script(ENDS[end]))
