"""Suggested shapes: valid for any target, and the needed acceptance is the one that reaches a speed."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from paceline.bench.cost_measurement import time_drafts
from paceline.cli import main
from paceline.cli.suggestions import print_suggestions
from paceline.config import Config, DrafterSection, ModelSection
from paceline.distillation.prices import Prices
from paceline.distillation.settings import DistillSettings, StudentShape
from paceline.distillation.student import build_student, num_parameters, student_config
from paceline.distillation.suggest import (
    SuggestedShape,
    Suggestions,
    TrainedDrafter,
    best_speedup,
    check_vocabulary,
    independent_efficiency,
    needed_acceptance,
    read_quality,
    shapes_for,
)
from paceline.errors import ArtefactError, ConfigError
from paceline.models.language_model import LanguageModel
from paceline.testing.tiny_models import ARCHITECTURES, tiny_model
from paceline.testing.tokenizers import byte_tokenizer
from paceline.verbs.distillation import measure_prices, suggest_shapes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paceline.assembly import Parts

ROOT = Path(__file__).resolve().parents[3]


def costs(step: float, longest: int = 16) -> np.ndarray:
    """Return the costs of rounds whose forwards cost alike at every width."""
    return 1.0 + step * np.arange(longest + 1)


def prices(step: float, longest: int = 16) -> Prices:
    lengths = np.arange(longest + 1)
    return Prices(np.ones(longest + 1), step * lengths, 0.0, 128)


# --- acceptance and speed -------------------------------------------------------------------------


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.85])
def test_block_efficiency_of_independent_positions_is_the_geometric_sum(acceptance: float) -> None:
    K = np.arange(9)
    expected = (1 - acceptance ** (K + 1)) / (1 - acceptance)
    assert independent_efficiency(acceptance, 8) == pytest.approx(expected)


@pytest.mark.parametrize("step", [0.03, 0.2])
@pytest.mark.parametrize("speedup", [1.0, 1.5, 2.0])
def test_the_needed_acceptance_reaches_the_speedup_and_less_does_not(
    step: float, speedup: float
) -> None:
    needed = needed_acceptance(costs(step), speedup)
    assert needed is not None
    assert best_speedup(costs(step), needed.rate)[0] == pytest.approx(speedup)
    assert best_speedup(costs(step), needed.rate - 1e-3)[0] < speedup
    at = (1 - needed.rate ** (needed.num_draft_tokens + 1)) / (1 - needed.rate)
    assert at / (1 + step * needed.num_draft_tokens) == pytest.approx(speedup)


def test_a_drafter_breaks_even_where_its_acceptance_is_its_cost() -> None:
    """One drafted token brings `a` tokens and costs `c` rounds."""
    needed = needed_acceptance(costs(0.25), 1.0)
    assert needed is not None
    assert needed.rate == pytest.approx(0.25)
    assert needed.num_draft_tokens == 1


def test_a_speedup_out_of_reach_needs_no_acceptance() -> None:
    assert needed_acceptance(costs(0.6, longest=4), 2.0) is None
    assert needed_acceptance(costs(0.6, longest=4), 1.0) is not None
    assert needed_acceptance(costs(1.5, longest=4), 1.0) is None


# --- shapes ---------------------------------------------------------------------------------------


def llama(hidden: int, heads: int, kv_heads: int, mlp: int, layers: int = 12) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=1000, hidden_size=hidden, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=mlp, num_hidden_layers=layers,
    )  # fmt: skip


@pytest.mark.parametrize(
    "target",
    [
        llama(384, 6, 3, 1024),
        llama(2048, 32, 4, 5632),
        llama(4096, 32, 32, 11008),
        llama(896, 14, 2, 4864),
        llama(1152, 4, 1, 6912),
        GPT2Config(n_embd=768, n_head=12, n_layer=12),
    ],
    ids=["zoo", "1b", "7b", "qwen", "gemma", "gpt2"],
)
def test_shapes_are_scaled_to_the_target_and_can_be_built(target: LlamaConfig | GPT2Config) -> None:
    shapes = shapes_for(target)
    hidden = target.hidden_size

    assert 8 <= len(shapes) <= 10
    assert len({shape.model_dump_json() for shape in shapes}) == len(shapes)
    assert {shape.num_layers for shape in shapes} == {1, 2, 4}
    assert min(s.hidden_size for s in shapes) / hidden == pytest.approx(1 / 6, rel=0.11)
    assert max(s.hidden_size for s in shapes) / hidden == pytest.approx(2 / 3, rel=0.11)
    for shape in shapes:
        assert shape.mlp_size % 32 == 0
        with torch.device("meta"):
            student = LlamaForCausalLM(student_config(target, shape))
        assert student.config.vocab_size == target.vocab_size
        assert student.config.hidden_size < hidden


def test_shapes_keep_the_widths_of_the_target_where_they_fit() -> None:
    target = llama(2048, 32, 8, 6144)
    shapes = {(s.num_layers, s.hidden_size): s for s in shapes_for(target)}
    half = shapes[2, 1024]
    assert (half.num_heads, half.num_kv_heads, half.mlp_size) == (16, 4, 3072)
    # 5 heads have no 1.25 key-value heads: the nearest divisor
    assert (shapes[1, 320].num_heads, shapes[1, 320].num_kv_heads) == (5, 1)


def test_a_shallow_target_has_no_deeper_student() -> None:
    assert {s.num_layers for s in shapes_for(llama(384, 6, 3, 1024, layers=2))} == {1, 2}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_has_shapes(architecture: str) -> None:
    target = tiny_model(architecture)
    for shape in shapes_for(target.config):
        assert num_parameters(build_student(target, shape, "random", 0)) > 0


def test_a_target_that_cannot_have_a_student_is_refused() -> None:
    with pytest.raises(ConfigError, match="hidden size 16 leaves no smaller student of 16 or more"):
        shapes_for(llama(16, 1, 1, 32))
    with pytest.raises(ConfigError, match="has 1000 output tokens and its tokenizer 1001"):
        check_vocabulary(llama(384, 6, 3, 1024), 1024, 1001)
    with pytest.raises(ConfigError, match="has 990 output tokens"):
        check_vocabulary(llama(384, 6, 3, 1024), 990, 1000)
    check_vocabulary(llama(384, 6, 3, 1024), 1024, 1000)


# --- trained drafters -----------------------------------------------------------------------------


def write_training(folder: Path, facts: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "training.json").write_text(json.dumps(facts))
    return folder


def test_the_match_rate_of_a_drafter_is_of_the_tasks_it_was_trained_on(tmp_path: Path) -> None:
    """A specialist is not chosen for the others, which are in the file, too."""
    quality = {"a": {"match_rate": 0.8}, "b": {"match_rate": 0.6}, "c": {"match_rate": 0.1}}
    facts = {"quality": quality, "trained_domains": ["a", "b"]}
    found = read_quality(write_training(tmp_path, {**facts, "target": "abc"}))
    assert found is not None
    assert found.match_rate == pytest.approx(0.7)
    assert found.target == "abc"
    assert read_quality(write_training(tmp_path, {"quality": {}})) is None
    assert read_quality(tmp_path / "elsewhere") is None
    now = {"measures": {"domains": quality}, "trained_domains": ["b"]}
    measured = read_quality(write_training(tmp_path, now))
    assert measured is not None
    assert measured.match_rate == pytest.approx(0.6)
    bundled = read_quality(ROOT / "zoo" / "draft-code")
    assert bundled is not None
    assert bundled.match_rate > 0.8  # of code; 0.1 to 0.4 on the other tasks
    for damaged in ([], {"quality": {"a": {}}, "trained_domains": ["a"]}):
        with pytest.raises(ArtefactError, match=r"training\.json: cannot be read"):
            read_quality(write_training(tmp_path, damaged))


def suggested(layers: int, hidden: int, parameters: int, step: float) -> SuggestedShape:
    shape = StudentShape(
        num_layers=layers, hidden_size=hidden, mlp_size=64, num_heads=4, num_kv_heads=2
    )
    return SuggestedShape(shape, parameters, prices(step))


def test_a_larger_shape_must_be_faster_than_the_trained_drafter() -> None:
    drafter = TrainedDrafter("d", 100, 0.7, prices(0.05))
    small, large = suggested(1, 64, 50, 0.02), suggested(2, 128, 200, 0.1)
    found = Suggestions((small, large), (drafter,))

    assert found.larger_than(drafter) == [large]
    needed = large.needs(drafter.speedup)
    assert needed is not None
    assert needed.rate > 0.7
    assert best_speedup(large.prices.round_costs, needed.rate)[0] == pytest.approx(drafter.speedup)
    assert drafter.speedup == pytest.approx(
        independent_efficiency(0.7, drafter.num_draft_tokens)[-1]
        / (1 + 0.05 * drafter.num_draft_tokens)
    )


def test_a_shape_that_took_longer_than_a_larger_one_is_doubted() -> None:
    disturbed = suggested(2, 64, 50, 0.3)
    wide, deep = suggested(2, 128, 200, 0.1), suggested(4, 32, 60, 0.5)
    [doubt] = Suggestions((disturbed, wide, deep)).doubts
    assert "2 x 64" in doubt
    assert "3.0 times as long" in doubt
    assert Suggestions((suggested(2, 64, 50, 0.08), wide, deep)).doubts == []


# --- tables ---------------------------------------------------------------------------------------


def test_the_tables_fit_80_columns() -> None:
    """Sizes as large as they come; a band more would separate a shape from its figures."""
    shapes = tuple(suggested(4, 5464 + 8 * i, 1_234_000_000 + i, 0.021 + 0.1 * i) for i in range(9))
    trained = (TrainedDrafter("translation", 1_442_432, 0.5, prices(0.03)),)
    console = Console(width=80, file=io.StringIO())
    print_suggestions(Suggestions(shapes, trained), console)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    tables = [line for line in lines if re.match("[┏┃┡│└]", line)]

    assert max(map(len, tables)) <= 80
    assert sum(line.startswith("┏") for line in tables) == 4
    assert sum("4 x 5464" in line for line in tables) == 3
    assert any("1234.00 M" in line and "2468.0" in line and "2.1%" in line for line in tables)


# --- measuring ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give a folder with a tiny target and a student that says that it is trained."""
    made = tmp_path_factory.mktemp("models")
    target = tiny_model(std=0.1, context=96)
    shape = StudentShape(num_layers=1, hidden_size=16, mlp_size=32, num_heads=1, num_kv_heads=1)
    student = build_student(target, shape, "random", 0)
    for name, model in (("target", target), ("student", student)):
        model.save_pretrained(made / name)
        byte_tokenizer().save_pretrained(made / name)
    facts = {"quality": {"a": {"match_rate": 0.6}}, "trained_domains": ["a"]}
    written_by = LanguageModel(target, "target").fingerprint()
    write_training(made / "student", {**facts, "target": written_by})
    shutil.copytree(made / "student", made / "foreign")
    write_training(made / "foreign", {**facts, "target": "another"})
    return made


