"""A cascade as a drafter: its settings, its rows, and models that are asked late."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support.reference import greedy_reference

from paceline.assembly import Pace, Parts, build_from_objects, give_chances
from paceline.config import Config, DrafterSection, EngineSection, ModelSection
from paceline.contracts import NONE
from paceline.drafting.base import BuildContext
from paceline.drafting.cascade.calibration import Chances
from paceline.drafting.cascade.drafter import Cascade, CascadeSettings
from paceline.drafting.cascade.kernels import NUM_BINS
from paceline.drafting.catalog import check_settings
from paceline.drafting.evidence import NUM_CLASSES
from paceline.drafting.prompt_lookup import PromptLookup, PromptLookupSettings
from paceline.drafting.suffix_lookup import SuffixLookup, SuffixLookupSettings
from paceline.drafting.trigram.drafter import TrigramTree
from paceline.drafting.trigram.settings import TrigramTreeSettings
from paceline.drafting.union import Union, UnionSettings
from paceline.errors import ConfigError
from paceline.testing.scripted import ScriptedDrafter
from paceline.testing.tiny_models import perturbed, tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.drafting.base import Drafter

CONTEXT, CHUNK = 128, 8
PROMPTS = ("hello", "spam, spam and eggs; " * 3, "x" * 60)


@pytest.fixture(scope="module")
def parts() -> Parts:
    target = tiny_model(std=0.1, context=CONTEXT)
    config = Config(
        target=ModelSection(model="in memory"), engine=EngineSection(prefill_chunk=CHUNK)
    )
    drafters = {
        "near": perturbed(target, 0.1),
        "far": perturbed(target, 0.2),
        "suffix": SuffixLookup("suffix", SuffixLookupSettings(num_draft_tokens=8)),
        "words": PromptLookup("words", PromptLookupSettings(min_ngram=1)),
    }
    built = build_from_objects(target, byte_tokenizer(), drafters, config)
    context = built.build_context()
    built.drafters["trigram"] = TrigramTree("trigram", TrigramTreeSettings(search="mcts"))
    built.drafters["union"] = Union.build("union", UnionSettings(parts=("near", "words")), context)
    settings = CascadeSettings(parts=("near", "suffix", "far"))
    built.drafters["both"] = Cascade.build("both", settings, context)
    return built


# --- settings -------------------------------------------------------------------------------------


def build(parts: Parts, *names: str, **extra: Drafter) -> Cascade:
    context = BuildContext(
        parts.target, parts.tokenizer, parts.vocabulary, {**parts.drafters, **extra}
    )
    return Cascade.build("c", CascadeSettings(parts=names), context)


class _Priced(ScriptedDrafter):
    nests = True
    wants_prices = True


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["near"], r"'c': none of its parts near is a suffix_lookup; name one first"),
        (["words", "near"], "none of its parts words, near is a suffix_lookup"),
        (
            ["suffix", "mear"],
            r"'c': its part 'mear' is not a drafter configured before it; there are",
        ),
        (["suffix", NONE], "its part 'none' is not a drafter configured before it"),
        (["suffix", "union"], r"its part 'union' \(union\) cannot be a part; parts are"),
        (["suffix", "trigram"], r"its part 'trigram' \(trigram_tree\) cannot be a part"),
        (["suffix", "both"], r"its part 'both' \(cascade\) cannot be a part"),
        (["suffix", "priced"], r"its part 'priced' .* cannot be a part; .* need no prices"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts: Parts, names: list[str], words: str) -> None:
    priced = _Priced("priced", lambda text, limit: [])
    with pytest.raises(ConfigError, match=words) as raised:
        build(parts, *names, priced=priced)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "parts"),
        ({"parts": []}, "parts"),
        ({"parts": ["a", "b", "a"]}, "named twice: a, b, a"),
        ({"parts": ["a"], "num_draft_tokens": 0}, "num_draft_tokens"),
        ({"parts": ["a"], "share": True}, "share"),
    ],
)
def test_invalid_settings_are_named(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_settings("c", DrafterSection(kind="cascade", settings=settings))


def test_lookups_precede_models_and_the_identity_has_all_parts(parts: Parts) -> None:
    cascade = parts.drafters["both"]
    assert isinstance(cascade, Cascade)

    assert tuple(cascade.parts) == ("suffix", "near", "far")
    identity = cascade.identity()
    assert identity["kind"] == "cascade"
    assert set(identity["parts"]) == {"suffix", "near", "far"}  # type: ignore[call-overload]


def test_bytes_are_counted_once(parts: Parts) -> None:
    both, near, far = (parts.drafters[name] for name in ("both", "near", "far"))

    assert both.num_bytes() == 0
    assert both.state_bytes([40]) == near.state_bytes([40]) + far.state_bytes([40]) > 0
    assert {holder.name for holder in both.holders()} == {"suffix", "near", "far"}


def test_chances_of_the_same_parts_are_taken_and_others_are_not(parts: Parts) -> None:
    cascade = parts.drafters["both"]
    assert isinstance(cascade, Cascade)
    before = cascade.chances
    learned = replace(before, tables=np.full((1, NUM_CLASSES), 0.3))
    try:
        give_chances(parts, {"both": (("suffix", "far", "near"), learned)})
        assert cascade.chances is before
        give_chances(parts, {"both": (("suffix", "near", "far"), learned)})
        assert cascade.chances is learned
    finally:
        cascade.calibrate(before)


# --- models that are asked late -------------------------------------------------------------------


def only(parts: Parts, part: int) -> Chances:
    """Return chances under which lookups are never asked, and only one of the models is."""
    assumed = Chances.assumed(1, 2)
    prospects = np.full((2, NUM_BINS, 2), 1e-6)
    if part >= 0:
        prospects[part] = 0.9
    return replace(
        assumed,
        tables=np.full((1, NUM_CLASSES), 1e-6),
        prospects=prospects,
        if_sure=np.full_like(assumed.if_sure, 0.9),
    )


@pytest.mark.parametrize("num_silent", [0, 1, 2, 3, 20])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.4, "seed": 3, "sampling": "invariant"}])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_model_that_was_not_asked_for_some_rounds_drafts_as_if_it_had_been(
    parts: Parts, num_silent: int, sampling: dict[str, Any], prompt: str
) -> None:
    """Also where more tokens are unread than a piece of the prefill has; the drafts are its own."""
    cascade, near = (parts.drafters[name] for name in ("both", "near"))
    assert isinstance(cascade, Cascade)
    pace, before = Pace(parts), cascade.chances
    settings = {"max_new_tokens": 50, "ignore_eos": True, **sampling}
    plain = pace.complete(prompt, drafter=NONE, **settings)
    asked: list[tuple[int, list[int]]] = []
    propose = cascade.propose

    def watched(rows: Sequence[Any], limits: Sequence[int]) -> Any:
        silent = len(rows[0].tokens) - rows[0].num_prompt <= num_silent
        cascade.calibrate(only(parts, -1 if silent else 0))
        drafts = propose(rows, limits)
        size = drafts.lengths[0]
        asked.append((len(rows[0].tokens), drafts.tokens[0, :size].tolist()))
        return drafts

    cascade.propose = watched  # type: ignore[method-assign]
    try:
        done = pace.complete(prompt, drafter="both", **settings)
    finally:
        del cascade.propose  # type: ignore[method-assign]
        cascade.calibrate(before)

    assert done.token_ids == plain.token_ids
    drafts = [(start, tokens) for start, tokens in asked if tokens]
    assert drafts[0][0] - len(pace.encode(prompt)) == num_silent + 1
    alone = own_drafts(pace, near, prompt, settings)
    for start, tokens in drafts:
        if start in alone:
            n = min(len(tokens), len(alone[start]))
            assert tokens[:n] == alone[start][:n]
    assert sum(start in alone for start, _ in drafts) >= 2


def own_drafts(
    pace: Pace, drafter: Drafter, prompt: str, settings: dict[str, Any]
) -> dict[int, list[int]]:
    """Return the drafter's drafts when it drafts alone, by the length of the text."""
    found: dict[int, list[int]] = {}
    propose = drafter.propose

    def watched(rows: Sequence[Any], limits: Sequence[int]) -> Any:
        drafts = propose(rows, limits)
        found[len(rows[0].tokens)] = drafts.tokens[0, : drafts.lengths[0]].tolist()
        return drafts

    drafter.propose = watched  # type: ignore[method-assign]
    try:
        # one token per draft, so that there is one at almost every position
        pace.complete(prompt, drafter=f"{drafter.name}@1", **settings)
    finally:
        del drafter.propose  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("part", ["suffix", "near"])
