"""A draft model whose tokenizer is not the target's.

`build` takes the first level that fits: a plain draft model, `SharedTokens` or `ThroughText`; see
`Bridge`. Text that the tokenizers split differently lowers acceptance and never changes the text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from paceline.drafting.base import Drafter
from paceline.drafting.bridged_drafters import KIND, Bridge, SharedTokens, ThroughText
from paceline.drafting.draft_model import DraftModel, DraftModelSettings
from paceline.errors import ConfigError, VocabularyError
from paceline.models.loading import load_language_model, load_tokenizer
from paceline.models.translation import shared_tokens

if TYPE_CHECKING:
    from paceline.drafting.base import BuildContext
    from paceline.drafting.draft_length import StopSettings
    from paceline.models.language_model import LanguageModel
    from paceline.models.vocabulary import Tokenizer


class CrossVocabularySettings(DraftModelSettings):
    """A model with its own tokenizer. level: `auto` takes the first level that fits."""

    level: Literal["auto", "shared", "text"] = "auto"


class CrossVocabulary(Drafter):
    """The builder of a `SharedTokens`, a `ThroughText` or a plain `DraftModel`."""

    kind = KIND
    Settings = CrossVocabularySettings

    @classmethod
    def build(cls, name: str, settings: CrossVocabularySettings, context: BuildContext) -> Drafter:
        bridge = check_bridge(name, settings, context.tokenizer, load_tokenizer(settings))
        return cls.from_model(name, load_language_model(settings, name), settings, bridge, context)

    @classmethod
    def from_model(
        cls,
        name: str,
        model: LanguageModel,
        settings: StopSettings,
        bridge: Bridge,
        context: BuildContext,
    ) -> Drafter:
        """Return the drafter of a loaded model."""
        if bridge.level != "same" and model.encoder is not None:
            raise VocabularyError(
                f"drafter '{name}' has an encoder and another tokenizer than the target ({bridge.why}); "
                "use a drafter without an encoder, or one with the target's tokenizer"
            )
        drafter: Drafter
        if bridge.level == "same":
            drafter = DraftModel.from_model(name, model, context, settings)
        elif bridge.level == "shared":
            drafter = SharedTokens(name, model, settings, bridge, context)
        else:
            drafter = ThroughText(name, model, settings, bridge, context)
        drafter.note = f"drafter '{name}': {bridge.why}"
        return drafter


def check_bridge(
    name: str, settings: CrossVocabularySettings, target: Tokenizer, own: Tokenizer
) -> Bridge:
    """Return the bridge that a drafter of these settings uses, without reading weights.

    Raises VocabularyError or ConfigError if no level fits the settings.
    """
    bridge = Bridge.between(target, own, settings.level)
    if bridge.level == "shared" and not shared_tokens(bridge.target, bridge.own):
        raise VocabularyError(
            f"drafter '{name}' has no token in common with the target; set 'level: text'"
        )
    if bridge.level == "text" and settings.stop == "expected":
        raise ConfigError(
            f"drafter '{name}' drafts text ({bridge.why}), so 'stop: expected' has no confidence "
            "per target token; set 'stop: confidence' or 'fixed'"
        )
    return bridge
