"""The packed forward gives transformers' logits for rows, trees, grown caches and reused slots."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from transformers import BartConfig, BartForCausalLM, CpmAntConfig, CpmAntForCausalLM

from paceline.errors import ModelError
from paceline.models import attention, packing
from paceline.models.cache import BLOCK
from paceline.models.forward_choice import ForwardChoice
from paceline.models.language_model import LanguageModel
from paceline.models.packing import Span
from paceline.models.self_checks import check_packed_forward
from paceline.testing.tiny_models import (
    ARCHITECTURES,
    FAMILIES,
    LEAN_ARCHITECTURES,
    perturbed,
    tiny_model,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

CONTEXT = 3 * BLOCK
TOLERANCE = 2e-4


# one of each kind; of the others the exactness tests hold the text
NARROW = ("cohere2", "granite_moe_shared", "falcon", "falcon_alibi", "gpt_neo", "bloom", "mpt")
FORWARDS = [
    *((architecture, "transformers") for architecture in (*ARCHITECTURES, *NARROW)),
    *((a, own) for a in LEAN_ARCHITECTURES for own in ("lean", "compiled")),
    *(
        pytest.param((family, "transformers"), marks=pytest.mark.wide)
        for family in FAMILIES
        if family not in NARROW
    ),
]


@pytest.fixture(params=FORWARDS, ids="-".join)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    architecture, forward = request.param
    return LanguageModel(tiny_model(architecture, context=CONTEXT), architecture, forward)


@pytest.fixture
def llama() -> LanguageModel:
    return LanguageModel(tiny_model("llama", context=CONTEXT), "llama")


def text(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(259, (length,), generator=generator).tolist()


def plain(model: LanguageModel, tokens: Sequence[int]) -> torch.Tensor:
    """Return transformers' own logits at the last token."""
    with torch.inference_mode():
        return model.model(input_ids=torch.tensor([list(tokens)])).logits[0, -1]


