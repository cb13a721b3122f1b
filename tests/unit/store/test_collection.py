"""Collections: rows are joined by id; missing, unfinished and foreign parts are named in one line."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from paceline.config import DEFAULT_ENCODERS
from paceline.contracts import GREEDY, SamplingParams
from paceline.errors import StoreError
from paceline.store import Collection, load_collection
from paceline.store.layout import Trajectory

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

IDS = ("b", "a", "c")
OUTPUT = [5, 6, 7, 8, 9, 10]
ROUNDS = ([4, 4, 2], [1, 0, 2])  # 1 + 2 + 1 + 2 tokens, no bonus token at the end


def open_collection(folder: Path, target: str = "t") -> Collection:
    return Collection(folder, target, "v", none="kind=none", hidden_size=2)


def trajectory(id: str, sampling: SamplingParams = GREEDY) -> dict[str, Any]:
    output = tuple(OUTPUT)
    return Trajectory(id, f"domain of {id}", (1, 2), output, "stop", 9, sampling).to_row()


def replayed(id: str) -> dict[str, Any]:
    scores = {"match": [True] * 6, "confidence": []}
    rounds = {"everywhere": False, "drafted": ROUNDS[0], "accepted": ROUNDS[1]}
    return {"id": id, **rounds, **scores}


def fill(folder: Path, arms: Sequence[str] = ("math",), ids: Sequence[str] = IDS) -> Collection:
    collection = open_collection(folder)
    collection.trajectories.append([trajectory(id) for id in ids[:2]])
    collection.trajectories.append([trajectory(id) for id in ids[2:]])
    # in another order and in other shards than the trajectories
    for encoder, width, sign in (("target_hidden", 2, 1), ("text_stats", 3, -1), ("other", 1, 0)):
        store = collection.features(encoder, f"line of {encoder}")
        for id in reversed(ids):
            values = np.full(width, sign * ord(id[0]), dtype=np.float32)
            store.append([{"id": id, "features": values}])
    for arm in arms:
        collection.replays(arm, f"kind={arm}").append([replayed(id) for id in ids])
    return collection


def add_features(collection: Collection, id: str) -> None:
    for encoder in DEFAULT_ENCODERS:
        collection.features(encoder, "line").append([{"id": id, "features": [1.0]}])


def refused(folder: Path, match: str, arms: Sequence[str] | None = None) -> None:
    with pytest.raises(StoreError, match=match) as caught:
        load_collection(folder, arms)
    assert "\n" not in str(caught.value)


def test_a_loaded_prompt_has_everything_that_was_stored(tmp_path: Path) -> None:
    collection = fill(tmp_path, ("math", "code"))
    outputs = collection.outputs("math", "kind=math")
    outputs.append([{"id": "c", "output_tokens": [5, 9]}, {"id": "a", "output_tokens": []}])
    prompts, identity = load_collection(tmp_path)
    assert [p.id for p in prompts] == ["a", "b", "c"]
    for prompt in prompts:
        assert prompt.domain == f"domain of {prompt.id}"
        assert (prompt.prompt_tokens, prompt.output_tokens) == ((1, 2), tuple(OUTPUT))
        assert prompt.max_new_tokens == 9
        assert prompt.features.tolist() == [ord(prompt.id)] * 2 + [-ord(prompt.id)] * 3
        assert prompt.spans == {"target_hidden": slice(0, 2), "text_stats": slice(2, 5)}
        assert (prompt.prompt_id, prompt.sampling) == (prompt.id, GREEDY)
        assert prompt.features.dtype == np.float32
        assert list(prompt.replays) == ["code", "math"]
        assert not prompt.replays["math"].everywhere
        assert prompt.replays["math"].table.tolist() == [list(r) for r in zip(*ROUNDS, strict=True)]
    assert [p.draft_outputs for p in prompts] == [{"math": ()}, {}, {"math": (5, 9)}]
    assert identity == (
        "t", "v", 2, {"none": "kind=none", "code": "kind=code", "math": "kind=math"},
        {"target_hidden": "line of target_hidden", "text_stats": "line of text_stats"},
    )  # fmt: skip


def test_features_stand_in_the_order_asked_for(tmp_path: Path) -> None:
    fill(tmp_path)
    prompts, identity = load_collection(tmp_path, encoders=("other", "text_stats"))
    assert prompts[0].spans == {"other": slice(0, 1), "text_stats": slice(1, 4)}
    assert prompts[0].features.tolist() == [0.0] + [-ord("a")] * 3
    assert list(identity.encoders) == ["other", "text_stats"]
    bare = load_collection(tmp_path, encoders=()).prompts[0]
    assert (bare.features.shape, bare.spans) == ((0,), {})


def test_a_sampled_row_keeps_its_prompt_and_its_exact_sampling(tmp_path: Path) -> None:
    warm = SamplingParams(0.7, 40, 0.95, 0.1, seed=2**61 + 1, method="invariant")
    ids = ("a", "a@t0.7,k40,p0.95,m0.1")
    collection = fill(tmp_path, ids=())
    for id, sampling in zip(ids, (GREEDY, warm), strict=True):
        collection.trajectories.append([trajectory(id, sampling)])
        collection.replays("math", "kind=math").append([replayed(id)])
    collection.outputs("math", "kind=math").append([{"id": "a", "output_tokens": [3]}])
    prompts = load_collection(tmp_path, encoders=()).prompts
    assert [p.id for p in prompts] == list(ids)
    assert [p.prompt_id for p in prompts] == ["a", "a"]
    assert [p.sampling for p in prompts] == [GREEDY, warm]
    # a drafter's greedy output belongs to the prompt under every sampling
    assert [p.draft_outputs for p in prompts] == [{"math": (3,)}] * 2


def test_features_of_two_widths_are_refused(tmp_path: Path) -> None:
    collection = fill(tmp_path)
    collection.trajectories.append([trajectory("d")])
    collection.replays("math", "kind=math").append([replayed("d")])
    collection.features("other", "line of other").append([{"id": "d", "features": [1.0, 2.0]}])
    with pytest.raises(StoreError, match="features/other: rows of 1 and of 2 features; delete"):
        load_collection(tmp_path, encoders=["other"])


def test_only_the_arms_asked_for_are_loaded(tmp_path: Path) -> None:
    fill(tmp_path, ("math", "code"))
    prompts, identity = load_collection(tmp_path, ["none", "code"])
    assert list(prompts[0].replays) == ["code"]
    assert list(identity.arms) == ["none", "code"]


@pytest.mark.parametrize("arm", ["a/b", "..", ".", "x=y", "ä ö", "%2E", "A"])
def test_an_arm_may_be_called_anything(tmp_path: Path, arm: str) -> None:
    fill(tmp_path / "c", (arm,))
    assert list(tmp_path.iterdir()) == [tmp_path / "c"]
    assert list(load_collection(tmp_path / "c").identity.arms) == ["none", arm]


def test_a_missing_and_an_empty_collection_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no collection here; run `paceline collect PROMPTS`")
    assert not (tmp_path / "nowhere").exists()
    open_collection(tmp_path)
    refused(tmp_path, "the collection is empty; run `paceline collect PROMPTS`")


def test_a_missing_arm_is_named(tmp_path: Path) -> None:
    fill(tmp_path)
    refused(
        tmp_path,
        "arm 'code' is not in this.*run `paceline collect PROMPTS` again to add what",
        ["code"],
    )
    assert not (tmp_path / "replays" / "code").exists()


def test_an_unfinished_arm_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    collection = fill(tmp_path)
    collection.replays("code", "kind=code").append([replayed("a")])
    refused(tmp_path, "code: covers 1 of 3 prompts; run `paceline collect PROMPTS` again")
    assert len(load_collection(tmp_path, ["math"]).prompts) == 3


def test_missing_features_are_named(tmp_path: Path) -> None:
    fill(tmp_path)
    shutil.rmtree(tmp_path / "features")
    refused(
        tmp_path, "the features of 'target_hidden' are not in.*`paceline collect PROMPTS` again"
    )


def test_another_target_or_tokenizer_is_refused(tmp_path: Path) -> None:
    fill(tmp_path)
    with pytest.raises(StoreError, match=r"target 't', now it is 'other'; collect into a new"):
        open_collection(tmp_path, "other")
    with pytest.raises(StoreError, match=r"tokenizer 'v', now it is 'w'"):
        Collection(tmp_path, "t", "w", none="kind=none", hidden_size=2)


def test_an_arm_that_became_another_one_says_which_folder_to_delete(tmp_path: Path) -> None:
    collection = fill(tmp_path)
    folder = tmp_path / "replays" / "math"
    with pytest.raises(StoreError, match=rf"now it is 'K=9'; delete {folder} and run"):
        collection.replays("math", "K=9")
    with pytest.raises(StoreError, match=r"'line of other', now it is 'new'; delete .*features"):
        collection.features("other", "new")


def test_replays_of_other_trajectories_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "old")
    shutil.move(tmp_path / "old" / "replays", tmp_path / "new" / "replays")
    collection = open_collection(tmp_path / "new")
    add_features(collection, "a")
    collection.trajectories.append([{**trajectory("a"), "output_tokens": [1, 2, 3, 4]}])
    refused(tmp_path / "new", "replay of 'a' is not of the trajectory collected here; delete")
    shutil.rmtree(tmp_path / "new" / "trajectories")
    shutil.rmtree(tmp_path / "new" / "features")
    other = open_collection(tmp_path / "new", "other")
    add_features(other, "a")
    other.trajectories.append([trajectory("a")])
    refused(tmp_path / "new", "made with target 't', the trajectories with 'other'; delete")


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    fill(tmp_path)
    shard = tmp_path / "replays" / "math" / "shard-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-20])
    refused(tmp_path, "math/shard-00000.parquet: damaged")
