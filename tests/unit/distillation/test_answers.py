"""The target's answers as training texts: its own continuations are learned, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from support.distillation import (
    KilledError,
    distill_settings,
    tiny_settings,
    tiny_target,
    tiny_tokenizer,
    write_prompts,
)

from paceline.assembly import Pace, build_from_objects
from paceline.config import Config, DrafterSection, ModelSection
from paceline.contracts import PromptRecord
from paceline.distillation import distill
from paceline.distillation.batches import Example, collate
from paceline.distillation.outputs import (
    Answerer,
    answered_prompts,
    decode_outputs,
    open_outputs,
    open_target,
    read_examples,
)
from paceline.distillation.settings import AnswerSampling
from paceline.errors import ConfigError, StoreError
from paceline.store import ShardStore, read_prompts

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from paceline.distillation.train import Lesson

GREEDY = AnswerSampling()
WARM = AnswerSampling(temperature=0.9)
NUCLEUS = AnswerSampling(temperature=0.9, top_p=0.6)
ALL = (GREEDY, WARM, NUCLEUS)
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def pace() -> Pace:
    config = Config(target=ModelSection(model="unused"))
    return Pace(build_from_objects(tiny_target(), tiny_tokenizer(), {}, config))


@pytest.fixture
def prompts(tmp_path: Path) -> list[PromptRecord]:
    return read_prompts([write_prompts(tmp_path / "apples.jsonl", "apples", 12)])


def decode(
    pace: Pace,
    prompts: list[PromptRecord],
    folder: Path,
    samplings: tuple[AnswerSampling, ...] = ALL,
    **changes: Any,
) -> ShardStore:
    store = open_outputs(pace, folder, NEW_TOKENS)
    decode_outputs(pace, prompts, samplings, store, NEW_TOKENS, **changes)
    return store


def rows(store: ShardStore) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in store.read().to_pylist()}


@torch.inference_mode()
def greedy_continuation(model: PreTrainedModel, tokens: list[int]) -> list[int]:
    """Return transformers' own greedy answer, up to and with the end token."""
    ids = torch.tensor([tokens])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
    )
    continuation: list[int] = out[0, len(tokens) :].tolist()
    return continuation


# --- what is learned ------------------------------------------------------------------------------


def check_learned(taken: list[Example], prompts: dict[str, str], weight: float) -> None:
    """Compare the targets and weights of each text's batch with transformers' greedy continuation."""
    target, tokenizer = tiny_target(), tiny_tokenizer()
    for example in taken:
        prompt = tokenizer(prompts[example.id])["input_ids"]
        answer = greedy_continuation(target, prompt)
        batch = collate([example], weight)
        learned = batch.weights == 1
        assert batch.targets[learned].tolist() == answer
        inputs = batch.tokens[0, batch.places[learned]].tolist()
        assert inputs == [prompt[-1], *answer[:-1]]
        if weight:
            assert batch.targets[~learned].tolist() == prompt[1:]
            assert torch.all(batch.weights[~learned] == weight)


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_the_learned_tokens_are_the_targets_own_greedy_continuation(
    pace: Pace, prompts: list[PromptRecord], tmp_path: Path, weight: float
) -> None:
    """Prompts and answers swapped, or weights moved from the answer to the prompt, fail here."""
    examples = read_examples(decode(pace, prompts, tmp_path / "o", (GREEDY,)), prompts, (GREEDY,))
    assert len(examples) == len(prompts)
    check_learned(examples, {r.id: r.prompt for r in prompts}, weight)


