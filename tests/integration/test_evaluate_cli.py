"""`paceline evaluate` and `paceline paraphrase` on the bundled models, with made-up prices."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from paceline.cli import main
from paceline.costs import CostTable, Measurement
from paceline.experiments.demo_prompts import load_written
from paceline.store import load_collection

ZOO = Path(__file__).parents[2] / "zoo"


def run(*arguments: str | Path) -> int:
    """Return the exit code of `paceline ARGUMENTS` in this process."""
    patch = pytest.MonkeyPatch()
    patch.setattr(sys, "argv", ["paceline", *map(str, arguments)])
    patch.setenv("COLUMNS", "300")
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        patch.undo()
    return 0


def write_prompts(path: Path, first: int, last: int) -> Path:
    records = [*load_written("math")[first:last], *load_written("translation")[first:last]]
    lines = [json.dumps({"id": r.id, "domain": r.domain, "prompt": r.prompt}) for r in records]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration, a collection, another of the same prompts in other words, and
    prices by which a forward of several tokens costs a little more than one.
    """
    folder = tmp_path_factory.mktemp("evaluate")
    drafter = {"model": str(ZOO / "draft-math"), "dtype": "float32", "num_draft_tokens": 3}
    raw = {
        "target": {"model": str(ZOO / "target"), "dtype": "float32"},
        "drafters": {
            "math": {"kind": "draft_model", "settings": drafter},
            "lookup": {"kind": "prompt_lookup", "settings": {"num_draft_tokens": 4}},
        },
        "learning": {"draft_lengths": [2], "max_epochs": 20, "held_out": 0.4},
    }
    (folder / "paceline.yaml").write_text(yaml.safe_dump(raw))
    prompts = write_prompts(folder / "prompts.jsonl", 0, 12)
    others = write_prompts(folder / "others.jsonl", 6, 18)  # half of them are in the first too
    config = ("-c", folder / "paceline.yaml", "--max-new-tokens", "8")
    assert run("collect", prompts, *config) == 0
    assert run("paraphrase", others, folder / "words.jsonl") == 0
    assert run("collect", folder / "words.jsonl", *config, "--store", folder / "words") == 0
    arms = load_collection(folder / "runs" / "collection").identity.arms
    figures = [("target", "prefill", 1, 3e-3), ("engine", "round", 1, 1e-4)]
    figures += [("target", "forward", n, 3e-3 + 1e-4 * n) for n in (1, 5)]
    figures += [(arm, "start", 1, 1e-3) for arm in ("math", "lookup")]
    figures += [("math", "propose", n, 3e-4 * n) for n in (1, 4)]
    figures += [("lookup", "propose", n, 1e-5) for n in (1, 4)]
    cells = [Measurement(s, o, n, 0, r, t) for s, o, n, t in figures for r in (1, 4)]
    lines = {f"arm {name}": line for name, line in arms.items()}
    CostTable(lines, cells).save(folder / "runs" / "costs.json")
    return folder


