"""transformers' assisted decoding with paceline's drafters: its text is unchanged, drafts are used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.examples import add_examples
from transformers import GenerationConfig, LogitsProcessorList, WatermarkingConfig
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from paceline.assembly import Pace, build_from_objects
from paceline.config import Config, ModelSection
from paceline.contracts import SamplingParams
from paceline.drafting.base import Needs
from paceline.drafting.draft_replay import SimpleRow
from paceline.errors import ConfigError, RequestError
from paceline.integrations import hf
from paceline.integrations.candidates import first_path
from paceline.testing.scripted import ScriptedTree
from paceline.testing.tiny_models import perturbed, tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from paceline.assembly import Parts
    from paceline.contracts import PromptRecord
    from paceline.drafting.base import Drafter

PROMPT = torch.tensor([[9, 40, 7, 7, 40, 9, 40, 7]])


def parts_of(model: PreTrainedModel, **drafters: Any) -> Parts:
    placeholder = Config(target=ModelSection(model="in memory"))
    return add_examples(build_from_objects(model, byte_tokenizer(), drafters, placeholder))


class Guided(UnbatchedClassifierFreeGuidanceLogitsProcessor):
    """A processor with its own cache between calls."""

    def __init__(self) -> None:
        pass


def from_text(drafter: Drafter) -> bool:
    return not drafter.needs.target_weights


class Counted:
    """A counter of a drafter's proposals."""

    def __init__(self, drafter: Drafter, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_drafted = self.num_calls = 0
        inner = drafter.propose

        def propose(rows: Sequence[Any], limits: Sequence[int]) -> Any:
            drafts = inner(rows, limits)
            self.num_calls, self.last = self.num_calls + 1, drafts
            self.num_drafted += drafts.lengths[0]
            return drafts

        monkeypatch.setattr(drafter, "propose", propose)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
def test_no_drafter_changes_the_greedy_text(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(architecture)
    parts = parts_of(model, noisy=perturbed(model, 0.05))
    settings = {"do_sample": False, "max_new_tokens": 32, "repetition_penalty": 1.1}
    expected = model.generate(PROMPT, **settings)

    for name, drafter in parts.drafters.items():
        if not from_text(drafter):
            continue
        counted = Counted(drafter, monkeypatch)
        found = model.generate(PROMPT, **settings, custom_generate=hf.assisted, drafter=drafter)
        assert torch.equal(found, expected), name
        assert counted.num_drafted > 0 or name == "none"
        if name == "noisy":
            assert counted.num_calls < 24  # of 32 tokens: drafts were taken
            assert not drafter._states
    assert "_get_candidate_generator" not in vars(model)


def test_the_zoo_writes_its_text_after_padding_and_into_a_streamer(
    zoo_target: Parts, prompts: list[PromptRecord]
) -> None:
    class RecordingStreamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    model, tokenizer = zoo_target.target.model, zoo_target.tokenizer
    ids = torch.tensor([[0] * 5 + tokenizer(prompts[2].prompt)["input_ids"]])
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 32}
    expected = model.generate(ids, **settings)
    drafter = zoo_target.drafters["draft-math"]
    recorded = RecordingStreamer()

    found = model.generate(
        ids, **settings, custom_generate=hf.assisted, drafter=drafter, streamer=recorded
    )

    assert torch.equal(found, expected)
    assert recorded.tokens == expected[0].tolist()
    assert recorded.ended


def test_of_a_tree_the_path_of_first_children_is_proposed() -> None:
    model = tiny_model("llama")
    text = model.generate(PROMPT, do_sample=False, max_new_tokens=24)[0].tolist()

    def grow(tokens: Sequence[int], limit: int) -> tuple[list[int], list[int]]:
        """Return a tree whose first children are right and have a wrong sibling each."""
        right = text[len(tokens) : len(tokens) + min(limit, 3)]
        nodes, parents, last = [], [], -1
        for token in right:
            nodes += [token, (token + 1) % 259]
            parents += [last, last]
            last = len(nodes) - 2
        return nodes, parents

    tree = ScriptedTree("tree", grow)
    found = model.generate(
        PROMPT, do_sample=False, max_new_tokens=24, custom_generate=hf.assisted, drafter=tree
    )
    assert found[0].tolist() == text

    drafts = tree.propose([SimpleRow(text[:8], 8)], [9])
    assert first_path(drafts) == [0, 2, 4]
    assert [int(drafts.tokens[0, k]) for k in first_path(drafts)] == text[8:11]


def test_a_candidate_generator_can_be_used_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    drafter = parts_of(model, same=model).drafters["same"]
    expected = model.generate(PROMPT, do_sample=False, max_new_tokens=12)

    with hf.candidate_generator(drafter, max_length=20) as candidates:
        ids, logits = candidates.get_candidates(PROMPT)
        assert ids[0].tolist() == expected[0, : 8 + drafter.num_draft_tokens].tolist()
        assert logits is None  # greedy: transformers compares tokens
        ids, _ = candidates.get_candidates(expected[:, :18])
        assert ids.shape[1] == 19  # the target writes the last token itself
        same, _ = candidates.get_candidates(expected[:, :19])
        assert same.shape[1] == 19
    assert not drafter._states

    sampled = SamplingParams(temperature=1.0, method="residual", seed=4)
    counted = Counted(drafter, monkeypatch)
    with hf.candidate_generator(drafter, max_length=20, sampling=sampled) as candidates:
        ids, logits = candidates.get_candidates(PROMPT)
    assert logits.shape == (1, drafter.num_draft_tokens, 259)
    assert torch.allclose(logits.softmax(-1), counted.last.probs)


def test_a_drafter_that_reads_the_targets_states_is_refused() -> None:
    model = tiny_model("llama")
    drafter = parts_of(model, same=model).drafters["same"]
    drafter.needs = Needs(target_weights=True)  # type: ignore[misc]
    with pytest.raises(ConfigError, match="reads the target's own states"):
        hf.candidate_generator(drafter, max_length=20)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"guidance_scale": 1.5},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "high"},
        {"force_words_ids": [[5]]},
        {"constraints": [object()]},
        {"watermarking_config": WatermarkingConfig()},
        {"encoder_repetition_penalty": 1.2},
        {"num_assistant_tokens": 7},
        {"assistant_ensemble_weight": 0.5},
        {"logits_processor": LogitsProcessorList([Guided()])},
        {"token_type_ids": torch.zeros(1, PROMPT.shape[1], dtype=torch.int64)},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_generate_and_assisted_refuse_with_the_same_message(settings: dict[str, Any]) -> None:
    model = tiny_model("gpt2")
    parts = parts_of(model, noisy=perturbed(model, 0.1))
    pace, drafter = Pace(parts), parts.drafters["noisy"]
    config = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0)
    inputs: dict[str, Any] = {"input_ids": PROMPT, "generation_config": config}
    for name, value in settings.items():
        if hasattr(config, name):  # set directly: transformers checks some, and warns of others
            setattr(config, name, value)
        else:
            inputs[name] = value
    messages = []
    for custom, given in ((hf.generate, {"pace": pace}), (hf.assisted, {"drafter": drafter})):
        with pytest.raises(RequestError) as caught:
            model.generate(**inputs, **given, custom_generate=custom)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert next(iter(settings)) in messages[0] or "Guid" in messages[0]


def test_rows_and_a_missing_drafter_are_refused() -> None:
    model = tiny_model("llama")
    drafter = parts_of(model, same=model).drafters["same"]
    with pytest.raises(RequestError, match="takes one row"):
        model.generate(
            PROMPT.repeat(2, 1), max_new_tokens=4, custom_generate=hf.assisted, drafter=drafter
        )
    with pytest.raises(RequestError, match="needs drafter="):
        model.generate(PROMPT, max_new_tokens=4, custom_generate=hf.assisted)
    for other in ({"assistant_model": perturbed(model, 0.1)}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(
            RequestError, match=f"drafter and {next(iter(other))} contradict each other"
        ):
            model.generate(
                PROMPT, max_new_tokens=4, custom_generate=hf.assisted, drafter=drafter, **other
            )
