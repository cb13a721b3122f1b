"""Weights that change in place after load: the text is that of the new ones, or an error says why.

The compiled forward runs on packed copies, and caches of past prompts hold what old weights computed.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.examples import add_examples

import paceline
from paceline.assembly import Pace, build_from_objects
from paceline.config import Config, ModelSection
from paceline.errors import DecodingError
from paceline.integrations import hf
from paceline.models.products import joined
from paceline.models.weights_monitor import WeightsMonitor
from paceline.testing.tiny_models import perturbed, tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

# long enough for whole blocks of it to be kept for other prompts that begin alike
PROMPT = "the weights of a model may change between two requests, in one of many ways; "
IDS: list[int] = byte_tokenizer()(PROMPT)["input_ids"]
TEN = {"max_new_tokens": 10, "ignore_eos": True}


def by_transformers(model: Any, **more: Any) -> list[int]:
    x = torch.tensor([IDS])
    call = {"attention_mask": torch.ones_like(x), "do_sample": False, "max_new_tokens": 10}
    output = model.generate(input_ids=x, pad_token_id=0, **call, **more)
    tokens: list[int] = output[0, len(IDS) :].tolist()
    return tokens


def noise(weight: torch.Tensor) -> torch.Tensor:
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.3


@torch.no_grad()
def write_in_place(model: PreTrainedModel) -> None:
    for weight in model.parameters():
        weight.add_(noise(weight))


def write_through_data(model: PreTrainedModel) -> None:
    for weight in model.parameters():
        weight.data.add_(noise(weight))


def exchange_data(model: PreTrainedModel) -> None:
    for weight in model.parameters():
        weight.data = weight.data + noise(weight)


def load_a_state(model: PreTrainedModel) -> None:
    model.load_state_dict({n: w + noise(w) for n, w in model.state_dict().items()})


def exchange_parameters(model: PreTrainedModel) -> None:
    model.load_state_dict({n: w + noise(w) for n, w in model.state_dict().items()}, assign=True)


def exchange_a_layer(model: PreTrainedModel) -> None:
    changed = copy.deepcopy(model.get_output_embeddings())
    changed.weight.data = changed.weight.data + noise(changed.weight)
    model.set_output_embeddings(changed)


def step_of_an_optimizer(model: PreTrainedModel) -> None:
    x = torch.tensor([IDS[:20]])
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    model(input_ids=x, labels=x).loss.backward()
    optimizer.step()


CHANGES = [
    write_in_place,
    write_through_data,
    exchange_data,
    load_a_state,
    exchange_parameters,
    exchange_a_layer,
    step_of_an_optimizer,
]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # packed; run as it is
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_text_is_that_of_the_new_weights(
    change: Callable[[PreTrainedModel], None], architecture: str
) -> None:
    model = tiny_model(architecture)
    pace = paceline.load(target=model, tokenizer=byte_tokenizer(), drafters={})
    before = by_transformers(model)
    assert pace.complete(PROMPT, drafter="none", **TEN).token_ids == before
    assert len(pace.engine.prefixes) > 0

    change(model)

    expected = by_transformers(model)
    assert expected != before
    assert pace.complete(PROMPT, drafter="none", **TEN).token_ids == expected
    change_back = perturbed(model, 0.2).state_dict()
    model.load_state_dict(change_back)
    expected = by_transformers(model)
    assert by_transformers(model, custom_generate=hf.generate, pace=pace) == expected
    assert "".join(pace.stream_text(PROMPT, drafter="none", **TEN)) == pace.parts.text(expected)


def test_a_buffer_that_a_checkpoint_holds_is_a_weight() -> None:
    model = tiny_model("llama")
    model.model.register_buffer("bias_of_experts", torch.zeros(4))
    model.model.register_buffer("angles", torch.zeros(4), persistent=False)
    controller = WeightsMonitor(model)

    model.model.angles.add_(1)
    model.model.angles = torch.ones(4)
    assert not controller.has_changed()
    model.model.bias_of_experts.add_(1)
    assert controller.has_changed()


def test_nothing_drops_out_of_a_model_that_is_trained_between_requests() -> None:
    model = tiny_model("gpt2")
    pace = paceline.load(target=model, tokenizer=byte_tokenizer(), drafters={})
    expected = by_transformers(model)
    model.train()
    model.transformer.h[0].eval()  # frozen by its owner

    assert pace.complete(PROMPT, drafter="none", **TEN).token_ids == expected
    assert model.training
    evaluating = [name for name, m in model.named_modules() if not m.training]
    assert evaluating
    assert all(name.startswith("transformer.h.0") for name in evaluating)


def test_every_kind_of_drafter_goes_on_with_the_new_weights() -> None:
    model = tiny_model("llama")
    config = Config(target=ModelSection(model="in memory"))
    parts = add_examples(build_from_objects(model, byte_tokenizer(), {}, config))
    pace = Pace(parts)
    for arm in pace.drafters:
        pace.complete(PROMPT, drafter=arm, **TEN)
    write_in_place(model)
    expected = by_transformers(model)
    for arm in pace.drafters:
        assert pace.complete(PROMPT, drafter=arm, **TEN).token_ids == expected, arm


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_drafter_drafts_by_its_new_weights(architecture: str) -> None:
    model = tiny_model(architecture)
    drafter = tiny_model(architecture, seed=9)
    pace = paceline.load(target=model, tokenizer=byte_tokenizer(), drafters={"small": drafter})
    before = pace.complete(PROMPT, drafter="small", **TEN)
    drafter.load_state_dict(model.state_dict())
    after = pace.complete(PROMPT, drafter="small", **TEN)
    assert after.token_ids == before.token_ids
    assert sum(r.accepted for r in before.rounds) < sum(r.drafted for r in before.rounds)
    assert sum(r.accepted for r in after.rounds) == sum(r.drafted for r in after.rounds)


def test_a_drafter_that_changes_while_it_drafts_costs_speed_alone() -> None:
    model = tiny_model("llama")
    drafter = perturbed(model, 0.01)
    pace = paceline.load(target=model, tokenizer=byte_tokenizer(), drafters={"small": drafter})
    requests = [pace.request(PROMPT, id=id, drafter="small", **TEN) for id in ("old", "new")]
    first = pace.engine.submit(requests[0])
    while not any(p.ticket == first and p.new_tokens for p in pace.engine.step()):
        pass
    write_in_place(drafter)
    pace.engine.submit(requests[1])
    done = []
    while len(done) < 2:
        done += [p.completion for p in pace.engine.step() if p.completion is not None]
    assert [c.token_ids for c in done] == [by_transformers(model)] * 2


def test_a_request_in_flight_fails_by_name_and_the_next_is_right() -> None:
    model = tiny_model("llama")
    pace = paceline.load(target=model, tokenizer=byte_tokenizer(), drafters={})
    engine = pace.engine
    engine.submit(pace.request(PROMPT, drafter="none", max_new_tokens=40, ignore_eos=True))
    engine.step()
    write_in_place(model)
    ticket = engine.submit(pace.request(PROMPT, drafter="none", **TEN))
    done = {}
    while ticket not in done:
        done |= {p.ticket: p.completion for p in engine.step() if p.completion is not None}
    old = next(c for t, c in done.items() if t != ticket)
    assert old.error is not None and "weights changed while it was decoded" in old.error
    assert done[ticket].token_ids == by_transformers(model)
    assert engine.num_rows == engine.num_waiting == 0


def test_a_model_that_changed_in_more_than_values_must_be_loaded_again() -> None:
    model = tiny_model("llama")
    pace = paceline.load(target=model, tokenizer=byte_tokenizer(), drafters={})
    model.to(torch.bfloat16)
    with pytest.raises(DecodingError, match=r"target: the model changed .* load it again"):
        pace.complete(PROMPT, drafter="none", **TEN)
    model.to(torch.float32)
    expected = by_transformers(model)
    assert pace.complete(PROMPT, drafter="none", **TEN).token_ids == expected

    drafter = perturbed(model, 0.05)
    pace = paceline.load(target=model, tokenizer=byte_tokenizer(), drafters={"small": drafter})
    drafter.to(torch.bfloat16)
    with pytest.raises(DecodingError, match=r"drafter 'small': .* load it again"):
        pace.complete(PROMPT, drafter="small", **TEN)
    assert pace.complete(PROMPT, drafter="none", **TEN).token_ids == expected


# PEFT 0.21 asks transformers 5.23 in a way that it calls old
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_an_adapter_that_is_switched_off_is_noticed() -> None:
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model: Any = get_peft_model(tiny_model("llama"), config)  # type: ignore[arg-type]
    pace = paceline.load(target=model, tokenizer=byte_tokenizer(), drafters={})
    with_adapter = by_transformers(model)
    assert pace.complete(PROMPT, drafter="none", **TEN).token_ids == with_adapter
    with model.disable_adapter():
        without = by_transformers(model)
        assert pace.complete(PROMPT, drafter="none", **TEN).token_ids == without
    assert with_adapter != without
    assert pace.complete(PROMPT, drafter="none", **TEN).token_ids == with_adapter


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_weights_that_stay_as_they_are_are_not_taken_again(architecture: str) -> None:
    model = tiny_model(architecture)
    pace = paceline.load(
        target=model, tokenizer=byte_tokenizer(), drafters={"small": perturbed(model, 0.1)}
    )
    targets = pace.parts.target, pace.parts.drafters["small"].model  # type: ignore[attr-defined]
    before = [target._forward for target in targets]
    for arm in ("none", "small"):
        pace.complete(PROMPT, drafter=arm, **TEN)
        by_transformers(model, custom_generate=hf.generate, pace=pace, drafter=arm)
        model.train()(torch.tensor([IDS[:9]])).logits.sum().backward()
        model.eval()
    assert [target._forward for target in targets] == before
    assert len(pace.engine.prefixes) > 0


def test_a_watch_of_what_is_no_module_never_changes() -> None:
    assert not WeightsMonitor(object()).has_changed()


def test_a_second_product_leaves_fused_weights_where_the_first_has_put_them() -> None:
    """On CUDA the layers' weights become views of the fused one; another pace must not move them."""
    whole = torch.randn(12, 4)
    layers = [torch.nn.Linear(4, n, bias=False) for n in (6, 3, 3)]
    for layer, part in zip(layers, whole.split([6, 3, 3]), strict=True):
        layer.weight.data = part
    fused = joined([layer.weight.data for layer in layers])
    assert fused.data_ptr() == whole.data_ptr() and torch.equal(fused, whole)
    apart = [layer.weight.data for layer in (layers[0], layers[2])]
    other = joined(apart)
    assert torch.equal(other, torch.cat(apart)) and other.data_ptr() != whole.data_ptr()
