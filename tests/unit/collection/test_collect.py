"""A collection equals the engine's own runs, each prompt once, after any number of stops."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support.reference import greedy_reference
from transformers import BertConfig, BertModel

import paceline.store.shards as shards
from paceline.collection import collect_trajectories
from paceline.collection.card import CARD_JSON, CARD_MD
from paceline.collection.draft_outputs import read_outputs
from paceline.config import SelectionSection
from paceline.contracts import (
    AUTO,
    GREEDY,
    NONE,
    Completion,
    Context,
    Decision,
    PromptRecord,
    Request,
    SamplingParams,
)
from paceline.engine import Driver, Engine
from paceline.errors import ConfigError, StoreError
from paceline.files import write_atomically
from paceline.replay import rounds_of, target_distributions
from paceline.selection.encoders import TargetHidden, build_encoder
from paceline.selection.features import feature_vector
from paceline.store import ShardStore, TrainedOn, load_collection
from paceline.store.collection import read_overlaps
from paceline.store.layout import TRAJECTORIES
from paceline.testing.tokenizers import byte_tokenizer

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
    return collect_trajectories(pace, records, folder, **{**given, **settings})


def completed(pace: Pace, record: PromptRecord, arm: str) -> Completion:
    message = [{"role": "user", "content": record.prompt}]
    return pace.complete(message, drafter=arm, max_new_tokens=MAX_NEW)


def content(folder: Path) -> dict[str, bytes]:
    """Return all files except the cards, which describe runs, and the leftovers of killed writes."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".part")
    files = (path for path in files if path.name not in (CARD_JSON, CARD_MD))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(
    pace: Pace, records: list[PromptRecord], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a collection of one uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    report = run(pace, records, folder)
    assert (report.num_prompts, report.num_decoded, report.num_present) == (10, 10, 0)
    assert (report.too_long, len(report.too_long)) == (("long",), 1)
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
        list(Driver(engine).generate([Request(prompt.id, prompt.prompt_tokens, 2, drafter=AUTO)]))
        assert contexts[0].request_id == prompt.id
        alone = feature_vector(contexts[0])
        np.testing.assert_allclose(prompt.features, alone, rtol=1e-4, atol=1e-5)
        assert (prompt.features != feature_vector(replace(contexts[0], rows_in_flight=9))).any()


def test_draft_outputs_equal_the_drafters_own_greedy_text(pace: Pace, whole: Path) -> None:
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


WARM = SamplingParams(temperature=0.8, top_p=0.95, seed=7, method="invariant")


def test_sampled_answers_and_rounds_are_those_of_serving(
    pace: Pace, records: list[PromptRecord], whole: Path, tmp_path: Path
) -> None:
    """Also if a temperature is added to a greedy collection."""
    run(pace, records, tmp_path)
    report = run(pace, records, tmp_path, samplings=(GREEDY, WARM))
    assert (report.num_prompts, report.num_decoded, report.num_present) == (20, 10, 10)
    assert report.num_draft_outputs == {"near": 0}  # greedy, so one for all samplings
    prompts = {p.id: p for p in load_collection(tmp_path).prompts}
    greedy = {p.id: p for p in load_collection(whole).prompts}
    num_accepted, seeds = 0, set()
    for record in records:
        if record.id == "long":
            continue
        drawn = prompts[record.id + "@t0.8,p0.95"]
        assert (drawn.prompt_id, drawn.domain) == (record.id, record.domain)
        assert drawn.sampling == replace(WARM, seed=drawn.sampling.seed)
        assert prompts[record.id].output_tokens == greedy[record.id].output_tokens
        assert drawn.features[drawn.spans["text_stats"]][4] == np.float32(0.8)
        seeds.add(drawn.sampling.seed)
        for arm in (NONE, *drawn.replays):
            served = pace.complete(
                [{"role": "user", "content": record.prompt}],
                drafter=arm, max_new_tokens=MAX_NEW,
                temperature=0.8, top_p=0.95, seed=drawn.sampling.seed,
            )  # fmt: skip
            assert served.token_ids == list(drawn.output_tokens)
            rounds = rounds_of(drawn, arm)
            assert [[r.drafted, r.accepted] for r in served.rounds] == rounds.tolist()
            num_accepted += int(rounds[:, 1].sum())
    assert num_accepted > 30
    assert len(seeds) == 10
    texts = [p.output_tokens for id, p in prompts.items() if id in greedy]
    assert texts != [prompts[id + "@t0.8,p0.95"].output_tokens for id in greedy]


def test_another_seed_draws_other_answers(
    pace: Pace, records: list[PromptRecord], tmp_path: Path
) -> None:
    texts = []
    for seed in (1, 1, 2):
        folder = tmp_path / str(len(texts))
        run(pace, records[:3], folder, samplings=[replace(WARM, seed=seed)], alignment=False)
        texts.append([p.output_tokens for p in load_collection(folder).prompts])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("samplings", "message"),
    [
        ((), "at least one sampling"),
        ((GREEDY, GREEDY), "temperature is given twice"),
        ((replace(WARM, top_p=0.0),), "top_p must be a number in"),
        ((replace(GREEDY, top_k=3),), "top_k given with temperature 0"),
    ],
)
def test_invalid_samplings_are_refused(
    pace: Pace,
    records: list[PromptRecord],
    tmp_path: Path,
    samplings: tuple[SamplingParams, ...],
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(pace, records, tmp_path, samplings=samplings)
    assert not list(tmp_path.iterdir())


def test_scores_are_added_to_an_old_collection_and_move_nothing_else(
    pace: Pace, records: list[PromptRecord], whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    stages: list[str] = []
    report = run(pace, records, tmp_path, scores=True, on_progress=lambda s, d, t: stages.append(s))
    assert report.num_scored == {"near": 10}
    assert set(stages) == {"scores"}
    new = content(tmp_path)
    assert {name: new[name] for name in content(whole)} == content(whole)
    collected = {p.id: p for p in load_collection(tmp_path).prompts}
    table = pq.read_table(tmp_path / "scores" / "near" / "shard-00000.parquet").to_pylist()
    near = pace.parts.drafters["near"]
    for row in table:
        prompt = collected[row["id"]]
        text = prompt.prompt_tokens, prompt.output_tokens
        p = target_distributions(pace.parts.target, *text)
        scores = near.would_accept(*text, p).scores
        np.testing.assert_allclose(row["ratio"], scores.ratio, atol=1e-5)
        np.testing.assert_allclose(row["overlap"], scores.overlap, atol=1e-5)
        assert np.array_equal(read_overlaps(tmp_path)["near"][row["id"]], row["overlap"])
        assert min(row["overlap"]) > 0.0 and max(row["overlap"]) <= 1.0 + 1e-5


def test_encoders_are_added_to_an_old_collection_without_the_target(
    make_pace: Callable[..., Pace],
    records: list[PromptRecord],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(whole, tmp_path / "c")
    shutil.rmtree(tmp_path / "c" / "features" / "hashed_ngrams")
    torch.manual_seed(0)
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = BertConfig(vocab_size=260, intermediate_size=8, **small)
    BertModel(config).save_pretrained(tmp_path / "encoder")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None  # sentence-transformers would apply it
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(258)
    tokenizer.save_pretrained(tmp_path / "encoder")
    pace = make_pace()
    section = SelectionSection(sentence_model=str(tmp_path / "encoder"))
    pace.parts.config = pace.parts.config.model_copy(update={"selection": section})

    def no_forward(*given: object) -> None:
        raise AssertionError("the target ran")

    monkeypatch.setattr(pace.parts.target, "forward", no_forward)
    stages: list[str] = []
    run(pace, records, tmp_path / "c", on_progress=lambda s, d, t: stages.append(s))
    assert set(stages) == {"features"}
    new = content(tmp_path / "c")
    assert {name: new[name] for name in content(whole)} == content(whole)
    encode = build_encoder(0, section, ["sentence", "hashed_ngrams"])
    for prompt in load_collection(tmp_path / "c", encoders=["sentence", "hashed_ngrams"]).prompts:
        tokens, nothing = prompt.prompt_tokens, np.zeros(0, np.float32)
        context = Context(
            tokens, nothing, nothing, GREEDY, 1, text=lambda t=tokens: pace.parts.text(t)
        )
        assert np.array_equal(prompt.features, encode(context))


def outputs_file(path: Path, **written: object) -> Path:
    lines = [{"id": id, **({"output": o} if isinstance(o, str) else {"output_tokens": o})}
             for id, o in written.items()]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_outputs_made_elsewhere_are_kept_by_name(
    pace: Pace, records: list[PromptRecord], whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "c")
    written: dict[str, object] = {f"p{i}": f"answer {i}" for i in range(10)}
    written |= {"p3": [65, 66], "not collected": "x"}
    path = outputs_file(tmp_path / "o.jsonl", **written)
    for expected in (10, 0):  # the second time there is nothing to add
        report = run(pace, records, tmp_path / "c", outputs={"black-box": path})
        assert report.num_draft_outputs == {"near": 0, "black-box": expected}
    for prompt in load_collection(tmp_path / "c").prompts:
        text = pace.parts.text(prompt.draft_outputs["black-box"])
        assert text == ("AB" if prompt.id == "p3" else written[prompt.id])
        assert prompt.draft_outputs["near"]  # still stored
        assert "black-box" not in prompt.replays
    changed = outputs_file(tmp_path / "o.jsonl", **{**written, "p4": "other"})
    with pytest.raises(StoreError, match="another output to 'p4' than the one kept"):
        run(pace, records, tmp_path / "c", outputs={"black-box": changed})
    fewer = outputs_file(tmp_path / "o.jsonl", p0="a", p9="b")
    with pytest.raises(StoreError, match=r"no output to .* and 3 more; every collected"):
        run(pace, records, tmp_path / "c", outputs={"other": fewer})
    with pytest.raises(ConfigError, match="'near' is configured here"):
        run(pace, records, tmp_path / "c", outputs={"near": fewer})
    assert sorted(p.name for p in (tmp_path / "c" / "outputs").iterdir()) == ["black-box", "near"]
    # reported before anything is decoded
    with pytest.raises(StoreError, match="no output to"):
        run(pace, records, tmp_path / "new", outputs={"other": fewer})
    with pytest.raises(StoreError, match="the collection is empty"):
        load_collection(tmp_path / "new")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "o.jsonl:2: not a JSON object"),
        ('"text"', "o.jsonl:2: not a JSON object with 'id'"),
        ('{"output": "x"}', "o.jsonl:2: not a JSON object with 'id'"),
        ('{"id": "p0", "output": "x"}', "o.jsonl:2: id 'p0' occurs twice"),
        ('{"id": "p1"}', "o.jsonl:2: needs 'output', a text, or 'output_tokens'"),
        ('{"id": "p1", "output_tokens": [1, "2"]}', "o.jsonl:2: needs 'output'"),
        ('{"id": "p1", "output_tokens": [9999]}', "o.jsonl:2: 9999 is no token id"),
    ],
)
def test_a_broken_output_is_named_by_its_line(
    pace: Pace, tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "o.jsonl"
    path.write_text('{"id": "p0", "output": "fine"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_outputs(pace, path)


def trained(pace: Pace, prompts: dict[str, list[str] | None]) -> Pace:
    """Give drafters a record of these training prompts; None: it is not known."""
    for name, texts in prompts.items():
        record = None if texts is None else TrainedOn.of(texts)
        pace.parts.drafters[name].trained_on = lambda record=record: record  # type: ignore[method-assign]
    return pace


def test_each_prompt_records_which_drafters_were_trained_on_it(
    make_pace: Callable[..., Pace], records: list[PromptRecord], tmp_path: Path
) -> None:
    """Also prompts and drafters that a later run adds; what nobody can know stays unknown."""
    pace = trained(make_pace(), {"near": None})
    run(pace, records[:4], tmp_path, samplings=(GREEDY, SamplingParams(0.8, method="invariant")))
    marked = {p.id: dict(p.trained_on) for p in load_collection(tmp_path).prompts}
    assert len(marked) == 8
    assert all(found == {"lookup": False} for found in marked.values())
    facts = json.loads((tmp_path / CARD_JSON).read_text())
    assert facts["trained_on"] == {"near": None, "lookup": {"known": 4, "trained_on": 0}}
    assert "- `near`: not known" in (tmp_path / CARD_MD).read_text()

    learned = [records[1].prompt + "  ", records[6].prompt]
    run(trained(pace, {"near": learned}), records[1:8], tmp_path)
    marked = {p.prompt_id: dict(p.trained_on) for p in load_collection(tmp_path).prompts}
    of_near = {id: found.get("near") for id, found in marked.items()}
    assert of_near[records[0].id] is None
    assert {id for id, seen in of_near.items() if seen} == {records[1].id, records[6].id}
    assert [id for id, seen in of_near.items() if seen is None] == [records[0].id]
    card = (tmp_path / CARD_MD).read_text()
    assert "- `near`: 2 of 6" in card

    run(pace, records, tmp_path)
    marked = {p.prompt_id: dict(p.trained_on) for p in load_collection(tmp_path).prompts}
    assert {id for id, found in marked.items() if found["near"]} == {records[1].id, records[6].id}
    with pytest.raises(StoreError, match=r"was made with prompts .* delete .*trained_on"):
        run(trained(pace, {"near": learned[:1]}), records, tmp_path)


def test_the_training_record_of_another_drafter_is_refused(
    make_pace: Callable[..., Pace], records: list[PromptRecord], tmp_path: Path
) -> None:
    run(make_pace(), records[:3], tmp_path)
    manifest = tmp_path / "trained_on" / "lookup" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["identity"]["arm"] = "another"
    manifest.write_text(json.dumps(content))
    with pytest.raises(StoreError, match="another drafter 'lookup' than the one replayed; delete"):
        load_collection(tmp_path)


def test_the_card_tells_of_every_run(
    pace: Pace, records: list[PromptRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text("what the prompts were read from")
    folder = tmp_path / "c"
    run(pace, records[:4], folder, sources=[source])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ShardStore, "append", stopped)
        run(pace, records, folder, samplings=(GREEDY, WARM))
    run(pace, records, folder, samplings=(GREEDY, WARM))
    card = json.loads((folder / CARD_JSON).read_text())
    first, stopped_run, last = card["runs"]
    assert [run["finished"] for run in card["runs"]] == [True, False, True]
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert first["prompt_files"] == [{"file": "prompts.jsonl", "sha256": digest}]
    assert (first["num_to_decode"], last["num_to_decode"]) == (4, 16)
    assert stopped_run["samplings"] == last["samplings"] == ["greedy", "t0.8,p0.95"]
    counts = {(r["task"], r["sampling"]): r["rows"] for r in card["rows"]}
    assert counts == {(d, s): 5 for d in ("d0", "d1") for s in ("greedy", "t0.8,p0.95")}
    assert card["target"]["fingerprint"] == pace.parts.target.fingerprint()
    assert set(card["drafters"]) == {"none", "near", "lookup"}
    assert set(card["encoders"]) == {"target_hidden", "text_stats", "hashed_ngrams"}
    page = (folder / CARD_MD).read_text()
    assert "| d0 | t0.8,p0.95 | 5 |" in page and "(did not finish)" in page and digest[:12] in page


def stopped(store: ShardStore, rows: object) -> None:
    raise KeyboardInterrupt


def test_a_feature_that_is_no_number_stops_before_it_is_kept(
    make_pace: Callable[..., Pace],
    records: list[PromptRecord],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def overflow(self: TargetHidden, context: Context) -> np.ndarray:
        return np.full(self.num_features, np.inf, dtype=np.float32)

    monkeypatch.setattr(TargetHidden, "encode", overflow)
    with pytest.raises(StoreError, match="a feature of 'target_hidden' is not a finite number"):
        run(make_pace(), records, tmp_path)
    with pytest.raises(StoreError, match="the collection is empty"):
        load_collection(tmp_path)


def test_without_drafters_only_answers_are_collected(
    make_pace: Callable[..., Pace], records: list[PromptRecord], whole: Path, tmp_path: Path
) -> None:
    report = run(make_pace(()), records, tmp_path)
    assert report.num_replayed == {}
    bare, full = load_collection(tmp_path).prompts, load_collection(whole).prompts
    assert [p.output_tokens for p in bare] == [p.output_tokens for p in full]


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
    assert list(seen) == ["decode", "features", "answers", "replay", "outputs"]
    assert seen["decode"] == seen["replay"] == [(i, 10) for i in range(1, 11)]
    assert seen["outputs"][-1] == (10, 10)


def test_an_answer_of_one_token_has_features_and_no_rounds(
    make_pace: Callable[..., Pace], records: list[PromptRecord], tmp_path: Path, whole: Path
) -> None:
    """The engine asks for no choice in that case."""
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


def test_mistakes_are_reported_before_anything_is_decoded(
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


# num_writes counts written files: shards and manifests
@pytest.mark.parametrize("num_writes", range(0, 60, 4))
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


def test_features_of_a_stopped_run_are_dropped_when_its_prompt_changes(
    pace: Pace, records: list[PromptRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: ShardStore, rows: list[dict[str, Any]]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        features = ShardStore.append
        patch.setattr(
            ShardStore,
            "append",
            lambda store, rows: (stop if store.kind == TRAJECTORIES else features)(store, rows),
        )
        with pytest.raises(KeyboardInterrupt):
            run(pace, records, tmp_path / "one")
    others = [replace(r, prompt=f"{r.prompt} And again!") for r in records]
    run(pace, others, tmp_path / "one")
    run(pace, others, tmp_path / "other")

    found, expected = (load_collection(tmp_path / n).prompts for n in ("one", "other"))
    for mine, theirs in zip(found, expected, strict=True):
        assert np.array_equal(mine.features, theirs.features)
