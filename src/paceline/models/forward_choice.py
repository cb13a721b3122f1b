"""Which forward runs a model: the compiled one on a CPU, the lean one elsewhere, or transformers' own.

`choose_forward` decides by a model's modules; `forward_before_weights` predicts it from a model on
torch's meta device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import nn

from paceline.errors import ModelError
from paceline.models.compiled.family import why_not_compiled
from paceline.models.compiled.processor import kernels
from paceline.models.lean import why_not_lean

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from paceline.config import ModelSection

ForwardChoice = Literal["auto", "compiled", "lean", "transformers"]
ForwardKind = Literal["compiled", "lean", "transformers"]


class Chosen(NamedTuple):
    """The forward to build, and why it is not the compiled one; None if it is."""

    kind: ForwardKind
    why_not_compiled: str | None

    @property
    def name(self) -> str:
        """The kind; of the compiled forward, with its kernels: `compiled (amx)`."""
        return f"compiled ({kernels()})" if self.kind == "compiled" else self.kind


def choose_forward(
    model: PreTrainedModel,
    name: str,
    forward: ForwardChoice,
    exact: bool,
    not_here: str | None,
    reason: str | None = None,
) -> Chosen:
    """Return the forward that runs a model.

    forward, exact: as in `LanguageModel`. not_here: why compiled code cannot run where the model is.
    reason: why only transformers' forward can run it. Raises ModelError if the one that is required does
    not fit.
    """
    not_compiled = not_here or why_not_compiled(model) or reason
    not_lean = why_not_lean(model) or reason
    if exact and (not_compiled or forward not in ("auto", "compiled")):
        why = not_compiled or f"the configuration asks for 'forward: {forward}'"
        raise ModelError(
            f"{name}: 'exact' is a promise of the compiled forward, which cannot run: {why}; remove "
            "'exact'"
        )
    if forward == "auto":
        own: ForwardKind = "compiled" if not_here is None else "lean"
        why_not_own = not_compiled if own == "compiled" else not_lean
        return Chosen(own if why_not_own is None else "transformers", not_compiled)
    why_not = {"compiled": not_compiled, "lean": not_lean, "transformers": None}[forward]
    if why_not is not None:
        raise ModelError(f"{name}: cannot run the {forward} forward, because {why_not}")
    if forward == "compiled":
        return Chosen(forward, None)
    return Chosen(forward, not_compiled or f"the configuration says '{forward}'")


def not_on(device: torch.device) -> str | None:
    """Return the reason why compiled code cannot run on a device, or None if it can."""
    if device.type == "cpu":
        return None
    return f"its weights are on {device.type}, and compiled code runs on the CPU"


def forward_before_weights(
    model: PreTrainedModel,
    name: str,
    section: ModelSection,
    exact: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Chosen:
    """Return the forward that will run a model, of which only shapes are known.

    model: on the meta device; its weights are replaced by single numbers, expanded. Raises ModelError if
    the forward that is required does not fit.
    """
    for module in model.modules():
        for key, weight in module._parameters.items():
            if weight is not None:
                number = torch.zeros((), dtype=dtype)
                module._parameters[key] = nn.Parameter(number.expand(weight.shape), False)
    is_quantised = getattr(model.config, "quantization_config", None) is not None
    reason = "its weights are quantised" if is_quantised else None
    return choose_forward(model, name, section.forward, exact, not_on(device), reason)
