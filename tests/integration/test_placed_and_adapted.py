"""Models with PEFT adapters, and models that accelerate has placed: transformers' text, our drafts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from accelerate import cpu_offload
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import paceline
from paceline.config import Config, ModelSection, load_config, parse
from paceline.errors import ConfigError, ModelError
from paceline.integrations import hf
from paceline.models.lean import why_not_lean
from paceline.models.loading import load_language_model
from paceline.testing.tiny_models import perturbed, tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# PEFT 0.21 asks transformers 5.23 in a way that it calls old
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

ZOO = Path(__file__).parents[2] / "zoo"
PROMPT = "What follows is text, and it goes on: "


def with_lora(model: PreTrainedModel) -> PeftModel:
    """Low-rank changes of weights everywhere, far from the zeros that PEFT begins with."""
    torch.manual_seed(0)
    lora = LoraConfig(
        r=4, lora_alpha=12, target_modules=["q_proj", "v_proj", "down_proj", "lm_head"],
        init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, lora).eval()


def greedy(model: Any, max_new_tokens: int = 32, **extra: Any) -> list[int]:
    ids = torch.tensor([byte_tokenizer()(PROMPT)["input_ids"]])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
        max_new_tokens=max_new_tokens, **extra,
    )  # fmt: skip
    return output[0, ids.shape[1] :].tolist()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A base model, and beside it an adapter for it."""
    base = tiny_model("llama")
    base.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    with_lora(base).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path


def test_a_peft_model_in_memory_writes_what_it_writes_with_transformers() -> None:
    plain = greedy(tiny_model("llama"))
    adapted = with_lora(tiny_model("llama"))
    expected = greedy(adapted)
    drafters = {"noisy": perturbed(adapted.get_base_model(), 0.02)}

    pace = paceline.load(target=adapted, tokenizer=byte_tokenizer(), drafters=drafters)

    assert expected != plain
    assert pace.parts.target.forward_kind == "transformers"
    assert "stands where a plain linear layer should" in (
        why_not_lean(adapted.get_base_model()) or ""
    )
    for arm in pace.drafters:
        completion = pace.complete(PROMPT, drafter=arm, max_new_tokens=32)
        assert completion.token_ids == expected
        assert greedy(adapted, custom_generate=hf.generate, pace=pace, drafter=arm) == expected
        assert arm != "noisy" or completion.block_efficiency > 1.5
    base = paceline.load(target=tiny_model("llama"), tokenizer=byte_tokenizer())
    assert pace.parts.target.fingerprint() != base.parts.target.fingerprint()


def test_a_pace_kept_with_the_model_follows_its_adapter() -> None:
    adapted = with_lora(tiny_model("llama"))
    with_adapter = greedy(adapted, custom_generate=hf.generate)
    with adapted.disable_adapter():
        without = greedy(adapted, custom_generate=hf.generate)
        assert without == greedy(adapted)

    assert with_adapter != without
    assert greedy(adapted, custom_generate=hf.generate) == with_adapter == greedy(adapted)


def test_an_adapter_of_the_configuration_is_merged_and_runs_compiled(saved: Path) -> None:
    """Of target and drafter, by paths beside the YAML."""
    section = {"model": "base", "adapter": "adapter", "dtype": "float32"}
    drafter = {"kind": "draft_model", "settings": section | {"num_draft_tokens": 3}}
    config = {"target": section, "drafters": {"itself": drafter}}
    (saved / "paceline.yaml").write_text(yaml.safe_dump(config))
    expected = greedy(with_lora(AutoModelForCausalLM.from_pretrained(saved / "base")))

    pace = paceline.load(saved / "paceline.yaml")

    assert pace.parts.target.forward_kind == "compiled"
    for arm in pace.drafters:
        completion = pace.complete(PROMPT, drafter=arm, max_new_tokens=32)
        assert completion.token_ids == expected
        assert arm != "itself" or {r.accepted for r in completion.rounds[:-1]} == {3}


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        ("nowhere/at/all", "does not fit the model"),
        ("base", "no adapter_config.json"),
        ("narrow", "size mismatch"),
        ("holes", "missing adapter keys"),
        ("prompts", "PROMPT_TUNING puts states of its own before the text"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_named(saved: Path, adapter: str, says: str) -> None:
    if adapter == "narrow":
        other = tiny_model("qwen3")
        with_lora(other).save_pretrained(saved / "narrow", save_embedding_layers=False)
    if adapter == "holes":
        shutil.copytree(saved / "adapter", saved / "holes")
        weights = load_file(saved / "holes" / "adapter_model.safetensors")
        weights.pop(min(weights))
        save_file(weights, saved / "holes" / "adapter_model.safetensors")
    if adapter == "prompts":
        tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        get_peft_model(tiny_model("llama"), tuning).save_pretrained(saved / "prompts")
    path = saved / adapter
    section = ModelSection(
        model=str(saved / "base"), adapter=str(path) if path.exists() else adapter
    )
    with pytest.raises(ModelError, match="(?s)adapter .*" + says):
        load_language_model(section, "target")


def test_an_adapter_in_the_models_place_says_where_it_belongs(saved: Path) -> None:
    with pytest.raises(ModelError, match="name it as 'adapter' and its base model as 'model'"):
        load_language_model(ModelSection(model=str(saved / "adapter")), "target")


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_a_placed_model_is_read_from_the_yaml(saved: Path, device_map: Any) -> None:
    raw = {"target": {"model": "base", "device_map": device_map}}
    (saved / "paceline.yaml").write_text(yaml.safe_dump(raw))
    config = load_config(saved / "paceline.yaml")
    expected = greedy(AutoModelForCausalLM.from_pretrained(saved / "base", device_map=device_map))

    completion = paceline.load(config).complete(PROMPT, drafter="none", max_new_tokens=32)

    assert completion.token_ids == expected


@pytest.mark.parametrize("whole", [True, False], ids=["all to memory", "half to disk"])
def test_an_offloaded_model_runs_where_accelerate_brings_it(tmp_path: Path, whole: bool) -> None:
    """Its weights are away between forwards, so transformers' forward runs and hooks fetch them."""
    expected = greedy(tiny_model("llama"))
    if whole:
        model = tiny_model("llama")
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        tiny_model("llama").save_pretrained(tmp_path / "base")
        places = dict.fromkeys(
            ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"],
            "cpu",
        )
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", device_map=places | {"model.layers.1": "disk"},
            offload_folder=tmp_path / "away",
        )  # fmt: skip
    drafters = {"noisy": perturbed(tiny_model("llama"), 0.02)}

    pace = paceline.load(target=model, tokenizer=byte_tokenizer(), drafters=drafters)

    target = pace.parts.target
    assert target.forward_kind == "transformers"
    assert target.device.type == "cpu"
    full = sum(p.numel() for p in model.parameters()) * 4
    assert target.num_bytes() < full
    for arm in pace.drafters:
        completion = pace.complete(PROMPT, drafter=arm, max_new_tokens=32)
        assert completion.token_ids == expected
        assert greedy(model, custom_generate=hf.generate, pace=pace, drafter=arm) == expected
        assert arm != "noisy" or completion.block_efficiency > 1.5
    assert len(target.fingerprint()) == 16


def test_a_device_and_a_device_map_contradict_each_other() -> None:
    raw = {"target": {"model": "x", "device": "cpu", "device_map": "auto"}}
    with pytest.raises(ConfigError, match="'device' and 'device_map' both place the weights"):
        parse(Config, raw, "paceline.yaml")
