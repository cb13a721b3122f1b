"""The parts of a pace: models, tokenizer and drafters, loaded or taken from memory.

This module knows no engine, policy or costs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch

from paceline.contracts import AT, AUTO, NONE, identity_of_arms
from paceline.costs.table import TARGET
from paceline.drafting.base import BuildContext
from paceline.drafting.cascade.drafter import Cascade
from paceline.drafting.catalog import check_settings, find_kind
from paceline.drafting.draft_model import DraftModel
from paceline.drafting.none import NoneDrafter
from paceline.drafting.suffix_lookup import SuffixLookup, SuffixLookupSettings
from paceline.errors import ConfigError
from paceline.models.detokenizer import Detokenizer
from paceline.models.language_model import LanguageModel
from paceline.models.loading import load_language_model, load_tokenizer
from paceline.models.self_checks import check_packed_forward
from paceline.models.vocabulary import Vocabulary, check_same_vocabulary
from paceline.selection import PolicyIdentity

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from paceline.config import Config
    from paceline.drafting.base import Drafter
    from paceline.drafting.cascade.calibration import Calibration

    DraftSpec = PreTrainedModel | Drafter | tuple[PreTrainedModel, PreTrainedTokenizerBase]


BUILT_IN: Final = "suffix"


@dataclass(slots=True)
class Parts:
    """Loaded models and drafters, before an engine drives them."""

    config: Config
    target: LanguageModel
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    drafters: dict[str, Drafter]  # `none` first
    notes: list[str] = field(default_factory=list)  # for the user, on how they were assembled
    built_in: str | None = None  # the drafter that neither a configuration nor a caller named
    detokenizer: Detokenizer = field(init=False)

    def __post_init__(self) -> None:
        self.detokenizer = Detokenizer.of(self.tokenizer, self.vocabulary)

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return self.detokenizer(tokens)

    def build_context(self) -> BuildContext:
        """Return the parts that the next drafter may use when it is built."""
        chunk = self.config.engine.prefill_chunk
        return BuildContext(self.target, self.tokenizer, self.vocabulary, self.drafters, chunk)

    def identities(self) -> dict[str, str]:
        """Return one comparable line per drafter."""
        return identity_of_arms({name: d.identity() for name, d in self.drafters.items()})

    def models(self) -> dict[str, LanguageModel]:
        """Return the target, and the model of each drafter that has one, by name."""
        models = {name: getattr(drafter, "model", None) for name, drafter in self.drafters.items()}
        found = {TARGET: self.target, **models}
        return {name: model for name, model in found.items() if isinstance(model, LanguageModel)}

    def forwards(self) -> dict[str, str]:
        """Return the forward that runs each of these models, by name."""
        return {name: model.forward_name for name, model in self.models().items()}


def build(config: Config) -> Parts:
    """Load everything that a configuration names.

    Raises ConfigError for names and settings before any weights are read, ModelError for a model that
    cannot be used, VocabularyError for a drafter with other tokens than the target's.
    """
    settings = {name: check_settings(name, d) for name, d in config.drafters.items()}
    kinds = {name: find_kind(name, d.kind) for name, d in config.drafters.items()}
    _check_names(settings)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    tokenizer = load_tokenizer(config.target)
    vocabulary = Vocabulary.of(tokenizer)
    for name, kind in kinds.items():
        kind.check(name, settings[name], vocabulary)
    target = load_language_model(config.target, "target", config.exact)
    parts = Parts(config, target, tokenizer, vocabulary, {NONE: NoneDrafter()})
    for name, kind in kinds.items():
        parts.drafters[name] = kind.build(name, settings[name], parts.build_context())
    return parts


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        if name in (AUTO, NONE):
            raise ConfigError(f"a drafter cannot be called '{name}', a reserved name; rename it")
        if AT in name:
            raise ConfigError(
                f"drafter '{name}': a name cannot hold '{AT}', which precedes a draft length; rename it"
            )


def build_from_objects(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drafters: Mapping[str, DraftSpec],
    config: Config,
) -> Parts:
    """Return the parts made from models in memory, which are only put in evaluation mode.

    A drafter is a transformers model, a pair of model and tokenizer, or a `Drafter`. A model alone
    must share the target's tokenizer; with its own tokenizer, the vocabularies are compared. Raises
    ConfigError, ModelError or VocabularyError as `build` does.
    """
    _check_names(drafters)
    vocabulary = Vocabulary.of(tokenizer)
    language_model = LanguageModel(
        target, "target", config.target.forward, config.exact, weights=config.target.weights
    )
    check_packed_forward(language_model)
    parts = Parts(config, language_model, tokenizer, vocabulary, {NONE: NoneDrafter()})
    for name, spec in drafters.items():
        model: Any = spec
        if isinstance(spec, tuple):
            model, own_tokenizer = spec
            check_same_vocabulary(name, vocabulary, Vocabulary.of(own_tokenizer))
        is_model = isinstance(model, torch.nn.Module)
        parts.drafters[name] = _draft_model(name, model, parts) if is_model else model
    return parts


def _draft_model(name: str, model: PreTrainedModel, parts: Parts) -> DraftModel:
    wrapped = LanguageModel(model, name)
    if wrapped.num_logits < parts.vocabulary.num_tokens:
        raise ConfigError(
            f"drafter '{name}' has {wrapped.num_logits} output tokens, the target's tokenizer "
            f"{parts.vocabulary.num_tokens}; use a drafter with the target's tokenizer"
        )
    check_packed_forward(wrapped)
    return DraftModel.from_model(name, wrapped, parts.build_context())


def give_chances(parts: Parts, calibration: Calibration) -> None:
    """Give the cascades the chances that were learned for their parts.

    Cascades of other parts keep the assumed chances; a policy that was learned with other parts is
    refused before.
    """
    for name, drafter in parts.drafters.items():
        names, chances = calibration.get(name, ((), None))
        if isinstance(drafter, Cascade) and chances is not None and names == tuple(drafter.parts):
            drafter.calibrate(chances)


def untrained_lookup(parts: Parts) -> str:
    """Return the drafter that `auto` is without a policy: the first `suffix_lookup`.

    If there is none, one with default settings is added as `suffix`, or under another name if that
    is taken.
    """
    for name, drafter in parts.drafters.items():
        if isinstance(drafter, SuffixLookup):
            return name
    name = BUILT_IN
    while name in parts.drafters:
        name = f"built-in-{name}"
    parts.drafters[name] = SuffixLookup(name, SuffixLookupSettings())
    parts.built_in = name
    return name


def policy_identity(parts: Parts) -> PolicyIdentity:
    """Return the identity that a policy must have been learned for to serve these parts."""
    return PolicyIdentity(
        target=parts.target.fingerprint(),
        tokenizer=parts.vocabulary.hash(),
        hidden_size=parts.target.hidden_size,
        drafters=parts.identities(),
    )
