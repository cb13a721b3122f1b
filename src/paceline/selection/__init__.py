"""CHOOSE: features, choosers, policies and their artefacts. Arms are names; no engine, no drafters."""

from paceline.selection.artefact import (
    PolicyIdentity,
    is_policy,
    load_policy,
    policy_of,
    save_policy,
)
from paceline.selection.features import FEATURE_VERSION, feature_vector
from paceline.selection.policies import Policy

__all__ = [
    "FEATURE_VERSION",
    "Policy",
    "PolicyIdentity",
    "feature_vector",
    "is_policy",
    "load_policy",
    "policy_of",
    "save_policy",
]
