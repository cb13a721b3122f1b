"""`pretrain`: a model from prompts with their references, without a target."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from support.distillation import VOCAB, KilledError, tiny_tokenizer
from support.encoder_decoders import own_logits
from support.training import killer
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from paceline.distillation import PretrainSettings, pretrain
from paceline.distillation.pretraining import make_model, read_pairs_of
from paceline.errors import ConfigError
from paceline.models.language_model import LanguageModel
from paceline.models.self_checks import check_packed_forward
from paceline.store import TrainedOn, part_of

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.distillation.batches import Example

SHAPE = {
    "num_layers": 1,
    "num_encoder_layers": 2,
    "hidden_size": 16,
    "mlp_size": 24,
    "num_heads": 2,
}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def write_pairs(path: Path, count: int, **last: object) -> Path:
    """Write prompts of five words, and the word after the first one as each one's reference."""
    random = np.random.default_rng(0)
    rows = []
    for i in range(count):
        words = [int(w) for w in random.integers(0, VOCAB - 3, 5)]
        reference = [(words[0] + k) % (VOCAB - 3) for k in (1, 2)]
        rows.append(
            {
                "id": f"{path.stem}/{i}", "domain": path.stem, "source": "a book", "license": "MIT",
                "prompt": " ".join(f"w{w}" for w in words),
                "reference": " ".join(f"w{w}" for w in reference),
            }
        )  # fmt: skip
    rows[-1] |= last
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings_of(tokenizer: Path, **changes: Any) -> PretrainSettings:
    plain = {
        "tokenizer": tokenizer, "shape": SHAPE, "epochs": 2.0, "batch_tokens": 128,
        "learning_rate": 1e-2, "validation_share": 0.2, "validate_every": 1.0, "events": None,
        "checkpoint_every": 2, "context": 32,
    }  # fmt: skip
    return PretrainSettings.model_validate({**plain, **changes})


def test_a_t5_is_trained_described_and_can_be_a_target(tokenizer: Path, tmp_path: Path) -> None:
    data, out = write_pairs(tmp_path / "plums.jsonl", 120), tmp_path / "made" / "model"
    report = pretrain([data], out, settings_of(tokenizer, epochs=12.0, validate_every=4.0))

    model = AutoModelForSeq2SeqLM.from_pretrained(out)
    loaded = LanguageModel(model, "target")
    check_packed_forward(loaded)
    assert loaded.encoder is not None
    # padding begins the decoder's text, as T5's, and the tokenizer's end token ends it
    assert loaded.encoder.start == model.generation_config.decoder_start_token_id == 1
    assert model.generation_config.eos_token_id == 0
    assert AutoTokenizer.from_pretrained(out).get_vocab() == tiny_tokenizer().get_vocab()
    facts = json.loads((out / "training.json").read_text())
    history = [entry["loss"] for entry in facts["history"]]
    assert history[-1] < history[0]
    best = min(facts["history"], key=lambda entry: entry["loss"])
    assert report.best_step == facts["best_step"] == best["step"]
    assert facts["model"]["encoder_layers"] == 2
    card = (out / "README.md").read_text()
    for word in (
        "pipeline_tag: text2text-generation", "2 encoder and 1 decoder layers", "a book", "MIT",
        "paceline pretrain", "--tokenizer tokenizer",
    ):  # fmt: skip
        assert word in card, word
    assert str(tmp_path) not in card + json.dumps(facts)
    # the command of the card gives settings that such a training has
    named = dict(re.findall(r"--set '(\w+)=(.*)'", card))
    again = {name: json.loads(value) for name, value in named.items()}
    assert settings_of(tokenizer, **again).shape == settings_of(tokenizer).shape
    assert not out.with_name("model.part").exists()


def test_only_prompts_of_the_part_are_trained_on_and_recorded(
    tokenizer: Path, tmp_path: Path
) -> None:
    data = write_pairs(tmp_path / "plums.jsonl", 120)
    pretrain([data], tmp_path / "out", settings_of(tokenizer, epochs=0.5))
    found = TrainedOn.load(tmp_path / "out")
    assert found is not None
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    parts = {"training": 0, "collection": 0, "judging": 0}
    for row in rows:
        parts[part_of(row["id"])] += 1
        assert part_of(row["id"]) == "training" or row["prompt"] not in found
    assert min(parts.values()) > 0
    assert 0.5 * parts["training"] < len(found) < parts["training"]  # some validate


def test_the_reference_is_the_label_and_the_prompt_the_source(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Example] = []

    def capture(model: object, lesson: Any, *rest: object, **named: object) -> None:
        taken.extend(lesson.answers)
        raise KilledError

    monkeypatch.setattr("paceline.distillation.pretraining.Trainer", capture)
    data = write_pairs(tmp_path / "plums.jsonl", 60)
    with pytest.raises(KilledError):
        pretrain([data], tmp_path / "out", settings_of(tokenizer))
    rows = {row["id"]: row for row in map(json.loads, data.read_text().splitlines())}
    plain = tiny_tokenizer()
    assert len(taken) > 20
    for example in taken:
        row = rows[example.id]
        assert plain.decode(example.tokens[: example.num_prompt]) == row["prompt"]
        assert plain.decode(example.tokens[example.num_prompt :]) == f"{row['reference']} <end>"


