"""Drafters known by their texts alone: collected, learned, judged and asked at the command line."""

from __future__ import annotations

import json
import shutil
import sys
from typing import TYPE_CHECKING, Any

import pytest
import yaml

import paceline
from paceline.cli import main
from paceline.config import load_config
from paceline.contracts import NONE, TEXT_ONLY
from paceline.errors import ArtefactError, ConfigError, StoreError
from paceline.rewards import rouge_l_f1
from paceline.store.collection import load_collection

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Run = Callable[..., tuple[int, str, str]]

NUM_PROMPTS = 40  # per task
TASKS = {"code": "def f{i}(x): return x", "math": "Add 1{i} and 2{i} please."}
WRONG = [7] * 12
LEARN = ("learn", "--reward", "alignment", "--learner", "reinforce")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("COLUMNS", "120")

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["paceline", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run


def configure(folder: Path, **sections: Any) -> Path:
    target = {"model": "target", "dtype": "float32"}
    raw = {"target": target, "learning": {"max_epochs": 40}, **sections}
    path = folder / "paceline.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def change(path: Path, **learning: Any) -> None:
    raw = yaml.safe_load(path.read_text())
    raw["learning"] |= learning
    path.write_text(yaml.safe_dump(raw))


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def made(save_tiny_models: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration without drafters, prompts of two tasks, and the texts of two models.

    `coder` writes what the target writes on `code`, and nonsense on `math`; `solver` the reverse.
    """
    folder = tmp_path_factory.mktemp("texts")
    (folder / "target").symlink_to(save_tiny_models(1024) / "target")
    config = load_config(configure(folder))
    prompts = [
        {"id": f"{task}-{i}", "domain": task, "prompt": text.format(i=i)}
        for task, text in TASKS.items()
        for i in range(NUM_PROMPTS)
    ]
    records = paceline.read_prompts([write_lines(folder / "prompts.jsonl", prompts)])
    paceline.collect(config, records, max_new_tokens=12)
    answers = load_collection(config.paths.store, []).prompts
    for writer, good in (("coder", "code"), ("solver", "math")):
        lines = [
            {"id": p.id, "output_tokens": list(p.output_tokens) if p.domain == good else WRONG}
            for p in answers
        ]
        write_lines(folder / f"{writer}.jsonl", lines)
    return folder


@pytest.fixture
def collected(made: Path, tmp_path: Path, run: Run) -> Path:
    """The configuration, in a folder with the collection and both texts."""
    folder = shutil.copytree(made, tmp_path / "own", symlinks=True)
    path = folder / "paceline.yaml"
    texts = [f"--outputs={name}={folder / name}.jsonl" for name in ("coder", "solver")]
    code, out, err = run(
        "collect", folder / "prompts.jsonl", "-c", path, "--max-new-tokens", "12", *texts
    )
    assert code == 0, err
    assert "next: `paceline learn --reward alignment --learner reinforce" in out
    return path


def test_texts_alone_lead_to_a_policy_that_routes(collected: Path, run: Run) -> None:
    """With alpha 1: no costs, and `none` is no arm."""
    config = ("-c", collected)
    code, out, err = run(*LEARN, "--alpha", "1", *config)
    assert code == 0, err
    assert "speeds are unknown: coder, solver" in out and "next: `paceline route" in out
    card = json.loads((collected.parent / "runs/policy/policy.json").read_text())
    assert card["arms"] == ["coder", "solver"]
    assert card["drafters"] | {NONE: ""} == {NONE: "", "coder": TEXT_ONLY, "solver": TEXT_ONLY}
    assert card["reward"] == {"kind": "alignment", "version": 2, "alpha": 1.0, "metric": "rouge_l"}

    code, out, err = run("evaluate", *config, "--json")  # by the reward that it was learned with
    assert code == 0, err
    report = json.loads(out)
    policy, oracle = (report["strategies"][name]["value"] for name in ("policy", "oracle"))
    single = report["strategies"]["best single"]["value"]
    assert oracle == pytest.approx(1.0) and policy > 0.95 and single < 0.8
    assert report["over_best_single"]["policy"]["low"] > 0.1
    assert report["by_domain"]["code"]["coder"] == pytest.approx(1.0)
    assert report["by_domain"]["code"]["solver"] == pytest.approx(wrong_reward(collected, "code"))
    assert any("speeds are unknown" in note for note in report["notes"])

    for prompt, arm in (("def g(y): return y", "coder"), ("Add 71 and 82 please.", "solver")):
        code, out, err = run("route", prompt, *config)
        assert (code, out.strip(), err) == (0, arm, "")
    code, out, err = run("route", prompt, *config, "--json")
    decision = json.loads(out)
    assert decision["arm"] == "solver" and set(decision["scores"]) == {"coder", "solver"}
    router = paceline.load_router(load_config(collected))
    assert router.arms == ("coder", "solver")
    for text, arm in (("def g(y): return y", "coder"), (prompt, "solver")):
        messages = [{"role": "user", "content": text}]
        assert paceline.route(router, messages).arm == arm
    assert paceline.route(load_config(collected), messages).arm == "solver"


def wrong_reward(path: Path, task: str) -> float:
    """Return the mean similarity of nonsense to the target's text on the held-out prompts of a task."""
    from paceline.learning.dataset import split
    from paceline.learning.from_texts import text_dataset

    config = load_config(path)
    prompts = load_collection(config.paths.store, []).prompts
    section = config.learning.model_copy(update={"alpha": 1.0})
    _, held_out = split(text_dataset(prompts, ("coder", "solver"), section)[0], 0.25)
    outputs = {p.id: p.output_tokens for p in prompts if p.domain == task}
    values = [rouge_l_f1(outputs[id], WRONG) for id in held_out.ids if id in outputs]
    return sum(values) / len(values)


def test_costs_decide_between_none_and_equal_texts(collected: Path, run: Run) -> None:
    config = ("-c", collected)
    code, _, err = run(*LEARN, *config)  # alpha is 0.5 by default
    assert code == 2 and len(err.splitlines()) == 1
    assert "needs the cost of 'coder'" in err and "learning.text_costs" in err
    # the reward of `none` is 0.5; a right text that costs 0.2 earns 0.9, a wrong one less than 0.5
    change(collected, text_costs={"coder": 0.2, "solver": 1.0})
    code, out, err = run(*LEARN, *config)
    assert code == 0, err
    code, out, err = run("evaluate", *config, "--json")
    report = json.loads(out)
    assert list(report["arms"]) == [NONE, "coder", "solver"]
    assert report["arms"][NONE]["value"] == pytest.approx(0.5)
    by_code, by_math = report["by_domain"]["code"], report["by_domain"]["math"]
    assert by_code["coder"] == pytest.approx(0.5 * 1.0 + 0.5 * 0.8)
    assert by_math["solver"] == pytest.approx(0.5)
    change(collected, text_costs={"coder": 0.2, "solver": 1.0, "painter": 0.1})
    code, _, err = run(*LEARN, *config)
    assert code == 2 and "text_costs names 'painter'" in err
    for wrong in (-0.1, float("inf")):
        change(collected, text_costs={"coder": wrong})
        code, _, err = run(*LEARN, *config)
        assert code == 2 and "text_costs.coder" in err, err


def test_such_a_policy_cannot_decode_and_says_why(collected: Path, run: Run) -> None:
    config = ("-c", collected)
    assert run(*LEARN, "--alpha", "1", *config)[0] == 0
    settings = load_config(collected)
    with pytest.raises(
        ArtefactError, match=r"by their texts alone \(coder, solver\).*cannot draft"
    ):
        paceline.load(settings, policy=settings.paths.policy)
    code, out, err = run("generate", "def", "--max-new-tokens", "3", *config)
    assert code == 0 and err.count("note:") == 1
    assert "by their texts alone (coder, solver)" in err and "`paceline route PROMPT" in err
    code, out, err = run("doctor", *config)
    assert code == 0 and "by their texts alone" in out


def test_learners_are_compared_by_their_rewards(collected: Path, run: Run) -> None:
    change(collected, reward="alignment", alpha=1.0)
    code, out, err = run(
        "evaluate", "-c", collected, "--compare", "policy_gradient,fixed", "--json"
    )
    assert code == 0, err
    report = json.loads(out)
    assert report["policies"] == ["policy_gradient", "fixed"]
    assert report["strategies"]["fixed"]["value"] == report["strategies"]["best single"]["value"]
    code, out, err = run("evaluate", "-c", collected, "--compare", "policy_gradient,fixed")
    assert (
        code == 0
        and "alignment reward on held-out prompts" in out
        and "policy_gradient chose" in out
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("evaluate", "--rows", "1,4", "--compare", "fixed"), "--rows is not supported"),
        (("evaluate", "--seeds", "2", "--compare", "fixed"), "--seeds is not supported"),
        (("evaluate", "--compare", "fixed", "--plot", "p.png"), "remove --plot"),
        (("evaluate", "--compare", "fixed", "--leave-one-task-out"), "--leave-one-task-out is not"),
        (("learn", "--plot", "p.png", "--learner", "fixed"), "remove --plot"),
        (("learn",), "take policy_gradient or reinforce"),
        (("evaluate",), "no policy here; run `paceline learn"),
        (("route", "a"), "no policy here; run `paceline learn"),
    ],
)
def test_an_option_that_texts_do_not_have_is_named(
    collected: Path, run: Run, words: tuple[str, ...], says: str
) -> None:
    change(collected, reward="alignment", alpha=1.0)
    code, _, err = run(*words, "-c", collected)
    assert code == 2 and says in err and len(err.splitlines()) == 1, err


