"""The search: near the exhaustive optimum, resumable, with errors for invalid inputs."""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from paceline.assembly import Pace, build_from_objects
from paceline.cli import main
from paceline.config import Config, ModelSection
from paceline.drafting.layer_skip import LayerSkip
from paceline.drafting.skip_set import SkipSet
from paceline.errors import ArtefactError, ConfigError
from paceline.layer_search import SearchSettings, plot, search_layers
from paceline.layer_search.costs import SubsetPricer
from paceline.layer_search.proposals import bits_of, next_subset, subset_of
from paceline.layer_search.subset_replay import SubsetReplay, decode, rounds_of
from paceline.models.language_model import LanguageModel
from paceline.models.packing import Span
from paceline.models.sublayers import LayerSubset
from paceline.testing.tokenizers import byte_tokenizer

from .conftest import LAYERS, PROMPTS, redundant_model

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.costs import CostTable
    from paceline.layer_search import SearchReport

NUM_BITS = 2 * LAYERS
SETTINGS = SearchSettings(max_new_tokens=18, num_draft_tokens=6)
FIXED = SETTINGS.model_copy(update={"stop": "fixed"})
SOME = LayerSubset(frozenset({1, 3}), frozenset({2}))


def search(
    pace: Pace, costs: CostTable, out: Path, trials: int, settings: SearchSettings = SETTINGS
) -> SearchReport:
    return search_layers(pace, PROMPTS, out, settings, trials=trials, costs=costs)


def test_the_search_comes_near_the_best_of_all_subsets(
    pace: Pace, costs: CostTable, tmp_path: Path
) -> None:
    """Within 2 % of the exhaustive optimum, in a twenty-fifth of its evaluations."""
    prompts, settings = PROMPTS[:2], SETTINGS.model_copy(update={"max_new_tokens": 13})
    report = search_layers(pace, prompts, tmp_path / "set.json", settings, 40, costs=costs)

    assert len({trial.subset for trial in report.trials}) == 40
    pricer = SubsetPricer(costs, LAYERS)
    replay = SubsetReplay(pace.parts.target, decode(pace, prompts, 13), 6)
    seconds = {}
    for bits in itertools.product((False, True), repeat=NUM_BITS):
        subset = subset_of(bits)
        rounds = rounds_of(replay.scores(subset), settings)
        seconds[subset] = pricer.seconds_per_token(rounds, subset)
    replay.close()
    assert all(seconds[trial.subset] == trial.seconds_per_token for trial in report.trials)
    assert len(seconds) == 1024
    assert report.best.seconds_per_token <= 1.02 * min(seconds.values())
    # there is something to find
    assert report.best.seconds_per_token < 0.9 * report.plain_seconds_per_token
    assert min(seconds.values()) < 0.7 * sorted(seconds.values())[512]


def test_the_process_improves_on_the_design() -> None:
    """Of two sub-layers that replace each other, either may be skipped, but not both."""

    def value(bits: tuple[bool, ...]) -> float:
        clashes = sum(bits[i] and bits[i + 1] for i in range(0, NUM_BITS, 2))
        return 3.0 - 0.5 * sum(bits) + 0.9 * clashes

    best = min(value(bits) for bits in itertools.product((False, True), repeat=NUM_BITS))
    tried: dict[tuple[bool, ...], float] = {}
    for num_tried in range(30):  # of 1024
        if num_tried == NUM_BITS + 6:
            assert min(tried.values()) > best
        bits = next_subset(tried, NUM_BITS, seed=0)
        assert bits is not None
        assert bits not in tried
        tried[bits] = value(bits)
    assert min(tried.values()) == best
    draws = random.Random(0)
    drawn = [value(tuple(draws.random() < 0.5 for _ in range(NUM_BITS))) for _ in range(30)]
    assert min(drawn) > best


Bits = tuple[bool, ...]


def distance(one: Bits, other: Bits) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))


