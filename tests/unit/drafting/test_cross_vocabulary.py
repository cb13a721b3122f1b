"""A drafter with another tokenizer never changes a text, at any level."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from support.relabelled import relabelled
from support.trained_tokenizers import byte_level_bpe, unigram

from paceline.assembly import Pace, Parts, build, build_from_objects, load
from paceline.bench.doctor import doctor
from paceline.config import Config, DrafterSection, EngineSection, ModelSection
from paceline.contracts import NONE, SamplingParams
from paceline.drafting.bridged_drafters import Bridge, SharedTokens, ThroughText
from paceline.drafting.cross_vocabulary import CrossVocabulary
from paceline.drafting.draft_length import StopSettings
from paceline.drafting.draft_model import DraftModel
from paceline.errors import ConfigError
from paceline.experiments.demo_prompts import demo_prompts
from paceline.models.language_model import LanguageModel
from paceline.models.translation import RunningText
from paceline.replay import max_output, replay, target_distributions
from paceline.testing.tiny_models import perturbed, tiny_model
from paceline.testing.tokenizers import byte_tokenizer
from paceline.warping import warp

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from paceline.drafting.base import Drafter

NEW = 24
LONG = 80


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [record.prompt for record in demo_prompts(6, 1)[0]]


@pytest.fixture(scope="module")
def tokenizers(texts: list[str]) -> dict[str, PreTrainedTokenizerBase]:
    return {"bpe": byte_level_bpe(texts, 500), "unigram": unigram(texts, 450)}


def drafter_of(
    parts: Parts,
    name: str,
    model: object,
    tokenizer: PreTrainedTokenizerBase,
    level: str,
    stop: StopSettings | None = None,
) -> Drafter:
    bridge = Bridge.between(parts.tokenizer, tokenizer, level)  # type: ignore[arg-type]
    own = LanguageModel(model, name)  # type: ignore[arg-type]
    context = parts.build_context()
    return CrossVocabulary.from_model(name, own, stop or StopSettings(), bridge, context)


@pytest.fixture(scope="module")
def worlds(
    zoo_target: Parts, tokenizers: dict[str, PreTrainedTokenizerBase], texts: list[str]
) -> dict[str, Pace]:
    """Return targets with drafters of every level: the same model under other ids, and other tokens."""
    found = {}
    for name in ("bpe", "unigram", "zoo"):
        if name == "zoo":
            # a target that writes real text; the smallest is enough
            general = zoo_target.drafters["draft-general"]
            assert isinstance(general, DraftModel)
            model, tokenizer = general.model.model, zoo_target.tokenizer
        else:
            tokenizer = tokenizers[name]
            model = tiny_model(std=0.12, vocab_size=len(tokenizer), context=512)
        config = Config(target=ModelSection(model="in memory"), engine=EngineSection(max_rows=3))
        near = model if name == "zoo" else perturbed(model, 0.05)
        parts = build_from_objects(model, tokenizer, {"plain": near}, config)
        if name != "unigram":
            other, own = relabelled(near, tokenizer)
            parts.drafters["shared"] = drafter_of(parts, "shared", other, own, "shared")
            parts.drafters["text"] = drafter_of(parts, "text", other, own, "text")
        for kind, own in tokenizers.items():
            foreign = tiny_model(seed=4, std=0.12, vocab_size=len(own), context=512)
            for level in ("shared", "text") if name == "bpe" else ("text",):
                arm = f"{kind} {level}"
                parts.drafters[arm] = drafter_of(parts, arm, foreign, own, level)
        found[name] = Pace(parts)
    return found


WORLDS = ("bpe", "unigram", "zoo")


# --- the text -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORLDS)
def test_the_text_is_the_targets_and_replay_gives_the_real_rounds(
    worlds: dict[str, Pace], texts: list[str], name: str
) -> None:
    pace = worlds[name]
    drafted: dict[str, int] = {}
    for text in [*texts[:2], "東京 🙂 Zoë"]:
        prompt = pace.encode(text)
        plain = pace.complete(text, drafter=NONE, max_new_tokens=NEW)
        for arm, drafter in pace.parts.drafters.items():
            real = pace.complete(text, drafter=arm, max_new_tokens=NEW)
            limit = max_output(NEW, len(prompt), pace.parts.target.context_length)

            assert real.token_ids == plain.token_ids, arm
            predicted = replay(drafter, prompt, plain.token_ids, limit).rounds
            assert predicted.tolist() == [[r.drafted, r.accepted] for r in real.rounds], arm
            drafted[arm] = drafted.get(arm, 0) + sum(r.drafted for r in real.rounds)
    assert all(drafted[arm] > 0 for arm in drafted if arm != NONE), drafted


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("seed", range(2))
def test_any_schedule_gives_the_targets_text(
    worlds: dict[str, Pace], texts: list[str], name: str, seed: int
) -> None:
    """Rows of all levels in one batch change drafter in flight, and some pause drafting."""
    pace, order = worlds[name], random.Random(seed)
    prompts = [pace.encode(text) for text in texts[:4]]
    expected = [
        pace.complete(prompt, drafter=NONE, max_new_tokens=24).token_ids for prompt in prompts
    ]
    arms = list(pace.parts.drafters)
    engine, done = pace.engine, {}
    tickets = [
        engine.submit(pace.request(prompt, drafter=order.choice(arms), max_new_tokens=24))
        for prompt in prompts
    ]
    while len(done) < len(tickets):
        if order.random() < 0.4:
            engine.switch(order.choice(tickets), order.choice(arms))
        for progress in engine.step():
            if progress.completion is not None:
                done[progress.ticket] = progress.completion

    assert [done[t].error for t in tickets] == [None] * 4
    assert [done[t].token_ids for t in tickets] == expected
    for drafter in pace.parts.drafters.values():
        if isinstance(drafter, DraftModel | ThroughText):
            cache = drafter.model.cache
            assert cache.num_rows == 0
    text_drafter = pace.parts.drafters["bpe text"]
    assert isinstance(text_drafter, ThroughText) and not text_drafter._rows


@pytest.mark.parametrize("name", WORLDS)
def test_a_seed_gives_the_same_text_at_every_level(
    worlds: dict[str, Pace], texts: list[str], name: str
) -> None:
    pace = worlds[name]
    settings = {"temperature": 0.6, "seed": 3, "max_new_tokens": 24}
    plain = pace.generate(texts[:2], drafter=NONE, **settings)
    for arm in pace.parts.drafters:
        done = pace.generate(texts[:2], drafter=arm, **settings)
        assert [c.token_ids for c in done] == [c.token_ids for c in plain], arm


# --- acceptance -----------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["shared", "text"])
def test_the_same_model_under_other_ids_drafts_the_same(
    worlds: dict[str, Pace], texts: list[str], level: str
) -> None:
    """A model drafts for itself, so only the bridge can cost acceptance."""
    pace = worlds["zoo"]
    accepted, drafted, whole = 0, 0, 0
    for text in texts[:3]:
        messages = [{"role": "user", "content": text}]
        real = pace.complete(messages, drafter=level, max_new_tokens=LONG)
        rounds = real.rounds[:-1]  # the last round may reach past a stop
        accepted += sum(r.accepted for r in rounds)
        drafted += sum(r.drafted for r in rounds)
        whole += 4 * len(rounds)
    assert drafted > 0.8 * whole
    assert accepted == drafted if level == "shared" else accepted > 0.9 * drafted


def test_a_text_drafter_feeds_only_what_is_new(
    worlds: dict[str, Pace], texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cache survives the rounds although its text is read again."""
    pace = worlds["zoo"]
    drafter = pace.parts.drafters["text"]
    assert isinstance(drafter, ThroughText)
    prompt = pace.encode(" ".join(texts[:8]))
    fed: list[int] = []
    forward = drafter.model.forward
    monkeypatch.setattr(
        drafter.model,
        "forward",
        lambda tokens, spans: fed.append(len(tokens)) or forward(tokens, spans),
    )

    done = pace.complete(prompt, drafter="text", max_new_tokens=60, ignore_eos=True)

    assert len(prompt) > 400
    first, *rest = fed
    assert first > 400
    assert sum(rest) < 6 * 60 + 100
    assert len(done.token_ids) == 60


