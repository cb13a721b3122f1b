"""transformers' own forward, run on packed rows: the general twin of the lean forward.

transformers runs the model on one packed sequence [1, N]; only the attention registered here, under
the name "paceline", knows which token belongs to which row. Weights stay where transformers put
them and a model the caller handed in is left as it was found.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from paceline.errors import ModelError
from paceline.models.attention import attend
from paceline.models.kinds import takes_positions
from paceline.models.sublayers import SubLayers
from paceline.models.visibility import NUM_TOKENS, PROBE, Visibility, look

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor
    from transformers import PreTrainedModel

    from paceline.models.cuda.batch import PagedBatch
    from paceline.models.packing import PackedBatch
    from paceline.models.sublayers import LayerSubset

NAME: Final = "paceline"

# What an architecture may hand its attention function without changing what is computed here.
_HARMLESS: Final = frozenset(
    {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict",
     "cache_position", "is_causal", "position_embeddings", "past_key_values", "layer_past",
     "encoder_hidden_states", "encoder_attention_mask", "dropout"}
)  # fmt: skip


class TransformersForward:
    """Body and head of any causal LM whose attention goes through transformers' interface."""

    kind: ClassVar[str] = "transformers"

    def __init__(
        self, model: PreTrainedModel, name: str, context_length: int, device: torch.device
    ) -> None:
        """context_length: no token stands further. device: where token ids go in."""
        head = model.get_output_embeddings()
        if head is None:
            raise ModelError(f"{name}: {type(model).__name__} has no output head; use a causal LM")
        self._head = head
        self._body = model.base_model
        self._name = name
        self._sublayers: SubLayers | None = None  # looked for when some are to be skipped
        text_config = model.config.get_text_config()
        self._num_layers: int = text_config.num_hidden_layers
        self._logit_cap: float | None = getattr(text_config, "final_logit_softcapping", None)
        # every attention module reads its implementation from one of these
        configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
        self._configs: list[Any] = list(configs.values())
        self.visibility = self._look(context_length, device)

    def hidden(
        self, tokens: Tensor, packed: PackedBatch | PagedBatch, skip: LayerSubset | None = None
    ) -> Tensor:
        """Final hidden states [N, D] of tokens [N], without the sub-layers of `skip`."""
        with self._attention(NAME), self._without(skip):
            output = self._body(
                input_ids=tokens[None],
                position_ids=packed.positions()[None],
                use_cache=False,
                packed=packed,
                windows=self.visibility.windows,
            )
        hidden: Tensor = output.last_hidden_state
        return hidden[0]

    @contextmanager
    def _attention(self, name: str) -> Iterator[None]:
        """The time in which the model runs its attention under a registered name."""
        before = [config._attn_implementation for config in self._configs]
        for config in self._configs:
            config._attn_implementation_internal = name
        try:
            yield
        finally:
            for config, old in zip(self._configs, before, strict=True):
                config._attn_implementation_internal = old

    def _look(self, context_length: int, device: torch.device) -> Visibility:
        """Read from the model's own code what each layer sees."""
        tokens = torch.zeros((1, min(NUM_TOKENS, context_length)), dtype=torch.int64, device=device)
        with self._attention(PROBE):
            seen = look(lambda: self._body(input_ids=tokens, use_cache=False), context_length)
        if not takes_positions(self._body):
            seen.note("its forward cannot be told the positions of its tokens")
        without = [i for i in range(self._num_layers) if i not in seen.windows]
        if without and not seen.reasons:
            seen.note(
                f"{len(without)} of its {self._num_layers} layers (such as {without[0]}) run no "
                "attention through transformers' interface"
            )
        return seen

    def _without(self, skip: LayerSubset | None) -> AbstractContextManager[None]:
        """The time in which a subset's sub-layers are silent."""
        if skip is None:
            return nullcontext()
        if self._sublayers is None:
            self._sublayers = SubLayers(self._body, self._num_layers, self._name)
        return self._sublayers.without(skip)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of final hidden states [..., D]."""
        logits: Tensor = self._head(hidden)
        if self._logit_cap is not None:
            logits = torch.tanh(logits / self._logit_cap) * self._logit_cap
        return logits


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packed: PackedBatch | PagedBatch | None = None,
    windows: Mapping[int, int | None] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface. query: [1, H, N, D]; key, value: [1, Hkv, N, D].

    windows: what each layer's mask lets it see, by layer; it decides over `sliding_window`, which
    transformers' own eager and sdpa attention ignore. Returns [1, N, H, D]. An argument that is not
    known to leave the result alone is refused, because it would be silently ignored.
    """
    if packed is None:
        raise ModelError(f"{type(module).__name__} does not pass extra arguments to its attention")
    strange = [k for k, v in kwargs.items() if v is not None and k not in _HARMLESS]
    if strange or attention_mask is not None:
        raise ModelError(
            f"{type(module).__name__} hands its attention {strange or ['a mask']}, which the packed "
            "forward does not know"
        )
    scale = scaling if scaling is not None else query.shape[3] ** -0.5
    layer: Any = module.layer_idx
    window = (windows or {}).get(layer, sliding_window)
    value_dim = value.shape[3]
    if value_dim > key.shape[3]:
        raise ModelError(
            f"{type(module).__name__} has wider values than keys, which is not supported"
        )
    # narrower values (multi-head latent attention) are padded to share a tensor with the keys
    value = F.pad(value, (0, key.shape[3] - value_dim))
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    out = attend(packed, layer, q, torch.cat((k, v), dim=1), scale, window, softcap)
    # some architectures `view` it, which a single row's transposed output does not allow
    return out[None, ..., :value_dim].contiguous(), None


AttentionInterface.register(NAME, packed_attention)
