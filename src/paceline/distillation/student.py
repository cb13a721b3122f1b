"""The student: a small Llama with the target's tokenizer, to be used as a drafter.

Vocabulary, context, rope and end token are the target's. The tied embedding can start as the target's
own, projected to its D strongest singular directions and whitened, so that tokens with similar
embeddings in the target start similar. Knows no data and no training.
Symbols: V vocabulary, D student's hidden size, T target's hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from paceline.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from paceline.distillation.settings import StudentShape

_STD: Final = 0.02  # of initial weights


def student_config(target: Any, shape: StudentShape) -> LlamaConfig:
    """Return a student's configuration. target: the target's transformers configuration."""
    text = target.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    if not isinstance(rope.get("rope_theta", 0.0), int | float):
        rope = {}  # one rope per layer type (Gemma 3); a student has a single one
    return LlamaConfig(
        vocab_size=text.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.mlp_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.hidden_size // shape.num_heads,
        max_position_embeddings=text.max_position_embeddings,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(rope.get("rope_theta", 10000.0)),
        },
        rms_norm_eps=1e-6,
        initializer_range=_STD,
        tie_word_embeddings=True,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    )


def build_student(
    target: PreTrainedModel,
    shape: StudentShape,
    embedding_init: Literal["svd", "random"],
    seed: int,
) -> LlamaForCausalLM:
    """Return a float32 student on the CPU, a function of the seed; the caller's RNG does not change."""
    config = student_config(target.config, shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = LlamaForCausalLM(config).float()
    if embedding_init == "svd":
        table: Any = target.get_input_embeddings().weight
        embedding = table.detach().float().cpu()
        with torch.no_grad():
            student.get_input_embeddings().weight.copy_(project(embedding, shape.hidden_size))
    return student


def project(embedding: Tensor, width: int) -> Tensor:
    """Return an embedding [V, T] projected to its D = width strongest singular directions [V, D].

    The result has the scale of initial weights. Raises ConfigError if width is above T.
    """
    if width > embedding.shape[1]:
        raise ConfigError(
            f"the student's hidden size {width} exceeds the target's {embedding.shape[1]}; choose "
            "a smaller student or embedding_init 'random'"
        )
    centred = embedding - embedding.mean(dim=0)
    # the eigenvectors of the T x T Gram matrix are the right singular vectors
    squares, directions = torch.linalg.eigh(centred.T @ centred)  # ascending
    projected = centred @ directions[:, -width:].flip(-1)  # [V, D]
    # equal scale in every direction, or a few strong ones would dominate
    projected = projected / squares[-width:].flip(-1).clamp(min=1e-12).sqrt()
    return projected * (_STD / projected.std())


def num_parameters(model: PreTrainedModel) -> int:
    """Return the number of weights; tied ones count once."""
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
