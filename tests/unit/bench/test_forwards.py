"""The doctor says before weights are read which forward runs each model; cost tables remember it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from paceline.assembly import build, load
from paceline.bench.doctor import doctor, model_facts
from paceline.cli import main
from paceline.config import Config, DrafterSection, ModelSection
from paceline.errors import ModelError
from paceline.models.compiled.processor import kernels
from paceline.models.language_model import LanguageModel
from paceline.models.loading import load_language_model
from paceline.testing.tiny_models import ARCHITECTURES, tiny_model
from paceline.testing.tokenizers import byte_tokenizer

ZOO = Path(__file__).parents[3] / "zoo"
OURS = f"compiled ({kernels()})"


def section_of(architecture: str, folder: Path, **settings: Any) -> ModelSection:
    """Return the section of a tiny model saved to a folder."""
    tiny_model(architecture).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return ModelSection(model=str(folder), device="cpu", **settings)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_forward_that_is_predicted_is_the_one_that_runs(
    architecture: str, tmp_path: Path
) -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        section = section_of(architecture, tmp_path, dtype=dtype)
        facts, loaded = model_facts(section), load_language_model(section, "target")

        assert facts.forward == loaded.forward_name
        assert facts.why_not_compiled == loaded.why_not_compiled
        assert facts.cache_bytes_per_token == loaded.position_bytes
        assert facts.packed_bytes == loaded.packed_bytes


@pytest.mark.parametrize(
    ("settings", "forward", "reason"),
    [
        ({}, OURS, None),
        ({"forward": "lean"}, "lean", "the configuration says 'lean'"),
        ({"forward": "transformers"}, "transformers", "the configuration says 'transformers'"),
        ({"dtype": "float16"}, "transformers", "its weights are float16"),
    ],
)
def test_a_forward_that_is_not_compiled_has_a_reason(
    settings: dict[str, Any], forward: str, reason: str | None, tmp_path: Path
) -> None:
    facts = model_facts(section_of("llama", tmp_path, **settings))

    assert (facts.forward, facts.why_not_compiled) == (forward, reason)


def test_a_device_map_decides_at_load(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    facts = model_facts(ModelSection(model=str(tmp_path), device_map="auto"))

    assert facts.forward is None and "'device_map' decides" in (facts.why_not_compiled or "")


def test_a_required_forward_that_does_not_fit_is_a_problem(tmp_path: Path) -> None:
    target = section_of("llama", tmp_path / "target")
    small = {"model": str(tmp_path / "target"), "forward": "compiled", "dtype": "float16"}
    drafters = {"small": DrafterSection(kind="draft_model", settings=small)}
    [problem] = doctor(Config(target=target, drafters=drafters)).problems
    assert "small: cannot run the compiled forward, because its weights are float16" in problem

    other = section_of("gpt2", tmp_path / "other")
    with pytest.raises(ModelError, match="'exact' needs the compiled forward"):
        doctor(Config(target=other, exact=True))


def test_the_command_names_every_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = section_of("llama", tmp_path / "target")
    small = {"model": str(tmp_path / "target"), "forward": "lean"}
    config = {
        "target": target.model_dump(),
        "drafters": {"small": {"kind": "draft_model", "settings": small}},
    }
    path = tmp_path / "paceline.yaml"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["paceline", "doctor", "-c", str(path)])
    with pytest.raises(SystemExit, match=r"^0$"):
        main()

    shown = capsys.readouterr().out
    assert f"forward of target: {OURS}\n" in shown
    assert "forward of small: lean; not compiled: the configuration says 'lean'" in shown


def test_the_packed_copy_of_the_weights_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own, rounded, bound = (
        model_facts(ModelSection(model=str(ZOO / "target"), device="cpu", **settings))
        for settings in ({"dtype": "bfloat16"}, {"weights": "int8"}, {"forward": "transformers"})
    )
    assert own.packed_bytes == pytest.approx(own.weight_bytes, rel=0.1)
    assert 2 * rounded.packed_bytes == pytest.approx(own.packed_bytes, rel=0.1)
    assert bound.packed_bytes == 0

    path = tmp_path / "paceline.yaml"
    section = {"model": str(ZOO / "target"), "dtype": "bfloat16", "device": "cpu"}
    path.write_text(yaml.safe_dump({"target": section}))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["paceline", "doctor", "-c", str(path)])
    with pytest.raises(SystemExit, match=r"^0$"):
        main()
    assert f"MiB + {own.packed_bytes / 2**20:.1f} MiB packed + " in capsys.readouterr().out


def test_a_pace_notes_the_models_that_compiled_code_cannot_run(tmp_path: Path) -> None:
    target = section_of("gpt2", tmp_path / "target")
    drafters = {
        name: DrafterSection(kind="draft_model", settings=section.model_dump())
        for name, section in {
            "small": section_of("llama", tmp_path / "small"),
            "odd": section_of("granite_moe", tmp_path / "odd"),
            "chosen": section_of("phi", tmp_path / "chosen", forward="transformers"),
        }.items()
    }
    pace = load(Config(target=target, drafters=drafters), with_policy=False)
    assert pace.notes == [
        f"forward of {name}: transformers; not compiled: compiled code does not know {kind}"
        for name, kind in (("target", "GPT2LMHeadModel"), ("odd", "GraniteMoeForCausalLM"))
    ]


def test_parts_name_the_forwards_of_their_models(tmp_path: Path) -> None:
    target = section_of("llama", tmp_path)
    drafters = {
        "small": DrafterSection(
            kind="draft_model", settings={"model": str(tmp_path), "forward": "transformers"}
        ),
        "lookup": DrafterSection(kind="prompt_lookup"),
    }
    parts = build(Config(target=target, drafters=drafters))

    assert parts.forwards() == {"target": OURS, "small": "transformers"}


def test_a_lean_model_on_the_cpu_reads_changed_weights_again() -> None:
    model = LanguageModel(tiny_model("llama"), "target", "lean")
    model.model.lm_head.weight.data.mul_(2)  # type: ignore[operator, union-attr]
    model.reload()

    assert model.forward_kind == "lean"