def test_texts_that_are_missing_are_named(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "own", symlinks=True)
    change(folder / "paceline.yaml", reward="alignment", alpha=1.0, learner="reinforce")
    config = load_config(folder / "paceline.yaml")
    records = paceline.read_prompts([folder / "prompts.jsonl"])
    with pytest.raises(StoreError, match="no drafter is configured, and no texts"):
        paceline.learn(config)
    paceline.collect(config, records, 12, outputs={"coder": folder / "coder.jsonl"})
    with pytest.raises(ConfigError, match=r"at least two drafters.*texts of coder alone"):
        paceline.learn(config)
    more = [*records, paceline.PromptRecord("new", "code", "def h(): pass")]
    paceline.collect(config, more, 12)
    change(folder / "paceline.yaml", alpha=0.5, text_costs={"coder": 0.1})
    with pytest.raises(
        StoreError, match=r"prompt 'new' has no text of 'coder'.*--outputs coder=FILE"
    ):
        paceline.learn(load_config(folder / "paceline.yaml"))


def test_a_policy_of_drafters_that_draft_here_routes_too(
    save_tiny_models: Callable[[int], Path], tmp_path: Path, run: Run
) -> None:
    folder = save_tiny_models(1024)
    near = {"model": str(folder / "near"), "num_draft_tokens": 3}
    drafters = {"near": {"kind": "draft_model", "settings": near}}
    target = {"model": str(folder / "target"), "dtype": "float32"}
    path = configure(tmp_path, target=target, drafters=drafters)
    prompts = [
        paceline.PromptRecord(f"{task}-{i}", task, text.format(i=i))
        for task, text in TASKS.items()
        for i in range(12)
    ]
    config = load_config(path)
    paceline.collect(config, prompts, 8)
    paceline.profile(config, budget=0.1)
    learned = paceline.learn(config)
    code, out, err = run("route", "def g(y): return y", "-c", path, "--json")
    assert code == 0, err
    decision = json.loads(out)
    assert decision["arm"] in learned.policy.arms and decision["policy"] == learned.policy.id
    assert decision["seconds_per_token"][NONE] > 0