def configuration(folder: Path) -> Config:
    drafter = {"model": str(folder / "student"), "num_draft_tokens": 2}
    return Config(
        target=ModelSection(model=str(folder / "target")),
        drafters={
            "trained": DrafterSection(kind="draft_model", settings=drafter),
            "foreign": DrafterSection(
                kind="draft_model", settings={"model": str(folder / "foreign")}
            ),
            # is not loaded
            "unknown": DrafterSection(kind="draft_model", settings={"model": "no-such-folder"}),
            "lookup": DrafterSection(kind="prompt_lookup"),
        },
    )


def test_shapes_and_trained_drafters_are_measured(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = suggest_shapes(
        configuration(folder), lambda stage, done, total: seen.append((done, total))
    )
    total = len(found.shapes) + 1

    assert [own.name for own in found.trained] == ["trained"]
    assert found.other_targets == ("foreign",)
    assert found.trained[0].match_rate == 0.6
    assert seen == [(i + 1, total) for i in range(total)]
    sizes = [own.num_parameters for own in found.shapes]
    assert sizes == sorted(sizes)
    for own in (*found.shapes, *found.trained):
        # the trained drafter is priced beyond its own draft length, as the shapes are
        assert own.prices.longest == 16
        assert (own.prices.forwards > 0).all()
        assert (own.prices.proposals[1:] > 0).all()
        assert own.prices.proposals[16] > own.prices.proposals[1]
        assert 0 < own.prices.context <= 128


def test_the_prices_of_a_shape_are_of_a_student_of_that_shape(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = []

    def capture(parts: Parts, arm: str, *rest: object) -> list[object]:
        timed.append(parts.drafters[arm])
        return time_drafts(parts, arm, *rest)

    monkeypatch.setattr("paceline.verbs.distillation.time_drafts", capture)
    shape = StudentShape(num_layers=3, hidden_size=32, mlp_size=96, num_heads=2, num_kv_heads=1)
    settings = DistillSettings(shape=shape, dtype="float32", embedding_init="random")
    prices = measure_prices(configuration(folder), settings)

    assert len(timed) > 3
    [model] = {id(drafter): drafter.model for drafter in timed}.values()
    config = model.model.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (3, 32, 96)
    assert (config.vocab_size, model.dtype) == (259, torch.float32)
    assert timed[0].num_draft_tokens == prices.longest == 16


def test_the_command_prints_the_suggestions(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "paceline.yaml"
    path.write_text(configuration(folder).model_dump_json())  # JSON is YAML
    monkeypatch.setenv("COLUMNS", "80")
    assert run(monkeypatch, "--suggest", "-c", path) == 0
    out = capsys.readouterr().out
    for words in (
        "student shapes for this target",
        "to break even",
        "trained",
        "must reach",
        "foreign",
    ):
        assert words in out


def test_files_and_suggestions_exclude_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    assert run(monkeypatch, "--suggest", "prompts.jsonl") == 2
    assert "--suggest trains nothing" in capsys.readouterr().err
    for ignored in (("--loss", "kl"), ("--set", "epochs=3"), ("--measure", "prompts.jsonl")):
        assert run(monkeypatch, "--suggest", *ignored) == 2
        assert f"remove it, or {ignored[0]}" in capsys.readouterr().err
    for arguments in (("prompts.jsonl",), ("--out", tmp_path / "made")):
        assert run(monkeypatch, *arguments) == 2
        assert "needs prompt files and a folder to write" in capsys.readouterr().err


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> object:
    monkeypatch.setattr("sys.argv", ["paceline", "distill", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code or 0
