"""Kinds of models that cannot be served, and the reason, from the configuration alone.

Faults that only a forward shows are found by `visibility.py` and by the self-check at load. Knows no
cache.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RECURRENT: Final = re.compile(r"mamba|linear|recurrent|conv|rwkv|lstm|ssm|delta|lightning")
_ROLLBACK: Final = "which cannot be taken back when a draft is rejected"


def why_not_packed(model: PreTrainedModel) -> str | None:
    """Return why a model cannot run on packed rows over a key-value cache, or None if its kind can."""
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model, and only causal (decoder-only) models are served"
    recurrent = _recurrent_layers(config.get_text_config())
    if recurrent or getattr(model, "_is_stateful", False):
        what = f" ({', '.join(recurrent)})" if recurrent else ""
        state = f"a recurrent state in addition to or instead of keys and values{what}"
        return f"it keeps {state}, {_ROLLBACK}"
    if getattr(config.get_text_config(), "index_topk", None):
        return (
            "an index of its own chooses which tokens each token sees (index_topk), and that index is "
            "not kept per row"
        )
    return None


def _recurrent_layers(config: Any) -> list[str]:
    """Return the layer types of a configuration that keep a recurrent state, each once."""
    for name in ("layer_types", "layers_block_type", "block_types"):
        kinds = getattr(config, name, None)
        if isinstance(kinds, list | tuple):
            found = dict.fromkeys(str(k) for k in kinds if _RECURRENT.search(str(k)))
            if found:
                return list(found)
    return []
