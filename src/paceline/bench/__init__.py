"""MEASURE: the cost table, timed runs, tables and plots."""

from paceline.bench.doctor import doctor
from paceline.bench.drafters import drafters
from paceline.bench.profile import profile

__all__ = ["doctor", "drafters", "profile"]
