"""CHOOSE: features, policies and their artefacts, and the controller of a choice while decoding.

Arms are names here; this room knows no engine and no drafters.
"""

from paceline.selection.adaptation import Arm, Hedge
from paceline.selection.artefact import (
    PolicyIdentity,
    is_policy,
    load_policy,
    policy_of,
    save_policy,
)
from paceline.selection.controller import AdaptiveController
from paceline.selection.features import feature_vector
from paceline.selection.guard import Guard
from paceline.selection.policies import Policy
from paceline.selection.round_prices import RoundPrices, TablePrices
from paceline.selection.untrained import UntrainedController

__all__ = [
    "AdaptiveController",
    "Arm",
    "Guard",
    "Hedge",
    "Policy",
    "PolicyIdentity",
    "RoundPrices",
    "TablePrices",
    "UntrainedController",
    "feature_vector",
    "is_policy",
    "load_policy",
    "policy_of",
    "save_policy",
]
