"""The classes that a cascade's chances are calibrated by, apart from those of evidence."""

from __future__ import annotations

from typing import Final

NUM_BINS: Final = 8
"""Bins of how sure the lookups are: 0 without any draft, then by the chance of the best first token."""

NUM_SURE: Final = 16
"""Classes of a drafted token by its model's probability for it, of equal width."""
