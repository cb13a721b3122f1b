"""`paceline trigram build`, and its table in a drafter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import paceline
from paceline.cli import main
from paceline.contracts import GREEDY, NONE
from paceline.drafting.trigram.table import read_facts
from paceline.models.vocabulary import Vocabulary
from paceline.store import Collection
from paceline.store.layout import Trajectory
from paceline.testing.tokenizers import byte_tokenizer

ZOO = Path(__file__).parents[2] / "zoo"
SOURCE = "def add(left, right):\n    return left + right\n\n\n" * 4


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "paceline.yaml"
    path.write_text(
        f"target: {{model: {ZOO / 'target'}, dtype: float32}}\n"
        "drafters:\n  tri: {kind: trigram_tree, settings: {table: tri.table}}\n"
        "paths: {store: store}\n"
    )
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Return the exit code of `paceline trigram build ARGUMENTS` in this process."""
    monkeypatch.setattr(sys, "argv", ["paceline", "trigram", "build", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def collected(folder: Path, tokenizer: str) -> None:
    """Write a collection of two made-up answers."""
    store = Collection(folder, "a target", tokenizer, "kind=none", hidden_size=4).trajectories
    answers = {"a": ([1, 2, 3, 4], [5, 6, 7]), "b": ([9, 3, 4], [5, 8])}
    store.append(
        [
            Trajectory(id, "x", tuple(prompt), tuple(output), "stop", 8, GREEDY).to_row()
            for id, (prompt, output) in answers.items()
        ]
    )


def test_a_table_of_text_files_serves_the_configured_drafter(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(SOURCE)
    files = (tmp_path / "a.py", tmp_path / "b.py")
    assert run(monkeypatch, "-c", config, "--out", tmp_path / "tri.table", "--text", *files) == 0
    said = capsys.readouterr().out
    assert f"written: {tmp_path / 'tri.table'}" in said

    pace = paceline.load(config)
    prompt = pace.encode(SOURCE + "def add(left")
    plain = pace.complete(prompt, drafter=NONE, max_new_tokens=20, ignore_eos=True)
    drafted = pace.complete(prompt, drafter="tri", max_new_tokens=20, ignore_eos=True)
    assert drafted.token_ids == plain.token_ids
    assert drafted.block_efficiency > 1.5


def test_a_table_of_the_targets_own_answers(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = paceline.load_config(config).target
    from paceline.models.loading import load_tokenizer

    collected(tmp_path / "store", Vocabulary.of(load_tokenizer(tokenizer)).hash())
    out = tmp_path / "new folder" / "tri.table"
    assert run(monkeypatch, "-c", config, "--out", out, "--from-collection") == 0

    facts = read_facts(out)
    # two tokens of each prompt and its answer: (3 4) -> 5, (4 5) -> 6 and 8, (5 6) -> 7
    assert (facts.num_tokens, facts.num_pairs, facts.num_trigrams) == (9, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to build from"),
        (["--text", "missing.txt"], "missing.txt: no such text file"),
        (["--text", str(ZOO / "target" / "model.safetensors")], "not UTF-8 text"),
        (["--from-collection"], "no collection here"),
        (["--from-collection", "--max-successors", "17"], "max_successors"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    words: str,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "-c", config, "--out", tmp_path / "t", *arguments) == 2
    said = capsys.readouterr().err
    assert words in said.replace("\n", " ")
    assert said.startswith("paceline:") and said.count("\n") == 1
    assert not (tmp_path / "t").exists()


def test_a_collection_of_another_tokenizer_is_refused(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    collected(tmp_path / "store", Vocabulary.of(byte_tokenizer()).hash())

    assert run(monkeypatch, "-c", config, "--out", tmp_path / "t", "--from-collection") == 2
    assert "another tokenizer" in capsys.readouterr().err
