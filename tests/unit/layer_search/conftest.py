"""A tiny target of five layers with some unimportant sub-layers, and fixed prices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from paceline.assembly import Pace, build_from_objects
from paceline.config import Config, ModelSection
from paceline.costs import CostTable
from paceline.costs.table import ENGINE, FORWARD, ROUND, TARGET, Measurement
from paceline.layer_search.costs import DRAFT
from paceline.testing.tokenizers import NUM_TOKENS, byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

LAYERS = 5
# factors on the output weights of each layer's attention and MLP
SCALES = ((1.0, 1.0), (0.02, 0.1), (0.3, 0.02), (0.02, 0.6), (0.1, 0.05))
PROMPTS: tuple[Sequence[int], ...] = tuple(
    tuple(text.encode()) for text in ("to be or not to be", "spam, eggs", "a rose is a rose")
)


def redundant_model(std: float = 0.3) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=NUM_TOKENS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=std)
            for layer, (attention, mlp) in zip(model.model.layers, SCALES, strict=True):
                layer.self_attn.o_proj.weight *= attention
                layer.mlp.down_proj.weight *= mlp
    return model.eval()


@pytest.fixture(scope="module")
def pace() -> Pace:
    config = Config(target=ModelSection(model="in memory"))
    return Pace(build_from_objects(redundant_model(), byte_tokenizer(), {}, config))


@pytest.fixture(scope="module")
def costs(pace: Pace) -> CostTable:
    """Return costs at which a drafted token takes 1 s with all layers, a verified one 0.02 s more."""
    cells = [Measurement(TARGET, FORWARD, w, 0, 1, 1.0 + 0.02 * w) for w in (1, 13)]
    parts = {"base": 0.1, "attention": 0.08, "mlp": 0.1}
    cells += [Measurement(DRAFT, part, 1, 0, 1, seconds) for part, seconds in parts.items()]
    cells.append(Measurement(ENGINE, ROUND, 0, 0, 1, 0.01))
    return CostTable({"target": pace.parts.target.fingerprint()}, cells)
