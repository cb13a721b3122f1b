"""The composition root: configuration to running engine. The only room that imports every part."""

from paceline.assembly.loading import (
    build_controller,
    find_round_seconds,
    load,
    open_log,
    steps_to_policy,
)
from paceline.assembly.pace import Pace
from paceline.assembly.parts import (
    Parts,
    build,
    build_from_objects,
    give_chances,
    policy_identity,
)

__all__ = [
    "Pace",
    "Parts",
    "build",
    "build_controller",
    "build_from_objects",
    "find_round_seconds",
    "give_chances",
    "load",
    "open_log",
    "policy_identity",
    "steps_to_policy",
]
