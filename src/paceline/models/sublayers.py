"""Forwards that leave out some attention and MLP sub-layers, each as if it added nothing.

Our own forwards leave a sub-layer out. In transformers' own modules it is silenced during one forward:
it returns zeros. Whether that is the same depends on the architecture (post-norm layers change the
residual stream anyway), so `self_checks.check_sublayers` compares them. Knows no drafting.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from paceline.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor

# transformers' names of the two sub-layers of a decoder layer; OPT's MLP is two bare linear layers,
# GraniteMoeShared's the sum of two modules. Where a layer attends to a source, too, both attentions are
# one sub-layer
_ATTENTIONS: Final = (
    ("self_attn", "encoder_attn"),
    ("SelfAttention", "EncDecAttention"),
    ("self_attn",),
    ("attn",),
    ("attention",),
    ("self_attention",),
)
_MLPS: Final = (
    ("mlp",),
    ("feed_forward",),
    ("block_sparse_moe", "shared_mlp"),
    ("block_sparse_moe",),
    ("ffn",),
    ("fc1", "fc2"),
    ("DenseReluDense",),
)


@dataclass(frozen=True, slots=True)
class LayerSubset:
    """Sub-layers that a forward leaves out, by the index of their decoder layer."""

    attention: frozenset[int] = frozenset()
    mlp: frozenset[int] = frozenset()

    @classmethod
    def everything(cls, num_layers: int) -> LayerSubset:
        """Return all sub-layers."""
        every = frozenset(range(num_layers))
        return cls(every, every)

    def __len__(self) -> int:
        return len(self.attention) + len(self.mlp)


@dataclass(frozen=True, slots=True)
class _Layer:
    """The modules of one decoder layer's sub-layers."""

    attention: list[nn.Module]
    mlp: list[nn.Module]


class SubLayers:
    """The sub-layers of a transformers model, found by name; ModelError if they are not found."""

    def __init__(self, body: nn.Module, num_layers: int, name: str) -> None:
        self.owner, self.attribute = find_layers(body, num_layers, name)
        layers: Any = getattr(self.owner, self.attribute)
        self._layers = [_find_sublayers(layer, name) for layer in layers]
        self._silent = {m: _silent(m, True) for layer in self._layers for m in layer.attention}
        self._silent |= {m: _silent(m, False) for layer in self._layers for m in layer.mlp}

    @contextmanager
    def without(self, subset: LayerSubset) -> Iterator[None]:
        """Silence the sub-layers of a subset inside the block."""
        silenced: list[tuple[nn.Module, Any]] = []
        try:
            for kind, indices in (("attention", subset.attention), ("mlp", subset.mlp)):
                for index in indices:
                    for module in getattr(self._layers[index], kind):
                        silenced.append((module, module.__dict__.get("forward")))
                        module.forward = self._silent[module]
            yield
        finally:
            for module, forward in reversed(silenced):
                if forward is None:
                    del module.__dict__["forward"]
                else:  # another library had replaced it
                    module.forward = forward

    def num_parameters(self, subset: LayerSubset) -> int:
        """Return the number of parameters of the sub-layers in a subset."""
        modules = [m for i in subset.attention for m in self._layers[i].attention]
        modules += [m for i in subset.mlp for m in self._layers[i].mlp]
        return sum(p.numel() for module in modules for p in module.parameters())

    @contextmanager
    def no_layers(self) -> Iterator[None]:
        """Remove all decoder layers inside the block: embedding, then last norm."""
        layers = getattr(self.owner, self.attribute)
        setattr(self.owner, self.attribute, nn.ModuleList())
        try:
            yield
        finally:
            setattr(self.owner, self.attribute, layers)


def _silence(*args: Any, **kwargs: Any) -> Tensor:
    """Return zeros of the hidden states' shape."""
    return torch.zeros_like(args[0] if args else kwargs["hidden_states"])


def _silence_pair(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Return zeros as attention modules do, with no attention weights."""
    return _silence(*args, **kwargs), None


def _silence_biased(*args: Any, **kwargs: Any) -> tuple[Tensor, None, None]:
    """Return zeros as T5's attention does, with neither a bias for the next layer nor weights."""
    return _silence(*args, **kwargs), None, None


def _pass_residual(hidden_states: Tensor, residual: Tensor, **kwargs: Any) -> Tensor:
    """Return the residual alone, for modules that add to it themselves (Bloom, MPT)."""
    return residual


def _pass_residual_pair(
    hidden_states: Tensor, residual: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    """Return the residual as attention modules do, with no attention weights."""
    return residual, None


def _silent(module: nn.Module, is_attention: bool) -> Callable[..., Any]:
    """Return the function that replaces a silent module's forward."""
    parameters = inspect.signature(type(module).forward).parameters
    if "residual" in parameters:
        return _pass_residual_pair if is_attention else _pass_residual
    if {"position_bias", "key_value_states"} <= parameters.keys():
        return _silence_biased
    return _silence_pair if is_attention else _silence


def find_layers(body: nn.Module, num_layers: int, name: str) -> tuple[nn.Module, str]:
    """Return the module that owns the list of decoder layers, and the attribute's name."""
    for owner in body.modules():
        for attribute, child in owner.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == num_layers:
                return owner, attribute
    raise ModelError(f"{name}: {type(body).__name__} has no list of {num_layers} decoder layers")


def _find_sublayers(layer: nn.Module, name: str) -> _Layer:
    """Return the sub-layers of a decoder layer. Raises ModelError if it has none of a known name."""
    children = dict(layer.named_children())
    parts: Any = children.pop("layer", ())
    for part in parts:  # T5's sub-layers are each a module of their own
        children |= dict(part.named_children())

    def find(what: str, known: Iterable[tuple[str, ...]]) -> list[nn.Module]:
        for names in known:
            if all(n in children for n in names):
                return [children[n] for n in names]
        raise ModelError(
            f"{name}: no {what} found in {type(layer).__name__}, so its sub-layers cannot be skipped"
        )

    return _Layer(find("attention", _ATTENTIONS), find("MLP", _MLPS))
