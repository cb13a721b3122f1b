"""transformers' own forward, run on packed rows: the general twin of the lean forward.

Of a model with an encoder it runs the decoder; `encoder_decoder.py` has the rest.

transformers runs the model on one packed sequence [1, N]; only the attention registered here, under
the name "paceline", and that of `own_attention.py` know the row of each token. The model and its weights
are unchanged after a forward.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from paceline.errors import ModelError
from paceline.models.attention import CURRENT
from paceline.models.encoder_decoder import (
    body_of,
    inputs_of_body,
    is_encoder_decoder,
    num_layers_of,
    told_positions,
)
from paceline.models.output_head import OutputHead
from paceline.models.own_attention import OwnAttention
from paceline.models.relative_bias import biases_of
from paceline.models.sublayers import SubLayers
from paceline.models.visibility import attention_named, configs_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from paceline.models.interfaces import Batch, SourceBatch
    from paceline.models.relative_bias import RelativeBias
    from paceline.models.sublayers import LayerSubset
    from paceline.models.visibility import Visibility

_NAME: Final = "paceline"

# what the attention of the running model is told by
_SEEN: Final[ContextVar[_Seen]] = ContextVar("paceline_seen")

# arguments of attention functions that do not change the result
_HARMLESS: Final = frozenset(
    {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict",
     "cache_position", "is_causal", "position_embeddings", "past_key_values", "layer_past",
     "encoder_hidden_states", "encoder_attention_mask", "dropout"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Seen:
    """What each layer sees: by its index, except the modules that attend to the source, by id."""

    windows: Mapping[int, int | None]
    cross_attentions: frozenset[int]
    biases: Mapping[int, RelativeBias]


class TransformersForward:
    """Body and head of a model whose attention goes through transformers' interface.

    Models with attention code of their own are also supported if `own_attention.py` knows them.
    """

    kind: ClassVar[str] = "transformers"

    def __init__(self, model: PreTrainedModel, name: str, visibility: Visibility) -> None:
        """Raises ModelError if the model has no output layer."""
        self._head = OutputHead(model, name)
        self._seen = _Seen(
            visibility.windows,
            frozenset(map(id, visibility.cross_attentions.values())),
            biases_of(visibility.attentions),
        )
        self._body = body_of(model)
        self._own_attention = OwnAttention(self._body)
        self._inputs = inputs_of_body(model) | self._own_attention.inputs
        self._has_encoder = is_encoder_decoder(model)
        self._name = name
        self._sublayers: SubLayers | None = None  # found when some are skipped first
        self._num_layers = num_layers_of(model)
        self._configs = configs_of(model)

    def hidden(self, tokens: Tensor, batch: Batch, skip: LayerSubset | None = None) -> Tensor:
        batch_token = CURRENT.set(batch)
        seen_token = _SEEN.set(self._seen)
        inputs = self._inputs
        if not self._has_encoder:
            inputs = inputs | {"position_ids": batch.positions()[None]}
        try:
            with (
                _evaluating(self._body),
                attention_named(self._configs, _NAME),
                self._own_attention.packed(),
                self._told_positions(batch),
                self._without(skip),
            ):
                output = self._body(input_ids=tokens[None], use_cache=False, **inputs)
        finally:
            CURRENT.reset(batch_token)
            _SEEN.reset(seen_token)
        hidden: Tensor = output.last_hidden_state
        return hidden[0]

    def _told_positions(self, batch: Batch) -> AbstractContextManager[None]:
        return told_positions(self._body, batch.positions) if self._has_encoder else nullcontext()

    def _without(self, skip: LayerSubset | None) -> AbstractContextManager[None]:
        if skip is None:
            return nullcontext()
        if self._sublayers is None:
            self._sublayers = SubLayers(self._body, self._num_layers, self._name)
        return self._sublayers.without(skip)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._head(hidden)


@contextmanager
def _evaluating(body: nn.Module) -> Iterator[None]:
    """Disable dropout inside the block, also of a model that is trained between requests."""
    training = [m for m in body.modules() if m.training] if body.training else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' interface asks. query: [1, H, N, D]; key, value: [1, Hkv, N, D].

    Returns [1, N, H, D]. The window of the layer's mask has priority over `sliding_window`, which
    transformers' eager and sdpa attention ignore. Raises ModelError for any other argument that might
    change the result.
    """
    seen = _SEEN.get()
    layer: Any = module.layer_idx
    bias = seen.biases.get(layer)
    harmless = _HARMLESS if bias is None else _HARMLESS | {"position_bias"}
    unknown = [k for k, v in kwargs.items() if v is not None and k not in harmless]
    if unknown or attention_mask is not None:
        raise ModelError(
            f"{type(module).__name__} passes its attention {unknown or ['a mask']}, which the packed "
            "forward does not know"
        )
    scale = scaling if scaling is not None else query.shape[3] ** -0.5
    batch = cast("SourceBatch", CURRENT.get())
    if id(module) in seen.cross_attentions:
        out = batch.attend_to_source(layer, query[0].transpose(0, 1), scale)
        return out[None].contiguous(), None
    window = seen.windows.get(layer, sliding_window)
    value_dim = value.shape[3]
    if value_dim > key.shape[3]:
        raise ModelError(
            f"{type(module).__name__} has wider values than keys, which is not supported"
        )
    # narrower values (multi-head latent attention) are padded to share a tensor with the keys
    value = F.pad(value, (0, key.shape[3] - value_dim))
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    out = batch.attend(layer, q, torch.cat((k, v), dim=1), scale, window, softcap, bias)
    # contiguous, since some architectures `view` it
    return out[None, ..., :value_dim].contiguous(), None


AttentionInterface.register(_NAME, packed_attention)
