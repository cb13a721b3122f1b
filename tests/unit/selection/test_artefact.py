"""The policy on disk: a round trip keeps its choices, and every mismatch is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from paceline.contracts import Context, SamplingParams
from paceline.costs import CostTable, Measurement
from paceline.errors import ArtefactError
from paceline.selection import PolicyIdentity, is_policy, load_policy, policy_of, save_policy
from paceline.selection.artefact import (
    CARD_FILE,
    WEIGHTS_FILE,
    PolicyArtefact,
    RewardCard,
    read_card,
)
from paceline.selection.choosers import (
    AcceptanceChooser,
    NetworkChooser,
    PolicyNetwork,
    Reduction,
)
from paceline.selection.encoders import build_encoder
from paceline.selection.features import num_features

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

D = 4
NAMES = ("none", "code@2", "code", "lookup")
ARMS = {
    "none": "kind=none, num_draft_tokens=0",
    "code": "kind=draft_model, num_draft_tokens=4",
    "lookup": "kind=prompt_lookup, num_draft_tokens=6",
}
IDENTITY = PolicyIdentity(target="target-1", tokenizer="tokens-1", hidden_size=D, drafters=ARMS)


def network(seed: int = 0, num_arms: int = len(NAMES)) -> NetworkChooser:
    rng = np.random.default_rng(seed)
    F, H = num_features(D) + 1, 6
    shapes = [(F,), (F,), (F, H), (H,), (H, num_arms), (num_arms,)]
    weights = PolicyNetwork(*(rng.normal(size=shape).astype(np.float32) for shape in shapes))
    return NetworkChooser(NAMES[:num_arms], [weights])


def portable() -> AcceptanceChooser:
    F, O = num_features(D), 3 * len(NAMES) + 1  # noqa: E741
    rng = np.random.default_rng(0)
    kinds = rng.uniform(0.2, 0.8, size=(1, 3, O))
    kinds[:, :, 2 * len(NAMES) : -1] = 0.0  # every round drafts, of `none` none does
    kinds[:, :, [len(NAMES) * i + NAMES.index("none") for i in range(3)]] = (1.0, 0.0, 1.0)
    shapes = [(F,), (F,), (F, 4), (4,), (F,), (1, 4, 3), (1, 3)]
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    low, high = np.zeros(O, np.float32), np.ones(O, np.float32)
    ends = (low, high, high, np.zeros(0, np.int64))
    everywhere = np.full(2, 1e30, np.float32)
    return AcceptanceChooser(
        NAMES, Reduction(*arrays[:5], everywhere), *arrays[5:], kinds.astype(np.float32), *ends
    )


def prices(propose: float = 0.1) -> CostTable:
    rows = [Measurement("target", "prefill", 10, 0, 1, 2.0)]
    rows += [Measurement("target", "forward", t, 0, 1, 1.0 + 0.1 * t) for t in (1, 5)]
    rows += [Measurement("engine", "round", 0, 0, 1, 0.1)]
    for drafter in ("code", "lookup"):
        rows += [Measurement(drafter, "start", 10, 0, 1, 0.5)]
        rows += [Measurement(drafter, "propose", t, 0, 1, propose * t) for t in (0, 4)]
    return CostTable({}, rows)


def card(**changes: Any) -> PolicyArtefact:
    values: dict[str, Any] = {
        "target": IDENTITY.target,
        "tokenizer": IDENTITY.tokenizer,
        "hidden_size": D,
        "drafters": ARMS,
        "encoders": build_encoder(D).identities(),
        "arms": list(NAMES),
        "chooser": "network",
        "facts": {"num_networks": 1},
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
    before, after = policy_of(network(), num_features(D)), load_policy(folder, IDENTITY)

    decisions = [after.choose(context) for context in contexts()]
    assert decisions == [before.choose(context) for context in contexts()]
    assert len({decision.arm for decision in decisions}) > 1
    assert after.id.startswith("network:")
    assert after.id != policy_of(network(seed=1), num_features(D)).id


def test_the_card_names_everything_that_the_policy_was_learned_with(folder: Path) -> None:
    found = read_card(folder)

    assert found == card(weights_sha256=found.weights_sha256)
    assert found.format_version == 5


def test_only_the_two_files_are_left(folder: Path) -> None:
    save_policy(folder, network(seed=1), card())

    assert sorted(path.name for path in folder.iterdir()) == [CARD_FILE, WEIGHTS_FILE]
    assert is_policy(folder)


def test_the_order_of_the_configured_drafters_does_not_matter(folder: Path) -> None:
    shuffled = replace(IDENTITY, drafters=dict(reversed(ARMS.items())))

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
        (
            {"drafters": ARMS | {"math": "kind=draft_model"}},
            ["does not know math", "expected code"],
        ),
        ({"drafters": without("code")}, ["knows code, not configured", "found code, lookup, none"]),
        (
            {"drafters": without("code") | {"math": "kind=draft_model"}},
            ["does not know math and it knows code"],
        ),
        (
            {"drafters": ARMS | {"code": "kind=draft_model, num_draft_tokens=5"}},
            ["another drafter 'code'", "num_draft_tokens=5", "num_draft_tokens=4"],
        ),
    ],
    ids=["target", "tokenizer", "hidden size", "missing arm", "extra arm", "renamed", "settings"],
)
def test_a_policy_for_other_models_is_refused(
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
    """Return a function that changes entries of policy.json; None removes an entry."""

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
    """A second save wrote its weights but not its card."""
    old = (folder / CARD_FILE).read_bytes()
    save_policy(folder, network(seed=1), card())
    (folder / CARD_FILE).write_bytes(old)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (edited(encoders={}), [CARD_FILE, "encoders"]),
        (
            edited(encoders={"text_stats": "version=99, features=6"}),
            ["encoder 'text_stats'", "expected version=1", "found version=99"],
        ),
        (edited(format_version=4), ["format version", "expected 5", "found 4", "paceline learn"]),
        (edited(format_version=None), ["format version", "found None"]),
        (edited(arms=None), [CARD_FILE, "'arms' is missing"]),
        (edited(arms=["none", "math@2"]), ["damaged", "none, math@2 are not of its drafters"]),
        (edited(arms=["none", "code"]), [WEIGHTS_FILE, "damaged", "are expected"]),
        (edited(chooser="oracle"), ["kind 'oracle'", "does not know"]),
        (edited(facts={}), [WEIGHTS_FILE, "damaged", "num_networks"]),
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


def test_a_missing_policy_is_refused(tmp_path: Path) -> None:
    assert not is_policy(tmp_path)
    with pytest.raises(ArtefactError, match="no policy here; run `paceline learn`"):
        load_policy(tmp_path / "nowhere", IDENTITY)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    broken = network()
    broken.networks[0].w2[0, 0] = np.nan
    with pytest.raises(ArtefactError, match="not a finite number"):
        save_policy(tmp_path, broken, card())
    assert not list(tmp_path.iterdir())


def test_a_portable_policy_is_priced_when_it_is_loaded(tmp_path: Path) -> None:
    """The same folder with two cost tables: expensive drafters are not chosen, and there is no note."""
    save_policy(tmp_path, portable(), card())
    chosen = {}
    for propose in (0.1, 50.0):
        policy = load_policy(tmp_path, IDENTITY, prices(propose))
        decisions = [policy.choose(context) for context in contexts()]
        chosen[propose] = {decision.arm for decision in decisions}
        assert policy.notes == ()
        assert all(decision.scores["none"] == 1.0 for decision in decisions)
        for decision in decisions:
            seconds = decision.seconds_per_token
            assert {arm: seconds["none"] / seconds[arm] for arm in NAMES} == decision.scores

    assert "none" not in chosen[0.1]
    assert chosen[50.0] == {"none"}


def test_a_portable_policy_needs_prices(tmp_path: Path) -> None:
    save_policy(tmp_path, portable(), card())

    with pytest.raises(
        ArtefactError, match=r"cost table, and there is none; run `paceline profile`"
    ):
        load_policy(tmp_path, IDENTITY)
    without = CostTable({}, [m for m in prices().measurements if m.subject != "lookup"])
    with pytest.raises(ArtefactError, match=r"lookup not measured; run `paceline profile`"):
        load_policy(tmp_path, IDENTITY, without)


def test_another_cost_table_is_noted_for_a_policy_with_built_in_prices(folder: Path) -> None:
    (note,) = load_policy(folder, IDENTITY, prices()).notes
    assert "another cost table" in note
    assert load_policy(folder, IDENTITY).notes == ()

    save_policy(folder, network(), card(costs=prices().hash()))
    assert load_policy(folder, IDENTITY, prices()).notes == ()


def test_a_folder_that_cannot_be_written_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtefactError, match="cannot be written"):
        save_policy(tmp_path / "file", network(), card())