@pytest.mark.parametrize("step", [1, 5])
def test_a_killed_training_ends_with_the_bits_of_an_uninterrupted_one(
    step: int, tokenizer: Path, tmp_path: Path
) -> None:
    data, settings = write_pairs(tmp_path / "plums.jsonl", 100), settings_of(tokenizer)
    pretrain([data], tmp_path / "whole", settings)
    with pytest.raises(KilledError):
        pretrain([data], tmp_path / "part", settings, killer(step))
    pretrain([data], tmp_path / "part", settings)
    whole, part = (tmp_path / name / "model.safetensors" for name in ("whole", "part"))
    assert whole.read_bytes() == part.read_bytes()


def test_a_causal_model_learns_pairs_as_text(tokenizer: Path, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "plums.jsonl", 100)
    shape = {name: size for name, size in SHAPE.items() if name != "num_encoder_layers"}
    settings = settings_of(tokenizer, architecture="llama", shape=shape, prompt_weight=0.0)
    pretrain([data], tmp_path / "out", settings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.max_position_embeddings == 32
    assert "pipeline_tag: text-generation" in (tmp_path / "out" / "README.md").read_text()


def test_a_t5_begins_with_a_flat_distribution(tokenizer: Path, tmp_path: Path) -> None:
    """Its tied embedding has a deviation of 1, so an unscaled output would be far from flat."""
    settings = settings_of(tokenizer)
    model = make_model(settings, tiny_tokenizer()).eval()
    pairs = read_pairs_of([write_pairs(tmp_path / "plums.jsonl", 60)], tiny_tokenizer(), settings)
    with torch.inference_mode():
        logits = torch.cat([own_logits(model, example) for example in pairs.training])
    assert float(logits.std()) < 2.0


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ({"reference": None}, r"plums.jsonl:60: 'reference' is not a text"),
        ({"prompt": ""}, r"plums.jsonl:60: the prompt is empty"),
    ],
    ids=["reference", "prompt"],
)
def test_a_broken_row_is_named(
    last: dict[str, object], message: str, tokenizer: Path, tmp_path: Path
) -> None:
    data = write_pairs(tmp_path / "plums.jsonl", 60, **last)
    with pytest.raises(ConfigError, match=message):
        pretrain([data], tmp_path / "out", settings_of(tokenizer))
    assert not (tmp_path / "out").exists()


def test_prompts_without_references_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    data = tmp_path / "plums.jsonl"
    rows = [{"id": f"plums/{i}", "domain": "plums", "prompt": f"w{i}"} for i in range(60)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"plums.jsonl:1: .*'prompt' and 'reference'"):
        pretrain([data], tmp_path / "out", settings_of(tokenizer))


def test_pairs_that_are_too_long_are_left_out_and_counted(tokenizer: Path, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "plums.jsonl", 80)
    own = write_pairs(tmp_path / "long.jsonl", 80, prompt=" ".join(["w1"] * 40))
    # of the last row, if it is of the part
    num = sum(part_of(f"long/{i}") == "training" for i in (79,))
    report = pretrain([data, own], tmp_path / "out", settings_of(tokenizer, epochs=0.5))
    assert report.notes == ([f"{num} pairs were left out, which have more than 32 tokens"] * num)
    with pytest.raises(
        ConfigError, match="0 pairs to train on and 0 to validate on have at most 3"
    ):
        pretrain([data], tmp_path / "b", settings_of(tokenizer, context=3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "kl"}, "'loss' is of a training with a target"),
        ({"teacher": "live"}, "'teacher' is of a training with a target"),
        ({"shape": {**SHAPE, "num_kv_heads": 1}}, None),
        ({"architecture": "gpt2"}, "architecture"),
        ({"prompt_weight": 0.5}, None),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_no_such_training_has_are_refused(
    changes: dict[str, Any], message: str | None, tokenizer: Path, tmp_path: Path
) -> None:
    if message is not None:
        with pytest.raises(ValueError, match=message):
            settings_of(tokenizer, **changes)
        return
    data = write_pairs(tmp_path / "plums.jsonl", 60)
    with pytest.raises(
        ConfigError, match=next(iter({"shape": "num_kv_heads"}.get(k, k) for k in changes))
    ):
        pretrain([data], tmp_path / "out", settings_of(tokenizer, **changes))


@pytest.mark.parametrize("damage", ["missing", "broken", "endless"])
def test_a_tokenizer_that_cannot_be_used_is_named(
    damage: str, tokenizer: Path, tmp_path: Path
) -> None:
    data = write_pairs(tmp_path / "plums.jsonl", 60)
    message = "cannot be read"
    if damage == "missing":
        tokenizer, message = tmp_path / "none", "no such folder"
    elif damage == "broken":
        (tokenizer / "tokenizer.json").write_text("{")
    else:
        plain = tiny_tokenizer()
        plain.eos_token = None
        plain.save_pretrained(tokenizer)
        message = "names no end token"
    with pytest.raises(ConfigError, match=f"tokenizer .*{message}"):
        pretrain([data], tmp_path / "out", settings_of(tokenizer))


def test_a_folder_of_something_else_is_not_replaced(tokenizer: Path, tmp_path: Path) -> None:
    data, out = write_pairs(tmp_path / "plums.jsonl", 60), tmp_path / "precious"
    out.mkdir()
    with pytest.raises(ConfigError, match="precious: exists"):
        pretrain([data], out, settings_of(tokenizer))
