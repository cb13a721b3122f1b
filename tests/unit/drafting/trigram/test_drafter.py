"""The drafter learns a row's text once, forgets rows, separates them, and replays the real rounds."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.reference import greedy_reference

from paceline.assembly import Pace, build, build_from_objects
from paceline.config import Config, EngineSection, ModelSection, parse
from paceline.contracts import identity_of_arms
from paceline.drafting.base import BuildContext
from paceline.drafting.catalog import check_settings
from paceline.drafting.draft_replay import SimpleRow
from paceline.drafting.trigram.build import build_table
from paceline.drafting.trigram.corpora import TokenSequences
from paceline.drafting.trigram.drafter import TrigramTree
from paceline.drafting.trigram.settings import TrigramTreeSettings
from paceline.drafting.trigram.table import load_table
from paceline.errors import ConfigError
from paceline.models.vocabulary import Vocabulary
from paceline.replay import replay
from paceline.testing.tiny_models import tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.drafting.base import Drafter


def drafter(**given: Any) -> TrigramTree:
    return TrigramTree("tri", TrigramTreeSettings(**given))


def row(tokens: Sequence[int], id: int = 0) -> SimpleRow:
    return SimpleRow(list(tokens), len(tokens), id=id)


def ready(tri: TrigramTree, *rows: SimpleRow) -> None:
    tri.start(rows)
    for one in rows:
        while not tri.prepare(one, 5):
            pass


def tree(tri: TrigramTree, one: SimpleRow, limit: int = 9) -> tuple[list[int], list[int]]:
    drafts = tri.propose([one], [limit])
    assert drafts.probs is None and drafts.parents is not None
    length = drafts.lengths[0]
    return drafts.tokens[0, :length].tolist(), drafts.parents[0, :length].tolist()


TEXT = [1, 2, 3, 4, 1, 2, 5, 6, 1, 2, 3, 4, 9, 1, 2]


def test_drafts_are_earlier_continuations() -> None:
    tri = drafter()
    one = row(TEXT)
    ready(tri, one)

    tokens, parents = tree(tri, one)

    roots = [t for t, parent in zip(tokens, parents, strict=True) if parent == -1]
    assert sorted(roots) == [3, 5]
    assert tokens[:2] == [3, 4]


@pytest.mark.parametrize("limit", [0, 1, 2, 3])
def test_a_draft_is_no_deeper_than_the_limit(limit: int) -> None:
    tri = drafter(depth=6)
    one = row(TEXT * 3)
    ready(tri, one)

    _, parents = tree(tri, one, limit)

    deepest, levels = 0, {-1: 0}
    for k, parent in enumerate(parents):
        levels[k] = levels[parent] + 1
        deepest = max(deepest, levels[k])
    assert deepest == limit


def test_the_whole_prompt_is_learned_in_pieces_and_once() -> None:
    """The statistics do not depend on the pieces in which the text is read."""
    order = random.Random(4)
    text = [order.randrange(6) for _ in range(200)]
    at_once, in_pieces, by_propose = (drafter(search="greedy") for _ in range(3))
    one = row(text)
    at_once.start([one])
    assert at_once.prepare(one, 1000)
    in_pieces.start([one])
    assert [in_pieces.prepare(one, 60) for _ in range(4)] == [False, False, False, True]
    growing = row(text[:1])
    for end in range(1, len(text), 7):
        growing.tokens[:] = text[:end]
        by_propose.propose([growing], [end % 3])
    growing.tokens[:] = text

    assert tree(at_once, one) == tree(in_pieces, one) == tree(by_propose, growing)


def test_the_released_rule_learns_its_window_again_in_every_round() -> None:
    tri = drafter(preset="released")
    one = row([9, 8, 7, 9, 8, 7, *range(20, 60)])
    ready(tri, one)
    tree(tri, one)

    one.tokens += [9, 8]  # the window moves past the first tokens
    assert tree(tri, one) == ([], [])
    one.tokens += [7, 9, 8]
    assert tree(tri, one)[0][0] == 7


def test_without_an_update_only_the_table_counts(tmp_path: Path) -> None:
    build_table([TokenSequences("x", [[1, 2, 7]])], tmp_path / "t", "hash")
    table, facts = load_table(tmp_path / "t")
    settings = TrigramTreeSettings(update="none", table=tmp_path / "t")
    tri = TrigramTree("tri", settings, table, facts.sha256)
    one = row(TEXT)
    ready(tri, one)
    before = tri.num_bytes()

    assert tree(tri, one) == ([7], [-1])
    assert tri.num_bytes() == before


# --- rows apart, rows together --------------------------------------------------------------------


def test_requests_never_see_each_others_text() -> None:
    tri = drafter()
    mine, other = row(TEXT, 0), row([1, 2], 1)
    ready(tri, mine, other)

    assert tree(tri, mine)[0]
    assert tree(tri, other) == ([], [])
    tri.finish([mine])
    again = row([1, 2], 0)
    ready(tri, again)
    assert tree(tri, again) == ([], [])


def test_requests_that_share_see_each_others_text_even_after_they_ended() -> None:
    tri = drafter(share=True)
    mine = row(TEXT, 0)
    ready(tri, mine)
    tri.finish([mine])
    other = row([1, 2], 1)
    ready(tri, other)

    assert tree(tri, other)[0][0] == 3


def test_drafters_share_by_tenant(tmp_path: Path) -> None:
    build_table(
        [TokenSequences("x", [[1, 2, 7]])], tmp_path / "t", Vocabulary.of(byte_tokenizer()).hash()
    )
    built: dict[str, Any] = {}
    vocabulary = Vocabulary.of(byte_tokenizer())
    context = BuildContext(None, None, vocabulary, built)  # type: ignore[arg-type] - not used

    def build_tri(name: str, **settings: Any) -> TrigramTree:
        built[name] = TrigramTree.build(name, TrigramTreeSettings(**settings), context)
        return built[name]

    mine = build_tri("a", share=True, tenant="one")
    others = build_tri("b", share=True, tenant="two")
    also_mine = build_tri("c", share=True, tenant="one", search="full", depth=2)
    alone = build_tri("d")
    one = row(TEXT, 0)
    ready(mine, one)
    mine.finish([one])

    assert mine.common is also_mine.common and mine.common is not others.common
    expected = {"a": True, "b": False, "c": True, "d": False}
    for tri in (mine, others, also_mine, alone):
        other = row([1, 2], 1)
        ready(tri, other)
        assert bool(tree(tri, other)[0]) == expected[tri.name]
    for settings in (
        {"decay": 0.5},
        {"max_pairs": 5},
        {"update": "released"},
        {"table": tmp_path / "t"},
    ):
        with pytest.raises(
            ConfigError, match=rf"shares its statistics with 'a', so its {min(settings)}"
        ):
            build_tri("e", share=True, tenant="one", **settings)
    assert mine.identity() != others.identity()


def test_a_restarted_row_is_read_from_its_beginning() -> None:
    """Its text may have grown while another drafter served it."""
    tri = drafter()
    one = row(TEXT[:6])
    ready(tri, one)
    tri.finish([one])
    one.tokens[:] = TEXT
    ready(tri, one)
    fresh, other = drafter(), row(TEXT)
    ready(fresh, other)

    assert tree(tri, one) == tree(fresh, other)


def test_finishing_frees_a_row_and_ignores_an_unknown_one() -> None:
    tri = drafter()
    empty = tri.num_bytes()
    order = random.Random(1)
    one = row([order.randrange(500) for _ in range(2000)])
    ready(tri, one)
    assert tri.num_bytes() > empty + 100_000

    tri.finish([one])
    tri.finish([one, row([1], 77)])

    assert tri.num_bytes() == empty


def test_learned_pairs_stay_within_their_bound() -> None:
    order = random.Random(1)
    tri = drafter(max_pairs=300, depth=4)
    one = row([order.randrange(100) for _ in range(500)])
    ready(tri, one)
    held = tri.num_bytes()

    one.tokens += [order.randrange(100) for _ in range(5000)]
    one.tokens += [1, 2, 3, 4, 1, 2]

    assert tree(tri, one)[0] == [3, 4, 1, 2]
    assert tri.num_bytes() <= held * 1.05 + 1000


# --- settings and identity ------------------------------------------------------------------------


def test_the_preset_sets_omitted_settings() -> None:
    released = TrigramTreeSettings(preset="released", num_draft_tokens=32)

    assert (released.num_draft_tokens, released.update, released.iterations) == (
        32,
        "released",
        150,
    )
    assert released.share
    assert not TrigramTreeSettings(preset="released", share=False).share
    assert TrigramTreeSettings(preset="released").num_draft_tokens == 64


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"search": "best"}, ["search", "best"]),
        ({"num_draft_tokens": 65}, ["num_draft_tokens", "65"]),
        ({"itertions": 3}, ["itertions", "iterations"]),
        ({"decay": 0}, ["decay"]),
        ({"tenant": "me"}, ["tenant needs share: true"]),
        ({"table": "t", "answers": "a"}, ["'table' and 'answers'", "remove one"]),
        ({"answers": "a", "share": True}, ["to its own prompt; set share: false"]),
        ({"answers": "a", "preset": "released"}, ["set share: false"]),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], words: list[str]) -> None:
    section = {"target": {"model": "x"}, "drafters": {}}
    section["drafters"] = {"tri": {"kind": "trigram_tree", "settings": settings}}
    config = parse(Config, section, "test")

    with pytest.raises(ConfigError) as caught:
        check_settings("tri", config.drafters["tri"])
    assert all(word in str(caught.value) for word in words)


def test_identity_changes_with_the_proposals(tmp_path: Path) -> None:
    build_table([TokenSequences("x", [[1, 2, 7]])], tmp_path / "t", "hash")
    table, facts = load_table(tmp_path / "t")
    arms: dict[str, Drafter] = {
        "plain": drafter(),
        "seed": drafter(seed=1),
        "decay": drafter(decay=0.5),
        "share": drafter(share=True),
        "table": TrigramTree("x", TrigramTreeSettings(), table, facts.sha256),
    }
    lines = identity_of_arms({name: arm.identity() for name, arm in arms.items()})

    assert len(set(lines.values())) == len(arms)
    assert str(tmp_path) not in lines["table"]


# --- in the engine --------------------------------------------------------------------------------


@pytest.mark.parametrize("search", ["mcts", "greedy", "full"])
@pytest.mark.parametrize("update", ["counts", "released", "none"])
def test_every_variant_with_a_table_is_exact_and_replays_the_real_rounds(
    search: str, update: str, tmp_path: Path
) -> None:
    model = tiny_model("llama", context=128)
    tokenizer = byte_tokenizer()
    prompts = [tuple(text.encode()) for text in ("to be or not to be", "spam, spam and spam")]
    outputs = {prompt: greedy_reference(model, prompt, 60).tokens for prompt in prompts}
    # the target's own answers, with another text between them
    texts = [[*prompt, *output[:40]] for prompt, output in outputs.items()]
    build_table(
        [TokenSequences("answers", [*texts, list(b"spam and eggs, eggs and ham")])],
        tmp_path / "table",
        Vocabulary.of(tokenizer).hash(),
    )
    raw = {"table": tmp_path / "table", "search": search, "update": update}
    table, facts = load_table(tmp_path / "table")
    tri = TrigramTree("tri", TrigramTreeSettings(**raw), table, facts.sha256)
    config = Config(target=ModelSection(model="in memory"), engine=EngineSection(max_rows=2))
    pace = Pace(build_from_objects(model, tokenizer, {"tri": tri}, config))
    for prompt, output in outputs.items():
        done = pace.complete(list(prompt), drafter="tri", max_new_tokens=60)

        assert done.token_ids == output
        assert any(r.accepted > 1 for r in done.rounds)
        assert any(r.accepted < r.drafted for r in done.rounds)
        predicted = replay(tri, prompt, output, 60).rounds
        assert [[r.drafted, r.accepted] for r in done.rounds] == predicted.tolist()


def test_a_configured_table_is_relative_to_the_configuration(tmp_path: Path) -> None:
    zoo = Path(__file__).parents[4] / "zoo" / "target"
    (tmp_path / "paceline.yaml").write_text(
        f"target: {{model: {zoo}, dtype: float32}}\n"
        "drafters:\n  tri: {kind: trigram_tree, settings: {table: tri.table}}\n"
    )
    import paceline

    config = paceline.load_config(tmp_path / "paceline.yaml")
    with pytest.raises(ConfigError, match=r"tri\.table: no such .*trigram build"):
        build(config)

    (tmp_path / "a.txt").write_text("for i in range(10):\n    print(i)\n" * 3)
    paceline.build_trigrams(
        config.model_copy(update={"drafters": {}}), tmp_path / "tri.table", [tmp_path / "a.txt"]
    )
    arms = build(config).drafters
    assert arms["tri"].identity()["table"]


def test_kernels_compile_where_nothing_can_be_cached() -> None:
    """A function without a file has no folder for the cache of its code."""
    code = (
        "from paceline.compiled import compiled\n"
        "try:\n"
        "    import numba\n"
        "    numba.njit(cache=True)(lambda x: x + 1)\n"
        "except RuntimeError:\n"
        "    print(compiled(lambda x: x + 1)(41))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "42", done.stderr
