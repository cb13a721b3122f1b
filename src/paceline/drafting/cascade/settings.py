"""Settings of the drafter `cascade`, and which drafters can be its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from paceline.config import MAX_DRAFT_TOKENS, Section
from paceline.contracts import NONE
from paceline.drafting.suffix_lookup import SuffixLookup
from paceline.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from paceline.drafting.base import Drafter


class CascadeSettings(Section):
    """Settings. parts: drafters configured before, at least one of them a `suffix_lookup`.
    num_draft_tokens: maximum tokens of a draft.
    """

    parts: tuple[str, ...] = Field(min_length=1)
    num_draft_tokens: int = Field(default=16, ge=1, le=MAX_DRAFT_TOKENS)

    @model_validator(mode="after")
    def _parts_differ(self) -> CascadeSettings:
        if len(set(self.parts)) < len(self.parts):
            raise ValueError(f"a part is named twice: {', '.join(self.parts)}")
        return self


def find_parts(
    name: str, settings: CascadeSettings, drafters: Mapping[str, Drafter]
) -> dict[str, Drafter]:
    """Return a cascade's parts. Raises ConfigError if one is missing or does not fit."""
    parts = {part: _find_part(name, part, drafters) for part in settings.parts}
    if not any(isinstance(part, SuffixLookup) for part in parts.values()):
        raise ConfigError(
            f"drafter '{name}': none of its parts {', '.join(parts)} is a suffix_lookup; name one "
            "first, or use the parts alone"
        )
    return parts


def _find_part(name: str, part: str, drafters: Mapping[str, Drafter]) -> Drafter:
    drafter = drafters.get(part)
    if drafter is None or part == NONE:
        known = ", ".join(other for other in drafters if other != NONE) or "none"
        raise ConfigError(
            f"drafter '{name}': its part '{part}' is not a drafter configured before it; there "
            f"are: {known}"
        )
    is_chain = drafter.nests and drafter.replays_everywhere
    if drafter.wants_prices or not (isinstance(drafter, SuffixLookup) or is_chain):
        raise ConfigError(
            f"drafter '{name}': its part '{part}' ({drafter.kind}) cannot be a part; parts are "
            "suffix_lookup and chains that can be replayed at every position and need no prices, such "
            "as draft_model with stop: fixed"
        )
    return drafter
