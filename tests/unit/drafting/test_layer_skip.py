"""The target drafts for itself on its own cache, copies nothing, and leaves no stale entry."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch

from paceline.assembly import Pace, build_from_objects
from paceline.config import Config, EngineSection, ModelSection, parse
from paceline.contracts import SamplingParams
from paceline.drafting.draft_replay import cache_text
from paceline.drafting.layer_skip import LayerSkip, LayerSkipSettings
from paceline.drafting.skip_set import SkipSet
from paceline.errors import ArtefactError, ConfigError
from paceline.models.language_model import LanguageModel
from paceline.models.packing import Span
from paceline.models.sublayers import LayerSubset
from paceline.replay import replay
from paceline.testing.tiny_models import tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from paceline.contracts import Drafts

GREEDY = SamplingParams()
RESIDUAL = SamplingParams(0.9, top_k=20, seed=3, method="residual")
INVARIANT = SamplingParams(0.9, top_k=20, seed=3, method="invariant")
# attention follows the skipped MLP, so its cached entries differ from those of a full pass
SUBSET = LayerSubset(mlp=frozenset({0}))
FIXED = LayerSkipSettings(skip_mlp=(0,), num_draft_tokens=4, stop="fixed")
TEXT = [7, 40, 3, 99, 12, 64, 5, 80, 33, 2]


@dataclass
class Row:
    id: int
    slot: int
    tokens: list[int]
    sampling: SamplingParams = GREEDY
    num_prompt: int = 1
    num_cached: int = 0


def new_target(architecture: str = "llama") -> LanguageModel:
    return LanguageModel(tiny_model(architecture), "target")


def cached_row(target: LanguageModel, id: int, tokens: list[int], **settings: Any) -> Row:
    row = Row(id, target.acquire(), tokens, **settings)
    with torch.inference_mode():
        cache_text(target, row.slot, tokens[:-1], len(tokens))
    row.num_cached = len(tokens) - 1
    return row


def propose(drafter: LayerSkip, rows: Sequence[Row], limits: Sequence[int]) -> Drafts:
    with torch.inference_mode():
        return drafter.propose(rows, limits)


def naive_draft(target: LanguageModel, tokens: list[int], num: int) -> list[int]:
    """Return a draft from full entries of all tokens but the last, one skipped forward per token."""
    row = cached_row(target, 0, tokens)
    drafted: list[int] = []
    with torch.inference_mode():
        for step in range(num):
            token = (drafted or tokens)[-1]
            place = Span(row.slot, len(tokens) - 1 + step, 1)
            hidden = target.forward(torch.tensor([token]), [place], skip=SUBSET)
            drafted.append(int(target.unembed(hidden)[0].argmax()))
    target.release(row.slot)
    return drafted


def pace_with(settings: LayerSkipSettings = FIXED, **engine: Any) -> Pace:
    config = Config(target=ModelSection(model="in memory"), engine=EngineSection(**engine))
    parts = build_from_objects(tiny_model(), byte_tokenizer(), {}, config)
    parts.drafters["skip"] = LayerSkip.build("skip", settings, parts.build_context())
    return Pace(parts)


# --- proposals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
def test_drafts_are_those_of_the_skipped_model_one_by_one(architecture: str) -> None:
    target = new_target(architecture)
    texts = [TEXT, TEXT[:4], TEXT[2:], TEXT[1:7]]
    expected = [naive_draft(target, text, 4) for text in texts]
    drafter = LayerSkip("skip", target, SUBSET, FIXED)
    rows = [cached_row(target, i, text) for i, text in enumerate(texts)]
    drafter.start(rows)
    for _ in range(2):  # the first draft's entries after the text do not change the second
        drafts = propose(drafter, rows[::-1], [4, 9, 2, 0][::-1])
        found = [drafts.tokens[i, :n].tolist() for i, n in enumerate(drafts.lengths)][::-1]
        assert found == [expected[0], expected[1], expected[2][:2], []]
    assert any(draft != [draft[0]] * 4 for draft in expected)


@pytest.mark.parametrize("sampling", [GREEDY, RESIDUAL, INVARIANT], ids=lambda s: s.method)
def test_only_the_rows_own_new_positions_are_written(sampling: SamplingParams) -> None:
    target = new_target()
    drafter = LayerSkip("skip", target, SUBSET, FIXED)
    rows = [cached_row(target, i, TEXT[i:], sampling=sampling) for i in range(3)]
    before = [target.cache.read(row.slot, 0, 128) for row in rows]
    drafter.start([rows[1]])
    propose(drafter, [rows[1]], [4])
    last = len(rows[1].tokens) - 1
    for row, was in zip(rows, before, strict=True):
        for old, new in zip(was, target.cache.read(row.slot, 0, 128), strict=True):
            changed = (old != new).any(dim=2).any(dim=0).nonzero().flatten().tolist()
            assert changed == (list(range(last, last + 4)) if row is rows[1] else [])


def test_a_draft_ends_with_the_first_token_below_the_threshold() -> None:
    target = new_target()
    settings = LayerSkipSettings(skip_mlp=(0,), num_draft_tokens=12, threshold=0.06)
    drafter = LayerSkip("skip", target, SUBSET, settings)
    lengths = []
    for start in range(6):
        row = cached_row(target, start, TEXT[start:])
        drafter.start([row])
        drafts = propose(drafter, [row], [12])
        n = drafts.lengths[0]
        drafted = drafts.tokens[0, :n].tolist()
        assert drafted == naive_draft(target, row.tokens, n)
        sure = []
        with torch.inference_mode():
            for k in range(n):
                place = Span(row.slot, len(row.tokens) - 1 + k, 1)
                token = torch.tensor([[*row.tokens[-1:], *drafted][k]])
                logits = target.unembed(target.forward(token, [place], skip=SUBSET))
                sure.append(float(logits.softmax(dim=-1).amax()))
        assert all(s >= 0.06 for s in sure[:-1])
        assert sure[-1] < 0.06 or n == 12
        lengths.append(n)
    assert len(set(lengths)) > 1


def test_the_end_of_a_draft_does_not_depend_on_the_drawn_token() -> None:
    """Otherwise the last tokens of drafts would not be distributed as q."""
    target = new_target()
    settings = LayerSkipSettings(skip_mlp=(0,), num_draft_tokens=8, threshold=0.06)
    for text in (TEXT, TEXT[:4], TEXT[:7]):
        drafter = LayerSkip("skip", target, SUBSET, settings)
        ends: dict[tuple[int, ...], set[bool]] = {}
        drawn: dict[tuple[int, ...], set[int]] = {}
        for seed in range(60):
            sampling = SamplingParams(2.0, seed=seed, method="residual")
            row = cached_row(target, seed, text, sampling=sampling)
            drafter.start([row])
            drafts = propose(drafter, [row], [8])
            tokens = tuple(drafts.tokens[0, : drafts.lengths[0]].tolist())
            for k in range(min(len(tokens), 7)):
                ends.setdefault(tokens[:k], set()).add(k + 1 == len(tokens))
                drawn.setdefault(tokens[:k], set()).add(tokens[k])
            target.release(row.slot)
        assert len(drawn[()]) > 3
        assert all(len(found) == 1 for found in ends.values())


def test_a_row_learns_from_its_own_rounds_and_is_forgotten() -> None:
    target = new_target()
    settings = LayerSkipSettings(skip_mlp=(0,), num_draft_tokens=3, threshold=0.0)
    drafter = LayerSkip("skip", target, SUBSET, settings)
    row = cached_row(target, 5, list(TEXT))
    drafter.start([row])
    drafted = propose(drafter, [row], [3]).tokens[0].tolist()
    row.tokens += [*drafted[:1], (drafted[1] + 1) % 99]
    propose(drafter, [row], [3])
    (state,) = drafter._states.values()
    assert state.exit.acceptance == pytest.approx(1 / 3)
    drafter.finish([row, Row(77, 0, [])])
    assert not drafter._states
    drafter.start([row])
    assert drafter._states[5].exit.acceptance is None


# --- memory ---------------------------------------------------------------------------------------


def live_bytes() -> int:
    """Return the bytes of all live tensors, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):  # isinstance would load lazy modules
            if thing.is_sparse or thing.is_sparse_csr or thing.is_nested:
                continue  # of another test: no model has such tensors
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_no_weight_is_copied_and_no_second_cache_is_held() -> None:
    pace = pace_with()
    target = pace.parts.target
    weights = {p.data_ptr() for p in target.model.parameters()}
    plain = pace.complete("to be or not to be", drafter="none", max_new_tokens=60)
    pace.complete(
        "to be or not to be", drafter="skip", max_new_tokens=60
    )  # creates the masks, which are kept
    cache, before = target.cache.num_bytes(), live_bytes()

    other = LayerSkip.build("other", FIXED, pace.parts.build_context())
    pace.parts.drafters["other"] = other
    skipping = Pace(pace.parts)
    drafted = skipping.complete("to be or not to be", drafter="other", max_new_tokens=60)

    assert drafted.token_ids == plain.token_ids
    assert sum(r.drafted for r in drafted.rounds) > 50
    assert target.cache.num_bytes() == cache
    assert live_bytes() - before < 4096
    assert other._target is target
    assert {p.data_ptr() for p in target.model.parameters()} == weights
    assert other.num_bytes() == 0


