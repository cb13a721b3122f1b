"""Tiny encoder-decoder models with random weights, and texts that only a reader of sources can learn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from paceline.distillation.batches import Example
from paceline.distillation.settings import StudentShape
from paceline.testing.tiny_models import tiny_model
from support.distillation import VOCAB

if TYPE_CHECKING:
    from transformers import PreTrainedModel

START = 2
T5_FAMILY = ("t5", "mt5", "umt5")
KINDS = (*T5_FAMILY, "bart", "mbart", "marian", "pegasus")
TINY_T5 = StudentShape(num_layers=1, hidden_size=16, mlp_size=24, num_heads=2, num_encoder_layers=2)


def tiny_encoder_decoder(kind: str = "t5", seed: int = 3, std: float = 0.5) -> PreTrainedModel:
    """Return a model with 3 encoder and 2 decoder layers, end token 0 and start token 2."""
    ids: dict[str, Any] = {"decoder_start_token_id": START, "pad_token_id": 1, "eos_token_id": 0}
    layers = {} if kind in T5_FAMILY else {"encoder_layers": 3, "decoder_layers": 2}
    model: Any = tiny_model(kind, seed, VOCAB, context=64, std=std, **ids, **layers)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.zero_()  # a student cannot have one
    return model  # type: ignore[no-any-return]


def source_texts(count: int, seed: int = 0, domain: str = "d") -> list[Example]:
    """Return texts of random tokens, of several lengths."""
    random = np.random.default_rng(seed)
    examples = []
    for i in range(count):
        num_prompt, num_output = int(random.integers(2, 7)), int(random.integers(1, 9))
        tokens = random.integers(VOCAB, size=num_prompt + num_output).astype(np.int64)
        examples.append(Example(f"{domain}/{i}", domain, tokens, num_prompt))
    return examples


def repeated_texts(count: int, seed: int = 0) -> list[Example]:
    """Return texts whose prompts repeat one token, from which the answers go on in steps of 7.

    Only the source says with which token an answer begins.
    """
    random = np.random.default_rng(seed)
    examples = []
    for i in range(count):
        num_prompt, num_output = int(random.integers(2, 7)), int(random.integers(1, 6))
        first = int(random.integers(VOCAB))
        output = (first + 7 * np.arange(1, 1 + num_output)) % VOCAB
        tokens = np.concatenate([np.full(num_prompt, first), output]).astype(np.int64)
        examples.append(Example(f"r/{i}", "r", tokens, num_prompt))
    return examples


def own_logits(model: PreTrainedModel, example: Example) -> torch.Tensor:
    """Return the logits [output tokens, V] of one text alone, by transformers' own forward."""
    tokens = torch.from_numpy(example.tokens)
    prompt, output = tokens[: example.num_prompt], tokens[example.num_prompt :]
    with torch.inference_mode():
        fed = torch.cat([torch.tensor([START]), output[:-1]])
        return model(input_ids=prompt[None], decoder_input_ids=fed[None]).logits[0]
