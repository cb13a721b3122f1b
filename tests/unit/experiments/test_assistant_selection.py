"""Small runs of every experiment with learned policies, whose tables show the measured figures."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import yaml
from support.prompt_files import write_task

import paceline
from paceline.bench import measure_cost_table
from paceline.config import LearningSection
from paceline.contracts import NONE
from paceline.costs import CostTable, Measurement
from paceline.experiments.assistant_selection import (
    alignment_or_size,
    new_machine,
    number_of_examples,
    searched_sets,
)
from paceline.experiments.assistant_selection.learned import Drafting, Study
from paceline.experiments.assistant_selection.number_of_examples import reached
from paceline.experiments.assistant_selection.self_drafting import DRAFT_TOKENS, sets_by_hand
from paceline.experiments.catalog import EXPERIMENTS
from paceline.experiments.workbench import SMOKE, Workbench
from paceline.layer_search import search_layers
from paceline.learning.dataset import Dataset, build_dataset
from paceline.learning.learners.neighbours import NeighboursLearner
from paceline.store.records import CollectedPrompt, ReplayedDrafter
from paceline.testing.tiny_models import perturbed, tiny_model
from paceline.testing.tokenizers import byte_tokenizer
from paceline.verbs import pipeline

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.selection.choosers import Situation

TASKS = ("translation", "math", "code", "summary")
DRAFTERS = (*TASKS, "general", "slow-general")
SLOWER = {"slow-general": 1.5, "half-target": 2.5, "most-of-target": 4.0, "int8-target": 3.0}
LEARNED = [name for name in EXPERIMENTS if name != "published-timings"]


class Place(NamedTuple):
    """The files and folders of all experiments in this module."""

    config: Path
    data: Path
    work: Path
    out: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Write a target, drafters named as the bundled ones, one more for all tasks, and a data folder."""
    root = tmp_path_factory.mktemp("experiments")
    target = tiny_model(std=0.1, context=128)
    models = {"target": target}
    for i, name in enumerate(DRAFTERS):
        models[name] = drafter = perturbed(target, 0.04 * (i + 1))
        del drafter.model.layers[1:]  # cheaper than the target
        drafter.config.num_hidden_layers = 1
        drafter.config.layer_types = None
    for name, model in models.items():
        model.save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    drafters: dict[str, Any] = {
        name: {
            "kind": "draft_model",
            "settings": {"model": str(root / name), "num_draft_tokens": 2 if i % 2 else 3},
        }
        for i, name in enumerate(DRAFTERS)
    }
    drafters["lookup"] = {"kind": "prompt_lookup", "settings": {"min_ngram": 1}}
    raw = {
        "target": {"model": str(root / "target"), "dtype": "float32", "device": "cpu"},
        "drafters": drafters,
        "learning": {"loads": [1, 4], "draft_lengths": [1, 2]},
        "threads": 1,
    }
    (root / "paceline.yaml").write_text(yaml.safe_dump(raw))
    data = root / "data"
    data.mkdir()
    for task in TASKS:
        write_task(data, task)
    questions = [
        json.dumps({"question_id": i, "category": f"c{i % 3}", "turns": [f"what is {i}?"]})
        for i in range(18)
    ]
    (data / "spec_bench.jsonl").write_text("\n".join(questions) + "\n")
    made = Place(root / "paceline.yaml", data, root / "work", root / "out")
    write_prices(made)
    return made


def write_prices(place: Place) -> None:
    """Write made-up prices: drafting a token takes a quarter of the target's forward or less."""
    bench = Workbench(place.config, place.work, place.data, SMOKE)
    prices = [replace(m, seconds=price(m)) for m in bench.costs.measurements]
    CostTable(bench.costs.fingerprint, prices).save(bench.config.paths.costs)


def price(m: Measurement) -> float:
    if m.operation == "propose":
        return {"lookup": 0.01, "slow-general": 0.25}.get(m.subject, 0.15) * m.tokens
    return {"forward": 1.0 + 0.02 * m.tokens, "prefill": 1.0, "start": 0.2}.get(m.operation, 0.1)