def tried_around(optimum: Bits, hidden: tuple[Bits, ...], seed: int) -> dict[Bits, float]:
    """Return trials whose values grow with the distance to an optimum, none of them near `hidden`.

    The design is complete: each bit alone, and growing sets that begin with the bits that the optimum
    lacks, so that they lead away from it.
    """
    num_bits, draws = len(optimum), random.Random(seed)
    weights = [draws.uniform(0.8, 1.2) for _ in optimum]

    def value(bits: Bits) -> float:
        flipped = (a != b for a, b in zip(bits, optimum, strict=True))
        return sum(w for w, differs in zip(weights, flipped, strict=True) if differs)

    order = sorted(range(num_bits), key=lambda i: optimum[i])
    tried = {
        tuple(i == k for i in range(num_bits)): 4.0 + 0.01 * place for place, k in enumerate(order)
    }
    for share in (0.125, 0.25, 0.375, 0.5, 0.625, 0.75):
        chosen = set(order[: max(2, round(share * num_bits))])
        together = tuple(i in chosen for i in range(num_bits))
        tried[together] = value(together)
    others = [
        bits
        for bits in itertools.product((False, True), repeat=num_bits)
        if all(distance(bits, point) > 1 for point in hidden)
    ]
    for bits in random.Random(0).sample(others, 34):
        tried.setdefault(bits, value(bits))
    return tried


def test_the_model_finds_an_optimum_that_no_small_step_reaches() -> None:
    """No trial is within one flip of the optimum, so one flip of the best trial does not reach it."""
    distances = []
    for seed in range(5):
        places = set(random.Random(seed).sample(range(8), 4))
        optimum = tuple(i in places for i in range(8))
        tried = tried_around(optimum, (optimum,), seed)
        best = min(tried, key=lambda bits: tried[bits])
        assert distance(best, optimum) > 1
        proposed = next_subset(tried, 8, seed)
        assert proposed is not None
        assert proposed not in tried
        distances.append(distance(proposed, optimum))
    # of the 256 subsets one is the optimum and eight are next to it
    assert max(distances) <= 1
    assert distances.count(0) >= 2


def test_a_proposal_depends_on_all_trials_and_not_on_the_best_alone() -> None:
    """Two histories with the same subsets, number, seed and best trial, and other values elsewhere."""
    for seed in range(2):
        one = (True, True, True, True, False, False, False, False)
        other = (True, True, False, False, True, True, False, False)
        middle = (True, True, True, False, True, False, False, False)
        histories = [tried_around(optimum, (one, other), seed) for optimum in (one, other)]
        keys = list(dict.fromkeys(bits for history in histories for bits in history))
        proposals = []
        for optimum in (one, other):
            tried = {bits: float(distance(bits, optimum)) for bits in keys}
            for k in range(8):  # the design's order is that of the first history
                alone = tuple(i == k for i in range(8))
                tried[alone] = histories[0][alone]
            tried[middle] = 1.5
            assert min(tried, key=lambda bits: tried[bits]) == middle
            proposals.append(next_subset(tried, 8, seed))
        found = [distance(p, optimum) for p, optimum in zip(proposals, (one, other), strict=True)]  # type: ignore[arg-type]
        assert max(found) <= 1
        assert proposals[0] != proposals[1]


