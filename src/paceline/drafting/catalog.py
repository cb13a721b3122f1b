"""Every kind of drafter, once. Exactness tests iterate over this list: registering is testing."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from paceline.config import nearest, parse
from paceline.drafting.draft_model import DraftModel, DraftModelSettings
from paceline.drafting.none import NoneDrafter, NoneSettings
from paceline.drafting.prompt_lookup import PromptLookup, PromptLookupSettings
from paceline.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import BaseModel

    from paceline.config import DrafterSection
    from paceline.drafting.base import Drafter


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of drafter and the schema of its settings."""

    drafter: type[Drafter]
    settings: type[BaseModel]


CATALOG: Final[Mapping[str, Kind]] = MappingProxyType(
    {
        NoneDrafter.kind: Kind(NoneDrafter, NoneSettings),
        DraftModel.kind: Kind(DraftModel, DraftModelSettings),
        PromptLookup.kind: Kind(PromptLookup, PromptLookupSettings),
    }
)


def check_settings(name: str, section: DrafterSection) -> BaseModel:
    """The validated settings of a configured drafter; ConfigError names what is wrong."""
    kind = CATALOG.get(section.kind)
    if kind is None:
        raise ConfigError(
            f"drafter '{name}': unknown kind '{section.kind}'{nearest(section.kind, list(CATALOG))}"
        )
    return parse(kind.settings, section.settings, f"drafter '{name}'")
