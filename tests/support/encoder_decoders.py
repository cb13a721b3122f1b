"""Tiny encoder-decoder models with random weights, and texts that only a reader of sources can learn.

To be replaced by `paceline.testing.tiny_models` once that has these architectures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForSeq2SeqLM

from paceline.distillation.batches import Example
from paceline.distillation.settings import StudentShape
from support.distillation import VOCAB

if TYPE_CHECKING:
    from transformers import PreTrainedModel

START = 2
T5_FAMILY = ("t5", "mt5", "umt5")
KINDS = (*T5_FAMILY, "bart", "mbart", "marian", "pegasus")
TINY_T5 = StudentShape(num_layers=1, hidden_size=16, mlp_size=24, num_heads=2, num_encoder_layers=2)


def tiny_encoder_decoder(kind: str = "t5", seed: int = 3, std: float = 0.5) -> PreTrainedModel:
    """Return a model with 3 encoder and 2 decoder layers, end token 0 and start token 2."""
    ids: dict[str, Any] = {
        "vocab_size": VOCAB, "decoder_start_token_id": START, "pad_token_id": 1, "eos_token_id": 0,
        "bos_token_id": None, "d_model": 24,
    }  # fmt: skip
    if kind in T5_FAMILY:
        sizes = {"d_kv": 8, "d_ff": 32, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 3}
        config = CONFIG_MAPPING[kind](**ids, **sizes, feed_forward_proj="gated-gelu")
    else:
        sizes = {
            "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 3,
            "decoder_attention_heads": 3, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
            "max_position_embeddings": 64, "forced_eos_token_id": None,
        }  # fmt: skip
        config = CONFIG_MAPPING[kind](**ids, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForSeq2SeqLM.from_config(config).float().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1 and "embed_positions" not in name:
                    parameter.normal_(std=std)
    return model


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
