"""Fixtures for every room: the zoo's target, prompts in its four styles, one thread."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from paceline.assembly import Parts, build
from paceline.config import Config, DrafterSection, ModelSection
from paceline.contracts import PromptRecord
from paceline.models.compiled import processor
from paceline.models.compiled.native import control_functions, run_address
from paceline.testing.tiny_models import perturbed, tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[1]
ZOO = ROOT / "zoo"
WRITTEN = ROOT / "src" / "paceline" / "experiments" / "prompts"

sys.path += [str(ROOT / "scripts"), str(ROOT / "tests")]  # the grid of models, `support`

_CODE = """\
Complete the Python function:
def count_lines(path, encoding="utf-8"):
    \"\"\"Return the number of lines in a file that are not blank.\"\"\""""
_SUMMARY = """\
Summarize the Python function:
def merge_settings(defaults, overrides):
    merged = dict(defaults)
    for key, value in overrides.items():
        if value is not None:
            merged[key] = value
    return merged"""


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Use one thread: small models gain little from a second one, and on a busy machine threads that
    wait for each other take minutes. The suite runs in two processes instead.
    """
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _compiled_forward() -> None:
    """Compile what most tests need now, so that no program that a test runs says that it compiles."""
    control_functions()
    for dtype in ("bfloat16", "float32"):
        run_address(processor.kernels(), dtype, dtype)


@pytest.fixture(scope="session", autouse=True)
def _quick_cost_tables() -> Iterator[None]:
    """Measure cost tables with the fewest repeats; no test depends on their precision."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("paceline.bench.profile"), "BUDGET", 0.0)
        yield


@pytest.fixture(scope="module")
def short_trainings() -> Iterator[None]:
    """Shorten the training of policies, for tests that do not depend on their quality."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("paceline.learning.learners.acceptance._STEPS", 24)
        yield


@pytest.fixture(scope="session")
def save_tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Return a function that saves tiny models of a context length as folders `target` and `near`."""

    def save(context: int) -> Path:
        folder = tmp_path_factory.mktemp("models")
        target = tiny_model(std=0.1, context=context)
        for name, model in (("target", target), ("near", perturbed(target, 0.1))):
            model.save_pretrained(folder / name)
            byte_tokenizer().save_pretrained(folder / name)
        return folder

    return save


@pytest.fixture(scope="session")
def zoo_target() -> Parts:
    """Return the zoo's target and trained drafters in float32, loaded once."""
    trained = {
        folder.name: DrafterSection(
            kind="draft_model", settings={"model": str(folder), "dtype": "float32"}
        )
        for folder in sorted(ZOO.glob("draft-*"))
        if (folder / "config.json").is_file()
    }
    target = ModelSection(model=str(ZOO / "target"), dtype="float32", device="cpu")
    return build(Config(target=target, drafters=trained))


@pytest.fixture(scope="session")
def prompts() -> list[PromptRecord]:
    """Return six prompts in the four styles, and eight of PACELINE_DATA's records if it is set."""
    records = [*_first_two(WRITTEN / "translation.jsonl"), *_first_two(WRITTEN / "math.jsonl")]
    records.append(PromptRecord("own/code", "code", _CODE))
    records.append(PromptRecord("own/summary", "summary", _SUMMARY))
    if folder := os.environ.get("PACELINE_DATA"):
        for domain in ("translation", "math", "code", "summary"):
            records += _first_two(Path(folder) / f"{domain}.jsonl")
    return records


def _first_two(path: Path) -> list[PromptRecord]:
    with path.open(encoding="utf-8") as lines:
        raw = [json.loads(line) for line in itertools.islice(lines, 2)]
    return [PromptRecord(r["id"], r["domain"], r["prompt"]) for r in raw]