def test_an_interrupted_search_continues_as_an_uninterrupted_one(
    pace: Pace, costs: CostTable, tmp_path: Path
) -> None:
    whole = search(pace, costs, tmp_path / "whole.json", trials=19)
    for trials in (3, 12, 17, 19):
        parts = search(pace, costs, tmp_path / "parts.json", trials)
        assert len(parts.trials) == trials
    assert (tmp_path / "parts.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    found = SkipSet.load(tmp_path / "whole.json")
    assert found.subset == whole.best.subset
    assert found.facts["speedup"] == whole.speedup(whole.best)


def test_the_file_of_another_search_is_refused(
    pace: Pace, costs: CostTable, tmp_path: Path
) -> None:
    out = tmp_path / "set.json"
    search(pace, costs, out, trials=1)
    with pytest.raises(ConfigError, match="another 'settings'"):
        search(pace, costs, out, 2, FIXED)
    with pytest.raises(ConfigError, match="another 'prompts'"):
        search_layers(pace, PROMPTS[:1], out, SETTINGS, trials=2, costs=costs)
    costs.fingerprint["target"] = "another"
    try:
        with pytest.raises(ArtefactError, match="measured for another target"):
            search(pace, costs, out, 2)
    finally:
        costs.fingerprint["target"] = pace.parts.target.fingerprint()


def test_proposals_end_when_all_subsets_were_tried() -> None:
    tried: dict[tuple[bool, ...], float] = {}
    while (bits := next_subset(tried, 2, seed=1)) is not None:
        assert bits not in tried
        tried[bits] = float(sum(bits))
    assert len(tried) == 4


def test_bits_name_attention_before_mlp() -> None:
    assert bits_of(SOME, LAYERS) == (0, 1, 0, 1, 0, 0, 0, 1, 0, 0)
    assert subset_of(bits_of(SOME, LAYERS)) == SOME


# --- prediction -----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [SETTINGS, FIXED], ids=["threshold", "fixed"])
def test_predicted_rounds_are_nearly_those_of_the_drafter(
    pace: Pace, settings: SearchSettings
) -> None:
    """Exactly where a round begins with a window; elsewhere the cache differs a little."""
    settings = settings.model_copy(update={"max_new_tokens": 60, "threshold": 0.2})
    trajectories = decode(pace, PROMPTS, settings.max_new_tokens)
    replay = SubsetReplay(pace.parts.target, trajectories, settings.num_draft_tokens)
    predicted = rounds_of(replay.scores(SOME), settings)
    replay.close()
    own = build_from_objects(
        pace.parts.target.model, byte_tokenizer(), {}, Config(target=ModelSection(model="m"))
    )
    own.drafters["skip"] = LayerSkip("skip", own.target, SOME, settings.of_drafter())
    real = Pace(own)
    num_rounds = [0, 0]
    for rounds, trajectory in zip(predicted, trajectories, strict=True):
        done = real.complete(list(trajectory.prompt), drafter="skip", max_new_tokens=60)
        assert done.token_ids == list(trajectory.output)
        assert rounds[0].tolist() == [done.rounds[0].drafted, done.rounds[0].accepted]
        num_rounds[0] += len(rounds)
        num_rounds[1] += len(done.rounds)
    assert num_rounds[0] == pytest.approx(num_rounds[1], rel=0.1)


def test_trying_a_subset_leaves_the_development_text_as_it_was(pace: Pace) -> None:
    target = pace.parts.target
    trajectories = decode(pace, PROMPTS, 18)
    replay = SubsetReplay(target, trajectories, 5)
    before = [target.cache.read(slot, 0, 40) for slot in range(len(PROMPTS))]
    first = replay.scores(LayerSubset())
    everything = replay.scores(LayerSubset.everything(LAYERS))
    replay.scores(SOME)
    after = [target.cache.read(slot, 0, 40) for slot in range(len(PROMPTS))]
    replay.close()

    assert all(j.match.all() for j in first)
    assert not all(j.match.all() for j in everything)
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


def test_a_window_reads_full_entries_and_no_other_window(pace: Pace) -> None:
    """Windows of one token judge every position as the first token of a draft."""
    target = pace.parts.target
    trajectories = decode(pace, PROMPTS[:1], 12)
    replay = SubsetReplay(target, trajectories, 1)
    (scores,) = replay.scores(SOME)
    replay.close()
    t = trajectories[0]
    text = [*t.prompt, *t.output]
    slot = target.acquire()
    sure = []
    with torch.inference_mode():
        for place in range(len(t.prompt), len(text) - 1):
            target.forward(torch.tensor(text[:place]), [Span(slot, 0, place)])
            fed = torch.tensor(text[place : place + 1])
            hidden = target.forward(fed, [Span(slot, place, 1)], skip=SOME)
            sure.append(float(target.unembed(hidden).softmax(dim=-1).amax()))
    target.release(slot)
    assert scores.confidence[1:].tolist() == pytest.approx(sure, rel=1e-4)


def test_windows_of_a_row_take_turns_over_a_paged_cache(pace: Pace) -> None:
    """A paged forward writes all its tokens before any of them attends."""
    plain = pace.parts.target
    paged = LanguageModel(plain.model, "paged", paged=True)
    trajectories = decode(pace, PROMPTS[:2], 12)
    found = []
    for target in (plain, paged):
        replay = SubsetReplay(target, trajectories, 3)
        found.append(replay.scores(SOME))
        replay.close()

    for here, there in zip(*found, strict=True):
        assert here.match.tolist() == there.match.tolist()
        assert here.confidence.tolist() == pytest.approx(there.confidence.tolist(), rel=1e-4)


def test_a_token_is_priced_by_the_remaining_sub_layers(costs: CostTable) -> None:
    prices = SubsetPricer(costs, LAYERS)
    assert prices.draft_token(LayerSubset()) == pytest.approx(1.0)
    assert prices.draft_token(SOME) == pytest.approx(1.0 - 2 * 0.08 - 0.1)
    assert prices.plain == pytest.approx(1.03)
    rounds = torch.tensor([[3, 3], [1, 0]]).numpy()
    expected = (4 * prices.draft_token(SOME) + 1.08 + 1.04 + 2 * 0.01) / 5
    assert prices.seconds_per_token([rounds], SOME) == pytest.approx(expected)


# --- with the clock, and from the command line ----------------------------------------------------


def test_costs_are_measured_once_and_saved_next_to_the_result(pace: Pace, tmp_path: Path) -> None:
    out = tmp_path / "set.json"
    for trials in (1, 2):
        report = search_layers(pace, PROMPTS[:1], out, SETTINGS, trials=trials)
    costs = json.loads((tmp_path / "set.costs.json").read_text())
    drafts = [m for m in costs["measurements"] if m["subject"] == "draft"]
    assert {m["operation"] for m in drafts} == {"base", "attention", "mlp"}
    assert len(report.trials) == 2
    plot(report, tmp_path / "set.png")
    assert (tmp_path / "set.png").read_bytes().startswith(b"\x89PNG")


def test_the_measured_objective_decodes_against_the_clock(pace: Pace, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"objective": "measured"})
    report = search_layers(pace, PROMPTS[:2], tmp_path / "set.json", settings, trials=2)
    assert report.plain_seconds_per_token > 0
    assert all(0 < trial.seconds_per_token < math.inf for trial in report.trials)
    assert not (tmp_path / "set.costs.json").exists()


