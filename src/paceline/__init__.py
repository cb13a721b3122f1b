"""paceline: a language model answers faster, without changing what it answers.

The names below are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "BuildContext": "paceline.drafting.base",
    "Completion": "paceline.contracts",
    "Config": "paceline.config",
    "ConfigError": "paceline.errors",
    "DraftReplay": "paceline.drafting.draft_replay",
    "Drafter": "paceline.drafting.base",
    "Drafts": "paceline.contracts",
    "GREEDY": "paceline.contracts",
    "Needs": "paceline.drafting.base",
    "Pace": "paceline.assembly",
    "PacelineError": "paceline.errors",
    "PromptRecord": "paceline.contracts",
    "RowView": "paceline.contracts",
    "SimulatedReplay": "paceline.drafting.draft_replay",
    "build_trigrams": "paceline.experiments.pipeline",
    "collect": "paceline.experiments.pipeline",
    "data": "paceline.experiments.pipeline",
    "demo": "paceline.experiments.demo_job",
    "distill": "paceline.distillation",
    "doctor": "paceline.bench",
    "drafters": "paceline.bench",
    "evaluate": "paceline.experiments.evaluation",
    "experiment": "paceline.experiments.catalog",
    "learn": "paceline.experiments.pipeline",
    "learn_from_log": "paceline.experiments.from_log",
    "load": "paceline.assembly",
    "load_config": "paceline.config",
    "pad_drafts": "paceline.drafting.base",
    "profile": "paceline.experiments.pipeline",
    "read_decisions": "paceline.store",
    "read_prompts": "paceline.store",
    "search_layers": "paceline.layer_search",
}

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
    "learn",
    "learn_from_log",
    "load",
    "load_config",
    "pad_drafts",
    "profile",
    "read_decisions",
    "read_prompts",
    "search_layers",
]

if TYPE_CHECKING:
    from paceline.assembly import Pace, load
    from paceline.bench.doctor import doctor
    from paceline.bench.drafters import drafters
    from paceline.config import Config, load_config
    from paceline.contracts import GREEDY, Completion, Drafts, PromptRecord, RowView
    from paceline.distillation import distill
    from paceline.drafting.base import BuildContext, Drafter, Needs, pad_drafts
    from paceline.drafting.draft_replay import DraftReplay, SimulatedReplay
    from paceline.errors import ConfigError, PacelineError
    from paceline.experiments.catalog import experiment
    from paceline.experiments.demo_job import demo
    from paceline.experiments.evaluation import evaluate
    from paceline.experiments.from_log import learn_from_log
    from paceline.experiments.pipeline import build_trigrams, collect, data, learn, profile
    from paceline.layer_search import search_layers
    from paceline.store import read_decisions, read_prompts


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'paceline' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
