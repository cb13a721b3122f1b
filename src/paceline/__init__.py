"""paceline: a language model answers faster, without changing what it answers.

A public name is loaded at its first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "paceline.assembly": ("Pace", "load"),
    "paceline.bench": ("doctor", "drafters"),
    "paceline.config": ("Config", "load_config"),
    "paceline.contracts": ("GREEDY", "Completion", "Drafts", "PromptRecord", "RowView"),
    "paceline.distillation.pretraining": ("pretrain",),
    "paceline.drafting.base": ("BuildContext", "Drafter", "Needs", "pad_drafts"),
    "paceline.drafting.draft_replay": ("DraftReplay", "SimulatedReplay"),
    "paceline.errors": ("ConfigError", "PacelineError"),
    "paceline.experiments.catalog": ("experiment",),
    "paceline.experiments.demo_job": ("demo",),
    "paceline.layer_search": ("search_layers",),
    "paceline.store": ("read_decisions", "read_prompts", "take_part"),
    "paceline.verbs.data": ("data",),
    "paceline.verbs.distillation": ("distill", "suggest_shapes"),
    "paceline.verbs.evaluate": ("evaluate",),
    "paceline.verbs.from_log": ("learn_from_log",),
    "paceline.verbs.improvement": ("improve_drafter",),
    "paceline.verbs.pipeline": ("collect", "learn", "profile"),
    "paceline.verbs.route": ("Router", "load_router", "route"),
    "paceline.verbs.trigrams": ("build_trigrams",),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "GREEDY",
    "BuildContext",
    "Completion",
    "Config",
    "ConfigError",
    "DraftReplay",
    "Drafter",
    "Drafts",
    "Needs",
    "Pace",
    "PacelineError",
    "PromptRecord",
    "Router",
    "RowView",
    "SimulatedReplay",
    "build_trigrams",
    "collect",
    "data",
    "demo",
    "distill",
    "doctor",
    "drafters",
    "evaluate",
    "experiment",
    "improve_drafter",
    "learn",
    "learn_from_log",
    "load",
    "load_config",
    "load_router",
    "pad_drafts",
    "pretrain",
    "profile",
    "read_decisions",
    "read_prompts",
    "route",
    "search_layers",
    "suggest_shapes",
    "take_part",
]

if TYPE_CHECKING:
    from paceline.assembly import Pace, load
    from paceline.bench.doctor import doctor
    from paceline.bench.drafters import drafters
    from paceline.config import Config, load_config
    from paceline.contracts import GREEDY, Completion, Drafts, PromptRecord, RowView
    from paceline.distillation.pretraining import pretrain
    from paceline.drafting.base import BuildContext, Drafter, Needs, pad_drafts
    from paceline.drafting.draft_replay import DraftReplay, SimulatedReplay
    from paceline.errors import ConfigError, PacelineError
    from paceline.experiments.catalog import experiment
    from paceline.experiments.demo_job import demo
    from paceline.layer_search import search_layers
    from paceline.store import read_decisions, read_prompts, take_part
    from paceline.verbs.data import data
    from paceline.verbs.distillation import distill, suggest_shapes
    from paceline.verbs.evaluate import evaluate
    from paceline.verbs.from_log import learn_from_log
    from paceline.verbs.improvement import improve_drafter
    from paceline.verbs.pipeline import collect, learn, profile
    from paceline.verbs.route import Router, load_router, route
    from paceline.verbs.trigrams import build_trigrams


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'paceline' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
