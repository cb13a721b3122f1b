"""transformers' own forward, run on packed rows: the general twin of the lean forward.

transformers runs the model on one packed sequence [1, N]; only the attention registered here, under
the name "paceline", and that of `own_attention.py` know the row of each token. The model and its weights
are unchanged after a forward.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from paceline.errors import ModelError
from paceline.models.attention import CURRENT
from paceline.models.output_head import OutputHead
from paceline.models.own_attention import OwnAttention
from paceline.models.sublayers import SubLayers
from paceline.models.visibility import attention_named, configs_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from paceline.models.interfaces import Batch
    from paceline.models.sublayers import LayerSubset

_NAME: Final = "paceline"

# positions that each layer of the running model sees
_WINDOWS: Final[ContextVar[Mapping[int, int | None]]] = ContextVar("paceline_windows")

# arguments of attention functions that do not change the result
_HARMLESS: Final = frozenset(
    {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict",
     "cache_position", "is_causal", "position_embeddings", "past_key_values", "layer_past",
     "encoder_hidden_states", "encoder_attention_mask", "dropout"}
)  # fmt: skip


class TransformersForward:
    """Body and head of a causal LM whose attention goes through transformers' interface.

    Models with attention code of their own are also supported if `own_attention.py` knows them.
    """

    kind: ClassVar[str] = "transformers"

    def __init__(
        self, model: PreTrainedModel, name: str, windows: Mapping[int, int | None]
    ) -> None:
        """windows: positions that each layer sees, see `visibility.py`.

        Raises ModelError if the model has no output layer.
        """
        self._head = OutputHead(model, name)
        self._windows = windows
        self._body = model.base_model
        self._own_attention = OwnAttention(self._body)
        self._name = name
        self._sublayers: SubLayers | None = None  # found when some are skipped first
        text_config = model.config.get_text_config()
        self._num_layers: int = text_config.num_hidden_layers
        self._configs = configs_of(model)

    def hidden(self, tokens: Tensor, batch: Batch, skip: LayerSubset | None = None) -> Tensor:
        batch_token = CURRENT.set(batch)
        windows_token = _WINDOWS.set(self._windows)
        try:
            with (
                _evaluating(self._body),
                attention_named(self._configs, _NAME),
                self._own_attention.packed(),
                self._without(skip),
            ):
                output = self._body(
                    input_ids=tokens[None],
                    position_ids=batch.positions()[None],
                    use_cache=False,
                    **self._own_attention.inputs,
                )
        finally:
            CURRENT.reset(batch_token)
            _WINDOWS.reset(windows_token)
        hidden: Tensor = output.last_hidden_state
        return hidden[0]

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
    unknown = [k for k, v in kwargs.items() if v is not None and k not in _HARMLESS]
    if unknown or attention_mask is not None:
        raise ModelError(
            f"{type(module).__name__} passes its attention {unknown or ['a mask']}, which the packed "
            "forward does not know"
        )
    scale = scaling if scaling is not None else query.shape[3] ** -0.5
    layer: Any = module.layer_idx
    window = _WINDOWS.get().get(layer, sliding_window)
    value_dim = value.shape[3]
    if value_dim > key.shape[3]:
        raise ModelError(
            f"{type(module).__name__} has wider values than keys, which is not supported"
        )
    # narrower values (multi-head latent attention) are padded to share a tensor with the keys
    value = F.pad(value, (0, key.shape[3] - value_dim))
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    out = CURRENT.get().attend(layer, q, torch.cat((k, v), dim=1), scale, window, softcap)
    # contiguous, since some architectures `view` it
    return out[None, ..., :value_dim].contiguous(), None


AttentionInterface.register(_NAME, packed_attention)