def test_distill_trains_and_validates_on_greedy_continuations(
    pace: Pace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apples = write_prompts(tmp_path / "apples.jsonl", "apples", 30)
    settings = distill_settings(tmp_path).model_copy(update={"max_new_tokens": NEW_TOKENS})
    taken: list[list[Example]] = []

    def capture(run: object, lesson: Lesson, validation: list[Example], *_: object) -> None:
        taken.extend([list(lesson.answers), validation])
        raise KilledError

    monkeypatch.setattr("paceline.distillation.run._Run._phase", capture)
    with pytest.raises(KilledError):
        distill(pace, [apples], tmp_path / "a", settings)

    prompts = {r.id: r.prompt for r in read_prompts([apples])}
    examples, held = taken
    assert len(examples) > 10 and held
    assert not {e.id for e in examples} & {e.id for e in held}
    check_learned(examples + held, prompts, settings.prompt_weight)


# --- samplings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafter", [None, "none"])
def test_answers_are_the_targets_own_with_and_without_a_drafter(
    pace: Pace, prompts: list[PromptRecord], tmp_path: Path, drafter: str | None
) -> None:
    """A drafter that changed the text, or a seed that depends on the batch, would show."""
    stored = rows(decode(pace, prompts, tmp_path / "o", drafter=drafter))
    assert len(stored) == len(prompts) * len(ALL)
    alone = rows(decode(pace, prompts[3:4], tmp_path / "p", ALL[::-1], drafter="none"))
    for id, row in alone.items():
        assert stored[id] == row
    sampled = [row for row in stored.values() if row["temperature"]]
    assert {(row["temperature"], row["top_p"]) for row in sampled} == {(0.9, 1.0), (0.9, 0.6)}
    assert len({tuple(row["output_tokens"]) for row in sampled}) > len(prompts)


def test_the_seed_of_an_answer_is_its_prompts_own(pace: Pace, tmp_path: Path) -> None:
    """One seed for all prompts would give prompts with one text one answer."""
    given = [PromptRecord(f"twin/{i}", "", "w1 w2 w3") for i in range(6)]
    stored = rows(decode(pace, given, tmp_path / "o", (GREEDY, WARM)))
    for label, least, most in (("", 1, 1), ("@t0.9", 4, 6)):
        answers = {tuple(stored[record.id + label]["output_tokens"]) for record in given}
        assert least <= len(answers) <= most


def test_the_default_drafter_drafts(pace: Pace) -> None:
    answerer = Answerer.of(pace, None)
    # repeated tokens in prompt and answer, so that the lookup finds a match
    prompt = pace.encode([{"role": "user", "content": "w1 w2 w3 w1 w2 w3 w1 w2"}])
    done = [
        answerer.pace.complete(prompt, drafter=answerer.arm, max_new_tokens=40) for _ in range(2)
    ]
    assert sum(r.drafted for c in done for r in c.rounds) > 0
    assert pace.drafters == ["none"]  # the caller's own drafters are as before


def test_a_killed_run_resumes_with_the_same_answers(
    pace: Pace, prompts: list[PromptRecord], tmp_path: Path
) -> None:
    whole = rows(decode(pace, prompts, tmp_path / "whole"))

    def kill(done: int, total: int) -> None:
        if done == 8:
            raise KilledError

    with pytest.raises(KilledError):
        decode(pace, prompts, tmp_path / "part", shard_size=5, on_done=kill)
    assert open_outputs(pace, tmp_path / "part", NEW_TOKENS).num_rows == 5
    counts: list[tuple[int, int]] = []
    store = decode(pace, prompts, tmp_path / "part", on_done=lambda *c: counts.append(c))
    assert counts == [(i + 1, 31) for i in range(31)]
    assert rows(store) == whole

    # a sampling that is added later is decoded alone
    few = decode(pace, prompts, tmp_path / "few", (GREEDY,))
    assert few.num_rows == 12
    counts.clear()
    assert (
        rows(decode(pace, prompts, tmp_path / "few", on_done=lambda *c: counts.append(c))) == whole
    )
    assert counts[-1] == (24, 24)


def test_examples_have_their_own_ids_and_an_order_and_no_answer_twice(
    pace: Pace, prompts: list[PromptRecord], tmp_path: Path
) -> None:
    cold = AnswerSampling(temperature=1e-6)  # draws the most likely token, as greedy does
    samplings = (GREEDY, cold, WARM)
    store = decode(pace, prompts, tmp_path / "o", samplings)
    examples = read_examples(store, prompts, samplings)

    ids = [example.id for example in examples]
    assert len(set(ids)) == len(ids)
    assert not any("t1e-06" in id for id in ids)
    assert [id for id in ids if "@" not in id] == [record.id for record in prompts]
    assert any(id.endswith("@t0.9") for id in ids)
    stored = rows(store)
    for example in examples:
        row = stored[example.id]
        assert example.tokens.tolist() == row["prompt_tokens"] + row["output_tokens"]
        assert example.num_prompt == len(row["prompt_tokens"]) and example.domain == "apples"

    again = read_examples(store, prompts[::-1], samplings)
    assert sorted(e.id for e in again) == sorted(ids)
    assert again[0].id == prompts[-1].id
    colder = read_examples(store, prompts, (cold,))
    assert [e.id for e in colder] == [f"{record.id}@t1e-06" for record in prompts]
    assert answered_prompts(colder, [*prompts, PromptRecord("x", "", "y")], samplings) == prompts


def test_a_sampled_answer_of_one_prompt_is_not_taken_for_the_greedy_one_of_another(
    pace: Pace, tmp_path: Path
) -> None:
    given = [PromptRecord("a", "", "w1"), PromptRecord("a@t0.9", "", "w2")]
    with pytest.raises(ConfigError, match=r"'a@t0.9' belongs to the answers to two prompts"):
        decode(pace, given, tmp_path / "o")


def test_a_prompt_that_fills_the_context_has_no_answer(pace: Pace, tmp_path: Path) -> None:
    given = [PromptRecord("long", "", " ".join(["w1"] * 64)), PromptRecord("b", "", "w2")]
    store = decode(pace, given, tmp_path / "o", (GREEDY,))
    assert set(rows(store)) == {"b"}
    assert [e.id for e in read_examples(store, given, (GREEDY,))] == ["b"]


# --- mistakes -------------------------------------------------------------------------------------


def test_stored_answers_to_other_prompts_of_the_same_ids_are_refused(
    pace: Pace, prompts: list[PromptRecord], tmp_path: Path
) -> None:
    """Another file of the same name would be trained on the answers to this one."""
    decode(pace, prompts[:2], tmp_path / "o", (GREEDY,))
    changed = [prompts[0], replace(prompts[1], prompt="w1 w2")]
    with pytest.raises(StoreError, match=r"is to another prompt .*; delete or rename this folder"):
        decode(pace, changed, tmp_path / "o", (GREEDY,))


def test_a_store_of_an_earlier_version_is_refused_with_a_way_out(
    pace: Pace, tmp_path: Path
) -> None:
    names = ["id", "domain", "prompt_tokens", "output_tokens", "finish_reason"]
    schema = pa.schema([(name, pa.string()) for name in names])
    ShardStore(tmp_path / "old", "outputs", schema, {})
    with pytest.raises(
        StoreError, match=r"delete or rename this folder, or name another .*'outputs'"
    ):
        open_outputs(pace, tmp_path / "old", NEW_TOKENS)


@pytest.mark.parametrize(
    ("samplings", "message"),
    [
        ([{"temperature": 0.8}, {"temperature": 0.8}], "'t0.8' is given twice"),
        ([{}, {"temperature": 0}], "'greedy' is given twice"),
        ([{"temperature": 0, "top_p": 0.5}], "top_p 0.5 has no effect at temperature 0"),
        ([{"temperature": 1e-12}], "temperature 1e-12 is neither 0"),
        ([], "at least 1"),
    ],
)
def test_samplings_that_cannot_be_are_refused(samplings: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_settings(samplings=samplings)


def test_an_unknown_drafter_is_refused_before_models_are_read(pace: Pace) -> None:
    config = Config(
        target=ModelSection(model="nowhere"),
        drafters={"suffix": DrafterSection(kind="suffix_lookup", settings={})},
    )
    with pytest.raises(ConfigError, match=r"answers_drafter 'sufix' .* did you mean 'suffix'"):
        open_target(config, "sufix")
    with pytest.raises(ConfigError, match="answers_drafter 'suffix' is not a drafter; valid: none"):
        Answerer.of(pace, "suffix")


def test_only_the_drafter_of_the_answers_is_loaded(tmp_path: Path) -> None:
    """The others may not exist yet: a distillation may be what makes them."""
    tiny_target().save_pretrained(tmp_path / "target")
    tiny_tokenizer().save_pretrained(tmp_path / "target")
    config = Config(
        target=ModelSection(model=str(tmp_path / "target")),
        drafters={
            "later": DrafterSection(kind="draft_model", settings={"model": "nowhere"}),
            "suffix": DrafterSection(kind="suffix_lookup", settings={}),
            "again": DrafterSection(kind="prompt_lookup", settings={}),
            "both": DrafterSection(kind="union", settings={"parts": ["suffix", "again"]}),
        },
    )
    assert open_target(config, None).drafters == ["none"]
    assert open_target(config, "suffix").drafters == ["none", "suffix"]
    assert open_target(config, "both").drafters == ["none", "suffix", "again", "both"]


def test_views_of_the_stored_lists_hold_across_shards(pace: Pace, tmp_path: Path) -> None:
    """Offsets of a second shard that are counted from the first one's start would shift its texts."""
    store = open_outputs(pace, tmp_path / "o", NEW_TOKENS)
    given = [PromptRecord(f"p{i}", "d", "x") for i in range(7)]
    texts = {r.id: (list(range(i + 1)), list(range(i % 3))) for i, r in enumerate(given)}
    for part in (given[:2], given[2:3], given[3:]):
        store.append(
            [
                {"id": r.id, "prompt_tokens": texts[r.id][0], "output_tokens": texts[r.id][1]}
                for r in part
            ]
        )
    found = read_examples(store, given, (GREEDY,))
    assert [e.id for e in found] == [r.id for r in given if texts[r.id][1]]
    for example in found:
        prompt, answer = texts[example.id]
        assert example.num_prompt == len(prompt)
        assert np.array_equal(example.tokens, prompt + answer)
