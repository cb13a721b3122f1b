"""A union's tree holds the likeliest tokens of its parts, each once, for parts of any kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from paceline.assembly import Pace, Parts, build_from_objects
from paceline.config import Config, DrafterSection, ModelSection
from paceline.contracts import NONE, SamplingParams
from paceline.drafting.base import BuildContext
from paceline.drafting.catalog import check_settings
from paceline.drafting.layer_skip import LayerSkip, LayerSkipSettings
from paceline.drafting.none import NoneDrafter
from paceline.drafting.prompt_lookup import PromptLookup, PromptLookupSettings
from paceline.drafting.union import Proposal, Union, UnionSettings, merge
from paceline.errors import ConfigError
from paceline.replay import max_output, replay
from paceline.testing.scripted import ScriptedDrafter, ScriptedTree
from paceline.testing.tiny_models import perturbed, tiny_model
from paceline.testing.tokenizers import byte_tokenizer
from paceline.verification import depths

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.drafting.base import Drafter


def chain(tokens: Sequence[int], acceptance: float) -> Proposal:
    return Proposal(list(tokens), list(range(-1, len(tokens) - 1)), acceptance)


# --- merging --------------------------------------------------------------------------------------


def test_equal_tokens_of_parts_are_one_node() -> None:
    tokens, parents = merge([chain([5, 6, 7], 0.8), chain([5, 6, 9, 1], 0.5)], 16)

    assert tokens == [5, 6, 7, 9, 1]
    assert parents == [-1, 0, 1, 1, 3]


def test_the_same_token_elsewhere_is_another_node() -> None:
    tokens, parents = merge([chain([5, 5], 0.8), chain([6, 5], 0.8)], 16)

    assert (tokens, parents) == ([5, 5, 6, 5], [-1, 0, -1, 2])


def test_the_budget_goes_to_the_part_that_is_right_more_often() -> None:
    tokens, parents = merge([chain([1, 2, 3, 4], 0.3), chain([5, 6, 7, 8], 0.9)], 5)

    # 0.9, 0.81, 0.73, 0.66 of the second, then 0.3 of the first
    assert (tokens, parents) == ([1, 5, 6, 7, 8], [-1, -1, 1, 2, 3])


def test_agreement_counts() -> None:
    """Two parts propose 1: it is wrong with 0.4 * 0.4, so it ranks above 9."""
    proposals = [chain([1, 2], 0.6), chain([1, 3], 0.6), chain([9], 0.7)]

    assert merge(proposals, 1) == ([1], [-1])
    assert merge(proposals, 2) == ([1, 9], [-1, -1])


def test_a_trees_later_children_are_less_likely() -> None:
    tree = Proposal(
        [1, 2, 3, 4], [-1, -1, -1, 0], 0.8
    )  # probabilities 0.8, 0.4, 0.27, and 0.64 for the child of the first

    assert merge([tree], 2) == ([1, 4], [-1, 0])
    assert merge([tree], 3) == ([1, 2, 4], [-1, -1, 0])


@pytest.mark.parametrize("budget", range(1, 12))
def test_the_best_nodes_are_always_a_tree(budget: int) -> None:
    twice = Proposal([1, 1, 2, 2, 2, 5], [-1, -1, 0, 1, 1, 2], 1.0)
    proposals = [twice, chain([1, 2, 5, 6, 7], 1.0), chain([], 0.9), chain([3, 4], 0.0)]

    tokens, parents = merge(proposals, budget)

    assert len(tokens) <= budget
    assert all(-1 <= parent < k for k, parent in enumerate(parents))
    assert len({*zip(parents, tokens, strict=True)}) == len(tokens)


# --- a drafter among others -----------------------------------------------------------------------


class Row:
    num_prompt, slot, num_cached, features = 1, -1, 0, None

    def __init__(self, tokens: list[int], sampling: SamplingParams = SamplingParams()) -> None:  # noqa: B008
        self.id, self.tokens, self.sampling = 0, tokens, sampling


def scripted(name: str, tokens: Sequence[int]) -> ScriptedDrafter:
    return ScriptedDrafter(name, lambda text, limit: list(tokens))


def test_a_part_that_was_wrong_loses_its_nodes() -> None:
    right, wrong = scripted("right", [1, 2, 3]), scripted("wrong", [7, 8, 9])
    union = Union("both", {"wrong": wrong, "right": right}, num_draft_tokens=3)
    row = Row([0])
    union.start([row])

    first = union.propose([row], [3]).tokens[0].tolist()
    for _ in range(3):
        row.tokens += [1, 2, 3, 4]
        last = union.propose([row], [3]).tokens[0].tolist()

    assert first == [7, 8, 1]  # all equally likely: the first named, level by level
    assert last == [1, 2, 3]
    union.finish([row])
    union.start([row])
    assert union.propose([row], [3]).tokens[0].tolist() == first


def test_tokens_after_the_end_of_a_text_count_for_no_part() -> None:
    union = Union("both", {"a": scripted("a", [1, 2, 3, 4]), "b": scripted("b", [1])})
    row = Row([0])
    union.start([row])
    union.propose([row], [4])
    row.tokens += [1, 2]

    union.propose([row], [4])

    first, second = union._states[0].records
    assert (first.right, first.wrong) == (2, 0)
    assert (second.right, second.wrong) == (1, 0)


def test_limits_hold_in_depth_and_the_budget_in_nodes() -> None:
    tree = ScriptedTree("tree", lambda text, n: ([4, 5, 6, 7], [-1, -1, 1, -1]), 8)
    union = Union("both", {"lookup": scripted("long", range(20)), "tree": tree}, 6)
    row = Row([0])
    union.start([row])

    drafts = union.propose([row], [3])

    assert drafts.parents is not None and drafts.probs is None
    parents = drafts.parents[0, : drafts.lengths[0]].tolist()
    assert drafts.lengths[0] == 6 and max(depths(parents)) == 2


@pytest.mark.parametrize(
    ("method", "expected"),
    [("residual", "greedy"), ("block", "greedy"), ("invariant", "invariant")],
)
def test_parts_draft_deterministically(method: str, expected: str) -> None:
    asked = []

    class Asked(ScriptedDrafter):
        def propose(self, rows, limits):  # type: ignore[no-untyped-def]
            asked.extend(row.sampling.method for row in rows)
            return super().propose(rows, limits)

    parts = {name: Asked(name, lambda text, limit: [1]) for name in "ab"}
    union = Union("both", parts)
    row = Row([0], SamplingParams(0.8, method=method))
    union.start([row])
    union.propose([row], [3])

    assert asked == [expected, expected]


@pytest.fixture(scope="module")
def pace() -> Pace:
    target = tiny_model(std=0.1, context=96)
    config = Config(target=ModelSection(model="in memory"))
    lookup = PromptLookup("lookup", PromptLookupSettings(min_ngram=1))
    drafters = {"near": perturbed(target, 0.1), "far": perturbed(target, 0.3), "lookup": lookup}
    parts = build_from_objects(target, byte_tokenizer(), drafters, config)
    settings = UnionSettings(parts=("near", "far", "lookup"), num_draft_tokens=12)
    parts.drafters["all"] = Union.build("all", settings, parts.build_context())
    return Pace(parts)


PROMPTS = ("hello", "abcabcabc", "the quick brown fox jumps over it", "x" * 60)


def test_it_accepts_at_least_nearly_what_its_best_part_does(pace: Pace) -> None:
    rounds = {}
    for arm in ("near", "far", "lookup", "all"):
        done = pace.generate(PROMPTS, drafter=arm, max_new_tokens=36)
        plain = pace.generate(PROMPTS, drafter=NONE, max_new_tokens=36)
        assert [c.token_ids for c in done] == [c.token_ids for c in plain]
        rounds[arm] = sum(len(c.rounds) for c in done)

    assert rounds["all"] < min(rounds[arm] for arm in ("near", "far", "lookup"))


def test_a_part_that_skips_layers_is_replayed_on_the_targets_cache(pace: Pace) -> None:
    parts = pace.parts
    context = parts.build_context()
    # a part that would write more to the cache than a round verifies
    settings = LayerSkipSettings(skip_mlp=(0,), num_draft_tokens=12, stop="fixed")
    skip = LayerSkip.build("skip", settings, context)
    union = Union(
        "both", {"skip": skip, "lookup": parts.drafters["lookup"]}, 5, target=parts.target
    )
    other = Pace(Parts(parts.config, parts.target, parts.tokenizer, parts.vocabulary,
                       {**parts.drafters, "both": union}))  # fmt: skip
    accepted = 0
    for text in PROMPTS:
        prompt = pace.encode(text)
        real = other.complete(text, drafter="both", max_new_tokens=36)
        plain = other.complete(text, drafter=NONE, max_new_tokens=36)
        limit = max_output(36, len(prompt), 96)

        predicted = replay(union, prompt, real.token_ids, limit).rounds

        assert real.token_ids == plain.token_ids
        assert predicted.tolist() == [[r.drafted, r.accepted] for r in real.rounds]
        accepted += sum(r.accepted for r in real.rounds)
    assert accepted > 20


def test_replay_gives_the_real_rounds(pace: Pace) -> None:
    for text in PROMPTS:
        prompt = pace.encode(text)
        real = pace.complete(text, drafter="all", max_new_tokens=36)
        limit = max_output(36, len(prompt), 96)

        predicted = replay(pace.parts.drafters["all"], prompt, real.token_ids, limit).rounds

        assert predicted.tolist() == [[r.drafted, r.accepted] for r in real.rounds]


@pytest.mark.parametrize("sampling", ["residual", "block", "invariant"])
def test_a_seed_gives_the_targets_text(pace: Pace, sampling: str) -> None:
    """Also under `residual`: a tree is judged by the draws of plain decoding."""
    settings = {"max_new_tokens": 30, "temperature": 0.2, "seed": 5, "sampling": sampling}
    plain = pace.generate(PROMPTS, drafter=NONE, **settings)
    done = pace.generate(PROMPTS, drafter="all", **settings)

    assert [c.token_ids for c in done] == [c.token_ids for c in plain]
    assert sum(r.accepted for c in done for r in c.rounds) > 10


def test_rows_of_one_batch_may_use_the_union_and_its_parts_and_switch(pace: Pace) -> None:
    expected = [c.token_ids for c in pace.generate(PROMPTS, drafter=NONE, max_new_tokens=30)]
    arms = ["all", "near", "lookup", "all"]
    engine = pace.engine
    tickets = [
        engine.submit(pace.request(text, drafter=arm, max_new_tokens=30))
        for text, arm in zip(PROMPTS, arms, strict=True)
    ]
    done = {}
    for turn in range(200):
        for place, ticket in enumerate(tickets):
            if ticket not in done and turn % 3 == 2:
                engine.switch(ticket, [*arms, "far"][(place + turn) % 5])
        for progress in engine.step():
            if progress.completion is not None:
                done[progress.ticket] = progress.completion
        if len(done) == len(tickets):
            break

    assert [done[t].error for t in tickets] == [None] * 4
    assert [done[t].token_ids for t in tickets] == expected
    for name in ("near", "far"):
        cache = pace.parts.drafters[name].model.cache  # type: ignore[attr-defined]
        assert cache.num_rows == 0


def test_bytes_are_counted_once(pace: Pace) -> None:
    union, near = (pace.parts.drafters[name] for name in ("all", "near"))

    assert near.num_bytes() > 0
    assert union.num_bytes() == 0
    far = pace.parts.drafters["far"]
    assert union.state_bytes([40]) == near.state_bytes([40]) + far.state_bytes([40]) > 0


def test_the_identity_changes_with_a_part(pace: Pace) -> None:
    identity = pace.parts.drafters["all"].identity()

    assert identity["kind"] == "union"
    assert set(identity["parts"]) == {"near", "far", "lookup"}  # type: ignore[call-overload]
    assert "max_ngram=16" in str(identity)


# --- mistakes -------------------------------------------------------------------------------------


def build(pace: Pace, parts: Sequence[str], **extra: Drafter) -> Drafter:
    z = pace.parts
    context = BuildContext(z.target, z.tokenizer, z.vocabulary, {**z.drafters, **extra})
    return Union.build("u", UnionSettings(parts=tuple(parts)), context)


def test_parts_must_be_configured_drafters(pace: Pace) -> None:
    with pytest.raises(ConfigError, match=r"'u': its part 'mear' .* before it; there are: near"):
        build(pace, ["near", "mear"])
    with pytest.raises(ConfigError, match="'none' is not a drafter"):
        build(pace, ["near", NONE], none=NoneDrafter())
    with pytest.raises(ConfigError, match=r"'all' is a union; .* instead: near, far, lookup"):
        build(pace, ["near", "all"])


@pytest.mark.parametrize("attribute", ["wants_prices", "takes_prices"])
def test_a_part_that_drafts_by_prices_is_refused(pace: Pace, attribute: str) -> None:
    class Priced(ScriptedDrafter):
        pass

    setattr(Priced, attribute, True)

    with pytest.raises(ConfigError, match="'dear' drafts by prices"):
        build(pace, ["near", "dear"], dear=Priced("dear", lambda text, limit: []))


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"parts": ["a"]}, "parts"), ({"parts": ["a", "a"]}, "named twice"), ({}, "parts")],
)
def test_invalid_union_settings(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_settings("u", DrafterSection(kind="union", settings=settings))
