"""A small drafter of every kind in the catalogue, and variants, for exactness tests: registering is
testing.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from paceline.drafting.bridged_drafters import Bridge
from paceline.drafting.cascade.drafter import Cascade
from paceline.drafting.cross_vocabulary import CrossVocabulary
from paceline.drafting.draft_length import StopSettings
from paceline.drafting.draft_model import DraftModel
from paceline.drafting.layer_skip import LayerSkip, LayerSkipSettings
from paceline.drafting.none import NoneDrafter
from paceline.drafting.prompt_lookup import PromptLookup, PromptLookupSettings
from paceline.drafting.suffix_lookup import SuffixLookup, SuffixLookupSettings
from paceline.drafting.trigram.answer_table import write_answer_table
from paceline.drafting.trigram.drafter import TrigramTree
from paceline.drafting.trigram.settings import TrigramTreeSettings
from paceline.drafting.union import Union
from paceline.models.language_model import LanguageModel
from paceline.store.answers import Answer, write_answers
from paceline.testing.tiny_models import perturbed, tiny_model
from support.reference import greedy_reference
from support.relabelled import relabelled

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from paceline.assembly import Parts
    from paceline.drafting.base import BuildContext, Drafter

    Make = Callable[[str, BuildContext], Drafter]


# With a float32 target, each proposes accepted and rejected tokens.


def _draft_model(name: str, context: BuildContext) -> Drafter:
    """Return the target with noise on its weights."""
    model = LanguageModel(perturbed(context.target.model, 0.05), name)
    return DraftModel.from_model(name, model, context)


def _prompt_lookup(name: str, context: BuildContext) -> Drafter:
    # a match of one token, so that random text has drafts too
    return PromptLookup(name, PromptLookupSettings(min_ngram=1))


def _suffix_lookup(name: str, context: BuildContext) -> Drafter:
    # enough draft tokens after a short match for trees with branches
    return SuffixLookup(name, SuffixLookupSettings(num_draft_tokens=6, length_offset=3))


def _trigram_tree(name: str, context: BuildContext) -> Drafter:
    """Return a drafter without a table, which learns each row's text."""
    return TrigramTree(name, TrigramTreeSettings(search="mcts", num_draft_tokens=8, depth=3))


def _suffix_answers(name: str, context: BuildContext) -> Drafter:
    with TemporaryDirectory() as folder:
        settings = SuffixLookupSettings(num_draft_tokens=6, length_offset=3, answers=Path(folder))
        _collect(settings.answers, context)
        return SuffixLookup.build(name, settings, context)


def _trigram_answers(name: str, context: BuildContext) -> Drafter:
    with TemporaryDirectory() as folder:
        settings = TrigramTreeSettings(depth=3, answers=Path(folder))
        _collect(settings.answers, context)
        return TrigramTree.build(name, settings, context)


def _collect(folder: Path | None, context: BuildContext) -> None:
    """Write the index of some greedy answers, which stays mapped when the folder is gone."""
    assert folder is not None
    prompts = [tuple(text.encode()) for text in ("a", "to be", "spam, spam and", "0 1 2 3")]
    model = context.target.model
    answers = [Answer(str(p), greedy_reference(model, p, 30).tokens) for p in prompts]
    made_with = context.vocabulary.hash(), context.target.fingerprint()
    write_answers(folder, answers, *made_with, 1000, write_answer_table)


def _layer_skip(name: str, context: BuildContext) -> Drafter:
    """Return the target without one MLP in the middle, between two attention layers."""
    middle = context.target.num_layers // 2 - 1
    settings = LayerSkipSettings(skip_mlp=(middle,), num_draft_tokens=5)
    return LayerSkip.build(name, settings, context)


def _cross_vocabulary(name: str, context: BuildContext) -> Drafter:
    """Return the target with noise on its weights and its tokens under other ids.

    Such a drafter has no encoder, so for a target with one it is a random model.
    """
    near = perturbed(context.target.model, 0.05)
    if context.target.encoder is not None:
        near = tiny_model("llama", vocab_size=context.target.num_logits)
    model, tokenizer = relabelled(near, context.tokenizer)
    bridge = Bridge.between(context.tokenizer, tokenizer, "shared")
    own = LanguageModel(model, name)
    return CrossVocabulary.from_model(name, own, StopSettings(), bridge, context)


def _union(name: str, context: BuildContext) -> Drafter:
    parts = {"lookup": _prompt_lookup("lookup", context), "near": _draft_model("near", context)}
    return Union(name, parts)


def _cascade(name: str, context: BuildContext) -> Drafter:
    parts = {"suffix": _suffix_lookup("suffix", context), "near": _draft_model("near", context)}
    return Cascade(name, parts)


EXAMPLES: Final[Mapping[str, Make]] = MappingProxyType(
    {
        NoneDrafter.kind: lambda name, context: NoneDrafter(name),
        DraftModel.kind: _draft_model,
        CrossVocabulary.kind: _cross_vocabulary,
        PromptLookup.kind: _prompt_lookup,
        SuffixLookup.kind: _suffix_lookup,
        TrigramTree.kind: _trigram_tree,
        LayerSkip.kind: _layer_skip,
        Union.kind: _union,
        Cascade.kind: _cascade,
    }
)


_VARIANTS: Final[Mapping[str, Make]] = MappingProxyType(
    {"suffix_answers": _suffix_answers, "trigram_answers": _trigram_answers}
)
_MAKERS: Final = {**EXAMPLES, **_VARIANTS}

# all but `none` and the draft models, which tests build themselves
OTHER_KINDS: Final = tuple(k for k in _MAKERS if k not in (NoneDrafter.kind, DraftModel.kind))


def add_examples(parts: Parts, without: Collection[str] = ()) -> Parts:
    """Add a drafter of each other kind, named as its kind, and the variants; return the parts."""
    for kind in OTHER_KINDS:
        if kind in without:
            continue
        parts.drafters[kind] = _MAKERS[kind](kind, parts.build_context())
    return parts
