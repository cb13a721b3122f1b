"""Detection of changes to a model's weights after load.

Our own forwards copy the weights and caches hold their results, so a change in place (an optimizer's
step, a merge, another adapter, a `load_state_dict`) makes both wrong. The check is cheap enough for
every request: it reads no weight as a whole.
"""

from __future__ import annotations

from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from torch import Tensor

_INTEGERS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class WeightsMonitor:
    """A record of a model's weights at the time this was made.

    Notices parameters, persistent buffers and modules that were replaced or moved, writes that torch
    counts (in place, under `no_grad`, too) and switched PEFT adapters. Of writes that torch does not
    count (through `.data`) it notices, on the CPU, those that reach the number in the middle of any
    weight.
    """

    def __init__(self, model: Any) -> None:
        """model: a module; anything else never changes."""
        modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
        # without weights that accelerate has offloaded, since every forward loads and removes them,
        # and without buffers that are in no checkpoint, which some forwards rewrite
        entries: list[tuple[dict[str, Any], str, Any]] = [
            (table, name, v)
            for m in modules
            for table in (m._parameters, m._modules, m._buffers)
            for name, v in table.items()
            if v is not None
            and not getattr(v, "is_meta", False)
            and name not in m._non_persistent_buffers_set
        ]
        self._tables = [table for table, _, _ in entries]
        self._names = [name for _, name, _ in entries]
        self._values = [value for _, _, value in entries]
        weights = {id(v): v for v in self._values if isinstance(v, torch.Tensor)}
        self._counted = [w for w in weights.values() if not w.is_inference()]
        self._placed = [w for w in weights.values() if type(w.data) is torch.Tensor]
        self._samples = [s for w in self._placed if (s := _sample(w.data)) is not None]
        self._adapted = [m for m in modules if hasattr(m, "_disable_adapters")]  # PEFT's layers
        self._recorded = self._state()

    def has_changed(self) -> bool:
        """Return whether the weights have changed since this was made."""
        held = map(dict.get, self._tables, self._names)
        return not all(map(is_, held, self._values)) or self._state() != self._recorded

    def _state(self) -> tuple[object, ...]:
        return (
            list(map(attrgetter("_version"), self._counted)),
            list(map(torch.Tensor.data_ptr, self._placed)),
            [sample[0] for sample in self._samples],
            [(str(m._active_adapter), m._disable_adapters) for m in self._adapted],
        )


def _sample(weight: Tensor) -> memoryview | None:
    """Return a view of a weight's middle number as an integer; None if it cannot be read cheaply."""
    kind = _INTEGERS.get(weight.element_size())
    if weight.device.type != "cpu" or kind is None or not weight.numel():
        return None
    if not weight.is_contiguous():
        return None
    middle = weight.numel() // 2
    number: Any = weight.view(-1)[middle : middle + 1].view(kind).numpy()
    return memoryview(number)
