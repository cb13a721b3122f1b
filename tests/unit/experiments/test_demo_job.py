"""The demo's lookup drafts from the demo's own collected answers, never from those of timed prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from paceline.config import Config, DrafterSection, ModelSection
from paceline.drafting.suffix_lookup import SuffixLookup
from paceline.experiments import demo_job
from paceline.experiments.demo_prompts import demo_prompts
from paceline.store.answers import open_answers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_a_timed_prompt_has_no_answer_in_the_index_that_is_drafted_from(
    save_tiny_models: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = save_tiny_models(2048)
    settings: dict[str, Any] = {"answers": str(tmp_path / "of another collection")}
    config = Config(
        target=ModelSection(model=str(models / "target"), dtype="float32", device="cpu"),
        drafters={"suffix": DrafterSection(kind="suffix_lookup", settings=settings)},
    )
    prepared = []
    prepare = demo_job.prepare

    def record(*given: Any) -> Any:
        prepared.append(prepare(*given))
        return prepared[0]

    monkeypatch.setattr(demo_job, "prepare", record)

    demo_job.demo(config, tmp_path / "demo", 4, 1, 8)

    parts = prepared[0].pace.parts
    suffix = parts.drafters["suffix"]
    assert isinstance(suffix, SuffixLookup) and suffix._answers is not None
    used = suffix._answers.index
    assert used is not None  # it was built after the drafter
    assert used.folder.is_relative_to(tmp_path / "demo" / "collection")
    index = open_answers(tmp_path / "demo" / "collection", parts.vocabulary.hash())
    assert index is not None and index.facts == used.facts
    collected, timed = demo_prompts(4, 1)
    assert all(len(index.spans_of(prompt.id)) == 1 for prompt in collected)
    assert not any(index.spans_of(prompt.id) for prompt in timed)
    assert timed
