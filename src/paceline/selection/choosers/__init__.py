"""The kinds of chooser, by name in an artefact. A new kind is one file and one line in `_KINDS`."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from paceline.selection.choosers.acceptance import AcceptanceChooser
from paceline.selection.choosers.base import (
    Chooser,
    PortableChooser,
    Situation,
    softmax,
)
from paceline.selection.choosers.constant import FirstLineChooser, FixedChooser, RandomChooser
from paceline.selection.choosers.linear import LinearChooser
from paceline.selection.choosers.neighbours import NeighboursChooser
from paceline.selection.choosers.network import NetworkChooser, PolicyNetwork
from paceline.selection.choosers.reduction import Reduction

if TYPE_CHECKING:
    from collections.abc import Mapping

_KINDS: Final[tuple[type[Chooser], ...]] = (
    AcceptanceChooser,
    NeighboursChooser,
    NetworkChooser,
    LinearChooser,
    FirstLineChooser,
    FixedChooser,
    RandomChooser,
)
CHOOSERS: Final[Mapping[str, type[Chooser]]] = MappingProxyType(
    {kind.kind: kind for kind in _KINDS}
)

__all__ = [
    "CHOOSERS",
    "AcceptanceChooser",
    "Chooser",
    "FirstLineChooser",
    "FixedChooser",
    "LinearChooser",
    "NeighboursChooser",
    "NetworkChooser",
    "PolicyNetwork",
    "PortableChooser",
    "RandomChooser",
    "Reduction",
    "Situation",
    "softmax",
]
