"""A tiny target with a word tokenizer, prompt files for it, and the settings of a short training."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from paceline.distillation import DistillSettings
from paceline.testing.tiny_models import tiny_model

if TYPE_CHECKING:
    from pathlib import Path

VOCAB = 40


def tiny_target() -> PreTrainedModel:
    return tiny_model(
        seed=3, vocab_size=VOCAB, context=64, std=0.5, eos_token_id=0, pad_token_id=1,
        tie_word_embeddings=True, hidden_size=24, num_hidden_layers=1,
    )  # fmt: skip


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<end>", "<pad>", "<unk>", *(f"w{i}" for i in range(VOCAB - 3))]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    inner = Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


def tiny_settings(**changes: object) -> DistillSettings:
    plain = {
        "epochs": 3.0,
        "batch_tokens": 64,
        "checkpoint_every": 2,
        "validate_every": 1.0,
        "learning_rate": 1e-2,
    }
    return DistillSettings.model_validate({**plain, **changes})


class KilledError(Exception):
    """A kill between two steps."""


def write_prompts(path: Path, domain: str, count: int) -> Path:
    random = np.random.default_rng(len(domain))
    lines = [
        json.dumps(
            {
                "id": f"{domain}/{i}",
                "domain": domain,
                "prompt": " ".join(f"w{w}" for w in random.integers(0, VOCAB - 3, 5)),
                "source": f"{domain} book",
                "license": "MIT",
            }
        )
        for i in range(count)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def distill_settings(tmp_path: Path, **changes: object) -> DistillSettings:
    return tiny_settings(
        embedding_init="random",
        outputs=str(tmp_path / "outputs"),
        max_new_tokens=6,
        validation_share=0.2,
        epochs=1.0,
        **changes,
    )