def test_fewer_draft_tokens_hold_from_the_next_round_on(
    parts: Parts, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cascade = parts.drafters["both"]
    assert isinstance(cascade, Cascade)
    pace, before, proposed = Pace(parts), cascade.chances, cascade.propose
    chances = only(parts, 0)
    if part == "suffix":
        chances = replace(only(parts, -1), tables=np.full((1, NUM_CLASSES), 0.9))
    lengths: list[int] = []

    def watched(rows: Sequence[Any], limits: Sequence[int]) -> Any:
        drafts = proposed(rows, limits)
        lengths.extend(drafts.lengths)
        if drafts.lengths[0] > 2:
            cascade.num_draft_tokens = 2
        return drafts

    settings = {"max_new_tokens": 40, "ignore_eos": True}
    plain = pace.complete(PROMPTS[1], drafter=NONE, **settings)
    monkeypatch.setattr(cascade, "propose", watched)
    monkeypatch.setattr(cascade, "num_draft_tokens", cascade.num_draft_tokens)
    cascade.calibrate(chances)
    try:
        done = pace.complete(PROMPTS[1], drafter="both", **settings)
    finally:
        cascade.calibrate(before)

    assert done.token_ids == plain.token_ids
    first = next(i for i, length in enumerate(lengths) if length > 2)
    assert max(lengths[first + 1 :]) == 2


def test_models_may_alternate_in_every_round(parts: Parts) -> None:
    """Each has unread tokens whenever it is asked, and the text is the target's."""
    cascade = parts.drafters["both"]
    assert isinstance(cascade, Cascade)
    pace, before = Pace(parts), cascade.chances
    propose, turn = cascade.propose, iter(range(10**6))

    def alternating(rows: Sequence[Any], limits: Sequence[int]) -> Any:
        cascade.calibrate(only(parts, next(turn) % 2))
        return propose(rows, limits)

    cascade.propose = alternating  # type: ignore[method-assign]
    try:
        for prompt in PROMPTS:
            tokens = pace.encode(prompt)
            done = pace.complete(tokens, drafter="both", max_new_tokens=40, ignore_eos=True)
            expected = greedy_reference(parts.target.model, tuple(tokens), 40)
            assert done.token_ids == expected.tokens
            assert sum(r.accepted for r in done.rounds) > 3
    finally:
        del cascade.propose  # type: ignore[method-assign]
        cascade.calibrate(before)


# --- sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["residual", "block", "invariant"])
@pytest.mark.parametrize("shape", ["chain of a model", "tree of a lookup", "both"])
def test_a_seed_gives_the_targets_text_at_temperature_08(
    parts: Parts, method: str, shape: str
) -> None:
    """A cascade's drafts have no probabilities, so the target's own draws judge them."""
    cascade = parts.drafters["both"]
    assert isinstance(cascade, Cascade)
    pace, before = Pace(parts), cascade.chances
    seen: list[Any] = []
    propose = cascade.propose

    def watched(rows: Sequence[Any], limits: Sequence[int]) -> Any:
        drafts = propose(rows, limits)
        seen.append(drafts)
        return drafts

    chances = {
        "chain of a model": only(parts, 0),
        "tree of a lookup": replace(only(parts, -1), tables=np.full((1, NUM_CLASSES), 0.9)),
        "both": before,
    }
    cascade.calibrate(chances[shape])
    cascade.propose = watched  # type: ignore[method-assign]
    settings = {
        "max_new_tokens": 60, "temperature": 0.8, "top_k": 2, "seed": 5, "sampling": method,
        "ignore_eos": True,
    }  # fmt: skip
    prompts = [*PROMPTS, "abababab"]
    try:
        done = pace.generate(prompts, drafter="both", **settings)
    finally:
        del cascade.propose  # type: ignore[method-assign]
        cascade.calibrate(before)

    plain = pace.generate(prompts, drafter=NONE, **settings)
    assert [c.token_ids for c in done] == [c.token_ids for c in plain]
    assert all(drafts.probs is None for drafts in seen)
    by_model = [n for drafts in seen for n in drafts.proposed]
    has_tree = any(drafts.parents is not None for drafts in seen)
    assert any(by_model) == (shape != "tree of a lookup")
    if shape != "both":
        assert has_tree == (shape == "tree of a lookup")
    assert sum(r.accepted for c in done for r in c.rounds) > 0
