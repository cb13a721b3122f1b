"""CHOOSE: features, policies and their artefacts. Arms are names here; no engine, no drafters."""

from paceline.selection.artefact import PolicyIdentity, is_policy, load_policy, save_policy
from paceline.selection.features import FEATURE_VERSION, feature_vector
from paceline.selection.policies import FixedPolicy, NetworkPolicy, Policy, RandomPolicy

__all__ = [
    "FEATURE_VERSION",
    "FixedPolicy",
    "NetworkPolicy",
    "Policy",
    "PolicyIdentity",
    "RandomPolicy",
    "feature_vector",
    "is_policy",
    "load_policy",
    "save_policy",
]
