"""Two processes on the CPU train nearly the weights of one process with as many batches per step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "tests" / "support" / "train_in_processes.py"
NUM_TEXTS = 44  # an odd number of batches: the last step has one for two processes


def train(folder: Path, processes: int, accumulate: int) -> dict[str, Any]:
    """Return the facts that the program writes."""
    folder.mkdir()
    launch = [sys.executable]
    if processes > 1:
        # on CPUs `accelerate launch` would need MPI
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    arguments = [str(SCRIPT), str(folder), str(accumulate), str(NUM_TEXTS)]
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *arguments],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    facts: dict[str, Any] = json.loads((folder / "facts.json").read_text())
    return facts


def test_two_processes_train_nearly_the_weights_of_one(tmp_path: Path) -> None:
    one = train(tmp_path / "one", 1, accumulate=2)
    two = train(tmp_path / "two", 2, accumulate=1)

    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["last_batches"] == two["last_batches"] == 1
    assert one["steps"] == two["steps"] > 5
    assert one["tokens"] == two["tokens"]
    assert one["best_step"] == two["best_step"]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    # AdamW's steps do not depend on the gradients' scale, which its moments show
    assert two["moments"] == pytest.approx(one["moments"], rel=1e-3)
    weights = [
        torch.cat([w.flatten() for w in torch.load(tmp_path / name / "weights.pt").values()])
        for name in ("one", "two")
    ]
    assert (weights[0] - weights[1]).abs().mean() < 1e-5
