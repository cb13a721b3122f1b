"""`paceline distill --from-log`: from served requests to better weights in the drafter's folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import yaml

import paceline
from paceline.cli import main
from paceline.distillation.adoption import WEIGHTS
from paceline.testing.tiny_models import perturbed, tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

SHORT = ("--set", "least_held_out=4", "--set", "batch_tokens=256", "--threads", "1")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(sys, "argv", ["paceline", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def configured(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that serves prompts with a log and returns the configuration's path."""
    target = tiny_model(std=0.1, context=96)
    models = {"target": target, "mine": perturbed(target, 1.0)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)

    def serve(tokens: str) -> Path:
        raw = {
            "target": {"model": str(tmp_path / "target")},
            "drafters": {
                "mine": {"kind": "draft_model", "settings": {"model": str(tmp_path / "mine")}},
                "lookup": {"kind": "prompt_lookup"},
            },
            "log": {"folder": "served", "tokens": tokens},
            "paths": {"costs": "costs.json"},
        }
        path = tmp_path / "paceline.yaml"
        path.write_text(yaml.safe_dump(raw))
        pace = paceline.load(path)
        random = np.random.default_rng(0)
        prompts = ["".join(random.choice(list("abcdefgh "), 12)) for _ in range(48)]
        messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
        pace.generate(messages, drafter="mine", max_new_tokens=24, ignore_eos=True)
        return path

    return serve


def test_served_requests_improve_their_drafter(
    configured: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = configured("ids")
    (tmp_path / "costs.json").write_text("{}")
    old = (tmp_path / "mine" / WEIGHTS).read_bytes()
    before = paceline.load(path, with_policy=False).parts.identities()["mine"]
    improve = ("distill", "-c", path, "--from-log", "mine", *SHORT)

    assert run(monkeypatch, *improve, "--set", "learning_rate=1e-12") == 0
    said = capsys.readouterr().out
    assert "48 prompts or conversations" in said and "not adopted" in said
    assert (tmp_path / "mine" / WEIGHTS).read_bytes() == old
    assert not [*tmp_path.glob("mine.*")]

    assert run(monkeypatch, *improve, "--epochs", "12", "--set", "learning_rate=1e-2") == 0
    said = capsys.readouterr().out
    assert "adopted: block efficiency rises by +" in said and "run `paceline profile" in said
    assert f"the weights before are in {tmp_path / 'mine.before'}" in said
    assert (tmp_path / "mine.before" / WEIGHTS).read_bytes() == old
    pace = paceline.load(path, with_policy=False)
    assert pace.parts.identities()["mine"] != before
    assert pace.complete("abc", drafter="mine", max_new_tokens=3).token_ids


def test_mistakes_are_one_line(
    configured: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = configured("off")
    log = ("--log", tmp_path / "served")
    for arguments, message in {
        ("--from-log", "mine"): "have no token ids (log.tokens: ids keeps them)",
        ("--from-log", "lookup"): "'lookup' is a prompt_lookup",
        ("--from-log", "mien"): "did you mean 'mine'",
        ("--from-log", "mine", "--log", tmp_path / "none"): "no decisions were logged here",
        ("--from-log", "mine", "--size", "small"): "'size' is of a new drafter",
        ("--from-log", "mine", "--measure", path): "--measure is of a new drafter",
        log: "--log is read by --from-log",
    }.items():
        assert run(monkeypatch, "distill", "-c", path, *arguments) == 2, arguments
        shown = capsys.readouterr()
        assert message in " ".join((shown.err + shown.out).split()), shown
        assert "Traceback" not in shown.err
    assert not [*tmp_path.glob("mine.*")]