@pytest.fixture(autouse=True)
def _short_trainings(short_trainings: None) -> None:
    """Shorten trainings: no test here depends on how well a policy chooses."""


@pytest.fixture(autouse=True)
def _steady_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Price measured costs by a rule, so that the load of the machine has no effect."""

    def measure(*settings: Any) -> CostTable:
        measured = measure_cost_table(*settings)
        steady = [replace(m, seconds=_steady(m)) for m in measured.measurements]
        return CostTable(measured.fingerprint, steady)

    monkeypatch.setattr(pipeline, "measure_cost_table", measure)


def _steady(m: Measurement) -> float:
    """Return a millisecond and a little per token for a target forward, and less for drafting."""
    if m.subject == "engine":
        return 1e-4
    per_token = {"forward": 5e-5, "prefill": 1e-5, "start": 2e-6, "propose": 2e-4}[m.operation]
    per_token *= SLOWER.get(m.subject, 1.0)
    return (1e-3 if m.subject == "target" else 0.0) + per_token * (m.tokens + m.rows - 1)


def run(place: Place, name: str) -> dict[str, Any]:
    """Return the JSON of a small run."""
    done = paceline.experiment(
        name, place.out, place.config, place.data, smoke=True, folder=place.work
    )
    assert [path.name for path in done.files] == [f"{name}.{s}" for s in ("md", "json", "png")]
    for table in done.findings.tables:
        assert table.rows and all(len(row) == len(table.columns) for row in table.rows)
    found: dict[str, Any] = json.loads((place.out / f"{name}.json").read_text())
    return found


def cells(found: dict[str, Any], table: int = 0) -> list[dict[str, Any]]:
    """Return a table's rows by column."""
    heads = [column["name"] for column in found["tables"][table]["columns"]]
    return [dict(zip(heads, row, strict=True)) for row in found["tables"][table]["rows"]]


def test_specialists_are_compared_on_the_prompts_of_their_tasks(place: Place) -> None:
    found = run(place, "two-specialists")
    rows = {row["chosen by"]: row for row in cells(found)}
    always = rows["always `math`"]
    assert always["math prompts to `math`"] == 1.0
    assert always["translation prompts to `translation`"] == 0.0
    assert rows["oracle"]["of the oracle"] == pytest.approx(1.0)
    pairs = cells(found, 1)
    assert len(pairs) == 6
    whole = found["facts"]["reports"]["translation + math"]["overall"]
    assert set(whole["arms"]) == {NONE, *(arm for arm in whole["arms"] if arm[0] in "tm")}
    assert {row["prompts"] for row in pairs} != {0}


def test_every_choice_of_an_alpha_is_a_drafter(place: Place) -> None:
    """Cost alone never chooses an expensive drafter, and the whole target's copy has its very text."""
    found = run(place, "alignment-or-size")
    rows = cells(found)
    assert len(rows) == 4 * 5
    for row in rows:
        assert sum(row[f"to `{name}`"] for name in alignment_or_size.DRAFTERS) == pytest.approx(1.0)
    assert {row["similarity"] for row in rows} == {"rouge_1", "rouge_l", "edit", "prefix"}
    drafters = {row["drafter"]: row for row in cells(found, 1)}
    scores = {name: row["cost score"] for name, row in drafters.items()}
    assert scores == pytest.approx(
        {name: 1 - 2e-4 * SLOWER.get(name, 1.0) / 1.05e-3 for name in alignment_or_size.DRAFTERS}
    )
    for row in rows:
        at_zero = [name for name in scores if row["alpha"] == 0.0 and row[f"to `{name}`"]]
        assert all(scores[name] == max(scores.values()) for name in at_zero)
    whole = drafters["int8-target"]
    assert whole["edit"] > max(drafters[name]["edit"] for name in ("general", "half-target"))
    for row in rows:
        chosen = sum(row[f"to `{name}`"] * score for name, score in scores.items())
        assert row["mean cost score"] == pytest.approx(chosen)