# --- nothing stale --------------------------------------------------------------------------------


def test_verification_overwrites_every_drafted_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """If verification leaves one drafted entry, the text changes."""
    prompts = ["to be or not to be", "spam, eggs and spam", "a rose is a rose"]
    pace = pace_with()
    settings = {"max_new_tokens": 60}
    expected = [c.token_ids for c in pace.generate(prompts, drafter="none", **settings)]

    assert [c.token_ids for c in pace.generate(prompts, drafter="skip", **settings)] == expected

    score = LanguageModel.score

    def forgetful(self: LanguageModel, tokens: Any, spans: Any, *rest: Any) -> Any:
        drafts = [s for s in spans if s.width > 1]
        kept = [self.cache.read(s.slot, s.start, s.start + 1) for s in drafts]
        scores = score(self, tokens, spans, *rest)
        for span, entries in zip(drafts, kept, strict=True):
            self.cache.write(span.slot, span.start, entries)
        return scores

    monkeypatch.setattr(LanguageModel, "score", forgetful)
    assert [c.token_ids for c in pace.generate(prompts, drafter="skip", **settings)] != expected


def test_shared_prefixes_hold_no_drafted_entries() -> None:
    prompt = "to be or not to be, that is the question: whether 'tis nobler in the mind to suffer"
    blocks = []
    for arm in ("none", "skip"):
        pace = pace_with(prefix_positions=128)
        for extra in ("", " the slings", " and arrows"):
            pace.complete(prompt + extra, drafter=arm, max_new_tokens=20)
        blocks.append(list(pace.engine.prefixes._blocks.values()))
    assert len(blocks[0]) == len(blocks[1]) > 0
    for of_none, of_skip in zip(*blocks, strict=True):
        for a, b in zip(of_none.entries, of_skip.entries, strict=True):
            assert torch.equal(a, b)


