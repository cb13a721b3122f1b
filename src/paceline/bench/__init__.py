"""MEASURE: the cost table, timed runs, tables and plots."""

from paceline.bench.doctor import doctor
from paceline.bench.drafters import drafters
from paceline.bench.profile import measure_cost_table

__all__ = ["doctor", "drafters", "measure_cost_table"]
