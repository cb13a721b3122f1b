"""The earlier tokens that each attention layer sees, read from transformers' own mask code.

Some architectures pass the window to their attention function, others apply it by the mask alone. One
forward over a few tokens runs with a probe mask, which evaluates the model's mask function up to the
end of the context, and a probe attention, which records the mask of each layer. So a window of any
length is read exactly, at the cost of a few tokens.
Symbols: N tokens, H query heads, D size of a value, w positions of a window.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from paceline.models.encoder_decoder import (
    body_of,
    inputs_of_body,
    is_encoder_decoder,
    num_layers_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel

FAILURES: Final = (
    TypeError, ValueError, AttributeError, LookupError, RuntimeError, ImportError, AssertionError,
)  # fmt: skip
"""Exceptions that an architecture's code may raise where it is run in an unusual way."""

_PROBE: Final = "paceline_probe"
_NUM_TOKENS: Final = 3
_NUM_SOURCE: Final = 5  # positions; attention to this number of keys is to the source


@dataclass(slots=True)
class Visibility:
    """The findings of one forward: the window of every layer, and reasons against packed rows."""

    windows: dict[int, int | None] = field(default_factory=dict)  # by layer index; None: all
    reasons: list[str] = field(default_factory=list)  # why the packed forward is wrong
    # by layer index: the modules that attend to the text, and to the source
    attentions: dict[int, nn.Module] = field(default_factory=dict)
    cross_attentions: dict[int, nn.Module] = field(default_factory=dict)
    _context: int = 0
    _masks: dict[int, int | str | None] = field(default_factory=dict)  # by the tensor's address
    _kept: list[Tensor] = field(default_factory=list)  # kept alive, so that no address is reused

    def note(self, reason: str) -> None:
        """Add a reason once."""
        if reason not in self.reasons:
            self.reasons.append(reason)


_current: ContextVar[Visibility | None] = ContextVar("visibility", default=None)


def configs_of(model: PreTrainedModel) -> list[Any]:
    """Return a model's configurations; each attention module reads its implementation from one."""
    return list({id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values())


@contextmanager
def attention_named(configs: Sequence[Any], name: str) -> Iterator[None]:
    """Run a model's attention under a registered name inside the block."""
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for config, old in zip(configs, before, strict=True):
            config._attn_implementation_internal = old


def look_at(model: PreTrainedModel, context_length: int, device: torch.device) -> Visibility:
    """Run a few tokens through a model's body and return the windows of its attention.

    device: of the token ids. The error of a forward that fails becomes a reason.
    """
    seen = Visibility(_context=context_length)
    body = body_of(model)
    tokens = torch.zeros((1, min(_NUM_TOKENS, context_length)), dtype=torch.int64, device=device)
    current = _current.set(seen)
    try:
        with torch.inference_mode(), attention_named(configs_of(model), _PROBE):
            body(input_ids=tokens, use_cache=False, **inputs_of_body(model, _NUM_SOURCE))
    except FAILURES as error:
        seen.note(f"its forward fails on plain tokens: {type(error).__name__}: {error}"[:200])
    finally:
        _current.reset(current)
        seen._masks.clear()
        seen._kept.clear()
    if is_encoder_decoder(model):
        _check_decoder(seen, body)
        return seen
    if "position_ids" not in inspect.signature(body.forward).parameters:
        seen.note("its forward cannot be told the positions of its tokens")
    num_layers = num_layers_of(model)
    without = [i for i in range(num_layers) if i not in seen.windows]
    if without and not seen.reasons:
        seen.note(
            f"{len(without)} of its {num_layers} layers (such as {without[0]}) run no attention "
            "through transformers' interface"
        )
    return seen


def _check_decoder(seen: Visibility, decoder: Any) -> None:
    """Note what keeps a decoder from running on packed rows."""
    if not seen.reasons and seen.attentions.keys() != seen.cross_attentions.keys():
        seen.note("not every layer of its decoder attends to both text and source")


def _probe_mask(
    *args: Any, mask_function: Callable[..., Tensor], device: Any = None, **kwargs: Any
) -> Any:
    """Replace transformers' mask function: return the real mask and record its window."""
    seen = _current.get()
    assert seen is not None
    if torch.device(device).type == "meta":
        return None  # no values to read a window from
    kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    make: Any = sdpa_mask
    mask = make(*args, mask_function=mask_function, device=device, **kwargs)
    seen._kept.append(mask)
    seen._masks[mask.data_ptr()] = window_of(mask_function, seen._context, device)
    return mask


def window_of(
    mask_function: Callable[..., Tensor], context_length: int, device: Any
) -> int | str | None:
    """Return the window w of a mask function within a context, or None for all earlier tokens.

    Return the reason as a string if the mask is neither.
    """
    zero = torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=device)
    keys = torch.arange(context_length, device=device)[None, None, None]
    last = context_length - 1
    window: int | None = None
    for query in (last, 2 * last // 3, last // 3 + 1, 1, 0):
        try:
            visible = mask_function(zero, zero, zero + query, keys)
        except FAILURES as error:
            return f"its attention mask follows a rule of its own ({type(error).__name__})"
        visible = visible.expand(1, 1, 1, context_length).flatten()
        if bool(visible[query + 1 :].any()):
            return "its attention sees later tokens, so it is not a causal model"
        count = int(visible.sum())
        if query == last:
            window = count if count <= last else None
        expected = query + 1 if window is None else min(window, query + 1)
        if count != expected or not bool(visible[query + 1 - count : query + 1].all()):
            return "its attention mask is neither causal nor a sliding window (such as chunks)"
    return window


def _probe_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Replace transformers' attention: return zeros [1, N, H, D] and record the layer's mask."""
    seen = _current.get()
    assert seen is not None
    layer = getattr(module, "layer_idx", None)
    reads_source = key.shape[2] == _NUM_SOURCE
    known = seen.cross_attentions if reads_source else seen.attentions
    if layer is None:
        seen.note(f"{type(module).__name__} does not say which layer it is")
    elif layer in known:
        several = "several modules" if known[layer] is not module else "one module twice"
        seen.note(f"layer {layer} runs the attention of {several}, which would share one cache")
    else:
        known[layer] = module
    out = query.new_zeros(*query.shape[:1], query.shape[2], query.shape[1], value.shape[3])
    if reads_source:
        return out, None
    rule: int | str | None = sliding_window
    if isinstance(attention_mask, torch.Tensor):
        unknown = f"{type(module).__name__} hands its attention a mask that it has made itself"
        rule = seen._masks.get(attention_mask.data_ptr(), unknown)
    elif attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if not causal:
            rule = "its attention sees later tokens, so it is not a causal model"
    if isinstance(rule, str):
        seen.note(rule)
    elif layer is not None:
        seen.windows[layer] = rule
    return out, None


AttentionInterface.register(_PROBE, _probe_attention)
AttentionMaskInterface.register(_PROBE, _probe_mask)