def test_more_examples_are_drawn_from_the_training_part(place: Place) -> None:
    found = run(place, "number-of-examples")
    sizes = found["facts"]["speedups"]["acceptance"]
    *_, largest = sizes
    assert int(largest) == found["settings"]["prompts to learn from"] < 4 * 8
    assert all(speed > 0 for speeds in sizes.values() for speed in speeds)


def test_the_curve_by_number_of_examples_is_judged_on_held_out_prompts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`code` is right on all training prompts and wrong on the held-out ones, so a policy is slow there.

    A curve of training prompts would show its gain.
    """
    study = Study(None, LearningSection(), priced_prompts(40, 4), priced_prompts(12, 0, first=40))  # type: ignore[arg-type]
    taken: list[tuple[str, ...]] = []
    fit = NeighboursLearner.fit

    def record(self: Any, data: Dataset, *rest: Any) -> Any:
        taken.append(data.ids)
        return fit(self, data, *rest)

    monkeypatch.setattr(NeighboursLearner, "fit", record)
    found = [
        number_of_examples._speedup(study, "knn", size, draw)
        for size, draw in ((20, 0), (20, 1), (40, 0))
    ]

    code = np.eye(2)[[1] * 12]
    assert study.held_out.speedup(code) < 0.9 < 1.5 < study.train.speedup(np.eye(2)[[1] * 40])
    assert found == [pytest.approx(study.held_out.speedup(code))] * 3
    assert list(map(len, taken)) == [20, 20, 40]
    assert taken[0] != taken[1]
    for ids in taken:
        assert set(ids) <= set(study.train.ids)
        assert len(set(ids)) == len(ids)


def priced_prompts(num: int, accepted: int, first: int = 0) -> Dataset:
    """Return prompts on which `code` drafts four tokens per round and gets `accepted` of them."""
    figures = [("target", "prefill", 1.0), ("target", "forward", 1.0), ("engine", "round", 0.1)]
    figures += [("code", "start", 0.1), ("code", "propose", 0.6)]
    costs = CostTable({}, [Measurement(s, o, 1, 0, 1, seconds) for s, o, seconds in figures])
    rng = np.random.default_rng(first)
    prompts = [
        CollectedPrompt(
            id=f"p{first + i}",
            domain="",
            prompt_tokens=(1, 2, 3),
            output_tokens=tuple(range(41)),
            max_new_tokens=41,
            features=rng.normal(size=8).astype(np.float32),
            replays={
                "code": ReplayedDrafter(
                    np.tile([[4, accepted - (i == 0)]], (40, 1)).clip(min=0), everywhere=True
                )
            },
            draft_outputs={},
        )
        for i in range(num)
    ]
    return build_dataset(prompts, (NONE, "code"), costs, LearningSection())[0]


def test_a_policy_without_none_never_takes_it(place: Place) -> None:
    found = run(place, "plain-decoding-as-an-arm")
    reports = found["facts"]["reports"]
    assert set(reports) == {
        "all drafters",
        "code and summary drafting for translation and math",
        "translation and math drafting for code and summary",
        "a useless drafter",
    }
    for report in reports.values():
        with_none, without = report["policies"]
        assert without == f"{with_none}, no {NONE}"
        assert report["overall"]["chosen"][without]["drafters"][NONE] == 0.0
    useless = reports["a useless drafter"]["overall"]
    assert useless["strategies"]["oracle"]["speedup"]["value"] < 1.1
    (shuffled,) = (f for arm, f in useless["arms"].items() if arm != NONE)
    assert shuffled["speedup"]["value"] < 1.0


def test_every_category_is_left_out_once(place: Place) -> None:
    found = run(place, "many-tasks")
    assert [row["category, left out"] for row in cells(found)] == ["c0", "c1", "c2"]
    left_out = found["facts"]["left out"]
    assert {r["num_train"] for r in left_out.values()} == {12}  # the two others, six of each
    assert all(set(r["by_domain"]) == {name} for name, r in left_out.items())
    shown = {arm.partition("@")[0] for arm in left_out["c0"]["overall"]["arms"]}
    assert shown == {NONE, "general", "slow-general", "lookup"}


def test_skip_sets_become_arms(place: Place) -> None:
    found = run(place, "self-drafting")
    sets = {row["set"]: row for row in cells(found, 1)}
    assert set(sets) == {*sets_by_hand(2), "searched"}
    assert all(row["tokens per round"] >= 1.0 for row in sets.values())
    saved = json.loads((place.work / "self-drafting" / "skip-set.json").read_text())
    of_search = found["facts"]["sets"]["searched"]
    assert (of_search["attention"], of_search["mlp"]) == (
        saved["skip_attention"],
        saved["skip_mlp"],
    )
    groups = found["facts"]["reports"]
    assert list(groups) == ["sets and `none`", "all drafters"]
    alone, among = (set(report["overall"]["arms"]) for report in groups.values())
    assert alone == {NONE, *sets}
    assert alone < among and "lookup" in {arm.partition("@")[0] for arm in among}


def test_a_set_is_searched_on_prompts_that_are_never_collected(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Workbench(place.config, place.work, place.data, SMOKE)
    searched_on: list[tuple[int, ...]] = []

    def record(pace: Any, prompts: Any, *rest: Any, **settings: Any) -> Any:
        searched_on.extend(tuple(prompt) for prompt in prompts)
        return search_layers(pace, prompts, *rest, **settings)

    monkeypatch.setattr(searched_sets, "search_layers", record)
    report = searched_sets.search_set(bench, tmp_path / "set.json", DRAFT_TOKENS)
    collected = {
        tuple(bench.pace.encode([{"role": "user", "content": record.prompt}]))
        for record in bench.prompts.collected
    }
    assert len(collected) == 4 * 8 and len(searched_on) == 4
    assert not collected & set(searched_on)
    assert len(report.trials) == 3 and (tmp_path / "set.json").is_file()


@pytest.mark.parametrize("num_layers", [2, 3, 10, 32])
def test_sets_by_hand_fit_any_depth(num_layers: int) -> None:
    quarter, half = sets_by_hand(num_layers).values()
    assert quarter.attention == quarter.mlp <= half.attention == half.mlp
    assert quarter.attention and half.attention <= set(range(1, num_layers))


def test_rewards_are_judged_by_the_same_speeds(place: Place) -> None:
    found = run(place, "reward-compared")
    facts = found["facts"]
    assert list(facts) == ["speed", *(f"alignment, alpha {a:.2f}" for a in (0, 0.25, 0.5, 0.75, 1))]
    assert facts["speed"]["right"] == 1.0  # the reward is the speed
    assert cells(found)[0]["pairs in order"] == 1.0
    singles = {
        one["report"]["overall"]["strategies"]["oracle"]["seconds"] for one in facts.values()
    }
    assert len(singles) == 1


def test_streams_have_the_same_requests_for_every_way(place: Place) -> None:
    found = run(place, "online")
    num = found["settings"]["requests a stream"]
    half = found["facts"]["requests before the shift"]
    assert 0 < half < num
    for stream in ("steady", "shifting"):
        ways = found["facts"][stream]
        assert {len(way["seconds"]) for way in ways.values()} == {num}
        oracle = np.array(ways["best arm of each request"]["seconds"])
        assert (oracle <= np.array(ways["policy"]["seconds"]) + 1e-12).all()
        assert (oracle <= np.array(ways["best single arm"]["seconds"]) + 1e-12).all()
    # the same requests in another order
    plain = [sorted(found["facts"][s]["policy"]["plain"]) for s in ("steady", "shifting")]
    assert plain[0] == pytest.approx(plain[1])


def test_machines_price_the_same_choices(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(new_machine, "MACHINES", (("float32", 1), ("bfloat16", 1)))
    # with the same number of threads they need no process of their own, whose imports take seconds
    monkeypatch.setattr(new_machine, "_elsewhere", lambda work, *given: work(*given))
    found = run(place, "new-machine")
    own = cells(found, 1)
    assert [row["machine"] for row in own] == ["float32, 1 thread", "bfloat16, 1 thread"]
    assert own[0]["own prices"] == own[0]["prices of float32, 1 thread"]
    assert all(row["own prices"] <= row["oracle"] + 1e-9 for row in own)
    dtypes = {
        json.loads(path.read_text())["fingerprint"]["dtype of target"]
        for path in (place.work / "machines").iterdir()
    }
    assert dtypes == {"float32", "bfloat16"}
    if found["facts"]["clocked seconds"]:
        seconds = found["facts"]["clocked seconds"]["bfloat16, 1 thread"]
        assert len(seconds["home"]) == len(seconds["own"]) > 0


def test_elsewhere_is_another_process() -> None:
    assert new_machine._elsewhere(os.getpid) != os.getpid()


def test_all_experiments_of_this_file_are_in_the_catalogue() -> None:
    assert len(LEARNED) == 9 and len(EXPERIMENTS) == 10


# --- the parts ------------------------------------------------------------------------------------


def test_enough_is_where_it_stays_enough() -> None:
    def of(*speeds: float) -> list[number_of_examples._Learned]:
        sizes = (30, 100, 300, 1000)
        return [
            number_of_examples._Learned(n, np.array([s, s]))
            for n, s in zip(sizes, speeds, strict=True)
        ]

    assert reached(of(1.5, 1.99, 2.0, 2.0)) == 100
    assert reached(of(1.99, 1.5, 1.99, 2.0)) == 300  # not 30: a larger one fell back
    assert reached(of(1.1, 1.2, 1.3, 2.0)) is None
    # of a gain over 1.9 much more is missing
    assert reached(of(1.5, 1.99, 2.0, 2.0), 1.9) == 300
    assert reached(of(1.5, 1.99, 2.0, 2.0), 2.5) is None


class PrefersNone(Drafting):
    """A chooser that prefers `none`, then `b`."""

    def __init__(self) -> None:
        self.arms = (NONE, "a", "b")

    def preferences(self, features: np.ndarray, situation: Situation) -> np.ndarray:
        return np.array([[3.0, 1.0, 2.0]])


def test_the_second_choice_is_taken_where_none_is_excluded() -> None:
    inner = PrefersNone()
    excluding = Drafting(inner, data=None)  # type: ignore[arg-type]
    found = excluding.preferences(np.zeros((1, 1)), None)  # type: ignore[arg-type]
    assert excluding.distribution(found).tolist() == [[0.0, 0.0, 1.0]]


def test_a_given_store_is_used_and_its_prompts_are_not_timed(place: Place, tmp_path: Path) -> None:
    first = Workbench(place.config, place.work, place.data, SMOKE)
    store = first.config.paths.store
    there = {p.prompt_id for p in first.collection.prompts}

    given = Workbench(place.config, tmp_path, place.data, replace(SMOKE, prompts=None), store=store)
    assert {p.prompt_id for p in given.collection.prompts} == there
    assert given.config.paths.costs.parent == tmp_path
    assert not {p.id for p in given.prompts.timed} & there
    fewer = Workbench(place.config, tmp_path, place.data, replace(SMOKE, prompts=2), store=store)
    domains = [p.domain for p in fewer.collection.prompts]
    assert {task: domains.count(task) for task in TASKS} == dict.fromkeys(TASKS, 2)


def test_a_missing_drafter_is_one_line(place: Place, tmp_path: Path) -> None:
    raw = yaml.safe_load(place.config.read_text())
    general = raw["drafters"].pop("general")
    path = tmp_path / "paceline.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(paceline.ConfigError, match="needs a drafter 'general', and the"):
        paceline.experiment(
            "alignment-or-size", tmp_path, path, place.data, smoke=True, folder=tmp_path
        )
    raw["drafters"] = {"general": general}
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(paceline.ConfigError, match="two drafters that are named after tasks"):
        paceline.experiment(
            "two-specialists", tmp_path, path, place.data, smoke=True, folder=tmp_path
        )
