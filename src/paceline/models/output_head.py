"""Logits of hidden states as the model's own code makes them: scaled (Cohere), capped (Gemma 2).

If the output layer alone gives the same bits, it is called alone. Otherwise the model's own forward
runs with a body that returns the given hidden states, so that every step between body and logits runs.
The model is not changed. Symbols: D hidden size, V logits width.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from paceline.errors import ModelError
from paceline.models.encoder_decoder import body_of, is_encoder_decoder
from paceline.models.visibility import FAILURES

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn


class _BodyOutput:
    """The output of a model's body: hidden states, and None for everything else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None  # caches, router logits and others, which only go into the model's output

    def __getitem__(self, at: int | slice) -> Any:
        return (self.last_hidden_state,)[at]


class _BodyReplacement:
    """A body that returns given hidden states, with the attributes of the real one."""

    def __init__(self, body: nn.Module) -> None:
        self._real = body
        self.hidden = torch.empty(0)
        self.was_called = False

    def __call__(self, *args: Any, **kwargs: Any) -> _BodyOutput:
        self.was_called = True
        return _BodyOutput(self.hidden)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._real, name)
        # some models call a body inside their body, such as OPT's decoder
        return self if isinstance(found, PreTrainedModel) else found


class _HeadOfForward:
    """A model's forward without its body. Not for two threads at once."""

    def __init__(self, model: PreTrainedModel) -> None:
        # the class's, since hooks replace the instance's
        self._forward = type(model).forward
        self._model = copy.copy(model)  # shares all modules and weights
        self._model._modules = dict(model._modules)
        self._has_encoder = is_encoder_decoder(model)
        # T5's base model is the model itself, and its decoder the body
        is_base = model.base_model is model
        self._body = _BodyReplacement(body_of(model) if is_base else model.base_model)
        place = "decoder" if is_base else model.base_model_prefix
        self._model._modules[place] = self._body  # type: ignore[assignment]

    def __call__(self, hidden: Tensor) -> Tensor:
        batch = hidden.reshape(1, -1, hidden.shape[-1])
        self._body.hidden = batch
        inputs: dict[str, Any] = {"inputs_embeds": batch}
        if self._has_encoder:
            inputs = {"decoder_inputs_embeds": batch, "encoder_outputs": (batch,)}
        output = self._forward(self._model, use_cache=False, **inputs)
        if not self._body.was_called:
            raise RuntimeError("it does not call its base model")
        logits: Tensor = output.logits
        return logits.view(*hidden.shape[:-1], -1)


class OutputHead:
    """The function from hidden states [..., D] to logits [..., V] of a model."""

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        """Raises ModelError if the model has no output layer."""
        self._model, self._name = model, name
        self._layer: Any = model.get_output_embeddings()
        if self._layer is None:
            raise ModelError(f"{name}: {type(model).__name__} has no output head; use a causal LM")
        self._function: Callable[[Tensor], Tensor] | None = None  # chosen when first called

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V] of hidden states [..., D].

        Raises ModelError, when first called, if the model's forward cannot run without its body.
        """
        if self._function is None:
            self._function = self._choose(hidden)
        return self._function(hidden)

    def _choose(self, like: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the output layer, or the model's own head. like: gives size, dtype and device."""
        own = _HeadOfForward(self._model)
        if like.is_meta:  # no values to compare
            return own
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(1, 2, like.shape[-1], generator=generator)
        probe[:, 1] *= 100  # far enough for a cap to show in bfloat16 too
        probe = probe.to(like)
        try:
            return self._layer if torch.equal(own(probe), self._layer(probe)) else own
        except FAILURES as error:
            raise ModelError(
                f"{self._name}: {type(self._model).__name__} does not make logits of hidden states "
                f"alone ({error})"
            ) from error
