"""CHOOSE: features, policies and their artefacts, and what watches a choice while decoding.

Arms are names here; no engine, no drafters.
"""

from paceline.selection.adaptation import Arm, Hedge
from paceline.selection.artefact import (
    PolicyIdentity,
    is_policy,
    load_policy,
    policy_of,
    save_policy,
)
from paceline.selection.features import feature_vector
from paceline.selection.guard import Guard
from paceline.selection.policies import Policy
from paceline.selection.round_prices import RoundPrices, TablePrices
from paceline.selection.watch import Watch

__all__ = [
    "Arm",
    "Guard",
    "Hedge",
    "Policy",
    "PolicyIdentity",
    "RoundPrices",
    "TablePrices",
    "Watch",
    "feature_vector",
    "is_policy",
    "load_policy",
    "policy_of",
    "save_policy",
]