def test_learners_are_compared_on_every_side(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ("-c", workplace / "paceline.yaml")
    wide = ("--rows", "1,4", "--leave-one-task-out", "--on", f"words={workplace / 'words'}")
    figure = workplace / "figures" / "compared.png"
    compared = (
        "--compare",
        "knn,first_line_lookup",
        "--encoders",
        "text_stats;none",
        "--seeds",
        "2",
    )
    capsys.readouterr()

    assert run("evaluate", *config, *compared, *wide, "--plot", figure, "--json") == 0

    found = json.loads(capsys.readouterr().out)
    titles = [section["title"] for section in found["sections"]]
    assert titles == [
        "held-out prompts",
        "held-out prompts, 4 rows",
        "words",
        "math, never seen",
        "translation, never seen",
    ]
    policies = [
        f"{n} ({e})" for n in ("knn", "first_line_lookup") for e in ("text_stats", "no features")
    ]
    first, _, words, *left_out = (section["report"] for section in found["sections"])
    assert first["policies"] == policies
    assert [len(first["by_seed"][name]) for name in policies] == [2] * 4
    assert first["known_first_lines"] == 1.0
    assert words["known_first_lines"] == 0.0  # the fixed lines are gone
    assert words["overall"]["num_prompts"] + int(words["notes"][-1].split()[0]) == 24
    assert [list(report["by_domain"]) for report in left_out] == [["math"], ["translation"]]
    assert [report["num_train"] for report in left_out] == [12, 12]
    assert len(found["sentences"]) == 3 * 4 + 4
    assert {"cost table", "commit", "command", "collection"} <= found["circumstances"].keys()
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_the_saved_policy_is_evaluated_on_what_it_was_not_trained_on(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = workplace / "paceline.yaml"
    assert run("learn", "-c", config) == 0
    # a share that is changed afterwards must not move prompts from training to testing
    raw = yaml.safe_load(config.read_text())
    raw["learning"]["held_out"] = 0.7
    changed = workplace / "changed.yaml"
    changed.write_text(yaml.safe_dump(raw))
    sizes = []
    for path in (config, changed):
        capsys.readouterr()
        assert run("evaluate", "-c", path, "--json") == 0
        report = json.loads(capsys.readouterr().out)["sections"][0]["report"]
        sizes.append((report["num_train"], report["overall"]["num_prompts"]))
    assert sizes[0] == sizes[1]
    assert run("evaluate", "-c", config) == 0
    shown = capsys.readouterr().out
    assert "predicted speed-up over none: held-out prompts" in shown
    assert "- held-out prompts: policy " in shown


MISTAKES = [
    (("--compare", "knm"), "unknown learner 'knm'; did you mean 'knn'"),
    (("--compare", "knn", "--encoders", "words"), "no features of the encoder 'words'"),
    (("--encoders", "text_stats"), "name learners with --compare"),
    (("--rows", "1,x"), "give whole numbers from 1"),
    (("--rows", "0"), "give whole numbers from 1"),
    (("--on", "words"), "give NAME=FOLDER"),
    (("--compare", "knn", "--on", "words=nowhere"), "no collection here"),
    (("--objective", "speed"), "objective"),
]


@pytest.mark.parametrize(("arguments", "expected"), MISTAKES)
def test_a_mistake_is_one_line(
    workplace: Path,
    arguments: tuple[str, ...],
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    assert run("evaluate", "-c", workplace / "paceline.yaml", *arguments) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1 and message.startswith("paceline: ")


def test_a_collection_of_other_drafters_is_refused(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = yaml.safe_load((workplace / "paceline.yaml").read_text())
    raw["drafters"]["math"]["settings"]["num_draft_tokens"] = 2
    (tmp_path / "paceline.yaml").write_text(yaml.safe_dump(raw))
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join((workplace / "others.jsonl").read_text().split("\n")[:2]) + "\n")
    store = tmp_path / "store"
    made = ("-c", tmp_path / "paceline.yaml", "--max-new-tokens", "4", "--store", store)
    assert run("collect", few, *made) == 0
    capsys.readouterr()
    arguments = ("--compare", "knn", "--on", f"other={store}")
    assert run("evaluate", "-c", workplace / "paceline.yaml", *arguments) == 2
    assert "was collected with other drafters than the collection" in capsys.readouterr().err


def test_paraphrase_refuses_what_it_does_not_know(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = workplace / "prompts.jsonl"
    out = workplace / "out.jsonl"
    capsys.readouterr()
    for arguments, expected in (
        (("--kind", "rhymed"), "--kind must be paraphrased or bare"),
        (("--use", "tests"), "--use must be train or test"),
    ):
        assert run("paraphrase", prompts, out, *arguments) == 2
        assert expected in capsys.readouterr().err
    assert run("paraphrase", prompts, out, "--kind", "bare") == 0
    assert run("paraphrase", out, workplace / "again.jsonl") == 2
    assert "no instruction to change" in capsys.readouterr().err
