"""Students: new ones, ones that go on from a checkpoint, and copies of the target's layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import SafetensorError
from support.distillation import VOCAB, tiny_settings, tiny_target, tiny_tokenizer
from support.training import TINY, new_student, same_weights
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from paceline.distillation.model_folders import save_model, save_tokenizer
from paceline.distillation.student import (
    build_student,
    check_tokenizer,
    copy_layers,
    make_student,
    num_parameters,
    project,
)
from paceline.errors import ConfigError
from paceline.models.language_model import LanguageModel
from paceline.models.self_checks import check_packed_forward
from paceline.models.vocabulary import Vocabulary
from paceline.testing.tiny_models import tiny_model

if TYPE_CHECKING:
    from pathlib import Path

# other norms and biases; windows and angles per layer; learned positions
COPIED = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "smollm3", "gpt_neox", "gpt2", "opt")


def model_of(architecture: str, **settings: Any) -> PreTrainedModel:
    """Return a small model of an architecture with the vocabulary of `tiny_target`."""
    return tiny_model(architecture, vocab_size=VOCAB, context=64, **settings)


def logits_of(model: PreTrainedModel, num: int = 20) -> torch.Tensor:
    tokens = torch.arange(num)[None] * 7 % VOCAB
    with torch.inference_mode():
        return model(input_ids=tokens, use_cache=False).logits


# --- new ones -------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["svd", "random"])
def test_a_student_has_the_targets_vocabulary_and_runs_packed(init: str, tmp_path: Path) -> None:
    target = tiny_target()
    made = build_student(target, TINY, init, seed=0)  # type: ignore[arg-type]
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert type(loaded) is LlamaForCausalLM
    for name in ("vocab_size", "max_position_embeddings", "eos_token_id", "rope_parameters"):
        assert getattr(loaded.config, name) == getattr(target.config, name), name
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    check_packed_forward(LanguageModel(loaded, "student"))


def test_a_student_is_a_function_of_the_seed_and_does_not_change_the_callers_randomness() -> None:
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    first, again, other = new_student(1), new_student(1), new_student(2)

    assert torch.equal(torch.random.get_rng_state(), before)
    assert same_weights(first, again)
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)


def test_projection_is_the_whitened_strongest_directions() -> None:
    """The weakest directions (eigh sorts upwards) would lose the target's geometry."""
    torch.manual_seed(0)
    embedding = torch.randn(30, 8) * torch.tensor([9.0, 7, 5, 3, 1, 1, 0.5, 0.1]) + 4
    projected = project(embedding, 3)
    best = torch.linalg.svd(embedding - embedding.mean(dim=0), full_matrices=False)[0][:, :3]

    # singular vectors are determined up to their sign
    torch.testing.assert_close(projected.abs(), best.abs() * (0.02 / best.std()), atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match="exceeds the target's 8"):
        project(embedding, 9)


def test_tied_weights_count_once() -> None:
    layer = 16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 24 + 2 * 16
    assert num_parameters(new_student()) == VOCAB * 16 + 2 * layer + 16


# --- from a checkpoint ----------------------------------------------------------------------------


def start_from(
    folder: Path, model: PreTrainedModel | None, target: PreTrainedModel | None = None
) -> PreTrainedModel:
    """Return the student that a model in a folder becomes."""
    if model is not None:
        model.save_pretrained(folder)
    target = target or tiny_target()
    return make_student(LanguageModel(target, "target"), tiny_settings(start_from=str(folder)))


def test_a_student_goes_on_from_a_checkpoint_of_any_dtype(tmp_path: Path) -> None:
    before = new_student(4)
    found = start_from(tmp_path / "a", before)
    assert same_weights(found, before)

    half = start_from(tmp_path / "b", new_student(4).to(torch.bfloat16))
    assert half.dtype == torch.float32
    for a, b in zip(half.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b.bfloat16().float())


def test_a_checkpoint_that_is_none_or_has_other_logits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"start_from .*none: not a causal LM"):
        start_from(tmp_path / "none", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"start_from .*empty: not a causal LM"):
        start_from(tmp_path / "empty", None)
    with pytest.raises(ConfigError, match=r"has 41 logits, the target 40; start from a model with"):
        start_from(tmp_path / "wide", tiny_model(vocab_size=VOCAB + 1))


@pytest.mark.parametrize("std", [0.02, 0.25])
@pytest.mark.parametrize("architecture", ["gemma2", "cohere", "granite", "phi"])
def test_a_checkpoint_with_other_steps_before_its_logits_is_refused(
    architecture: str, std: float, tmp_path: Path
) -> None:
    """Caps, scales and biases. Small weights have small logits, on which a cap hardly shows."""
    model = model_of(architecture, std=std)
    if architecture == "phi":
        torch.nn.init.normal_(model.lm_head.bias, std=std)
    with pytest.raises(ConfigError, match="scales, caps or shifts its logits"):
        start_from(tmp_path, model)
    target = LanguageModel(model, "target")
    with pytest.raises(ConfigError, match=r"target_layers of target: .* or a new student"):
        make_student(target, tiny_settings(target_layers=[0]))


