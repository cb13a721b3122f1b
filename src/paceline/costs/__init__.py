"""PRICE: read and interpolate the cost table, and price arms by it; `bench` measures it."""

from paceline.costs.pricing import ArmPricer, Objective, SecondsFn
from paceline.costs.round_seconds import RoundSeconds
from paceline.costs.table import CostTable, Measurement

__all__ = ["ArmPricer", "CostTable", "Measurement", "Objective", "RoundSeconds", "SecondsFn"]
