"""A tiny target in memory with repetitive answers, two drafters and some prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from paceline.assembly import Pace, build_from_objects
from paceline.config import Config, EngineSection, ModelSection
from paceline.contracts import PromptRecord
from paceline.drafting.prompt_lookup import PromptLookup, PromptLookupSettings
from paceline.testing.tiny_models import perturbed, tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONTEXT = 96


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread; a second one slows models of this size down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_pace() -> Callable[..., Pace]:
    """Return a function that makes a Pace with `near`, `lookup` or both, and a target from a seed."""

    def make(arms: tuple[str, ...] = ("near", "lookup"), seed: int = 0) -> Pace:
        target = tiny_model(std=0.1, context=CONTEXT, seed=seed)
        drafters = {
            "near": perturbed(target, 0.1),
            "lookup": PromptLookup("lookup", PromptLookupSettings(min_ngram=1)),
        }
        config = Config(target=ModelSection(model="in memory"), engine=EngineSection(max_rows=3))
        chosen = {arm: drafters[arm] for arm in arms}
        return Pace(build_from_objects(target, byte_tokenizer(), chosen, config))

    return make


@pytest.fixture(scope="module")
def pace(make_pace: Callable[..., Pace]) -> Pace:
    return make_pace()


@pytest.fixture(scope="session")
def records() -> list[PromptRecord]:
    """Return ten prompts that fit, not sorted by length, and one that is too long."""
    texts = [f"{word} " * (i % 4 + 1) for i, word in enumerate("abcdefghij")]
    records = [PromptRecord(f"p{i}", f"d{i % 2}", text) for i, text in enumerate(texts)]
    return [*records[:5], PromptRecord("long", "d0", "x" * CONTEXT), *records[5:]]