def test_a_prompt_longer_than_the_drafters_context_gets_no_drafts(
    worlds: dict[str, Pace], texts: list[str], tokenizers: dict[str, PreTrainedTokenizerBase]
) -> None:
    pace = worlds["zoo"]
    prompt = pace.encode(" ".join(texts[:4]))
    plain = pace.complete(prompt, drafter=NONE, max_new_tokens=12).token_ids
    for level in ("shared", "text"):
        own = tokenizers["unigram"]
        short = tiny_model(vocab_size=len(own), context=64)
        pace.parts.drafters["short"] = drafter_of(pace.parts, "short", short, own, level)
        done = Pace(pace.parts).complete(prompt, drafter="short", max_new_tokens=12)
        del pace.parts.drafters["short"]

        assert done.token_ids == plain
        assert not any(r.drafted for r in done.rounds)


class View:
    num_prompt, slot, num_cached = 2, -1, 0

    def __init__(self, id: int, tokens: list[int], sampling: SamplingParams) -> None:
        self.id, self.tokens, self.sampling = id, tokens, sampling


def proposals(drafter: Drafter, row: View, limit: int) -> list[int]:
    with torch.inference_mode():
        drafts = drafter.propose([row], [limit])
    tokens: list[int] = drafts.tokens[0, : drafts.lengths[0]].tolist()
    return tokens


