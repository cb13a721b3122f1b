"""Drafts from collected answers: those of a naive search, and as if left-out answers were not there."""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from paceline.assembly import Pace, build_from_objects
from paceline.config import Config, ModelSection
from paceline.contracts import identity_of_arms
from paceline.drafting import answer_kernels
from paceline.drafting.answers import Answers
from paceline.drafting.base import BuildContext
from paceline.drafting.cascade.drafter import Cascade
from paceline.drafting.draft_replay import SimpleRow
from paceline.drafting.evidence import NUM_EVIDENCE
from paceline.drafting.suffix_kernels import evidence_of
from paceline.drafting.suffix_lookup import SuffixLookup, SuffixLookupSettings
from paceline.drafting.trigram.answer_table import load_answer_table, write_answer_table
from paceline.drafting.trigram.drafter import TrigramTree
from paceline.drafting.trigram.settings import TrigramTreeSettings
from paceline.drafting.union import Union
from paceline.errors import ConfigError, StoreError
from paceline.models.vocabulary import Vocabulary
from paceline.store.answers import Answer, manifest_path, open_answers, write_answers
from paceline.testing.tiny_models import tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.drafting.base import Drafter
    from paceline.store.answers import AnswerIndex

TOKENIZER, TARGET = "tokenizer", "target"


def write(folder: Path, answers: list[Answer], tokenizer: str = TOKENIZER) -> None:
    write_answers(folder, answers, tokenizer, TARGET, 10_000, write_answer_table)


def answers_in(folder: Path) -> Answers:
    return Answers("x", folder, TOKENIZER, TARGET)


def random_answers(choose: random.Random, ids: int, most: int = 12) -> list[Answer]:
    return [
        Answer(choose.choice("abcd"), [choose.randrange(ids) for _ in range(choose.randrange(40))])
        for _ in range(choose.randrange(2, most))
    ]


# --- matches and trees ----------------------------------------------------------------------------


@dataclass
class NaiveNode:
    token: int
    parent: int
    level: int
    probability: float
    evidence: int
    places: list[int] = field(default_factory=list)


