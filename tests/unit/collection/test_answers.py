"""A collection indexes its answers, and no drafter is replayed with the answer to its own prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from paceline.assembly import Pace
from paceline.collection import collect_trajectories
from paceline.config import CollectionSection
from paceline.contracts import GREEDY, PromptRecord, SamplingParams
from paceline.drafting.suffix_lookup import SuffixLookup, SuffixLookupSettings
from paceline.drafting.trigram.answer_table import write_answer_table
from paceline.drafting.trigram.drafter import TrigramTree
from paceline.drafting.trigram.settings import TrigramTreeSettings
from paceline.drafting.union import Union
from paceline.replay import max_output, replay
from paceline.store import load_collection
from paceline.store.answers import END, Answer, AnswerIndex, open_answers, write_answers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from paceline.store.records import CollectedPrompt

WARM = SamplingParams(temperature=0.8, seed=7, method="invariant")
ARMS = ("suffix", "tri", "both")


def pace_with_answers(make_pace: Callable[..., Pace], folder: Path) -> Pace:
    """Return a pace whose drafters use the answers in a folder, alone and in a union."""
    parts = make_pace(("lookup",)).parts
    suffix = SuffixLookupSettings(answers=folder)
    tri = TrigramTreeSettings(answers=folder)
    parts.drafters["suffix"] = SuffixLookup.build("suffix", suffix, parts.build_context())
    parts.drafters["tri"] = TrigramTree.build("tri", tri, parts.build_context())
    parts.drafters["both"] = Union("both", {n: parts.drafters[n] for n in ("suffix", "tri")})
    return Pace(parts)


def run(pace: Pace, records: list[PromptRecord], folder: Path, **settings: object) -> None:
    collect_trajectories(pace, records, folder, 24, samplings=(GREEDY, WARM), **settings)  # type: ignore[arg-type]


def index_of(pace: Pace, folder: Path) -> AnswerIndex:
    parts = pace.parts
    index = open_answers(folder, parts.vocabulary.hash(), parts.target.fingerprint())
    assert index is not None
    return index


def without(pace: Pace, prompt_id: str, whole: Path, folder: Path) -> None:
    """Write the index of a collection's answers to all other prompts, in the same order."""
    index = index_of(pace, whole)
    spans = set(index.spans_of(prompt_id))
    assert spans
    pairs = zip(index.starts[:-1].tolist(), index.starts[1:].tolist(), strict=True)
    answers = [Answer("", index.tokens[a : b - 1]) for a, b in pairs if (a, b) not in spans]  # type: ignore[arg-type]
    made_with = pace.parts.vocabulary.hash(), pace.parts.target.fingerprint()
    write_answers(folder, answers, *made_with, 10_000, write_answer_table)


@pytest.fixture(scope="module")
def similar() -> list[PromptRecord]:
    """Return prompts with similar answers."""
    texts = ["abc abc", "abc abd", "abc abc abc", "xbc abc", "abc"]
    return [PromptRecord(f"p{i}", "d", text) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def whole(
    make_pace: Callable[..., Pace],
    similar: list[PromptRecord],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Pace, Path]:
    """Return a collection whose drafters used its answers, built in the same run, and their pace."""
    folder = tmp_path_factory.mktemp("whole")
    pace = pace_with_answers(make_pace, folder)
    run(pace, similar, folder)
    return pace, folder


def replayed(pace: Pace, arm: str, prompt: CollectedPrompt) -> list[list[int]]:
    text = prompt.prompt_tokens, prompt.output_tokens
    context = pace.parts.target.context_length
    limit = max_output(prompt.max_new_tokens, len(prompt.prompt_tokens), context)
    result = replay(pace.parts.drafters[arm], *text, limit, sampling=prompt.sampling)
    return result.record.table.tolist()


def test_the_index_holds_every_answer_with_its_prompt(whole: tuple[Pace, Path]) -> None:
    index = index_of(*whole)
    prompts = load_collection(whole[1]).prompts
    for prompt in prompts:
        spans = index.spans_of(prompt.prompt_id)
        texts = [index.tokens[a:b].tolist() for a, b in spans]
        assert len(texts) == 2  # greedy and sampled
        assert [*prompt.output_tokens, END] in texts
    assert index.facts.num_answers == len(prompts) == 10


@pytest.mark.parametrize("arm", ARMS)
def test_a_prompt_is_replayed_as_if_its_answers_were_not_collected(
    make_pace: Callable[..., Pace], whole: tuple[Pace, Path], tmp_path: Path, arm: str
) -> None:
    pace, folder = whole
    seen_differ = others_differ = 0
    for prompt in load_collection(folder).prompts:
        stored = prompt.replays[arm].table.tolist()
        own = tmp_path / prompt.id
        without(pace, prompt.prompt_id, folder, own)
        assert stored == replayed(pace_with_answers(make_pace, own), arm, prompt)
        # its own answers would change it, and so would having no answers
        seen_differ += stored != replayed(pace, arm, prompt)
        nothing = pace_with_answers(make_pace, tmp_path / "nothing")
        others_differ += stored != replayed(nothing, arm, prompt)
    assert seen_differ and others_differ


def test_the_index_is_renewed_when_prompts_are_added(
    make_pace: Callable[..., Pace], similar: list[PromptRecord], tmp_path: Path
) -> None:
    stages: list[str] = []
    pace = pace_with_answers(make_pace, tmp_path)
    assert "no answers" in pace.notes[-1]
    run(pace, similar[:2], tmp_path)
    first = index_of(pace, tmp_path)
    run(pace, similar[:2], tmp_path, on_progress=lambda stage, done, total: stages.append(stage))
    assert stages == [] and index_of(pace, tmp_path).facts == first.facts

    run(pace, similar, tmp_path, on_progress=lambda stage, done, total: stages.append(stage))

    assert "answers" in stages
    renewed = index_of(pace, tmp_path)
    assert renewed.facts.num_answers == 10
    assert np.array_equal(renewed.tokens[: len(first.tokens)], first.tokens)
    assert not any("no answers" in note for note in pace.notes)


def test_the_configuration_bounds_the_index(
    make_pace: Callable[..., Pace], tmp_path: Path, similar: list[PromptRecord]
) -> None:
    pace = make_pace(("lookup",))
    bound = CollectionSection.model_construct(answer_tokens=60)  # below the schema's minimum
    pace.parts.config = pace.parts.config.model_copy(update={"collection": bound})

    collect_trajectories(pace, similar, tmp_path, 24)

    facts = index_of(pace, tmp_path).facts
    assert facts.num_tokens <= 60 and facts.num_dropped > 0
    assert facts.num_answers + facts.num_dropped == 5


def test_answers_of_another_collection_are_left_out_by_the_prompts_id(
    make_pace: Callable[..., Pace],
    whole: tuple[Pace, Path],
    similar: list[PromptRecord],
    tmp_path: Path,
) -> None:
    """The same prompt in other words has the same id."""
    pace, folder = whole
    reworded = [replace(record, prompt=record.prompt + " ") for record in similar]
    run(pace, reworded, tmp_path / "reworded")
    for prompt in load_collection(tmp_path / "reworded").prompts[:4]:
        own = tmp_path / prompt.id
        without(pace, prompt.prompt_id, folder, own)
        expected = replayed(pace_with_answers(make_pace, own), "suffix", prompt)
        assert prompt.replays["suffix"].table.tolist() == expected