def test_settings_of_two_students_are_refused(tmp_path: Path) -> None:
    target = LanguageModel(tiny_target(), "target")
    folder = str(tmp_path)
    with pytest.raises(ConfigError, match="both begin a student; remove one"):
        make_student(target, tiny_settings(start_from=folder, target_layers=[0]))
    for own in ({"start_from": folder}, {"target_layers": [0]}):
        with pytest.raises(ConfigError, match="'shape' is of a new student"):
            make_student(target, tiny_settings(shape=TINY.model_dump(), **own))


# --- copies of layers -----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", COPIED)
def test_a_copy_of_all_layers_is_the_target(architecture: str) -> None:
    target = model_of(architecture)
    before = {name: weight.clone() for name, weight in target.state_dict().items()}
    copy = make_student(LanguageModel(target, "target"), tiny_settings(target_layers=[0, 1]))
    assert torch.equal(logits_of(copy), logits_of(target))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in copy.parameters())

    with torch.no_grad():  # a copy, not a view
        for parameter in copy.parameters():
            parameter.add_(1)
    assert all(torch.equal(w, before[name]) for name, w in target.state_dict().items())


@pytest.mark.parametrize("indices", [[1], [1, 0], [0, 0, 1]], ids=str)
@pytest.mark.parametrize("architecture", COPIED)
def test_a_copy_of_some_layers_has_their_weights_and_is_the_same_when_loaded(
    architecture: str, indices: list[int], tmp_path: Path
) -> None:
    """A configuration with the windows or angles of other layers would load as another model."""
    target = model_of(architecture)
    copy = copy_layers(target, indices).eval()
    copy.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert loaded.config.num_hidden_layers == len(indices)
    assert target.config.num_hidden_layers == 2
    torch.testing.assert_close(logits_of(loaded), logits_of(copy), rtol=1e-5, atol=1e-5)
    others = copy_layers(target, [1 - i for i in indices]).eval()
    assert not torch.allclose(logits_of(others), logits_of(copy), atol=1e-2)


@pytest.mark.parametrize("architecture", COPIED)
def test_a_copys_cache_holds_its_own_layers(architecture: str) -> None:
    """Layers that keep their index in the target would share or miss a place in the cache."""
    copy = copy_layers(model_of(architecture), [1, 0, 1]).eval()
    assert copy.config.num_hidden_layers == 3
    text = torch.tensor([[3, 9, 4, 17, 5]])
    greedy = {"do_sample": False, "max_new_tokens": 16, "pad_token_id": 0}
    cached, plain = (copy.generate(text, use_cache=use, **greedy) for use in (True, False))
    assert torch.equal(cached, plain)
    assert len(set(plain[0, 5:].tolist())) > 2


def test_layers_that_the_target_lacks_are_refused() -> None:
    with pytest.raises(ConfigError, match="target_layers: 2 is not one of the target's 2 layers"):
        copy_layers(model_of("llama"), [0, 2])


@pytest.mark.parametrize(
    "error", [SafetensorError("I/O error: No space left on device"), OSError(28, "No space left")]
)
def test_weights_that_a_full_disk_cannot_hold_are_an_error_with_advice(
    error: Exception, tmp_path: Path
) -> None:
    class Full:
        def save_pretrained(self, folder: Path, **options: Any) -> None:
            raise error

    with pytest.raises(ConfigError, match=r"cannot be written \(.*No space left.*: make room"):
        save_model(Full(), tmp_path / "d")  # type: ignore[arg-type]


def test_weights_may_be_read_by_whoever_may_read_the_configuration(tmp_path: Path) -> None:
    save_model(new_student(), tmp_path)
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_a_tokenizer_that_a_full_disk_cannot_hold_is_an_error_with_advice(tmp_path: Path) -> None:
    class Full:
        def save_pretrained(self, folder: Path) -> None:
            raise Exception("No space left on device (os error 28)")

    with pytest.raises(ConfigError, match=r"tokenizer cannot be written.*make room"):
        save_tokenizer(Full(), tmp_path / "d")


@pytest.mark.parametrize("size", [0, 100, -100])
def test_a_damaged_checkpoint_is_named(size: int, tmp_path: Path) -> None:
    new_student().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(ConfigError, match=r"start_from .*: not a causal LM"):
        start_from(tmp_path, None)


@pytest.mark.parametrize("content", ["", "{}", "{", "\xff"])
def test_a_damaged_tokenizer_of_a_checkpoint_is_named(content: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"start_from .*: its tokenizer cannot be read"):
        check_tokenizer(tmp_path, Vocabulary.of(tokenizer))
