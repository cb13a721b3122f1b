"""A tiny target whose answers repeat themselves, with a drafter of every kind, built from files.

The weights' spread makes its greedy text wander and return: lookups and a drafter with slightly
other weights are right often and wrong often.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from paceline.assembly import Pace, build
from paceline.config import Config, DrafterSection, ModelSection
from paceline.contracts import NONE
from paceline.drafting.catalog import CATALOG
from paceline.testing.tiny_models import perturbed, tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedModel

CONTEXT = 96
SHORT_CONTEXT = 40


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small only lose by a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pace(tmp_path_factory: pytest.TempPathFactory) -> Pace:
    """Arms are called like their kinds; `short` is a draft model with less context."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_model(std=0.1, context=CONTEXT)
    near = perturbed(model, 0.1)
    _save(model, folder / "target")
    _save(near, folder / "near")
    near.config.max_position_embeddings = SHORT_CONTEXT
    _save(near, folder / "short")
    needed = {
        "draft_model": {"model": str(folder / "near"), "num_draft_tokens": 5},
        "cross_vocabulary": {"model": str(folder / "near")},
        "prompt_lookup": {"min_ngram": 1},
        "layer_skip": {"skip_mlp": [1], "num_draft_tokens": 5, "stop": "fixed"},
        "union": {"parts": ["prompt_lookup", "draft_model"]},
        "cascade": {"parts": ["suffix_lookup", "draft_model"]},
    }
    # a kind that is not named here is tested with its defaults
    drafters = {k: DrafterSection(kind=k, settings=needed.get(k, {})) for k in CATALOG if k != NONE}
    short = {"model": str(folder / "short"), "num_draft_tokens": 4}
    drafters["short"] = DrafterSection(kind="draft_model", settings=short)
    return Pace(build(Config(target=ModelSection(model=str(folder / "target")), drafters=drafters)))


def _save(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