# --- replay ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.02, 0.06])
def test_replayed_rounds_are_the_real_ones_as_the_threshold_moves(threshold: float) -> None:
    settings = LayerSkipSettings(
        skip_mlp=(0,), num_draft_tokens=6, threshold=threshold, threshold_step=0.2
    )
    pace = pace_with(settings)
    target = pace.parts.target
    drafted = set()
    for prompt in ("to be or not to be", "spam, eggs and spam"):
        real = pace.complete(prompt, drafter="skip", max_new_tokens=70)
        drafter = pace.parts.drafters["skip"]
        for _ in range(2):
            found = replay(drafter, pace.encode(prompt), real.token_ids, 70).rounds
            assert found.tolist() == [[r.drafted, r.accepted] for r in real.rounds]
        drafted |= {r.drafted for r in real.rounds}
    assert len(drafted) > 2
    assert target.acquire() == 0  # every slot is free


def test_replay_restores_the_entries_that_a_round_overwrote() -> None:
    pace = pace_with()
    target, drafter = pace.parts.target, pace.parts.drafters["skip"]
    real = pace.complete("to be", drafter="none", max_new_tokens=20)
    prompt = pace.encode("to be")
    with torch.inference_mode():
        draft_replay = drafter.would_accept(prompt, real.token_ids, None)
        n = len(prompt) + len(real.token_ids) - 1
        before = target.cache.read(0, 0, n)
        for position in (1, 4, 5, 18, 19):
            draft_replay.round_at(position, 20 - position - 1)
            after = target.cache.read(0, 0, n)
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        draft_replay.close()


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "say what to skip: skip_set with a file"),
        ({"skip_mlp": [1], "skip_set": "x.json"}, "say what to skip"),
        ({"skip_mlp": [1], "stop": "never"}, "'stop'"),
        ({"skip_mpl": [1]}, "unknown key 'skip_mpl'; did you mean 'skip_mlp'?"),
    ],
)
def test_invalid_settings(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(LayerSkipSettings, raw, "drafter 'skip'")
    assert message in str(error.value)


def test_a_missing_layer() -> None:
    with pytest.raises(ConfigError, match="there is no layer 2 to skip; the target's layers are 0"):
        pace_with(LayerSkipSettings(skip_attention=(2,)))


def test_a_skip_set_serves_its_own_target_only(tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    own = pace_with()
    SkipSet(SUBSET, 2, own.parts.target.fingerprint(), {"speedup": 1.5}).save(path)
    assert SkipSet.load(path).facts == {"speedup": 1.5}
    skipping = pace_with(LayerSkipSettings(skip_set=path))
    assert isinstance(drafter := skipping.parts.drafters["skip"], LayerSkip)
    assert drafter.subset == SUBSET
    assert drafter.identity()["skip_mlp"] == "0"
    SkipSet(SUBSET, 2, "another", {}).save(path)
    with pytest.raises(ArtefactError, match="drafter 'skip': the skip set was made for another"):
        pace_with(LayerSkipSettings(skip_set=path))


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format_version": 1}'])
def test_an_invalid_skip_set(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "set.json"
    if content is not None:
        path.write_text(content)
    settings = LayerSkipSettings(skip_set=path)
    with pytest.raises(ArtefactError, match="run `paceline layer-search PROMPTS`"):
        LayerSkip.check("skip", settings, None)  # type: ignore[arg-type]


def test_profiling_measures_drafts_at_full_length() -> None:
    """A threshold of 1 ends every draft after one token, because max q is below it."""
    target = new_target()
    settings = LayerSkipSettings(skip_mlp=(0,), num_draft_tokens=6, threshold=1.0)
    drafter = LayerSkip("skip", target, SUBSET, settings)
    row = cached_row(target, 0, TEXT)
    drafter.start([row])

    assert propose(drafter, [row], [6]).lengths == [1]
    with drafter.at_full_length():
        assert propose(drafter, [row], [6]).lengths == [6]
    assert propose(drafter, [row], [6]).lengths == [1]
