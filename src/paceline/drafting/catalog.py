"""The kinds of drafters. Exactness tests iterate over this list: registering is testing.

A kind that is not listed is a user's class, named by its module:
`kind: my_package.my_module:MyDrafter`.
"""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from pydantic import BaseModel

from paceline.config import parse
from paceline.contracts import NONE, join_arm
from paceline.drafting.base import Drafter
from paceline.drafting.cascade.drafter import Cascade
from paceline.drafting.cross_vocabulary import CrossVocabulary
from paceline.drafting.draft_model import DraftModel
from paceline.drafting.layer_skip import LayerSkip
from paceline.drafting.none import NoneDrafter
from paceline.drafting.prompt_lookup import PromptLookup
from paceline.drafting.suffix_lookup import SuffixLookup
from paceline.drafting.trigram.drafter import TrigramTree
from paceline.drafting.union import Union
from paceline.errors import ConfigError, suggest_name

if TYPE_CHECKING:
    from paceline.config import Config, DrafterSection

_KINDS: Final[tuple[type[Drafter], ...]] = (
    NoneDrafter,
    DraftModel,
    CrossVocabulary,
    PromptLookup,
    SuffixLookup,
    TrigramTree,
    LayerSkip,
    Union,
    Cascade,
)
CATALOG: Final = MappingProxyType({kind.kind: kind for kind in _KINDS})


def find_kind(name: str, kind: str) -> type[Drafter]:
    """Return the class of a kind. Raises ConfigError, which names the drafter, if there is none."""
    if ":" in kind:
        return _import_kind(name, kind)
    if kind not in CATALOG:
        raise ConfigError(
            f"drafter '{name}': unknown kind '{kind}' (one of your own is named "
            f"package.module:Class){suggest_name(kind, CATALOG)}"
        )
    return CATALOG[kind]


def _import_kind(name: str, kind: str) -> type[Drafter]:
    module, _, attribute = kind.partition(":")
    try:
        drafter = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"drafter '{name}': cannot import kind '{kind}' ({error})") from error
    if not (isinstance(drafter, type) and issubclass(drafter, Drafter)):
        raise ConfigError(f"drafter '{name}': {kind} is not a subclass of paceline.Drafter")
    settings = getattr(drafter, "Settings", None)
    if not (isinstance(settings, type) and issubclass(settings, BaseModel)):
        raise ConfigError(f"drafter '{name}': {kind} has no `Settings`, a pydantic model")
    return drafter


def check_settings(name: str, section: DrafterSection) -> BaseModel:
    """Return a configured drafter's validated settings. Raises ConfigError for invalid ones."""
    schema = find_kind(name, section.kind).Settings
    return parse(schema, section.settings, f"drafter '{name}'")


def arms_of(config: Config) -> list[str]:
    """Return the arms of a policy: `none` and every drafter at its own length; a drafter whose drafts
    nest also at each shorter length in `learning.draft_lengths`.
    """
    arms = [NONE]
    for name, section in config.drafters.items():
        longest = getattr(check_settings(name, section), "num_draft_tokens", 0)
        if find_kind(name, section.kind).nests:
            arms += [join_arm(name, k) for k in config.learning.draft_lengths if k < longest]
        arms.append(name)
    return arms
