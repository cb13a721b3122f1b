"""Which earlier tokens each attention layer sees, asked of transformers' own mask code.

Some architectures tell their attention function the window, others apply it by the mask alone. One
forward over a few tokens runs under a name of its own, with a mask function that notes what the model
asks for and evaluates it up to the end of the context, and an attention that notes which layer got
which mask. So a window of any length is read exactly and at the cost of a few tokens.
Symbols: N tokens, H query heads, D size of a value, w positions of a window.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

PROBE: Final = "paceline_probe"
NUM_TOKENS: Final = 3


@dataclass(slots=True)
class Visibility:
    """What one forward showed: the window of every layer, and what packed rows cannot be given."""

    windows: dict[int, int | None] = field(default_factory=dict)  # by layer index; None: all
    reasons: list[str] = field(default_factory=list)  # why the packed forward would be wrong
    _context: int = 0
    _masks: dict[int, int | str | None] = field(default_factory=dict)  # by the tensor's address
    _kept: list[Tensor] = field(default_factory=list)  # alive, so that no address is used twice
    _layers: dict[int, int] = field(default_factory=dict)  # layer index -> its module's id

    def note(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)


_current: ContextVar[Visibility | None] = ContextVar("visibility", default=None)


def look(run: Callable[[], object], context_length: int) -> Visibility:
    """Run a forward under the name PROBE and return what it showed.

    A forward that fails shows what it can: its error is one of the reasons.
    """
    seen = Visibility(_context=context_length)
    token = _current.set(seen)
    try:
        with torch.inference_mode():
            run()
    except (
        TypeError, ValueError, AttributeError, LookupError, RuntimeError, ImportError,
        AssertionError,
    ) as error:  # fmt: skip
        seen.note(f"its forward fails on plain tokens: {type(error).__name__}: {error}"[:200])
    finally:
        _current.reset(token)
        seen._masks.clear()
        seen._kept.clear()
    return seen


def _probe_mask(
    *args: Any, mask_function: Callable[..., Tensor], device: Any = None, **kwargs: Any
) -> Any:
    """transformers' mask interface. Returns the real mask of the few tokens, and notes its rule."""
    seen = _current.get()
    assert seen is not None
    kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    make: Any = sdpa_mask
    mask = make(*args, mask_function=mask_function, device=device, **kwargs)
    seen._kept.append(mask)
    seen._masks[mask.data_ptr()] = window_of(mask_function, seen._context, device)
    return mask


def window_of(
    mask_function: Callable[..., Tensor], context_length: int, device: Any
) -> int | str | None:
    """The window w of a mask function within a context, None for all earlier tokens.

    A string says what it is where it is neither.
    """
    zero = torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=device)
    keys = torch.arange(context_length, device=device)[None, None, None]
    last = context_length - 1
    window: int | None = None
    for query in (last, 2 * last // 3, last // 3 + 1, 1, 0):
        try:
            visible = mask_function(zero, zero, zero + query, keys)
        except (TypeError, ValueError, LookupError, RuntimeError) as error:
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
    """transformers' attention interface. Returns zeros [1, N, H, D], and notes the layer's mask."""
    seen = _current.get()
    assert seen is not None
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        seen.note(f"{type(module).__name__} does not say which layer it is")
    elif layer in seen._layers:
        several = "several modules" if seen._layers[layer] != id(module) else "one module twice"
        seen.note(f"layer {layer} runs the attention of {several}, which would share one cache")
    else:
        seen._layers[layer] = id(module)
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
    return query.new_zeros(*query.shape[:1], query.shape[2], query.shape[1], value.shape[3]), None


AttentionInterface.register(PROBE, _probe_attention)
AttentionMaskInterface.register(PROBE, _probe_mask)