@pytest.mark.parametrize(("name", "arm"), [("bpe", "unigram text"), ("unigram", "bpe text")])
def test_proposals_are_those_of_a_fresh_drafter_after_any_history(
    worlds: dict[str, Pace], texts: list[str], name: str, arm: str
) -> None:
    """Its own tokens after the last round's text may have changed, and its cache with them."""
    pace, order = worlds[name], random.Random(1)
    drafter = pace.parts.drafters[arm]
    text = pace.encode(texts[0] + texts[1])
    row, at = View(0, text[:5], SamplingParams()), 5
    drafter.start([row])
    drafted = rewritten = 0
    while at < min(len(text), 120):
        before = list(drafter._rows[0].tokens)  # type: ignore[attr-defined]
        found = proposals(drafter, row, 4)
        after = drafter._rows[0].tokens  # type: ignore[attr-defined]
        rewritten += after[: len(before)] != before
        fresh = View(1, list(row.tokens), SamplingParams())
        drafter.start([fresh])
        assert found == proposals(drafter, fresh, 4)
        drafter.finish([fresh])
        drafted += len(found)
        at += order.randint(1, 3)
        row.tokens = text[:at]
    drafter.finish([row])
    assert drafted > 60 and rewritten > 5


def test_a_draft_continues_inside_a_character(worlds: dict[str, Pace]) -> None:
    """The target's last token ends inside it; the drafter reads only whole characters."""
    drafter = worlds["bpe"].parts.drafters["text"]
    assert isinstance(drafter, ThroughText)
    target, own = drafter._bridge.target, drafter._bridge.own
    text = RunningText(target, own, {})
    text.extend([target.of.index(b"a"), target.of.index(b"\xc3")])

    def said(draft: str) -> bytes:
        return target.join(drafter._target_tokens(text, own.encode(draft)))

    assert text.held == b"\xc3"
    assert said("éb") == "éb".encode()[1:]
    assert said("bé") == b""  # does not start with the character


# --- drafts over shared tokens --------------------------------------------------------------------


def test_drafts_are_drawn_from_the_renormalised_distribution(
    worlds: dict[str, Pace], texts: list[str]
) -> None:
    pace = worlds["bpe"]
    drafter = pace.parts.drafters["unigram shared"]
    assert isinstance(drafter, SharedTokens)
    tokens = pace.encode(texts[0])
    params = SamplingParams(0.8, top_p=0.9, seed=2, method="residual")
    rows = [View(i, list(tokens), replace(params, seed=i)) for i in range(40)]
    with torch.inference_mode():
        drafter.start(rows)
        drafts = drafter.propose(rows, [3] * 40)
        drafter.finish(rows)

    assert drafts.probs is not None
    q = drafts.probs
    known = set(drafter._pairs)
    torch.testing.assert_close(q.sum(dim=-1), torch.ones(40, 3))
    assert not q[..., [t for t in range(q.shape[-1]) if t not in known]].any()
    assert {int(t) for t in drafts.tokens.flatten()} <= known
    assert (q.gather(-1, drafts.tokens[..., None]) > 0).all()
    own, _ = drafter._own_text(tokens, [])
    assert own[0] == drafter._bridge.own.tokenizer.bos_token_id
    with torch.inference_mode():
        logits = drafter.model.model(torch.tensor([own])).logits[0, -1]
    expected = torch.zeros(q.shape[-1])
    targets, owns = zip(*drafter._pairs.items(), strict=True)
    expected[list(targets)] = warp(logits[list(owns)], params)
    torch.testing.assert_close(q[0, 0], expected, rtol=0, atol=1e-4)


def test_scores_are_in_the_targets_tokens(worlds: dict[str, Pace], texts: list[str]) -> None:
    pace = worlds["bpe"]
    prompt = pace.encode(texts[0])
    output = pace.complete(prompt, drafter=NONE, max_new_tokens=NEW).token_ids
    p = target_distributions(pace.parts.target, prompt, output)
    scores = {
        arm: replay(pace.parts.drafters[arm], prompt, output, NEW, p).scores
        for arm in ("plain", "shared", "unigram shared")
    }

    plain, shared, foreign = scores.values()
    assert plain is not None and shared is not None and foreign is not None
    for field in ("match", "ratio", "overlap", "confidence"):
        np.testing.assert_allclose(getattr(shared, field), getattr(plain, field), atol=1e-4)
        assert len(getattr(foreign, field)) == len(output)
    assert np.isfinite(foreign.overlap).all() and foreign.overlap.max() < 1