class Rows:
    """Rows that are fed step by step and compared with a plain forward over their whole texts."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.texts: dict[int, list[int]] = {}

    def feed(self, pieces: dict[int, list[int]]) -> None:
        spans = [Span(s, len(self.texts.get(s, [])), len(p)) for s, p in pieces.items()]
        flat = torch.tensor([token for piece in pieces.values() for token in piece])
        with torch.inference_mode():
            logits = self.model.unembed(self.model.forward(flat, spans))
        ends = torch.tensor([len(piece) for piece in pieces.values()]).cumsum(0) - 1
        for (slot, piece), row in zip(pieces.items(), logits[ends], strict=True):
            self.texts.setdefault(slot, []).extend(piece)
            expected = plain(self.model, self.texts[slot])
            torch.testing.assert_close(row, expected, rtol=0, atol=TOLERANCE)


def test_ragged_rows_do_not_see_one_another(model: LanguageModel) -> None:
    a, b, c = (model.acquire() for _ in range(3))
    rows = Rows(model)

    rows.feed({a: text(9), b: text(2, 1), c: text(5, 2)})
    rows.feed({a: text(1, 3), b: text(1, 4), c: text(1, 5)})  # one attention call
    rows.feed({a: text(4, 6), b: text(1, 7), c: text(3, 8)})
    rows.feed({c: text(2, 9), a: text(2, 10)})  # any subset in any order
    rows.feed({b: text(3, 11), c: text(3, 12)})


def test_growing_caches_keep_what_they_hold(model: LanguageModel) -> None:
    rows = Rows(model)
    a = model.acquire()
    rows.feed({a: text(BLOCK - 3)})
    b = model.acquire()  # another slot, while a is filled
    rows.feed({a: text(2, 1), b: text(7, 2)})
    rows.feed({a: text(9, 3), b: text(1, 4)})  # past the first block
    rows.feed({b: text(2 * BLOCK, 5)})
    c, d = model.acquire(), model.acquire()
    rows.feed({c: text(3, 6), d: text(4, 7), a: text(1, 8)})
    rows.feed({slot: text(1, 9 + slot) for slot in (a, b, c, d)})


def test_the_last_position_of_the_context_can_be_used(model: LanguageModel) -> None:
    rows = Rows(model)
    slot = model.acquire()

    rows.feed({slot: text(CONTEXT - 2)})
    rows.feed({slot: text(2, 1)})


def test_a_reused_slot_remembers_nothing_of_the_row_before(model: LanguageModel) -> None:
    a, b, c = (model.acquire() for _ in range(3))
    rows = Rows(model)
    rows.feed({a: text(20), b: text(30, 1), c: text(10, 2)})

    model.release(b)
    again = model.acquire()
    del rows.texts[b]

    assert again == b
    rows.feed({a: text(1, 3), b: text(1, 4), c: text(1, 5)})
    rows.feed({a: text(2, 6), b: text(2, 7), c: text(2, 8)})


def test_rolling_back_is_forgetting_positions(model: LanguageModel) -> None:
    slot = model.acquire()
    rows = Rows(model)
    rows.feed({slot: text(12)})
    rows.feed({slot: text(5, 1)})

    del rows.texts[slot][13:]

    rows.feed({slot: text(3, 2)})


def test_a_tree_path_can_be_moved_into_place(model: LanguageModel) -> None:
    slot = model.acquire()
    prompt, tree = text(10), text(5, 1)
    # 0 is the root, 1 and 3 its children, 2 the child of 1, 4 the child of 3
    parents = [-1, 0, -1, 2]
    rows = Rows(model)
    rows.feed({slot: prompt})
    with torch.inference_mode():
        hidden = model.forward(torch.tensor(tree), [Span(slot, 10, 5)], [parents])
        logits = model.unembed(hidden)
        model.cache.copy_positions(slot, [10, 13, 14], 10)

    for path in ([0], [0, 1], [0, 1, 2], [0, 3], [0, 3, 4]):
        expected = plain(model, [*prompt, *(tree[i] for i in path)])
        torch.testing.assert_close(logits[path[-1]], expected, rtol=0, atol=TOLERANCE)

    # the path that was accepted
    rows.texts[slot] += [tree[0], tree[3], tree[4]]
    rows.feed({slot: text(2, 2)})


# --- the self-check -------------------------------------------------------------------------------


def test_supported_architectures_pass_the_self_check(model: LanguageModel) -> None:
    check_packed_forward(model)

    assert model.cache.num_bytes() == 0, "the check left something in the model's own cache"


def siblings_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    visible = packing._visible

    def wrong(run: packing.Run, *rest: object) -> torch.Tensor:
        run.ancestors = None
        return visible(run, *rest)

    monkeypatch.setattr(packing, "_visible", wrong)


def windows_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = attention.RowBatch.mask

    def wrong(
        self: attention.RowBatch, run: packing.Run, window: int | None, *rest: object
    ) -> object:
        return mask(self, run, None, *rest)

    monkeypatch.setattr(attention.RowBatch, "mask", wrong)


def windows_are_one_too_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = attention.RowBatch.mask

    def wrong(
        self: attention.RowBatch, run: packing.Run, window: int | None, *rest: object
    ) -> object:
        return mask(self, run, window and window + 1, *rest)

    monkeypatch.setattr(attention.RowBatch, "mask", wrong)


def rows_see_each_others_length(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(run: packing.Run, window: int | None, device: torch.device) -> torch.Tensor:
        return torch.ones(len(run.slots), run.width, run.length, dtype=torch.bool)

    monkeypatch.setattr(packing, "_visible", wrong)


def positions_ignore_the_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(batch: attention.RowBatch) -> torch.Tensor:
        parts = [s + torch.arange(run.width) for run in batch.runs for s in run.starts]
        return torch.cat(parts)

    monkeypatch.setattr(attention.RowBatch, "positions", wrong)


def scores_are_not_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = attention._attend
    monkeypatch.setattr(attention, "_attend", lambda *given: attend(*given[:-1], None))


def scores_are_not_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = attention._attend
    monkeypatch.setattr(attention, "_attend", lambda *given: attend(*given) * torch.nan)


@pytest.mark.parametrize(
    ("plant", "architecture"),
    [
        (siblings_see_each_other, "llama"),
        (siblings_see_each_other, "gpt2"),
        (rows_see_each_others_length, "gpt_neox"),
        (positions_ignore_the_tree, "gpt2"),
        (positions_ignore_the_tree, "llama"),
        (windows_are_ignored, "mistral"),
        (windows_are_one_too_wide, "mistral"),
        (windows_are_ignored, "gemma2"),
        (scores_are_not_capped, "gemma2"),
        (scores_are_not_numbers, "llama"),
    ],
)
def test_the_self_check_refuses_a_planted_mismatch(
    plant: object, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the plants are in code that runs in torch
    forward: ForwardChoice = "lean" if architecture in LEAN_ARCHITECTURES else "transformers"
    model = LanguageModel(tiny_model(architecture), "target", forward)
    plant(monkeypatch)

    with pytest.raises(ModelError, match=r"target: .* differs from transformers'.*not supported"):
        check_packed_forward(model)


@pytest.mark.parametrize("architecture", ["gemma2", "cohere", "granite"])
def test_the_self_check_refuses_the_logits_of_the_output_layer_alone(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LanguageModel(tiny_model(architecture), "target", "transformers")
    layer = model.model.get_output_embeddings()
    monkeypatch.setattr(model._forward, "_head", layer)

    with pytest.raises(ModelError, match="not supported"):
        check_packed_forward(model)


def biases_by_the_place_in_the_cache(run: packing.Run, device: torch.device) -> torch.Tensor:
    return torch.arange(run.length, device=device)


@pytest.mark.parametrize("architecture", ["bloom", "mpt", "falcon_alibi"])
def test_the_self_check_refuses_biases_that_ignore_the_tree(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LanguageModel(tiny_model(architecture), "target")
    monkeypatch.setattr(packing, "_key_positions", biases_by_the_place_in_the_cache)

    with pytest.raises(ModelError, match="not supported"):
        check_packed_forward(model)


def test_architectures_that_do_something_else_are_refused() -> None:
    counts_positions_itself = BartForCausalLM(
        BartConfig(
            vocab_size=50,
            d_model=32,
            decoder_layers=1,
            decoder_attention_heads=4,
            decoder_ffn_dim=64,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
            forced_eos_token_id=None,
        )
    )
    with pytest.raises(ModelError, match=r"BartForCausalLM differs .* not supported"):
        check_packed_forward(LanguageModel(counts_positions_itself, "target"))

    endless = CpmAntForCausalLM(
        CpmAntConfig(
            vocab_size=50,
            hidden_size=32,
            num_attention_heads=4,
            dim_head=8,
            dim_ff=64,
            num_hidden_layers=1,
        )
    )
    with pytest.raises(ModelError, match="max_position_embeddings"):
        LanguageModel(endless, "target")


def test_too_short_a_context_for_the_self_check_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="context of 8 tokens is too short"):
        check_packed_forward(LanguageModel(tiny_model("gpt2", context=8), "target"))


# --- the model around it --------------------------------------------------------------------------


def test_a_failed_forward_leaves_the_attention_as_it_was() -> None:
    model = LanguageModel(tiny_model("llama"), "llama", "transformers")
    before = model.model.config._attn_implementation

    with pytest.raises(IndexError):
        model.forward(torch.tensor([10**6]), [Span(model.acquire(), 0, 1)])

    assert model.model.config._attn_implementation == before


def test_two_roles_of_the_same_weights_keep_their_rows_apart(llama: LanguageModel) -> None:
    other = LanguageModel(llama.model, "drafter")
    mine, theirs = Rows(llama), Rows(other)
    a, b = llama.acquire(), other.acquire()

    mine.feed({a: text(8)})
    theirs.feed({b: text(11, 1)})
    mine.feed({a: text(3, 2)})


def test_fingerprints_tell_weights_apart_but_not_precisions() -> None:
    model = tiny_model("llama")
    fingerprint = LanguageModel(model, "a").fingerprint()

    assert LanguageModel(tiny_model("llama"), "b").fingerprint() == fingerprint
    assert LanguageModel(perturbed(model, 0.1), "c").fingerprint() != fingerprint
    assert LanguageModel(tiny_model("mistral"), "d").fingerprint() != fingerprint
    assert LanguageModel(model.to(torch.bfloat16), "e").fingerprint() == fingerprint


def test_a_rope_that_changes_with_length_bounds_the_context() -> None:
    model = tiny_model("llama", context=64)
    model.config.rope_parameters = {
        "rope_type": "longrope",
        "original_max_position_embeddings": 16,
    }

    assert LanguageModel(model, "target").context_length == 16
