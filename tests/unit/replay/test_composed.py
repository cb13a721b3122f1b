"""The rounds of a cascade that follow from its parts' replays are those of the drafter and engine.

Prices and chances are made up so that all parts take turns. Faults that are planted in the drafter show
that the comparison would see them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from paceline.assembly import Pace, build_from_objects
from paceline.config import Config, DrafterSection, EngineSection, ModelSection
from paceline.contracts import GREEDY, SamplingParams
from paceline.costs import CostTable, Measurement
from paceline.drafting.cascade import kernels
from paceline.drafting.cascade.calibration import Chances, fit_chances
from paceline.drafting.cascade.drafter import Cascade, CascadeSettings
from paceline.drafting.cascade.entry import RowState
from paceline.drafting.cascade.fields import BRANCHES, DRAFTED, DRAFTED_AT, PART
from paceline.drafting.cascade.prices import Prices, read_prices
from paceline.drafting.evidence import NUM_CLASSES
from paceline.drafting.suffix_lookup import SuffixLookup, SuffixLookupSettings
from paceline.errors import StoreError
from paceline.replay import max_output, replay
from paceline.replay.composed import (
    CascadeParts,
    calibrate,
    cascades_of,
    compose,
    part_replays,
    stored_drafters,
    walk_cascade,
    with_cascades,
)
from paceline.store.records import CollectedPrompt, DraftNodes, ReplayedDrafter
from paceline.testing.tiny_models import perturbed, tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from paceline.contracts import Completion

CONTEXT, SHORT_CONTEXT = 160, 70
W = 6
PROMPTS = ("hello", "abcabcabc", "the quick brown fox jumps over it", "x" * 60, "0123456789")
SAMPLED = SamplingParams(temperature=0.3, top_p=0.95, seed=11, method="invariant")
CASCADES = {
    "one": ("wide", "near"),
    "two": ("wide", "near", "far"),
    "late": ("narrow", "wide", "short", "near"),
    "lookups": ("narrow", "wide"),
}


def part_seconds(name: str) -> float:
    return {"near": 0.3, "far": 0.28, "short": 0.28}.get(name, 0.0)


def cost_table(reading: float = 0.05) -> CostTable:
    """Return prices at which every part is sometimes worth its seconds."""
    cells = [Measurement("engine", "round", 0, 0, n, 0.05 * n) for n in (1, 4)]
    for n in (1, 4):
        for context in (0, 200):
            cells += [
                Measurement("target", "forward", t, context, n, 1 + 0.05 * t + 0.001 * context)
                for t in (1, 3, 40)
            ]
    cells += [Measurement("target", "prefill", n, 0, 1, 1 + 0.1 * n) for n in (1, 512)]
    for name in ("near", "far", "short", *CASCADES):
        own = part_seconds(name)
        cells += [
            Measurement(name, "propose", t, 0, n, 0.02 + own * t) for t in (0, W) for n in (1, 4)
        ]
        cells += [Measurement(name, "start", n, 0, 1, 0.1 + reading * n) for n in (1, 512)]
    return CostTable({}, cells)


def chances_of(parts: Sequence[str], seed: int = 0) -> Chances:
    """Draw chances that do not fit the parts, so that what these show in a request matters.

    A model's chance is the same at every probability, since replay does not know the probabilities of a
    chain beyond its first wrong token.
    """
    rng = np.random.default_rng(seed)
    models = [name for name in parts if part_seconds(name)]
    L, M = len(parts) - len(models), len(models)
    return replace(
        Chances.assumed(L, M),
        tables=rng.uniform(0.1, 0.8, (L, NUM_CLASSES)),
        prospects=rng.uniform(0.35, 0.95, (M, kernels.NUM_BINS, 2)),
        if_sure=np.tile(rng.uniform(0.6, 0.9, (M, 1)), kernels.NUM_SURE),
    )


@dataclass
class Bench:
    """Cascades among their parts, with the same prices and chances."""

    pace: Pace
    settings: Mapping[str, CascadeParts]

    def cascade(self, name: str) -> Cascade:
        drafter = self.pace.parts.drafters[name]
        assert isinstance(drafter, Cascade)
        return drafter

    def complete(self, name: str, prompt: str, num: int, sampling: SamplingParams) -> Completion:
        given: dict[str, Any] = {}
        if sampling is not GREEDY:
            given = {"temperature": 0.3, "top_p": 0.95, "seed": 11, "sampling": "invariant"}
        return self.pace.complete(
            prompt, drafter=name, max_new_tokens=num, ignore_eos=True, **given
        )

    def collected(
        self, text: str, output: Sequence[int], num: int, sampling: SamplingParams, spare: int = 0
    ) -> CollectedPrompt:
        """Return what a collection would hold. spare: tokens more than the parts may really draft."""
        prompt = self.pace.encode(text)
        limit = max_output(num, len(prompt), CONTEXT) + spare
        replays, nodes, scores = {}, {}, {}
        for name, drafter in self.pace.parts.drafters.items():
            if not drafter.composed and name != "none":
                found = replay(drafter, prompt, output, limit, sampling=sampling)
                replays[name] = found.record
                if found.scores is not None:
                    scores[name] = (found.scores.match, found.scores.confidence)
                if isinstance(drafter, SuffixLookup):
                    nodes[name] = as_nodes(found.record, found.nodes)
        return CollectedPrompt(
            text, "", tuple(prompt), tuple(output), num, np.zeros(1), replays, {}, scores,
            nodes, sampling=sampling,
        )  # fmt: skip

    def walked(self, name: str, prompt: CollectedPrompt) -> ReplayedDrafter:
        drafter = self.cascade(name)
        return walk_cascade(prompt, self.settings[name], drafter.chances, drafter._prices_at(1))


def as_nodes(record: ReplayedDrafter, nodes: Sequence[Any]) -> DraftNodes:
    columns = np.array(nodes, dtype=np.int64).reshape(-1, 3).T
    return DraftNodes(record.table[:, 0], columns[0], columns[1], columns[2].astype(bool))


@pytest.fixture(scope="module")
def bench() -> Bench:
    target = tiny_model(std=0.1, context=CONTEXT)
    short = perturbed(target, 0.12)
    short.config.max_position_embeddings = SHORT_CONTEXT
    config = Config(target=ModelSection(model="in memory"), engine=EngineSection(prefill_chunk=16))
    drafters = {
        "near": perturbed(target, 0.1),
        "far": perturbed(target, 0.2),
        "short": short,
        "wide": SuffixLookup("wide", SuffixLookupSettings(num_draft_tokens=8, length_offset=2)),
        "narrow": SuffixLookup("narrow", SuffixLookupSettings(paths=1, min_match=2)),
    }
    parts = build_from_objects(target, byte_tokenizer(), drafters, config)
    costs, found = cost_table(), {}
    for name, own in CASCADES.items():
        settings = CascadeSettings(parts=own, num_draft_tokens=W)
        cascade = Cascade.build(name, settings, parts.build_context())
        cascade.price(costs)
        cascade.calibrate(chances_of(own))
        parts.drafters[name] = cascade
        lookups, models = tuple(cascade.lookups), tuple(cascade.models)
        found[name] = CascadeParts(name, lookups, models, (True,) * len(models), W)
    return Bench(Pace(parts), found)


def rounds_of(completion: Completion) -> list[list[int]]:
    return [[r.drafted, r.accepted] for r in completion.rounds]


# --- exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", CASCADES)
@pytest.mark.parametrize("num", [1, 2, 9, 60, 400])
def test_rounds_from_the_parts_are_the_drafters_and_the_engines(
    bench: Bench, name: str, num: int, sampling: SamplingParams
) -> None:
    """Up to the end of the target's context, and beyond that of the model `short`."""
    for text in PROMPTS:
        real = bench.complete(name, text, num, sampling)
        prompt = bench.collected(text, real.token_ids, num, sampling)

        walked = bench.walked(name, prompt)

        limit = max_output(num, len(prompt.prompt_tokens), CONTEXT)
        own = replay(
            bench.cascade(name), prompt.prompt_tokens, real.token_ids, limit, sampling=sampling
        )
        assert len(real.token_ids) == limit
        assert own.rounds.tolist() == rounds_of(real)
        assert walked.table.tolist() == rounds_of(real)
        if num > 1:
            assert own.proposed is not None and walked.proposed is not None
            assert walked.proposed.tolist() == own.proposed.tolist()


