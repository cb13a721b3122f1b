"""A tiny target and drafter as folders of files, with a configuration and prompt files of their own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import yaml
from support.prompt_files import write_task

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="session")
def models(save_tiny_models: Callable[[int], Path]) -> Path:
    """Folders `target` and `near`, with a context of 128 tokens."""
    return save_tiny_models(128)


@pytest.fixture
def config(models: Path, tmp_path: Path) -> Path:
    path = tmp_path / "paceline.yaml"
    raw = {
        "target": {"model": str(models / "target"), "dtype": "float32", "device": "cpu"},
        "drafters": {
            "near": {"kind": "draft_model", "settings": {"model": str(models / "near")}},
            "lookup": {"kind": "prompt_lookup", "settings": {"min_ngram": 1}},
        },
    }
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a data folder: the four tasks, and a small Spec-Bench."""
    folder = tmp_path / "data"
    folder.mkdir()
    for task in ("translation", "math", "code", "summary"):
        write_task(folder, task)
    questions = [
        {"question_id": i, "category": "qa", "turns": [f"what is {i}?", "and then?"]}
        for i in range(24)
    ]
    lines = [json.dumps(question) for question in questions]
    (folder / "spec_bench.jsonl").write_text("\n".join(lines) + "\n")
    return folder