def test_the_measured_objective_takes_no_prices(
    pace: Pace, costs: CostTable, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="prices from the clock"):
        settings = SETTINGS.model_copy(update={"objective": "measured"})
        search(pace, costs, tmp_path / "set.json", 1, settings)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["paceline", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_command_writes_a_file_for_layer_skip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    redundant_model().save_pretrained(tmp_path / "target")
    byte_tokenizer().save_pretrained(tmp_path / "target")
    (tmp_path / "paceline.yaml").write_text("target: {model: target}\n")
    lines = [json.dumps({"id": str(i), "domain": "", "prompt": f"spam {i}"}) for i in range(3)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    out = tmp_path / "found" / "set.json"
    verb: list[Any] = ["layer-search", tmp_path / "prompts.jsonl", "--out", out]
    verb += ["-c", tmp_path / "paceline.yaml", "--max-new-tokens", 12, "--prompts", 2]

    assert run(monkeypatch, *verb, "--trials", 3, "--set", "num_draft_tokens=4") == 0
    assert "skip_attention: " in capsys.readouterr().out
    assert out.with_suffix(".png").is_file()
    assert SkipSet.load(out).num_layers == LAYERS
    (tmp_path / "paceline.yaml").write_text(
        "target: {model: target}\n"
        "drafters: {own: {kind: layer_skip, settings: {skip_set: found/set.json}}}\n"
    )
    generate = ["generate", "spam", "--drafter", "own", "-c", tmp_path / "paceline.yaml"]
    assert run(monkeypatch, *generate, "--max-new-tokens", 8) == 0
    capsys.readouterr()

    for wrong, said in (
        (["--trials", 4], "another 'settings'"),
        (["--set", "num_draft_token=4"], "did you mean 'num_draft_tokens'"),
        (["--set", "seed"], "--set 'seed': give KEY=VALUE"),
        (["--objective", "guessed"], "'objective'"),
        (["--costs", tmp_path / "none.json"], "no cost table here"),
    ):
        assert run(monkeypatch, *verb, *wrong) == 2
        error = capsys.readouterr().err
        assert said in " ".join(error.split())
        assert "Traceback" not in error