class Turns:
    """Counts the rounds of each part, and whether its drafts were trees."""

    def __init__(self, cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts = dict.fromkeys(["nothing", *cascade.parts], 0)
        self.trees = 0
        choose = cascade._choose

        def counted(table: Any, row: Any, state: RowState, limit: int) -> int:
            part = choose(table, row, state, limit)
            self.counts[["nothing", *cascade.parts][part + 1]] += 1
            self.trees += state.fields.item(BRANCHES)
            return part

        monkeypatch.setattr(cascade, "_choose", counted)


@pytest.mark.parametrize("name", CASCADES)
def test_all_parts_take_turns_in_these_rounds(
    bench: Bench, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the comparison above would prove little."""
    turns = Turns(bench.cascade(name), monkeypatch)
    rounds = []
    for text in PROMPTS:
        rounds += bench.complete(name, text, 400, GREEDY).rounds

    assert min(turns.counts.values()) >= 5, turns.counts
    assert turns.trees > 5
    assert any(r.accepted == r.drafted > 0 for r in rounds)
    assert any(0 < r.accepted < r.drafted for r in rounds)


def test_rounds_with_chances_by_probability_are_close(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond a chain's first wrong token replay takes the probabilities along the text instead."""
    cascade = bench.cascade("one")
    before = cascade.chances
    given = replace(before, if_sure=Chances.assumed(1, 1).if_sure)
    cascade.calibrate(given)
    try:
        walked, real = [], []
        for text in PROMPTS:
            completion = bench.complete("one", text, 400, GREEDY)
            prompt = bench.collected(text, completion.token_ids, 400, GREEDY)
            walked += bench.walked("one", prompt).table.tolist()
            real += rounds_of(completion)
    finally:
        cascade.calibrate(before)
    assert len(walked) == pytest.approx(len(real), rel=0.03)
    assert sum(d for d, _ in walked) == pytest.approx(sum(d for d, _ in real), rel=0.1)


def test_rounds_are_walked_again_under_load(bench: Bench) -> None:
    """With four rows in flight they are those of the drafter that was told of four rows."""
    real = bench.complete("two", PROMPTS[1], 90, GREEDY)
    prompt = bench.collected(PROMPTS[1], real.token_ids, 90, GREEDY)
    cascade = bench.cascade("two")
    config = config_of(bench, "two")
    calibration = {"two": (tuple(cascade.parts), cascade.chances)}

    (composed,) = compose([prompt], config, cost_table(), calibration)

    found = composed.replays["two"]
    assert found.under_load is not None
    cascade.rows_in_flight = 4
    try:
        loaded = replay(cascade, prompt.prompt_tokens, real.token_ids, 90)
    finally:
        cascade.rows_in_flight = 1
    assert found.table.tolist() == rounds_of(real)
    assert found.under_load(4).table.tolist() == loaded.rounds.tolist()
    assert loaded.rounds.tolist() != rounds_of(real)
    assert found.under_load(1).table.tolist() == rounds_of(real)


# --- planted faults -------------------------------------------------------------------------------


def lower_limits(cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    propose = cascade.propose
    monkeypatch.setattr(
        cascade, "propose", lambda rows, limits: propose(rows, [max(0, n - 1) for n in limits])
    )


def before_choosing(
    change: Callable[[Cascade, Any, RowState], None],
) -> Callable[[Cascade, pytest.MonkeyPatch], None]:
    """Plant a change of a row's state before the cascade learns and chooses."""

    def plant(cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
        choose = cascade._choose

        def changed(table: Any, row: Any, state: RowState, limit: int) -> int:
            if state.fields[PART] >= 0:
                change(cascade, row, state)
            return choose(table, row, state, limit)

        monkeypatch.setattr(cascade, "_choose", changed)

    return plant


def counting_twice(cascade: Cascade, row: Any, state: RowState) -> None:
    """Count the outcome of the last token that the text decides on once more."""
    size, begin = state.fields[DRAFTED], state.fields[DRAFTED_AT]
    written = np.array(row.tokens[begin : begin + size + 1])
    if len(written) > 1:
        seen = np.zeros((2, 2))
        for counts, text in zip(seen, (written, written[:-1]), strict=True):
            kernels.learn(*state.nodes, state.base, size, text, counts)
        state.seen[state.fields[PART]] += seen[0] - seen[1]


def ignoring(kind: str) -> Callable[[Cascade, Any, RowState], None]:
    """Leave the factors of the lookups or of the models as they are."""

    def change(cascade: Cascade, row: Any, state: RowState) -> None:
        if (state.fields[PART] < len(cascade.lookups)) == (kind == "lookups"):
            state.fields[PART] = -1

    return change


def forgetting_to_read(cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    """Price every model as if it had read all tokens."""
    prices = cascade._prices_at(1)
    free = replace(prices, reading=np.zeros_like(prices.reading))
    monkeypatch.setattr(cascade, "_prices", {1: free})
    monkeypatch.setattr(cascade, "_tables", {})


def never_having_read(cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    """Price every model as if it had read nothing since the first round."""
    propose = cascade.propose

    def forgetful(rows: Any, limits: Any) -> Any:
        for state in cascade._states.values():
            state.read[:] = rows[0].num_prompt
        return propose(rows, limits)

    monkeypatch.setattr(cascade, "propose", forgetful)


FAULTS = {
    "a wrong limit": lower_limits,
    "the last outcome counted twice": before_choosing(counting_twice),
    "a lookup's factor that stays": before_choosing(ignoring("lookups")),
    "a model's factor that stays": before_choosing(ignoring("models")),
    "tokens that are read for free": forgetting_to_read,
    "a model that never has read": never_having_read,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["one", "two"])
def test_a_planted_fault_is_seen(
    bench: Bench, name: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    FAULTS[fault](bench.cascade(name), monkeypatch)

    num_wrong = 0
    for text in PROMPTS:
        faulty = bench.complete(name, text, 100, GREEDY)
        prompt = bench.collected(text, faulty.token_ids, 100, GREEDY)
        walked = walk_cascade(
            prompt,
            bench.settings[name],
            bench.cascade(name).chances,
            right_prices(bench, name),
        )
        num_wrong += walked.table.tolist() != rounds_of(faulty)
    assert num_wrong > 0


def right_prices(bench: Bench, name: str) -> Prices:
    own = bench.settings[name]
    return read_prices(cost_table(), own.name, own.models, own.num_draft_tokens, 1)


def test_parts_that_were_replayed_to_another_limit_are_seen(bench: Bench) -> None:
    num_wrong = 0
    for text in PROMPTS:
        real = bench.complete("one", text, 30, GREEDY)
        prompt = bench.collected(text, real.token_ids, 30, GREEDY, spare=4)
        limited = replace(prompt, max_new_tokens=34)
        num_wrong += bench.walked("one", limited).table.tolist() != rounds_of(real)
    assert num_wrong > 0


# --- configuration and mistakes -------------------------------------------------------------------


def config_of(bench: Bench, *names: str) -> Config:
    sections = {
        "wide": DrafterSection(
            kind="suffix_lookup", settings={"num_draft_tokens": 8, "length_offset": 2}
        ),
        "narrow": DrafterSection(kind="suffix_lookup", settings={"paths": 1, "min_match": 2}),
        "near": DrafterSection(kind="draft_model", settings={"model": "near"}),
        "far": DrafterSection(kind="draft_model", settings={"model": "far"}),
        "short": DrafterSection(kind="draft_model", settings={"model": "short"}),
    }
    for name in names:
        settings = {"parts": list(CASCADES[name]), "num_draft_tokens": W}
        sections[name] = DrafterSection(kind="cascade", settings=settings)
    return Config(target=ModelSection(model="in memory"), drafters=sections)


def test_cascades_are_found_with_lookups_first(bench: Bench) -> None:
    config = config_of(bench, "two", "late")

    assert cascades_of(config) == [bench.settings["two"], bench.settings["late"]]
    assert stored_drafters(config) == ["wide", "narrow", "near", "far", "short"]


def test_identity_lines_are_those_of_the_drafters(bench: Bench) -> None:
    """A policy of a collection must fit the drafters that serve it."""
    lines = bench.pace.parts.identities()
    stored = {name: line for name, line in lines.items() if name not in CASCADES}

    assert with_cascades(stored, config_of(bench, *CASCADES)) == lines


def a_prompt(bench: Bench) -> CollectedPrompt:
    real = bench.complete("one", PROMPTS[1], 60, GREEDY)
    return bench.collected(PROMPTS[1], real.token_ids, 60, GREEDY)


def test_a_part_without_a_replay_is_named(bench: Bench) -> None:
    prompt = a_prompt(bench)
    config = config_of(bench, "one")
    without = replace(prompt, replays={k: v for k, v in prompt.replays.items() if k != "near"})

    for broken in (calibrate, lambda prompts, config: compose(prompts, config, cost_table(), {})):
        with pytest.raises(StoreError, match=r"part 'near' .*run `paceline collect PROMPTS`"):
            broken([without], config)


def test_a_part_of_a_kind_that_is_not_replayed_everywhere_is_named(bench: Bench) -> None:
    """Collecting again would not help."""
    prompt = a_prompt(bench)
    partly = ReplayedDrafter(prompt.replays["near"].table[::2], everywhere=False)
    broken = replace(prompt, replays=prompt.replays | {"near": partly})

    with pytest.raises(StoreError, match=r"part 'near' .* some positions only.*take it out"):
        calibrate([broken], config_of(bench, "one"))


def test_a_lookup_without_its_evidence_is_named(bench: Bench) -> None:
    prompt = replace(a_prompt(bench), nodes={})

    with pytest.raises(StoreError, match=r"'wide' .* no evidence .*delete this replay and run"):
        compose([prompt], config_of(bench, "one"), cost_table(), {})


def test_a_lookup_that_never_drafted_needs_no_evidence(bench: Bench) -> None:
    prompt = a_prompt(bench)
    table = prompt.replays["wide"].table * 0
    silent = ReplayedDrafter(table, everywhere=True)
    quiet = replace(prompt, nodes={}, replays=prompt.replays | {"wide": silent})

    replays = part_replays(quiet, bench.settings["one"], np.ones(1))

    assert replays.nodes[0].lengths.tolist() == [0] * len(table)
    assert len(bench.walked("one", quiet).table) > 0


def test_chances_weigh_the_prompts_for_which_a_model_is_best(bench: Bench) -> None:
    """`near` is best on the prompts on which it is right more often than `far`."""
    prompts = []
    for text in PROMPTS:
        real = bench.complete("two", text, 80, GREEDY)
        prompts.append(bench.collected(text, real.token_ids, 80, GREEDY))
    config = config_of(bench, "two")

    parts, chances = calibrate(prompts, config)["two"]

    assert parts == ("wide", "near", "far")
    shares = [
        [float((p.replays[m].table[:, 1] > 0).mean()) for m in ("near", "far")] for p in prompts
    ]
    weights = [np.where(np.array(own) >= max(own), 1.0, 0.1) for own in shares]
    assert any(w[0] < 1.0 for w in weights) or any(w[1] < 1.0 for w in weights)
    replays = [
        part_replays(p, bench.settings["two"], w) for p, w in zip(prompts, weights, strict=True)
    ]
    expected = fit_chances(replays, 1, 2)
    assert chances.tables.tolist() == expected.tables.tolist()
    assert chances.prospects.tolist() == expected.prospects.tolist()