def naive_tree(
    index: AnswerIndex, suffix: list[int], most: int, depth: int, paths: int, least: float
) -> tuple[int, list[NaiveNode], int]:
    """Return the length of the match, the nodes and the number of leaves, by looking at every place."""
    tokens = index.tokens.tolist()
    length, places = 0, []
    for n in range(1, min(len(suffix), 32) + 1):
        found = [p for p in index.order.tolist() if p >= n and tokens[p - n : p] == suffix[-n:]]
        length, places = (n, found) if found else (length, places)
    step = min(len(places), answer_kernels.FOLLOWED)
    places = [places[len(places) - 1 - i * len(places) // step] for i in range(step)]
    nodes: list[NaiveNode] = []
    waiting: list[NaiveNode] = []
    leaves = 0

    def expand(parent: int, level: int, probability: float, places: list[int]) -> None:
        if level == depth or not length:
            return
        for token in dict.fromkeys(tokens[p] for p in places):
            own = [p + 1 for p in places if tokens[p] == token]
            p = probability * (len(own) / len(places))
            if token >= 0 and p >= least:
                evidence = NUM_EVIDENCE + evidence_of(length + level, len(places), len(own))
                waiting.append(NaiveNode(token, parent, level + 1, p, evidence, own))
        waiting.sort(key=lambda node: -node.probability)

    expand(-1, 0, 1.0, places)
    while waiting and len(nodes) < most:
        node = waiting.pop(0)
        opens = not nodes or any(other.parent == node.parent for other in nodes)
        if opens and leaves == paths:
            continue
        leaves += opens
        nodes.append(node)
        expand(len(nodes) - 1, node.level, node.probability, node.places)
    return length, nodes, leaves


@pytest.mark.parametrize("seed", range(60))
def test_trees_are_those_of_a_naive_search(tmp_path: Path, seed: int) -> None:
    choose = random.Random(seed)
    ids = choose.choice([2, 3, 12])
    write(tmp_path, random_answers(choose, ids, most=choose.choice([4, 30])))
    index = answers_in(tmp_path).index
    assert index is not None
    for _ in range(20):
        suffix = [choose.randrange(ids + 1) for _ in range(choose.randrange(1, 40))]
        if choose.random() < 0.7:  # the end of a text that occurs
            end = choose.randrange(1, len(index.tokens))
            suffix += [t for t in index.tokens[max(0, end - 50) : end].tolist() if t >= 0]
        paths, depth, least = choose.choice([1, 3, 64]), choose.choice([1, 4, 64]), 0.05
        out = np.full((3, 2, 12), -7, dtype=np.int64)
        length, nodes, leaves = naive_tree(index, suffix, 12, depth, paths, least)

        found = answer_kernels.match_and_grow(
            index.tokens, index.order, np.empty(0, np.int64), np.array(suffix, dtype=np.int32),
            1, 0.0, 12.0, depth, paths, least, 0.0, out, 1,
        )  # fmt: skip

        n = len(nodes)
        assert found[:2] == (n, leaves)
        assert found[2] == pytest.approx(sum(node.probability for node in nodes))
        assert out[0, 1, :n].tolist() == [node.token for node in nodes]
        assert out[1, 1, :n].tolist() == [node.parent for node in nodes]
        assert out[2, 1, :n].tolist() == [node.evidence for node in nodes]
        assert set(out[:, 0].flat) | set(out[:, 1, n:].flat) <= {-7}
        assert all(NUM_EVIDENCE <= node.evidence < 2 * NUM_EVIDENCE for node in nodes)
        assert length or not nodes


@pytest.mark.parametrize("seed", range(25))
def test_left_out_answers_are_as_if_they_were_not_there(tmp_path: Path, seed: int) -> None:
    """Places, trees and tri-gram tables are those of an index that was built without them."""
    choose = random.Random(seed)
    ids = choose.choice([2, 3, 12])
    given = [*random_answers(choose, ids, 30), Answer("e", [0, 1, 0])]
    write(tmp_path / "all", given)
    group = given[0].group
    write(tmp_path / "kept", [answer for answer in given if answer.group != group])
    whole, kept = answers_in(tmp_path / "all"), answers_in(tmp_path / "kept")
    assert whole.index is not None and kept.index is not None
    assert any(answer.group == group for answer in given)
    with whole.without(group):
        assert len(whole.left_out)
        for _ in range(20):
            suffix = np.array([choose.randrange(ids) for _ in range(8)], dtype=np.int32)
            drafted = []
            for answers in (whole, kept):
                out = np.full((3, 1, 9), -1, dtype=np.int64)
                index = answers.index
                assert index is not None
                grown = answer_kernels.match_and_grow(
                    index.tokens, index.order, answers.left_out, suffix,
                    1, 2.0, 0.0, 8, 4, 0.1, 0.0, out, 0,
                )  # fmt: skip
                drafted.append((grown, out.tolist()))
            assert drafted[0] == drafted[1]
        tables = [load_answer_table("x", answers) for answers in (whole, kept)]
        for t1 in range(ids):
            for t2 in range(ids):
                assert successors(tables[0], t1, t2) == successors(tables[1], t1, t2)
    after = load_answer_table("x", whole)
    assert len(whole.left_out) == 0
    write(tmp_path / "again", given)
    full = load_answer_table("x", answers_in(tmp_path / "again"))
    assert all(np.array_equal(a, b) for a, b in zip(after, full, strict=True))


def successors(table: Any, t1: int, t2: int) -> list[tuple[int, float]]:
    if t1 + 1 >= len(table.starts):
        return []
    begin, end = table.starts[t1], table.starts[t1 + 1]
    for pair in range(begin, end):
        if table.seconds[pair] == t2:
            first, last = table.offsets[pair], table.offsets[pair + 1]
            found = zip(table.successors[first:last], table.weights[first:last], strict=True)
            return [(int(token), float(weight)) for token, weight in found]
    return []


def test_a_pruned_successor_comes_back_when_a_likelier_one_is_left_out(tmp_path: Path) -> None:
    """A table keeps 12 successors per pair."""
    often = [Answer("b", [1, 2, token]) for token in range(10, 22) for _ in range(2)]
    write(tmp_path, [*often, Answer("a", [1, 2, 30]), Answer("c", [1, 2, 31, 1, 2, 32])])
    answers = answers_in(tmp_path)
    assert 30 not in dict(successors(load_answer_table("x", answers), 1, 2))

    with answers.without("b"):
        table = load_answer_table("x", answers)

    third = float(np.float32(1 / 3))
    assert successors(table, 1, 2) == [(30, third), (31, third), (32, third)]


def test_a_damaged_order_reads_nothing_outside_the_text(tmp_path: Path) -> None:
    write(tmp_path, [Answer("a", [1, 2, 3] * 9)])
    index = answers_in(tmp_path).index
    assert index is not None
    order = np.full(len(index.order), 2**31 - 1, dtype=np.int32)
    order[::2] = -(2**31)
    order.setflags(write=False)
    out = np.full((3, 1, 8), -1, dtype=np.int64)

    answer_kernels.match_and_grow(
        index.tokens, order, np.empty(0, np.int64), np.array([2, 3], dtype=np.int32),
        1, 2.0, 0.0, 8, 4, 0.1, 0.0, out, 0,
    )  # fmt: skip

    assert set(out[0].flat) <= {-1, 1, 2, 3}


# --- the drafters ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def context() -> BuildContext:
    config = Config(target=ModelSection(model="in memory"))
    return build_from_objects(tiny_model(), byte_tokenizer(), {}, config).build_context()


def made_with(context: BuildContext) -> tuple[str, str]:
    return context.vocabulary.hash(), context.target.fingerprint()


def collect(context: BuildContext, folder: Path, answers: list[Answer]) -> None:
    tokenizer, target = made_with(context)
    write_answers(folder, answers, tokenizer, target, 10_000, write_answer_table)


def suffix_lookup(context: BuildContext, folder: Path, **settings: Any) -> SuffixLookup:
    read = SuffixLookupSettings(answers=folder, **settings)
    SuffixLookup.check("x", read, context.vocabulary)
    return SuffixLookup.build("x", read, context)


def trigram_tree(context: BuildContext, folder: Path, **settings: Any) -> TrigramTree:
    read = TrigramTreeSettings(answers=folder, **settings)
    TrigramTree.check("x", read, context.vocabulary)
    return TrigramTree.build("x", read, context)


MAKERS = [suffix_lookup, trigram_tree]


def drafted(drafter: Drafter, tokens: list[int], id: int = 0) -> list[int]:
    row = SimpleRow(list(tokens), len(tokens), id=id)
    drafter.start([row])
    while not drafter.prepare(row, 64):
        pass
    try:
        drafts = drafter.propose([row], [9])
        return drafts.tokens[0, : drafts.lengths[0]].tolist()
    finally:
        drafter.finish([row])


@pytest.mark.parametrize("make", MAKERS)
def test_answers_are_drafted_unless_they_are_to_the_prompt(
    context: BuildContext, tmp_path: Path, make: Any
) -> None:
    collect(context, tmp_path, [Answer("mine", [1, 2, 3, 4]), Answer("other", [1, 2, 9, 8])])
    drafter = make(context, tmp_path)
    union = Union("u", {"a": drafter, "b": make(context, tmp_path)})

    for one in (drafter, union):
        assert sorted(drafted(one, [7, 1, 2])) == [3, 4, 8, 9]
        with one.without_answers_to("mine"):
            assert drafted(one, [7, 1, 2]) == [9, 8]
            with one.without_answers_to("other"):
                assert drafted(one, [7, 1, 2]) == [3, 4]
            assert drafted(one, [7, 1, 2]) == [9, 8]
        with pytest.raises(KeyError), one.without_answers_to("mine"):
            raise KeyError
        assert sorted(drafted(one, [7, 1, 2])) == [3, 4, 8, 9]


def test_a_cascade_leaves_out_what_its_parts_leave_out(
    context: BuildContext, tmp_path: Path
) -> None:
    collect(context, tmp_path, [Answer("mine", [1, 2, 3, 4, 5, 6]), Answer("b", [1, 7, 8, 9])])
    cascade = Cascade("c", {"suffix": suffix_lookup(context, tmp_path)})

    assert drafted(cascade, [7, 1, 2])[:1] == [3]
    with cascade.without_answers_to("mine"):
        assert drafted(cascade, [7, 1, 2]) == []
    assert drafted(cascade, [7, 1, 2])[:1] == [3]


@pytest.mark.parametrize("make", MAKERS)
def test_an_index_is_used_from_the_next_request_on(
    context: BuildContext, tmp_path: Path, make: Any
) -> None:
    drafter = make(context, tmp_path / "later")
    assert "no answers in" in drafter.note and "paceline collect PROMPTS" in drafter.note
    assert drafted(drafter, [7, 1, 2]) == []

    collect(context, tmp_path / "later", [Answer("a", [1, 2, 3])])
    with drafter.without_answers_to("b"):  # as in a replay after the build
        assert drafted(drafter, [7, 1, 2]) == [3]
    assert drafter.note == ""

    collect(context, tmp_path / "later", [Answer("a", [1, 2, 3]), Answer("b", [5, 6, 7])])
    with drafter.without_answers_to("a"):
        assert drafted(drafter, [5, 6]) == [7]
        assert drafted(drafter, [1, 2]) == []
    shutil.rmtree(tmp_path / "later")
    assert drafted(drafter, [5, 6]) == [7]


def test_an_index_renewed_inside_the_block_leaves_out_the_same_prompt(
    context: BuildContext, tmp_path: Path
) -> None:
    drafter = suffix_lookup(context, tmp_path)
    with drafter.without_answers_to("a"):
        collect(context, tmp_path, [Answer("a", [1, 2, 3]), Answer("b", [1, 2, 4])])
        assert drafted(drafter, [7, 1, 2]) == [4]


def test_the_source_with_more_expected_tokens_wins_and_its_evidence_says_which(
    context: BuildContext, tmp_path: Path
) -> None:
    collect(context, tmp_path, [Answer("a", [1, 2, 3, 4, 5, 6])])
    drafter = suffix_lookup(context, tmp_path, length_factor=1.0)

    def evidence(tokens: list[int]) -> tuple[list[int], set[bool]]:
        row = SimpleRow(list(tokens), 0)
        drafter.start([row])
        drafts = drafter.propose([row], [9])
        drafter.finish([row])
        n = drafts.lengths[0]
        assert drafts.evidence is not None
        return drafts.tokens[0, :n].tolist(), set((drafts.evidence[0, :n] >= NUM_EVIDENCE).tolist())

    # a much longer match in the answers than in the row's own text, a longer and an equally long one
    assert evidence([3, 9, 1, 2, 3]) == ([4, 5, 6], {True})
    assert evidence([2, 3, 9, 1, 2, 3]) == ([9, 1], {False})
    assert evidence([1, 2, 3, 9, 9, 1, 2, 3]) == ([9, 9, 1], {False})
    # rows of a batch do not mix
    rows = [SimpleRow(tokens, 0, id=i) for i, tokens in enumerate([[7, 1, 2, 3], [0], [5, 9, 5]])]
    drafter.start(rows)
    drafts = drafter.propose(rows, [9, 9, 9])
    assert drafts.lengths == [3, 0, 1]
    assert drafts.tokens[:, 0].tolist() == [4, -1, 9]


@pytest.mark.parametrize("update", ["counts", "released", "none"])
def test_a_tri_gram_drafter_is_that_of_a_table_without_the_answers(
    context: BuildContext, tmp_path: Path, update: str
) -> None:
    choose = random.Random(5)
    given = [*random_answers(choose, 4, 20), Answer("e", [0, 1, 0])]
    collect(context, tmp_path / "all", given)
    collect(context, tmp_path / "kept", [a for a in given if a.group != "a"])
    whole, kept = (trigram_tree(context, tmp_path / n, update=update) for n in ("all", "kept"))
    differs = False
    for id in range(20):
        tokens = [choose.randrange(4) for _ in range(10)]
        seen = drafted(whole, tokens, id)
        with whole.without_answers_to("a"):
            assert drafted(whole, tokens, id) == drafted(kept, tokens, id)
        differs |= seen != drafted(kept, tokens, id)
    assert differs


@pytest.mark.parametrize("make", MAKERS)
def test_damaged_and_foreign_answers_are_refused_when_loading(
    context: BuildContext, tmp_path: Path, make: Any
) -> None:
    tokenizer, target = made_with(context)
    write_answers(tmp_path / "t", [Answer("a", [1])], "other", target, 100)
    write_answers(tmp_path / "m", [Answer("a", [1])], tokenizer, "other", 100)
    collect(context, tmp_path / "d", [Answer("a", [1])])
    manifest_path(tmp_path / "d").write_text("{")
    for folder, says in (("t", "another tokenizer"), ("m", "another target"), ("d", "damaged")):
        with pytest.raises(StoreError, match=says):
            make(context, tmp_path / folder)


def test_a_missing_table_is_refused_with_the_remedy(context: BuildContext, tmp_path: Path) -> None:
    collect(context, tmp_path, [Answer("a", [1, 2, 3])])
    index = open_answers(tmp_path, made_with(context)[0])
    assert index is not None
    (index.folder / "trigrams.table").unlink()

    with pytest.raises(StoreError, match=r"trigrams\.table: .*delete .* collect PROMPTS"):
        trigram_tree(context, tmp_path)


@pytest.mark.parametrize("make", MAKERS)
def test_the_identity_says_that_answers_are_used_and_not_which(
    context: BuildContext, tmp_path: Path, make: Any
) -> None:
    plain = type(make(context, tmp_path))
    lines = {
        identity_of_arms({"x": arm.identity()})["x"]
        for arm in (make(context, tmp_path), make(context, tmp_path / "other"))
    }
    without = plain("x", plain.Settings())

    assert len(lines) == 1
    assert lines != {identity_of_arms({"x": without.identity()})["x"]}
    assert "answers" not in without.identity()


@pytest.mark.parametrize("make", MAKERS)
def test_a_drafter_without_a_target_cannot_open_answers(
    context: BuildContext, tmp_path: Path, make: Any
) -> None:
    kind = type(make(context, tmp_path))
    with pytest.raises(ConfigError, match="drafter 'x': answers are opened for a target"):
        kind("x", kind.Settings(answers=tmp_path))


def test_nothing_is_compiled_for_answers_after_a_drafter_was_built(
    context: BuildContext, tmp_path: Path
) -> None:
    drafter = suffix_lookup(context, tmp_path)
    tri = trigram_tree(context, tmp_path)
    kernels = ("occurrences", "ranks_of")
    before = [len(getattr(answer_kernels, name).nopython_signatures) for name in kernels]
    assert before == [1, 1]

    collect(context, tmp_path, [Answer("a", [1, 2, 3, 1, 2]), Answer("b", [1, 2, 4])])
    for one in (drafter, tri):
        with one.without_answers_to("a"):
            assert drafted(one, [1, 2])

    assert [len(getattr(answer_kernels, n).nopython_signatures) for n in kernels] == before


def test_texts_are_the_targets_own_and_answers_help(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(std=0.1), byte_tokenizer()
    config = Config(target=ModelSection(model="in memory"))
    parts = build_from_objects(model, tokenizer, {}, config)
    prompts = ["abc", "xyz abc", "spam"]
    how = {"max_new_tokens": 40, "ignore_eos": True}
    plain = [c.token_ids for c in Pace(parts).generate(prompts, drafter="none", **how)]
    target = parts.target.fingerprint()
    answers = [Answer(str(i), tokens) for i, tokens in enumerate(plain)]
    tokenizer_hash = Vocabulary.of(tokenizer).hash()
    write_answers(tmp_path, answers, tokenizer_hash, target, 10_000, write_answer_table)
    for make in MAKERS:
        parts.drafters[make.__name__] = make(parts.build_context(), tmp_path)
    pace = Pace(parts)
    for make in MAKERS:
        done = pace.generate(prompts, drafter=make.__name__, **how)
        assert [c.token_ids for c in done] == plain
        assert min(c.block_efficiency for c in done) > 2


def test_a_stamp_is_compared_not_the_time(context: BuildContext, tmp_path: Path) -> None:
    """A manifest with the old modification time is read again, because it is another file."""
    collect(context, tmp_path, [Answer("a", [1, 2, 3])])
    drafter = suffix_lookup(context, tmp_path)
    status = manifest_path(tmp_path).stat()
    collect(context, tmp_path, [Answer("a", [1, 2, 4])])
    os.utime(manifest_path(tmp_path), ns=(status.st_atime_ns, status.st_mtime_ns))

    assert drafted(drafter, [1, 2]) == [4]
