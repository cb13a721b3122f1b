"""The sizes that all tiny models share. Knows no architecture."""

from __future__ import annotations

from typing import Any, Final

HIDDEN: Final = 32
LAYERS: Final = 2
HEADS: Final = 4
# No special ids: several architectures' own defaults lie outside a small vocabulary.
PLAIN: Final[dict[str, Any]] = {
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def llama_shape(vocab_size: int, context: int) -> dict[str, Any]:
    """Return the sizes in the field names of Llama's configuration."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        **PLAIN,
    }


def gpt_shape(vocab_size: int, context: int) -> dict[str, Any]:
    """Return the sizes in the field names of GPT-2's configuration."""
    return {
        "vocab_size": vocab_size,
        "n_positions": context,
        "n_embd": HIDDEN,
        "n_layer": LAYERS,
        "n_head": HEADS,
        **PLAIN,
    }
