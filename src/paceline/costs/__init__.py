"""PRICE: read and interpolate the cost table; measuring it is the work of `bench`."""

from paceline.costs.table import CostTable, Measurement

__all__ = ["CostTable", "Measurement"]