# --- stops ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["shared", "text"])
def test_a_confidence_stop_works_at_every_level(
    zoo_target: Parts, texts: list[str], level: str
) -> None:
    z = zoo_target
    parts = Parts(z.config, z.target, z.tokenizer, z.vocabulary, {NONE: z.drafters[NONE]})
    general = z.drafters["draft-general"]
    assert isinstance(general, DraftModel)
    other, own = relabelled(general.model.model, z.tokenizer)
    stop = StopSettings(num_draft_tokens=8, stop="confidence", threshold=0.4)
    parts.drafters["it"] = drafter_of(parts, "it", other, own, level, stop)
    pace = Pace(parts)
    lengths = set()
    for text in texts[:2]:
        messages = [{"role": "user", "content": text}]
        prompt = pace.encode(messages)
        plain = pace.complete(prompt, drafter=NONE, max_new_tokens=NEW)
        real = pace.complete(prompt, drafter="it", max_new_tokens=NEW)
        limit = max_output(NEW, len(prompt), parts.target.context_length)

        assert real.token_ids == plain.token_ids
        predicted = replay(parts.drafters["it"], prompt, plain.token_ids, limit).rounds
        assert predicted.tolist() == [[r.drafted, r.accepted] for r in real.rounds]
        lengths |= {r.drafted for r in real.rounds}
    assert len(lengths) > 3


# --- which level ----------------------------------------------------------------------------------


def test_the_level_follows_from_the_tokenizers(
    zoo_target: Parts, tokenizers: dict[str, PreTrainedTokenizerBase], texts: list[str]
) -> None:
    zoo = zoo_target.tokenizer
    other = relabelled(tiny_model(vocab_size=len(zoo)), zoo)[1]

    def level(own: PreTrainedTokenizerBase) -> str:
        return Bridge.between(zoo, own).level

    assert level(zoo) == "same"
    assert level(other) == "shared"
    assert level(tokenizers["unigram"]) == "text"
    assert level(byte_tokenizer()) == "text"


def saved(folder: Path, vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> str:
    tiny_model(vocab_size=vocab_size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def config_of(target: str, own: str, **settings: object) -> Config:
    section = DrafterSection(kind="cross_vocabulary", settings={"model": own, **settings})
    return Config(target=ModelSection(model=target), drafters={"small": section})


def test_a_configured_drafter_reports_its_level(
    tmp_path: Path, tokenizers: dict[str, PreTrainedTokenizerBase]
) -> None:
    bpe, uni = tokenizers["bpe"], tokenizers["unigram"]
    other = relabelled(tiny_model(vocab_size=len(bpe)), bpe)[1]
    target = saved(tmp_path / "target", len(bpe), bpe)
    same = saved(tmp_path / "same", len(bpe) + 13, bpe)  # the embedding table is padded
    permuted = saved(tmp_path / "permuted", len(bpe), other)
    foreign = saved(tmp_path / "foreign", len(uni), uni)
    for own, cls, words in [
        (same, DraftModel, "the same tokens: a plain draft model"),
        (
            permuted,
            SharedTokens,
            "100% of the tokens in common, 100% of text cut alike: drafts over",
        ),
        (foreign, ThroughText, "cut alike: drafts text"),
    ]:
        config = config_of(target, own)
        pace = load(config, with_policy=False)

        drafter = pace.parts.drafters["small"]
        assert type(drafter) is cls
        assert len(pace.notes) == 1 and words in pace.notes[0] and "'small'" in pace.notes[0]
        assert len(pace.complete("hello", drafter="small", max_new_tokens=5).token_ids) == 5
        [check] = doctor(config).drafters
        assert check.problem is None and words in check.vocabulary
        if cls is not DraftModel:
            identity = drafter.identity()
            assert identity["kind"] == "cross_vocabulary"
            assert identity["level"] in words.replace("drafts text", "text") or cls is SharedTokens
    forced = build(config_of(target, permuted, level="text"))
    assert isinstance(forced.drafters["small"], ThroughText)
    assert forced.drafters["small"].identity()["level"] == "text"


def test_a_text_drafter_cannot_stop_by_prices(
    tmp_path: Path, tokenizers: dict[str, PreTrainedTokenizerBase]
) -> None:
    bpe, uni = tokenizers["bpe"], tokenizers["unigram"]
    target = saved(tmp_path / "target", len(bpe), bpe)
    foreign = saved(tmp_path / "foreign", len(uni), uni)
    (tmp_path / "foreign" / "model.safetensors").write_bytes(b"")  # is never read
    config = config_of(target, foreign, stop="expected")

    with pytest.raises(ConfigError, match=r"'small' drafts text .* set 'stop: confidence'"):
        build(config)
    [check] = doctor(config).drafters
    assert check.problem is not None and "drafts text" in check.problem
