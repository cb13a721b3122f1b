"""What is collected is what the engine does, once for each prompt, however often it was stopped."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import paceline.store.shards as shards
from paceline.collection import collect
from paceline.collection.card import CARD_JSON, CARD_MD
from paceline.contracts import AUTO, NONE, Completion, Context, Decision, PromptRecord, Request
from paceline.engine import Engine
from paceline.errors import ConfigError, StoreError
from paceline.files import write_atomically
from paceline.replay import rounds_of
from paceline.selection.features import feature_vector
from paceline.store import load_collection
from paceline.testing.reference import greedy_reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.assembly import Pace
    from paceline.collection import CollectionReport

MAX_NEW = 24
SHARD_SIZE = 3


def run(
    pace: Pace, records: list[PromptRecord], folder: Path, **settings: object
) -> CollectionReport:
    given: dict = {"max_new_tokens": MAX_NEW, "alignment": True, "shard_size": SHARD_SIZE}
    return collect(pace, records, folder, **{**given, **settings})


def completed(pace: Pace, record: PromptRecord, arm: str) -> Completion:
    message = [{"role": "user", "content": record.prompt}]
    return pace.complete(message, drafter=arm, max_new_tokens=MAX_NEW)


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the cards, which tell of runs; leftovers of a killed write are not content."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".part")
    files = (path for path in files if path.name not in (CARD_JSON, CARD_MD))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(
    pace: Pace, records: list[PromptRecord], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A collection that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    report = run(pace, records, folder)
    assert (report.num_prompts, report.num_decoded, report.num_present) == (10, 10, 0)
    assert (report.too_long, report.num_too_long) == (("long",), 1)
    assert report.num_replayed == {"near": 10, "lookup": 10}
    assert report.num_draft_outputs == {"near": 10}
    return folder


def test_outputs_and_rounds_are_those_of_serving(
    pace: Pace, records: list[PromptRecord], whole: Path
) -> None:
    prompts = {p.id: p for p in load_collection(whole).prompts}
    assert sorted(prompts) == sorted(r.id for r in records if r.id != "long")
    num_accepted = 0
    for record in records:
        if record.id == "long":
            continue
        prompt = prompts[record.id]
        assert prompt.domain == record.domain
        assert len(prompt.replays) == 2
        for arm in (NONE, *prompt.replays):
            rounds = rounds_of(prompt, arm)
            served = completed(pace, record, arm)
            assert served.token_ids == list(prompt.output_tokens)
            assert [[r.drafted, r.accepted] for r in served.rounds] == rounds.tolist()
            num_accepted += int(rounds[:, 1].sum())
    assert num_accepted > 50


def test_features_are_those_of_a_request_that_is_alone(
    pace: Pace, records: list[PromptRecord], whole: Path
) -> None:
    contexts: list[Context] = []

    def choose(context: Context) -> Decision:
        contexts.append(context)
        return Decision(arm=NONE)

    engine = Engine(pace.parts.target, pace.parts.drafters, lambda tokens: "", choose)
    for prompt in load_collection(whole).prompts:
        contexts.clear()
        list(engine.generate([Request(prompt.id, prompt.prompt_tokens, 2, drafter=AUTO)]))
        assert contexts[0].request_id == prompt.id
        alone = feature_vector(contexts[0])
        np.testing.assert_allclose(prompt.features, alone, rtol=1e-4, atol=1e-5)
        assert (prompt.features != feature_vector(replace(contexts[0], rows_in_flight=9))).any()


def test_draft_outputs_are_what_the_drafter_writes_alone(pace: Pace, whole: Path) -> None:
    model = pace.parts.drafters["near"].model.model
    for prompt in load_collection(whole).prompts:
        stops = sorted(pace.stop_token_ids())
        alone = greedy_reference(model, prompt.prompt_tokens, MAX_NEW, stops)
        assert alone.margin > 1e-4
        assert list(prompt.draft_outputs["near"]) == alone.tokens
        assert list(prompt.draft_outputs) == ["near"]


def test_a_second_run_has_nothing_to_do(
    pace: Pace, records: list[PromptRecord], whole: Path
) -> None:
    before = content(whole)
    report = run(pace, records, whole)
    assert (report.num_prompts, report.num_decoded, report.num_present) == (10, 0, 10)
    assert report.num_replayed == {"near": 0, "lookup": 0}
    assert content(whole) == before


def test_an_arm_is_added_without_decoding(
    make_pace: Callable[..., Pace], records: list[PromptRecord], whole: Path, tmp_path: Path
) -> None:
    run(make_pace(("lookup",)), records, tmp_path)
    with pytest.raises(StoreError, match="arm 'near' is not in this collection"):
        load_collection(tmp_path, ["near"])
    stages = []
    report = run(
        make_pace(), records, tmp_path, on_progress=lambda stage, done, total: stages.append(stage)
    )
    assert report.num_replayed == {"near": 10, "lookup": 0}
    assert set(stages) == {"replay", "outputs"}
    assert content(tmp_path) == content(whole)


def test_prompts_are_added_to_all_arms(
    pace: Pace, records: list[PromptRecord], tmp_path: Path
) -> None:
    run(pace, records[:4], tmp_path)
    report = run(pace, records, tmp_path)
    assert (report.num_prompts, report.num_decoded, report.num_present) == (10, 6, 4)
    assert len(load_collection(tmp_path).prompts) == 10


def test_progress_counts_prompts_to_the_end(
    pace: Pace, records: list[PromptRecord], tmp_path: Path
) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    run(
        pace, records, tmp_path,
        on_progress=lambda stage, done, total: seen.setdefault(stage, []).append((done, total)),
    )  # fmt: skip
    assert list(seen) == ["decode", "features", "replay", "outputs"]
    assert seen["decode"] == seen["replay"] == [(i, 10) for i in range(1, 11)]
    assert seen["outputs"][-1] == (10, 10)


def test_an_answer_of_one_token_has_features_and_no_rounds(
    make_pace: Callable[..., Pace], records: list[PromptRecord], tmp_path: Path, whole: Path
) -> None:
    """The engine asks for no choice there."""
    pace = make_pace()
    first = load_collection(whole).prompts[0].output_tokens[0]
    pace.parts.tokenizer.eos_token = pace.parts.tokenizer.convert_ids_to_tokens(first)
    run(pace, records, tmp_path)
    known = {p.id: p for p in load_collection(whole).prompts}
    prompts = load_collection(tmp_path).prompts
    assert any(len(p.output_tokens) == 1 for p in prompts)
    for prompt in prompts:
        np.testing.assert_allclose(prompt.features, known[prompt.id].features, rtol=1e-4, atol=1e-5)
        if len(prompt.output_tokens) == 1:
            assert {len(replayed.table) for replayed in prompt.replays.values()} == {0}


def test_lost_features_are_computed_again_without_decoding(
    pace: Pace, records: list[PromptRecord], whole: Path, tmp_path: Path
) -> None:
    run(pace, records, tmp_path)
    shutil.rmtree(tmp_path / "features")
    assert run(pace, records, tmp_path).num_decoded == 0
    for old, new in zip(
        load_collection(whole).prompts, load_collection(tmp_path).prompts, strict=True
    ):
        np.testing.assert_allclose(old.features, new.features, rtol=1e-4, atol=1e-5)


def test_mistakes_are_said_before_anything_is_decoded(
    make_pace: Callable[..., Pace], pace: Pace, records: list[PromptRecord], whole: Path
) -> None:
    before = content(whole)
    with pytest.raises(ConfigError, match="prompt id 'p0' occurs twice"):
        run(pace, [*records, records[0]], whole)
    changed = [replace(records[0], prompt="something else"), *records[1:]]
    with pytest.raises(StoreError, match="'p0' is there with another prompt; give the new"):
        run(pace, changed, whole)
    with pytest.raises(StoreError, match=r"now it is .*collect into a new folder"):
        run(make_pace(seed=1), records, whole)
    assert content(whole) == before


def test_prompts_go_in_as_they_are_without_a_chat_template(
    make_pace: Callable[..., Pace], records: list[PromptRecord], tmp_path: Path
) -> None:
    pace = make_pace()
    pace.parts.tokenizer.chat_template = None
    run(pace, records[:1], tmp_path)
    assert load_collection(tmp_path).prompts[0].prompt_tokens == tuple(
        pace.encode(records[0].prompt)
    )


# every file that is written counts as one: shards and manifests
@pytest.mark.parametrize("num_writes", range(0, 40, 3))
def test_stopped_at_any_write_a_run_continues_to_the_same_files(
    pace: Pace,
    records: list[PromptRecord],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_writes: int,
) -> None:
    left = num_writes

    def stop_in_time(path: Path, data: bytes) -> None:
        nonlocal left
        if left == 0:
            path.with_name(path.name + ".part").write_bytes(data[: len(data) // 2])
            raise KeyboardInterrupt
        left -= 1
        write_atomically(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_atomically", stop_in_time)
        with pytest.raises(KeyboardInterrupt):
            run(pace, records, tmp_path)
    run(pace, records, tmp_path)
    assert content(tmp_path) == content(whole)


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import conftest
from paceline.collection import collect

def on_progress(stage, done, total):
    if (stage, done) == (sys.argv[3], int(sys.argv[4])):
        os.kill(os.getpid(), signal.SIGKILL)

pace = conftest.make_pace.__wrapped__()()
records = conftest.records.__wrapped__()
collect(pace, records, sys.argv[2], 24, alignment=True, shard_size=3, on_progress=on_progress)
"""


def test_killed_twice_a_run_loses_and_doubles_nothing(
    pace: Pace, records: list[PromptRecord], whole: Path, tmp_path: Path
) -> None:
    """With signal 9, in the middle of decoding and in the middle of replaying."""
    num_there = []
    for stage, done in (("decode", 5), ("replay", 8)):
        arguments = [str(Path(__file__).parent), str(tmp_path), stage, str(done)]
        ended = subprocess.run(
            [sys.executable, "-c", KILLED, *arguments], check=False, capture_output=True, text=True
        )
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        num_there.append(len(content(tmp_path)))
    assert 0 < num_there[0] < num_there[1] < len(content(whole))
    report = run(pace, records, tmp_path)
    assert report.num_decoded == 0
    assert report.num_replayed["near"] == 10 - 2 * SHARD_SIZE
    ids = [p.id for p in load_collection(tmp_path).prompts]
    assert ids == sorted(r.id for r in records if r.id != "long")
    assert content(tmp_path) == content(whole)
