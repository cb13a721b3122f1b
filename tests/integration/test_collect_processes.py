"""`paceline collect` gives the same files, each row once, when killed and with several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from support import HANGS

from paceline.collection.card import CARD_JSON, CARD_MD
from paceline.config import DrafterSection, load_config
from paceline.store import load_collection, read_prompts
from paceline.testing.tiny_models import perturbed, tiny_model
from paceline.testing.tokenizers import byte_tokenizer
from paceline.verbs.pipeline import collect, with_store

NUM_KILLS = 6
NUM_PROMPTS = 40

# Imports take longer than the work, so they are shared: this process runs no model itself. It forks a
# child for every `paceline collect`, and kills the child. argv: a seed, then the command's arguments
# with `STORE` for the folder, which is whole/ or killed/.
DRIVER = """
import os, random, signal, sys, time
import torch, transformers.models.llama.modeling_llama
import paceline.verbs.pipeline, paceline.cli.progress
from paceline.cli import main

def start(folder):
    pid = os.fork()
    if pid == 0:
        sys.argv = ["paceline", *(folder if a == "STORE" else a for a in sys.argv[2:])]
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            main()
        except SystemExit as stop:
            os._exit(int(stop.code or 0))
        os._exit(0)
    return pid

def shards(folder):
    return sum(name.endswith(".parquet") for _, _, names in os.walk(folder) for name in names)

began = time.monotonic()
assert os.waitpid(start("whole"), 0)[1] == 0
took, total = time.monotonic() - began, shards("whole")
moments = random.Random(int(sys.argv[1]))
left = int(os.environ["NUM_KILLS"])
killed = 0
while left:
    pid = start("killed")
    # wait until the run has written some shards, then until any moment between two writes
    goal = shards("killed") + moments.randrange(1 + (total - shards("killed")) // (left + 1))
    # an ended process stays unwaited until below, so that no other process gets its id
    ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while shards("killed") < goal and os.waitid(os.P_PID, pid, ended) is None:
        time.sleep(0.001)
    # at most until the next write, also if the first run was much slower
    until = time.monotonic() + moments.random() * took / total
    while shards("killed") <= goal and time.monotonic() < until:
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    killed += os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    left -= 1
    print("killed with", shards("killed"), "of", total, "shards", flush=True)
assert killed == int(os.environ["NUM_KILLS"])
assert os.waitpid(start("killed"), 0)[1] == 0
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    target = tiny_model(std=0.1, context=96)
    for name, model in (("target", target), ("near", perturbed(target, 0.1))):
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    raw = {
        "target": {"model": "target"},
        "drafters": {
            "near": {"kind": "draft_model", "settings": {"model": "near"}},
            "lookup": {"kind": "prompt_lookup", "settings": {"min_ngram": 1}},
        },
        "threads": 1,
    }
    (tmp_path / "paceline.yaml").write_text(yaml.safe_dump(raw))
    lines = [
        json.dumps(
            {"id": f"p{i}", "domain": f"d{i % 3}", "prompt": f"{chr(97 + i % 26)} " * (i % 9)}
        )
        for i in range(1, NUM_PROMPTS + 1)
        if i % 9
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "paceline.yaml"


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".part")
    files = (path for path in files if path.name not in (CARD_JSON, CARD_MD))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked to share their imports")
def test_a_run_killed_at_random_moments_ends_with_the_files_of_an_uninterrupted_run(
    config: Path, tmp_path: Path
) -> None:
    arguments = ["collect", "prompts.jsonl", "-c", str(config), "--store", "STORE"]
    arguments += ["--max-new-tokens", "16", "--alignment", "--temperature", "0"]
    arguments += ["--temperature", "0.8"]
    ended = subprocess.run(
        [sys.executable, "-c", DRIVER, "5", *arguments],
        cwd=tmp_path, env={**os.environ, "NUM_KILLS": str(NUM_KILLS), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=HANGS,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    # it was killed during the work, not before or after it
    seen = {line for line in ended.stdout.splitlines() if line.startswith("killed with")}
    assert len(seen) >= 3, ended.stdout
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    for manifest in (tmp_path / "killed").rglob("manifest.json"):
        ids = [
            id
            for shard in sorted(manifest.parent.glob("*.parquet"))
            for id in pq.read_table(shard).column("id").to_pylist()
        ]
        num_prompts = sum(bool(i % 9) for i in range(1, NUM_PROMPTS + 1))
        # drafters answer a prompt, and were trained on it or not, once for all samplings
        once = manifest.parent.parent.name in ("outputs", "trained_on")
        assert len(ids) == len(set(ids)) == (num_prompts if once else 2 * num_prompts), manifest
    assert len(load_collection(tmp_path / "killed").prompts) == 2 * num_prompts
    runs = json.loads((tmp_path / "killed" / CARD_JSON).read_text())["runs"]
    assert [run["finished"] for run in runs][-1] and not any(r["finished"] for r in runs[:-1])


def test_two_processes_leave_the_same_files_as_one(config: Path, tmp_path: Path) -> None:
    """Also where a drafter uses the answers, whose index is built after the processes have started."""
    settings = load_config(config)
    suffix = DrafterSection(kind="suffix_lookup", settings={"answers": "of this store"})
    drafters = {**settings.drafters, "suffix": suffix}
    settings = settings.model_copy(update={"drafters": drafters})
    records = read_prompts([tmp_path / "prompts.jsonl"])
    seen: dict[int, list[tuple[str, int, int]]] = {1: [], 2: []}
    for workers, told in seen.items():
        collect(
            with_store(settings, tmp_path / str(workers)), records, 8, alignment=True,
            on_progress=lambda *step, told=told: told.append(step),
            scores=True, workers=workers,
        )  # fmt: skip
    assert content(tmp_path / "1") == content(tmp_path / "2")
    # progress counts each stage to its end
    assert {step for step in seen[1] if step[1] == step[2]} == {
        step for step in seen[2] if step[1] == step[2]
    }
