"""Copies of the target: the layers that are kept, and the model that is read back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM

from paceline.config import ModelSection
from paceline.errors import ConfigError
from paceline.experiments.target_copies import copy_drafter, outer_layers, write_copy
from paceline.store import TrainedOn
from paceline.testing.tiny_models import tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def target(tmp_path: Path) -> Path:
    model = tiny_model(std=0.1, context=64, num_hidden_layers=3)
    folder = tmp_path / "target"
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_the_middle_of_the_stack_is_left_out() -> None:
    assert outer_layers(10, 10) == list(range(10))
    assert outer_layers(10, 8) == [0, 1, 2, 3, 6, 7, 8, 9]
    assert outer_layers(10, 5) == [0, 1, 2, 8, 9]
    assert outer_layers(2, 1) == [0]


def test_a_copy_has_the_weights_of_the_kept_layers(target: Path, tmp_path: Path) -> None:
    write_copy(str(target), tmp_path / "copy", [0, 2])
    whole, copy = (
        AutoModelForCausalLM.from_pretrained(folder) for folder in (target, tmp_path / "copy")
    )
    assert len(copy.model.layers) == copy.config.num_hidden_layers == 2
    for layer, source in zip(copy.model.layers, (0, 2), strict=True):
        for name, weight in layer.named_parameters():
            assert torch.equal(weight, whole.model.layers[source].get_parameter(name))
    trained_on = TrainedOn.load(tmp_path / "copy")
    assert trained_on is not None and len(trained_on) == 0


def test_a_copy_that_was_interrupted_is_written_again(target: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    section = ModelSection(model=str(target), dtype="float32")
    first = copy_drafter(section, folder, [0, 2], 4, weights="int8")
    assert first.settings["weights"] == "int8" and first.settings["dtype"] == "float32"
    weights = folder / "model.safetensors"
    weights.write_bytes(b"")
    copy_drafter(section, folder, [0, 2], 4)
    assert weights.stat().st_size == 0  # a finished copy is kept
    (folder / "trained_on.npy").unlink()
    copy_drafter(section, folder, [0, 2], 4)
    assert weights.stat().st_size > 0


def test_layers_that_are_elsewhere_are_refused(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other:
        pass

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: Other())
    with pytest.raises(ConfigError, match=r"cannot be left out \(Other has no model\.layers\)"):
        write_copy(str(target), tmp_path / "copy", [0])
