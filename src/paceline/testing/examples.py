"""A small drafter of every kind in the catalogue, for exactness tests: registering is testing."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from paceline.drafting.cross_vocabulary import Bridge, CrossVocabulary
from paceline.drafting.draft_model import DraftModel
from paceline.drafting.layer_skip import LayerSkip, LayerSkipSettings
from paceline.drafting.none import NoneDrafter
from paceline.drafting.prompt_lookup import PromptLookup, PromptLookupSettings
from paceline.drafting.stops import StopSettings
from paceline.drafting.suffix_lookup import SuffixLookup, SuffixLookupSettings
from paceline.drafting.trigram.drafter import TrigramTree, TrigramTreeSettings
from paceline.drafting.union import Union
from paceline.models.language_model import LanguageModel
from paceline.testing.relabelled import relabelled
from paceline.testing.tiny_models import perturbed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from paceline.assembly import Parts
    from paceline.drafting.base import Drafter, Surroundings

    Make = Callable[[str, Surroundings], Drafter]


# With a float32 target, each proposes accepted and rejected tokens.


def _draft_model(name: str, around: Surroundings) -> Drafter:
    """Return the target with noise on its weights."""
    model = LanguageModel(perturbed(around.target.model, 0.05), name)
    return DraftModel.beside(name, model, 4, around)


def _prompt_lookup(name: str, around: Surroundings) -> Drafter:
    # a match of one token, so that random text has drafts too
    return PromptLookup(name, PromptLookupSettings(min_ngram=1))


def _suffix_lookup(name: str, around: Surroundings) -> Drafter:
    # enough draft tokens after a short match for trees with branches
    return SuffixLookup(name, SuffixLookupSettings(num_draft_tokens=6, length_offset=3))


def _trigram_tree(name: str, around: Surroundings) -> Drafter:
    """Return a drafter without a table, which learns each row's text."""
    return TrigramTree(name, TrigramTreeSettings(search="mcts", num_draft_tokens=8, depth=3))


def _layer_skip(name: str, around: Surroundings) -> Drafter:
    """Return the target without one MLP in the middle, between two attention layers."""
    middle = around.target.num_layers // 2 - 1
    settings = LayerSkipSettings(skip_mlp=(middle,), num_draft_tokens=5)
    return LayerSkip.build(name, settings, around)


def _cross_vocabulary(name: str, around: Surroundings) -> Drafter:
    """Return the target with noise on its weights and its tokens under other ids."""
    model, tokenizer = relabelled(perturbed(around.target.model, 0.05), around.tokenizer)
    bridge = Bridge.between(around.tokenizer, tokenizer, "shared")
    own = LanguageModel(model, name)
    return CrossVocabulary.beside(name, own, StopSettings(), bridge, around)


def _union(name: str, around: Surroundings) -> Drafter:
    parts = {"lookup": _prompt_lookup("lookup", around), "near": _draft_model("near", around)}
    return Union(name, parts)


EXAMPLES: Final[Mapping[str, Make]] = MappingProxyType(
    {
        NoneDrafter.kind: lambda name, around: NoneDrafter(name),
        DraftModel.kind: _draft_model,
        CrossVocabulary.kind: _cross_vocabulary,
        PromptLookup.kind: _prompt_lookup,
        SuffixLookup.kind: _suffix_lookup,
        TrigramTree.kind: _trigram_tree,
        LayerSkip.kind: _layer_skip,
        Union.kind: _union,
    }
)


# kinds other than `none` and the draft models, which tests build themselves
OTHER_KINDS: Final = tuple(k for k in EXAMPLES if k not in (NoneDrafter.kind, DraftModel.kind))


def add_examples(parts: Parts) -> Parts:
    """Add a drafter of each other kind, named as its kind; return the parts."""
    for kind in OTHER_KINDS:
        parts.drafters[kind] = EXAMPLES[kind](kind, parts.surroundings())
    return parts
