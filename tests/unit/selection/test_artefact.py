"""The policy on disk: the same choices after a round trip, and every mismatch refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from paceline.selection.network import PolicyNetwork

from paceline.contracts import Context, SamplingParams
from paceline.errors import ArtefactError
from paceline.selection import PolicyIdentity, is_policy, load_policy, save_policy
from paceline.selection.artefact import (
    CARD_FILE,
    WEIGHTS_FILE,
    PolicyArtefact,
    RewardCard,
    network_policy,
    read_card,
)
from paceline.selection.features import FEATURE_VERSION, num_features

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

D = 4
ARMS = {
    "none": "kind=none, num_draft_tokens=0",
    "code": "kind=draft_model, num_draft_tokens=4",
    "lookup": "kind=prompt_lookup, num_draft_tokens=6",
}
IDENTITY = PolicyIdentity(target="target-1", tokenizer="tokens-1", hidden_size=D, arms=ARMS)


def network(seed: int = 0, num_arms: int = len(ARMS)) -> PolicyNetwork:
    rng = np.random.default_rng(seed)
    F, H = num_features(D), 6
    shapes = [(F,), (F,), (F, H), (H,), (H, num_arms), (num_arms,)]
    return PolicyNetwork(*(rng.normal(size=shape).astype(np.float32) for shape in shapes))


def card(**changes: Any) -> PolicyArtefact:
    values: dict[str, Any] = {
        "target": IDENTITY.target,
        "tokenizer": IDENTITY.tokenizer,
        "hidden_size": D,
        "arms": list(ARMS.items()),
        "reward": RewardCard(kind="alignment", version=1, alpha=0.5),
        "costs": "costs-1",
        "learner": {"seed": 0, "learning_rate": 0.003},
        "training": {"num_prompts": 100},
    }
    return PolicyArtefact(**values | changes)


def contexts() -> list[Context]:
    rng = np.random.default_rng(1)
    return [
        Context(
            rng.integers(0, 20, 40).tolist(),
            *rng.normal(size=(2, D)).astype(np.float32),
            SamplingParams(),
            1,
        )
        for _ in range(50)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_policy(tmp_path / "policy", network(), card())
    return tmp_path / "policy"


def test_a_round_trip_gives_the_same_decisions(folder: Path) -> None:
    before, after = network_policy(network(), list(ARMS)), load_policy(folder, IDENTITY)

    decisions = [after.choose(context) for context in contexts()]
    assert decisions == [before.choose(context) for context in contexts()]
    assert len({decision.arm for decision in decisions}) > 1
    assert after.id.startswith("learned:")
    assert after.id != network_policy(network(seed=1), list(ARMS)).id


def test_the_card_says_what_the_policy_was_learned_with(folder: Path) -> None:
    found = read_card(folder)

    assert found == card(weights_sha256=found.weights_sha256)
    assert (found.format_version, found.feature_version) == (1, FEATURE_VERSION)


def test_only_the_two_files_are_left(folder: Path) -> None:
    save_policy(folder, network(seed=1), card())

    assert sorted(path.name for path in folder.iterdir()) == [CARD_FILE, WEIGHTS_FILE]
    assert is_policy(folder)


def test_the_order_of_the_configured_arms_does_not_matter(folder: Path) -> None:
    shuffled = replace(IDENTITY, arms=dict(reversed(ARMS.items())))

    before, after = load_policy(folder, IDENTITY), load_policy(folder, shuffled)
    assert [before.choose(c) for c in contexts()] == [after.choose(c) for c in contexts()]


def without(name: str) -> dict[str, str]:
    return {arm: line for arm, line in ARMS.items() if arm != name}


@pytest.mark.parametrize(
    ("expect", "words"),
    [
        ({"target": "target-2"}, ["another target", "expected target-2", "found target-1"]),
        ({"tokenizer": "tokens-2"}, ["another tokenizer", "expected tokens-2", "found tokens-1"]),
        ({"hidden_size": 8}, ["another hidden size", "expected 8", "found 4"]),
        ({"arms": ARMS | {"math": "kind=draft_model"}}, ["does not know math", "expected code"]),
        ({"arms": without("code")}, ["knows code, not configured", "found code, lookup, none"]),
        (
            {"arms": without("code") | {"math": "kind=draft_model"}},
            ["does not know math and it knows code"],
        ),
        (
            {"arms": ARMS | {"code": "kind=draft_model, num_draft_tokens=5"}},
            ["another arm 'code'", "num_draft_tokens=5", "num_draft_tokens=4"],
        ),
    ],
    ids=["target", "tokenizer", "hidden size", "missing arm", "extra arm", "renamed", "settings"],
)
def test_a_policy_made_for_something_else_is_refused(
    folder: Path, expect: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ArtefactError) as caught:
        load_policy(folder, replace(IDENTITY, **expect))

    assert_one_line(caught.value, [str(folder), *words])


def assert_one_line(error: ArtefactError, words: list[str]) -> None:
    text = str(error)
    assert "\n" not in text
    assert text.endswith("run `paceline learn`")
    for word in words:
        assert word in text


def edited(**changes: Any) -> Callable[[Path], None]:
    """Change entries of policy.json; None takes one out."""

    def edit(folder: Path) -> None:
        path = folder / CARD_FILE
        raw = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))

    return edit


def truncated(name: str) -> Callable[[Path], None]:
    def truncate(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return truncate


def removed(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def one_bit_flipped(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS_FILE).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS_FILE).write_bytes(bytes(data))


def torn(folder: Path) -> None:
    """The weights of a second save arrived, its card did not."""
    old = (folder / CARD_FILE).read_bytes()
    save_policy(folder, network(seed=1), card())
    (folder / CARD_FILE).write_bytes(old)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            edited(feature_version=99),
            ["feature version", f"expected {FEATURE_VERSION}", "found 99"],
        ),
        (edited(format_version=2), ["format version", "expected 1", "found 2"]),
        (edited(format_version=None), ["format version", "found None"]),
        (edited(arms=None), [CARD_FILE, "'arms' is missing"]),
        (edited(hidden_size="many"), [CARD_FILE, "hidden_size"]),
        (edited(colour="red"), [CARD_FILE, "unknown key 'colour'"]),
        (truncated(CARD_FILE), [CARD_FILE, "damaged"]),
        (lambda folder: (folder / CARD_FILE).write_text("[]"), [CARD_FILE, "damaged"]),
        (lambda folder: (folder / CARD_FILE).write_bytes(b"\xff"), [CARD_FILE, "damaged"]),
        (removed(CARD_FILE), [CARD_FILE, "no policy here"]),
        (removed(WEIGHTS_FILE), [WEIGHTS_FILE, "no such file"]),
        (truncated(WEIGHTS_FILE), [WEIGHTS_FILE, "damaged"]),
        (one_bit_flipped, [WEIGHTS_FILE, "damaged"]),
        (torn, [WEIGHTS_FILE, "not the file"]),
    ],
)
def test_a_damaged_policy_is_refused_in_one_line(
    folder: Path, damage: Callable[[Path], None], words: list[str]
) -> None:
    damage(folder)

    with pytest.raises(ArtefactError) as caught:
        load_policy(folder, IDENTITY)
    assert_one_line(caught.value, words)


def test_no_policy_yet(tmp_path: Path) -> None:
    assert not is_policy(tmp_path)
    with pytest.raises(ArtefactError, match="no policy here; run `paceline learn`"):
        load_policy(tmp_path / "nowhere", IDENTITY)


def test_a_policy_that_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="are expected"):
        save_policy(tmp_path, network(num_arms=2), card())
    broken = network()
    broken.w2[0, 0] = np.nan
    with pytest.raises(ArtefactError, match="not a finite number"):
        save_policy(tmp_path, broken, card())
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtefactError, match="cannot be written"):
        save_policy(tmp_path / "file", network(), card())
