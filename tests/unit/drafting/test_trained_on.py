"""What each kind of drafter knows of its training prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from paceline.config import ModelSection, Section
from paceline.contracts import Drafts
from paceline.drafting.base import Drafter
from paceline.drafting.layer_skip import LayerSkip, LayerSkipSettings
from paceline.drafting.none import NoneDrafter
from paceline.drafting.prompt_lookup import PromptLookup, PromptLookupSettings
from paceline.drafting.suffix_lookup import SuffixLookup, SuffixLookupSettings
from paceline.drafting.trigram.drafter import TrigramTree
from paceline.drafting.trigram.settings import TrigramTreeSettings
from paceline.drafting.union import Union
from paceline.models.loading import load_language_model
from paceline.models.sublayers import LayerSubset
from paceline.store import TrainedOn
from paceline.testing.tiny_models import perturbed, tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.contracts import RowView

ZOO = Path(__file__).parents[3] / "zoo"


class Own(Drafter):
    """A user's drafter that says nothing of its training."""

    kind = "own"
    Settings = Section

    def propose(self, rows: Sequence[RowView], limits: Sequence[int]) -> Drafts:
        return Drafts(torch.empty((len(rows), 0), dtype=torch.int64), [0] * len(rows))


class Taught(Own):
    """A user's drafter that knows its training prompts."""

    def __init__(self, name: str, *prompts: str) -> None:
        super().__init__(name, 4)
        self._record = TrainedOn.of(prompts)

    def trained_on(self) -> TrainedOn:
        return self._record


def lookup() -> PromptLookup:
    return PromptLookup("lookup", PromptLookupSettings())


UNTRAINED: list[Drafter] = [
    NoneDrafter(),
    lookup(),
    SuffixLookup("suffix", SuffixLookupSettings()),
    TrigramTree("tree", TrigramTreeSettings()),
]


@pytest.mark.parametrize("drafter", UNTRAINED, ids=lambda drafter: drafter.kind)
def test_drafters_that_learn_nothing_in_advance_were_trained_on_nothing(drafter: Drafter) -> None:
    found = drafter.trained_on()
    assert found is not None
    assert len(found) == 0


def test_layers_chosen_by_hand_are_no_training_and_searched_ones_are_unknown() -> None:
    target: Any = None  # not run here
    by_hand = LayerSkipSettings(skip_mlp=(1,))
    searched = LayerSkipSettings(skip_set=Path("skip.json"))
    found = LayerSkip("skip", target, LayerSubset(), by_hand).trained_on()
    assert found is not None
    assert len(found) == 0
    assert LayerSkip("skip", target, LayerSubset(), searched).trained_on() is None


def test_a_table_made_from_texts_is_of_unknown_prompts() -> None:
    assert TrigramTree("tree", TrigramTreeSettings(), table_hash="a hash").trained_on() is None


def test_a_drafter_of_parts_was_trained_on_what_its_parts_were() -> None:
    whole = Union("both", {"a": Taught("a", "x", "y"), "b": Taught("b", "y", "z"), "c": lookup()})
    found = whole.trained_on()
    assert found is not None
    assert len(found) == 3
    assert all(prompt in found for prompt in "xyz")
    unknown = Union("both", {"a": Taught("a", "x"), "own": Own("own", 4)})
    assert unknown.trained_on() is None
    assert Own("own", 4).trained_on() is None


def test_a_draft_model_reads_the_record_in_its_folder(tmp_path: Path) -> None:
    model = perturbed(tiny_model(context=32), 0.1)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    section = ModelSection(model=str(tmp_path), device="cpu")
    assert load_language_model(section, "draft").trained_on is None
    TrainedOn.of(["a", "b"]).save(tmp_path)
    found = load_language_model(section, "draft").trained_on
    assert found is not None
    assert "b" in found
    assert "c" not in found


def test_the_bundled_drafters_know_their_prompts() -> None:
    section = ModelSection(model=str(ZOO / "draft-math"), device="cpu")
    found = load_language_model(section, "math").trained_on
    assert found is not None
    assert len(found) == 5990
