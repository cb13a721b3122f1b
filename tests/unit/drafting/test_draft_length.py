"""Stop rules end drafts by distributions alone, and replay gives the lengths of a real run."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from paceline.assembly import Pace, build_from_objects, load
from paceline.bench.doctor import doctor
from paceline.config import Config, DrafterSection, LearningSection, ModelSection, PathsSection
from paceline.contracts import NONE, PromptRecord, SamplingParams, identity_of_arms
from paceline.costs import CostTable, Measurement
from paceline.drafting.catalog import check_settings
from paceline.drafting.draft_length import (
    FIXED_LENGTH,
    ConfidenceStop,
    ExpectedGainStop,
    StopSettings,
    confidences,
)
from paceline.drafting.draft_model import DraftModel
from paceline.drafting.draft_replay import SimulatedReplay
from paceline.errors import ArtefactError, ConfigError
from paceline.models.language_model import LanguageModel
from paceline.replay import max_output, price_stops, replay, rounds_of, simulate, walk
from paceline.replay.priced import stopped_ahead
from paceline.store.collection import load_collection
from paceline.store.records import CollectedPrompt
from paceline.testing.tiny_models import perturbed, tiny_model
from paceline.testing.tokenizers import byte_tokenizer
from paceline.verbs.evaluate import evaluate
from paceline.verbs.pipeline import prepare

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from paceline.contracts import Drafts

PROMPTS = ("hello", "abcabcabc", "the quick brown fox jumps over it")
LENGTH = 6
FIXED = StopSettings(num_draft_tokens=LENGTH)
SURE = StopSettings(num_draft_tokens=LENGTH, stop="confidence", threshold=0.15)
EXPECTED = StopSettings(num_draft_tokens=LENGTH, stop="expected")
NEW = 40


def prices(step: float, width: float = 0.0, host: float = 0.0) -> CostTable:
    """Return prices: 1 s per target token; per drafted one `step` s to draft, `width` s to verify."""
    measured = [Measurement("engine", "round", 0, 0, 1, host)]
    measured.append(Measurement("target", "prefill", 1, 0, 1, 1.0))
    for k in (0, 1, 64):
        measured.append(Measurement("target", "forward", 1 + k, 0, 1, 1.0 + width * k))
    for arm in ("small", "general"):
        measured += [Measurement(arm, "propose", k, 0, 1, step * k) for k in (0, 1, 64)]
        measured.append(Measurement(arm, "start", 1, 0, 1, 0.0))
    return CostTable({}, measured)


# --- the rules alone ------------------------------------------------------------------------------


def test_confidence_allows_tokens_while_the_product_is_high_enough() -> None:
    rule = ConfidenceStop(0.5)

    assert rule.allows_next([0.9], 0)
    assert rule.allows_next([0.8, 0.625], 0)
    assert not rule.allows_next([0.8, 0.6], 0)
    assert not rule.allows_next([0.4], 0)


@pytest.mark.parametrize(
    ("sure", "step", "goes_on"),
    [
        # one token drafted: 1.5 expected in 1 + step seconds; the next adds 0.25 for `step`
        ([0.5], 0.19, True),  # 0.25 / 0.19 above 1.5 / 1.19
        ([0.5], 0.21, False),
        ([0.9], 0.5, True),  # 0.81 / 0.5 above 1.9 / 1.5
        ([1.0, 1.0], 10.0, False),  # never pays: 1 token in 10 s, 3 in 21 s
        ([1.0, 1.0], 0.99, True),
        ([0.01, 0.01], 0.0, True),  # a free token always pays
    ],
)
def test_expected_gain_compares_the_next_token_with_the_round_so_far(
    sure: Sequence[float], step: float, goes_on: bool
) -> None:
    assert ExpectedGainStop(prices(step), "small", 8).allows_next(sure, 50) is goes_on


def test_verification_is_a_part_of_the_price() -> None:
    assert ExpectedGainStop(prices(0.05), "small", 8).allows_next([0.5], 0)
    assert not ExpectedGainStop(prices(0.05, width=0.3), "small", 8).allows_next([0.5], 0)


def test_fixed_seconds_per_round_make_longer_drafts_pay() -> None:
    assert not ExpectedGainStop(prices(0.3), "small", 8).allows_next([0.5], 0)
    assert ExpectedGainStop(prices(0.3, host=3.0), "small", 8).allows_next([0.5], 0)


def test_prices_are_those_of_the_context() -> None:
    dear = [Measurement("small", "propose", k, 1024, 1, 10.0 * k) for k in (0, 1, 64)]
    table = CostTable({}, [*prices(0.1).measurements, *dear])
    rule = ExpectedGainStop(table, "small", 8)

    assert rule.allows_next([0.7], 10)
    assert not rule.allows_next([0.7], 1030)


def test_settings_that_do_not_fit_are_named() -> None:
    def check(**settings: object) -> None:
        section = DrafterSection(kind="draft_model", settings={"model": "m", **settings})
        check_settings("small", section)

    check(stop="confidence", threshold=0.3)
    with pytest.raises(ConfigError, match="'small': 'threshold' belongs to 'stop: confidence'"):
        check(threshold=0.3)
    with pytest.raises(ConfigError, match=r"'threshold' .*'expected'"):
        check(stop="expected", threshold=0.3)
    with pytest.raises(ConfigError, match="'stop'"):
        check(stop="never")


def test_a_rule_is_a_part_of_the_identity_and_length_alone_is_not() -> None:
    assert FIXED.stop_identity() == {}
    assert SURE.stop_identity() == {"stop": "confidence", "threshold": 0.15}
    assert EXPECTED.stop_identity() == {"stop": "expected"}


# --- in a draft model -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def target() -> LanguageModel:
    model = tiny_model(std=0.1, context=96)
    with torch.no_grad():  # so that confidences are high for some tokens and low for others
        model.get_output_embeddings().weight.mul_(8.0)
    return LanguageModel(model, "target")


def drafter(target: LanguageModel, stop: StopSettings, context: int = 96) -> DraftModel:
    near = perturbed(target.model, 0.05)
    near.config.max_position_embeddings = context
    width = target.num_logits
    return DraftModel("small", LanguageModel(near, "small"), LENGTH, width, width, stop=stop)


def pace_of(target: LanguageModel, *drafters: DraftModel) -> Pace:
    config = Config(target=ModelSection(model="in memory"))
    named = {d.name: d for d in drafters}
    return Pace(build_from_objects(target.model, byte_tokenizer(), named, config))


class View:
    num_prompt, slot, num_cached = 3, -1, 0

    def __init__(self, id: int, tokens: list[int], sampling: SamplingParams) -> None:
        self.id, self.tokens, self.sampling = id, tokens, sampling


def proposals(small: DraftModel, rows: Sequence[View], limits: Sequence[int]) -> Drafts:
    with torch.inference_mode():
        small.start(rows)
        drafts = small.propose(rows, limits)
        small.finish(rows)
    return drafts


GREEDY = SamplingParams()
HOT = SamplingParams(1.5, method="residual")


def test_each_row_of_a_batch_stops_on_its_own(target: LanguageModel) -> None:
    small = drafter(target, SURE)
    rows = [View(i, list(f"{i} and {i * i}".encode()), GREEDY) for i in range(12)]
    limits = [LENGTH - i % 3 for i in range(12)]

    together = proposals(small, rows, limits)

    full = proposals(drafter(target, FIXED), rows, limits)
    for i, row in enumerate(rows):
        alone = proposals(small, [row], [limits[i]])
        n = together.lengths[i]
        assert alone.lengths == [n]
        assert together.tokens[i, :n].tolist() == full.tokens[i, :n].tolist()
    assert len({*together.lengths}) > 2
    assert together.tokens.shape[1] == max(together.lengths)


@pytest.mark.parametrize("method", ["residual", "block"])
def test_no_rule_looks_at_a_token_that_it_would_remove(target: LanguageModel, method: str) -> None:
    """The length of a draft is a function of the text and of the tokens before its last."""
    small = drafter(target, SURE)
    text = list(b"to be or not to be")
    params = [replace(HOT, method=method, seed=seed) for seed in range(300)]
    rows = [View(i, list(text), p) for i, p in enumerate(params)]

    drafts = proposals(small, rows, [LENGTH] * len(rows))

    goes_on: dict[tuple[int, ...], bool] = {}
    for i, length in enumerate(drafts.lengths):
        tokens = drafts.tokens[i, :length].tolist()
        for k in range(1, min(length, LENGTH - 1) + 1):
            # after k tokens; the first k - 1 determine the distribution of the last
            assert goes_on.setdefault(tuple(tokens[: k - 1]), length > k) is (length > k)
    assert {True, False} <= set(goes_on.values())
    assert drafts.probs is not None and drafts.probs.shape[1] == max(drafts.lengths)


@pytest.mark.parametrize("stop", [SURE, EXPECTED], ids=lambda s: s.stop)
def test_text_is_the_targets_own_under_every_rule(
    target: LanguageModel, stop: StopSettings
) -> None:
    small = drafter(target, stop)
    small.price(prices(0.1))
    pace = pace_of(target, small)
    for settings in ({}, {"temperature": 0.9, "seed": 3}):
        plain = pace.generate(PROMPTS, drafter=NONE, max_new_tokens=NEW, **settings)
        drafted = pace.generate(PROMPTS, drafter="small", max_new_tokens=NEW, **settings)

        assert [c.token_ids for c in drafted] == [c.token_ids for c in plain]
        lengths = {r.drafted for c in drafted for r in c.rounds}
        assert len(lengths - {0}) > 2


@pytest.mark.parametrize("context", [96, 48])
def test_replay_under_a_confidence_stop_gives_the_real_rounds(
    target: LanguageModel, context: int
) -> None:
    small = drafter(target, SURE, context)
    pace = pace_of(target, small)
    for text in PROMPTS:
        prompt = pace.encode(text)
        real = pace.complete(text, drafter="small", max_new_tokens=NEW)
        replayed = replay(small, prompt, real.token_ids, max_output(NEW, len(prompt), 96))

        assert replayed.rounds.tolist() == [[r.drafted, r.accepted] for r in real.rounds]
        assert replayed.scores is not None
        assert small.model.cache.num_rows == 0


def test_the_stored_confidence_is_the_one_a_greedy_draft_stops_by(target: LanguageModel) -> None:
    small = drafter(target, FIXED)
    seen: list[float] = []

    class Listening:
        def allows_next(self, sure: Sequence[float], context: int) -> bool:
            seen.append(sure[-1])
            return True

    prompt, text = list(b"hello"), list(b" there")
    scores = small.would_accept(prompt, text, None).scores
    assert scores is not None
    small._rule = Listening()
    for position in range(len(text)):
        proposals(small, [View(0, [*prompt, *text[:position]], GREEDY)], [2])

    np.testing.assert_allclose(seen, scores.confidence, rtol=1e-5)


def test_confidence_is_of_the_unwarped_distribution() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.bfloat16)

    assert confidences(logits).item() == pytest.approx(0.6652, abs=1e-4)


# --- prices ---------------------------------------------------------------------------------------


def collected(pace: Pace, arm: str, text: str) -> CollectedPrompt:
    """Return a prompt as a collection returns it."""
    prompt = tuple(pace.encode(text))
    output = pace.complete(text, drafter=NONE, max_new_tokens=NEW).token_ids
    result = replay(pace.parts.drafters[arm], prompt, output, max_output(NEW, len(prompt), 96))
    assert result.scores is not None
    scores = {arm: (result.scores.match, result.scores.confidence)}
    features = np.zeros(1, dtype=np.float32)
    replays = {arm: result.record}
    return CollectedPrompt(text, "", prompt, tuple(output), NEW, features, replays, {}, scores)


@pytest.mark.parametrize("context", [96, 48])
def test_what_is_collected_does_not_depend_on_prices(target: LanguageModel, context: int) -> None:
    small, fixed = drafter(target, EXPECTED, context), drafter(target, FIXED, context)
    fixed.name = "fixed"
    pace = pace_of(target, small, fixed)
    for text in PROMPTS:
        before = rounds_of(collected(pace, "small", text), "small")
        small.price(prices(0.4))
        after = rounds_of(collected(pace, "small", text), "small")

        assert before.tolist() == after.tolist()
        assert before.tolist() == rounds_of(collected(pace, "fixed", text), "fixed").tolist()


@pytest.mark.parametrize("step", [0.05, 0.4])
@pytest.mark.parametrize("context", [96, 48])
def test_rounds_priced_from_scores_accept_what_a_real_run_does(
    target: LanguageModel, step: float, context: int
) -> None:
    """After a wrong token the drafted length is an estimate; acceptance is exact."""
    small = drafter(target, EXPECTED, context)
    pace = pace_of(target, small)
    stored = [collected(pace, "small", text) for text in PROMPTS]
    small.price(prices(step))
    rule = ExpectedGainStop(prices(step), "small", LENGTH)
    drafted = np.zeros(2)
    for prompt in stored:
        real = pace.complete(list(prompt.prompt_tokens), drafter="small", max_new_tokens=NEW)
        rounds = np.array([[r.drafted, r.accepted] for r in real.rounds])

        priced = walk(stopped_ahead(prompt, "small", rule, LENGTH))

        assert priced[:, 1].tolist() == rounds[:, 1].tolist()
        right = (rounds[:, 0] == rounds[:, 1]) | (priced[:, 0] == priced[:, 1])
        assert (priced[right] == rounds[right]).all()
        drafted += [priced[:, 0].sum(), rounds[:, 0].sum()]
        # a full simulation gives the drafted lengths as well
        simulated = SimulatedReplay(small, prompt.prompt_tokens, prompt.output_tokens)
        limit = max_output(NEW, len(prompt.prompt_tokens), 96)
        with torch.inference_mode():
            exact = simulate(simulated, len(prompt.output_tokens), limit)
            simulated.close()
        assert exact.tolist() == rounds.tolist()
    assert drafted[0] == pytest.approx(drafted[1], rel=0.15)
    assert drafted[1] < sum(rounds_of(p, "small")[:, 0].sum() for p in stored)


def test_only_arms_that_stop_by_prices_are_priced(target: LanguageModel) -> None:
    pace = pace_of(target, drafter(target, EXPECTED))
    stored = [collected(pace, "small", PROMPTS[0])]

    def config(**settings: object) -> Config:
        section = DrafterSection(kind="draft_model", settings={"model": "m", **settings})
        return Config(target=ModelSection(model="t"), drafters={"small": section})

    assert price_stops(stored, config(num_draft_tokens=LENGTH), prices(0.4)) == stored
    [priced] = price_stops(stored, config(stop="expected", num_draft_tokens=LENGTH), prices(0.4))
    assert rounds_of(priced, "small")[:, 0].mean() < rounds_of(stored[0], "small")[:, 0].mean()
    assert priced.output_tokens == stored[0].output_tokens


def test_without_prices_a_request_names_the_command_to_run(target: LanguageModel) -> None:
    pace = pace_of(target, drafter(target, EXPECTED))
    requests = [pace.request("hello", drafter=arm, max_new_tokens=9) for arm in ("small", NONE)]

    found = [c for r in requests for c in pace.driver.generate([r], return_errors=True)]

    assert found[0].error is not None and "run `paceline profile`" in found[0].error
    assert found[1].error is None


def test_measuring_drafts_at_full_length(target: LanguageModel) -> None:
    small = drafter(target, EXPECTED)
    row = View(0, list(b"hello"), GREEDY)

    with small.at_full_length():
        assert proposals(small, [row], [LENGTH]).lengths == [LENGTH]

    with pytest.raises(ArtefactError, match="paceline profile"):
        proposals(small, [row], [LENGTH])
    assert small._rule is not FIXED_LENGTH


def test_loading_gives_the_drafter_the_cost_table(target: LanguageModel, tmp_path: Path) -> None:
    for name, model in (("target", target.model), ("small", perturbed(target.model, 0.05))):
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    settings = {"model": str(tmp_path / "small"), "stop": "expected"}
    config = Config(
        target=ModelSection(model=str(tmp_path / "target")),
        drafters={"small": DrafterSection(kind="draft_model", settings=settings)},
        paths=PathsSection(costs=tmp_path / "costs.json"),
    )
    with pytest.raises(ArtefactError, match=r"'small' stops by expected gain.*paceline profile"):
        load(config)

    prices(0.1).save(tmp_path / "costs.json")
    pace = load(config)

    assert len(pace.complete("hello", drafter="small", max_new_tokens=9).token_ids) == 9
    small = pace.parts.drafters["small"]
    other = identity_of_arms({"small": {**small.identity(), "stop": "fixed"}})["small"]
    CostTable({"arm small": other}, prices(0.1).measurements).save(tmp_path / "costs.json")
    with pytest.raises(ArtefactError, match=r"'small' was measured as"):
        load(config)


def test_the_whole_path_prices_the_rule(target: LanguageModel, tmp_path: Path) -> None:
    """Collection runs without prices, learning and serving with them."""
    for name, model in (("target", target.model), ("small", perturbed(target.model, 0.05))):
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    settings = {"model": str(tmp_path / "small"), "stop": "expected", "num_draft_tokens": 12}
    config = Config(
        target=ModelSection(model=str(tmp_path / "target")),
        drafters={"small": DrafterSection(kind="draft_model", settings=settings)},
        learning=LearningSection(max_epochs=3),
        paths=PathsSection(
            store=tmp_path / "store", costs=tmp_path / "costs.json", policy=tmp_path / "policy"
        ),
    )
    records = [PromptRecord(str(i), "", f"{i} and {i * i} and {i}") for i in range(16)]

    prepared = prepare(config, records, 20)

    stored = load_collection(tmp_path / "store").prompts
    full = sum(rounds_of(p, "small")[:, 0].sum() for p in stored)
    priced = price_stops(stored, config, prepared.costs)
    assert sum(rounds_of(p, "small")[:, 0].sum() for p in priced) < full
    measured = {m.tokens for m in prepared.costs.measurements if m.operation == "propose"}
    assert {1, 4, 12} <= measured  # lengths that no rule cut short
    assert evaluate(config) is not None
    [small] = doctor(config).drafters
    assert "none on 16 prompts" in small.predicted
    for pace in (prepared.pace, load(config)):
        done = pace.complete("hello", drafter="auto", max_new_tokens=12)
        again = pace.complete("hello", drafter="small", max_new_tokens=12)
        assert done.token_ids == again.token_ids
        assert len(done.token_ids) == 12
