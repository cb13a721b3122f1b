"""transformers' `generate` with paceline writes the same text as without, or refuses a setting."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from scipy import stats
from support import HANGS
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
    TextIteratorStreamer,
    TextStreamer,
)

import paceline
from paceline.assembly import Pace, build_from_objects
from paceline.config import Config, EngineSection, ModelSection
from paceline.drafting.prompt_lookup import PromptLookup, PromptLookupSettings
from paceline.errors import ConfigError, DecodingError, RequestError
from paceline.integrations import hf
from paceline.testing.tiny_models import perturbed, tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from paceline.assembly import Parts
    from paceline.contracts import PromptRecord


def pace_for(model: PreTrainedModel, **drafters: Any) -> Pace:
    drafters = drafters or {"noisy": perturbed(model, 0.05)}
    config = Config(target=ModelSection(model="in memory"), engine=EngineSection(max_rows=32))
    return Pace(build_from_objects(model, byte_tokenizer(), drafters, config))


def batch(*lengths: int, pad: int = 0, vocab_size: int = 259) -> dict[str, Tensor]:
    """Return random prompts of these lengths, padded on the left."""
    generator = torch.Generator().manual_seed(3)
    width = max(lengths)
    ids = torch.full((len(lengths), width), pad)
    mask = torch.zeros_like(ids)
    for i, n in enumerate(lengths):
        ids[i, width - n :] = torch.randint(1, vocab_size, (n,), generator=generator)
        mask[i, width - n :] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def pace(llama: PreTrainedModel) -> Pace:
    return pace_for(llama)


class LengthBias:
    """A user's processor: tokens equal to the text's length modulo 7 get larger scores."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, input_ids.shape[1] % 7 :: 7] += 3.0
        return scores


def even_tokens(batch_id: int, ids: Tensor) -> list[int]:
    """Return the allowed tokens of a row: even ones in even rows, odd ones in odd rows."""
    return list(range(batch_id % 2, 259, 2))


# --- greedy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral", "gemma2"])
def test_a_padded_batch_has_the_same_text_as_without_paceline(architecture: str) -> None:
    model = tiny_model(architecture)
    inputs = batch(9, 4, 13, 1)
    settings = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0}
    free = model.generate(**inputs, **settings)
    settings["eos_token_id"] = sorted({int(free[0, 13 + 6]), int(free[2, 13 + 11])})
    expected = model.generate(**inputs, **settings)

    found = model.generate(**inputs, **settings, custom_generate=hf.generate, pace=pace_for(model))

    assert torch.equal(found, expected)
    assert (expected == 0).any(dim=-1).sum() > 1  # rows ended at different lengths


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 1},
        {"max_length": 30, "max_new_tokens": None},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6, "no_repeat_ngram_size": 2},
        {"min_new_tokens": 20, "eos_token_id": list(range(0, 259, 3))},
        {"min_length": 25, "eos_token_id": list(range(0, 259, 3))},
        {"suppress_tokens": list(range(0, 259, 2))},
        {"begin_suppress_tokens": list(range(0, 259, 2)), "forced_eos_token_id": 7},
        {"bad_words_ids": [[t] for t in range(100)]},
        {"sequence_bias": [[[t], 2.5] for t in range(0, 259, 5)]},
        {"exponential_decay_length_penalty": (4, 1.6), "eos_token_id": 33},
        {"remove_invalid_values": True, "renormalize_logits": True},
        {"prefix_allowed_tokens_fn": even_tokens},
        {"logits_processor": LogitsProcessorList([LengthBias()])},
        {"use_cache": False},
    ],
    ids=lambda settings: "+".join(settings),
)
def test_a_setting_has_the_effect_that_it_has_in_transformers(
    settings: dict[str, Any], llama: PreTrainedModel, pace: Pace
) -> None:
    inputs = batch(9, 4, 13)
    settings = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0} | settings
    expected = llama.generate(**inputs, **settings)

    found = llama.generate(**inputs, **settings, custom_generate=hf.generate, pace=pace)

    assert torch.equal(found, expected)


def test_a_penalty_does_not_count_padding(llama: PreTrainedModel, pace: Pace) -> None:
    settings = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0}
    often = int(llama.generate(**batch(9, 4), **settings)[1, 9:].mode().values)
    inputs = batch(9, 4, pad=often)
    settings["repetition_penalty"] = 1.3
    expected = llama.generate(**inputs, **settings)

    found = llama.generate(**inputs, **settings, custom_generate=hf.generate, pace=pace)

    assert often in expected[1, 9:]
    assert torch.equal(found, expected)


def test_the_calls_and_the_models_generation_configs_are_read(
    llama: PreTrainedModel, pace: Pace
) -> None:
    inputs = batch(9)
    config = GenerationConfig(max_new_tokens=12, repetition_penalty=1.5, do_sample=False)
    expected = llama.generate(**inputs, generation_config=config)
    llama.generation_config.suppress_tokens = [int(expected[0, 10])]
    try:
        other = llama.generate(**inputs, generation_config=config)
        found = llama.generate(
            **inputs, generation_config=config, custom_generate=hf.generate, pace=pace
        )
    finally:
        llama.generation_config.suppress_tokens = None

    assert not torch.equal(other, expected)
    assert torch.equal(found, other)


def test_the_zoo_writes_the_same_text_with_every_arm_and_reports_completions(
    zoo_target: Parts, prompts: list[PromptRecord]
) -> None:
    model, tokenizer = zoo_target.target.model, copy.deepcopy(zoo_target.tokenizer)
    tokenizer.padding_side = "left"
    messages = [[{"role": "user", "content": p.prompt}] for p in prompts[:4]]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )  # fmt: skip
    settings = {"do_sample": False, "max_new_tokens": 32}
    expected = model.generate(**inputs, **settings)

    pace = Pace(zoo_target)
    for arm in ("none", "draft-math", "draft-general"):
        output = model.generate(
            **inputs, **settings, custom_generate=hf.generate, pace=pace, drafter=arm,
            return_dict_in_generate=True,
        )  # fmt: skip
        assert torch.equal(output.sequences, expected)
        assert torch.equal(output[0], expected)
        assert {c.drafter for c in output.completions} == {arm}
    assert max(c.block_efficiency for c in output.completions) > 1.5


# --- sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.6, "top_k": 5, "top_p": 0.9, "min_p": 0.05},
        # typical_p is transformers' own code, and the temperature must be applied before it
        {"temperature": 1.6, "top_k": 0, "typical_p": 0.8, "repetition_penalty": 1.4},
    ],
    ids=lambda settings: "+".join(settings),
)
def test_sampled_text_has_transformers_distribution(settings: dict[str, Any]) -> None:
    """Compare the first three tokens with the distribution of transformers' own scores."""
    model = tiny_model("llama", vocab_size=7, std=0.5)
    prompt = torch.tensor([[3, 1, 4, 1, 5]])

    def distribution(text: Tensor) -> Tensor:
        output = model.generate(
            text, attention_mask=torch.ones_like(text), do_sample=True, max_new_tokens=1,
            output_scores=True, return_dict_in_generate=True, **settings,
        )  # fmt: skip
        return output.scores[0][0].softmax(dim=-1)

    texts, expected = [()], [1.0]
    for _ in range(3):
        distributions = [
            distribution(torch.cat((prompt, torch.tensor([text]).long()), 1)) for text in texts
        ]
        expected = [
            p * float(q) for p, row in zip(expected, distributions, strict=True) for q in row
        ]
        texts = [(*text, token) for text in texts for token in range(7)]
    torch.manual_seed(11)
    num_draws = 400
    output = model.generate(
        prompt, do_sample=True, max_new_tokens=4, num_return_sequences=num_draws,
        custom_generate=hf.generate, drafters={"noisy": perturbed(model, 0.3)}, **settings,
        return_dict_in_generate=True,
    )  # fmt: skip

    rounds = [r for c in output.completions for r in c.rounds]
    assert 0 < sum(r.accepted for r in rounds) < sum(r.drafted for r in rounds)
    written = Counter(map(tuple, output.sequences[:, 5:8].tolist()))
    cells, seen = np.array(expected), np.array([written[text] for text in texts])
    assert not seen[cells == 0].any()  # no filtered token
    order = np.argsort(cells)
    wanted, seen = cells[order] / cells.sum() * num_draws, seen[order]
    rare = int(np.searchsorted(np.cumsum(wanted), 10.0)) + 1
    wanted = np.concatenate([[wanted[:rare].sum()], wanted[rare:]])
    seen = np.concatenate([[seen[:rare].sum()], seen[rare:]])
    assert stats.chisquare(seen, wanted).pvalue > 1e-4


def test_a_seed_gives_the_same_text_with_every_drafter(llama: PreTrainedModel, pace: Pace) -> None:
    inputs = batch(9, 4)
    call = {"do_sample": True, "max_new_tokens": 16, "pad_token_id": 0, "top_k": 0}
    call |= {"custom_generate": hf.generate, "pace": pace, "num_return_sequences": 2}

    texts = [llama.generate(**inputs, **call, seed=5, drafter=arm) for arm in pace.drafters]
    other = llama.generate(**inputs, **call, seed=6)

    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], other)
    assert len({tuple(row) for row in texts[0].tolist()}) == 4


def test_torchs_seed_is_used_if_none_is_given(llama: PreTrainedModel, pace: Pace) -> None:
    inputs = batch(9)
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(
            llama.generate(
                **inputs, do_sample=True, max_new_tokens=12, custom_generate=hf.generate, pace=pace
            ).tolist()
        )

    assert texts[0] == texts[1] != texts[2]


# --- streamers and stops --------------------------------------------------------------------------


def test_a_text_streamer_prints_the_same_as_without_paceline(
    zoo_target: Parts, prompts: list[PromptRecord], capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = zoo_target.target.model, zoo_target.tokenizer
    inputs = tokenizer(prompts[2].prompt, return_tensors="pt")
    settings = {"do_sample": False, "max_new_tokens": 24}
    printed = []
    for extra in ({}, {"custom_generate": hf.generate, "pace": Pace(zoo_target)}):
        arm = {"drafter": "draft-math"} if extra else {}
        streamer = TextStreamer(tokenizer, skip_prompt=True)
        model.generate(**inputs, **settings, streamer=streamer, **extra, **arm)
        printed.append(capsys.readouterr().out)

    assert printed[0].strip()
    assert printed[0] == printed[1]


def test_an_iterator_streamer_ends_even_if_the_call_is_refused(
    llama: PreTrainedModel, pace: Pace
) -> None:
    inputs = batch(9)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}
    expected = byte_tokenizer().decode(llama.generate(**inputs, **settings)[0, 9:])

    def read(**extra: Any) -> str:
        streamer = TextIteratorStreamer(byte_tokenizer(), skip_prompt=True, timeout=HANGS)
        call = {**inputs, **settings, **extra, "streamer": streamer, "pace": pace}

        def run() -> None:
            try:
                llama.generate(**call, custom_generate=hf.generate)
            except RequestError:
                refused.append(1)

        refused.clear()
        thread = threading.Thread(target=run)
        thread.start()
        text = "".join(streamer)
        thread.join()
        return text

    refused: list[int] = []
    assert read() == expected
    assert not refused
    assert read(guidance_scale=2.0) == ""
    assert refused


class StopsAt:
    """A stopping criterion that ends a row at the first of the given tokens."""

    def __init__(self, tokens: set[int]) -> None:
        self.tokens = tokens
        self.widths: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.widths.append(input_ids.shape[1])
        return torch.tensor([int(row[-1]) in self.tokens for row in input_ids])


def test_stopping_criteria_are_called_at_every_token(llama: PreTrainedModel) -> None:
    inputs = batch(9, 4)
    settings = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0, "eos_token_id": 258}
    free = llama.generate(**inputs, **settings)
    stop = StopsAt({int(free[0, 9 + 7]), int(free[1, 9 + 3])})
    expected = llama.generate(**inputs, **settings, stopping_criteria=StoppingCriteriaList([stop]))
    stop.widths.clear()
    exact = pace_for(llama, same=llama)  # every draft is accepted completely

    output = llama.generate(
        **inputs, **settings, stopping_criteria=StoppingCriteriaList([stop]),
        custom_generate=hf.generate, pace=exact, return_dict_in_generate=True,
    )  # fmt: skip

    assert torch.equal(output.sequences, expected)
    assert expected.shape[1] < free.shape[1]
    assert {completion.finish_reason for completion in output.completions} == {"stop"}
    assert min(stop.widths) == 10  # the first new token, after the padding
    assert exact.engine.num_rows == 0


def test_a_stop_string_criterion_stops_at_the_same_token(llama: PreTrainedModel) -> None:
    tokenizer = byte_tokenizer()
    inputs = batch(9, vocab_size=128)
    settings = {"do_sample": False, "max_new_tokens": 40, "suppress_tokens": list(range(128, 259))}
    free = tokenizer.decode(llama.generate(**inputs, **settings)[0, 9:])
    stop = StoppingCriteriaList([StopStringCriteria(tokenizer, [free[9:11]])])
    expected = llama.generate(**inputs, **settings, stopping_criteria=stop)

    found = llama.generate(
        **inputs, **settings, stopping_criteria=stop, custom_generate=hf.generate,
        pace=pace_for(llama),
    )  # fmt: skip

    assert torch.equal(found, expected)
    assert 9 < expected.shape[1] < 9 + 40


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_beams": 3}, "num_beams=3"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores=True"),
        ({"output_logits": True, "return_dict_in_generate": True}, "output_logits=True"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6"),
        ({"dola_layers": "high"}, "dola_layers"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"encoder_repetition_penalty": 1.2}, "use repetition_penalty"),
        ({"prefill_chunk_size": 4}, "engine.prefill_chunk"),
        ({"num_assistant_tokens": 7}, "num_draft_tokens"),
        ({"assistant_early_exit": 1}, "give a drafter to paceline"),
        ({"position_ids": torch.arange(2, 11)[None]}, "position_ids"),
        ({"attention_mask": torch.tensor([[1] * 7 + [0] * 2])}, "padding_side='left'"),
        ({"token_type_ids": torch.zeros(1, 9, dtype=torch.int64)}, "token_type_ids"),
        ({"drafter": "nobody"}, "unknown drafter 'nobody'"),
        ({"drafters": {}}, "pace and drafters"),
        ({"prompt_lookup_num_tokens": 4}, "prompt_lookup_num_tokens"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_an_unsupported_setting_is_refused_by_name(
    settings: dict[str, Any], says: str, pace: Pace
) -> None:
    model = pace.parts.target.model
    if "token_type_ids" in settings:
        model = tiny_model("gpt2")
        pace = pace_for(model)
    inputs = batch(9) | {"do_sample": False, "max_new_tokens": 8} | settings
    with pytest.raises(RequestError, match=says):
        model.generate(**inputs, custom_generate=hf.generate, pace=pace)
    assert pace.engine.num_rows == pace.engine.num_waiting == 0


def test_a_cache_that_already_holds_text_is_refused(llama: PreTrainedModel, pace: Pace) -> None:
    inputs = batch(9)
    parameters = inspect.signature(llama.forward).parameters  # its name depends on transformers
    name = next(name for name in ("cache", "past_key_values") if name in parameters)
    settings = {"do_sample": False, "max_new_tokens": 4, "custom_generate": hf.generate}
    empty = DynamicCache(config=llama.config)
    found = llama.generate(**inputs, **{name: empty}, **settings, pace=pace)
    assert torch.equal(found, llama.generate(**inputs, do_sample=False, max_new_tokens=4))

    past = DynamicCache(config=llama.config)
    llama(inputs["input_ids"][:, :5], use_cache=True, **{name: past})
    with pytest.raises(RequestError, match=f"'{name}' already holds text"):
        llama.generate(**inputs, **{name: past}, **settings, pace=pace)


def test_embeddings_instead_of_text_are_refused(llama: PreTrainedModel, pace: Pace) -> None:
    embedded = llama.get_input_embeddings()(batch(9)["input_ids"])
    with pytest.raises(RequestError, match="model input 'inputs_embeds'"):
        llama.generate(
            inputs_embeds=embedded, max_new_tokens=4, custom_generate=hf.generate, pace=pace
        )


def test_a_pace_of_another_model_is_refused(pace: Pace) -> None:
    with pytest.raises(ConfigError, match="another model object"):
        tiny_model("llama", seed=2).generate(
            **batch(9), max_new_tokens=4, custom_generate=hf.generate, pace=pace
        )


def test_a_streamer_for_a_batch_is_refused(llama: PreTrainedModel, pace: Pace) -> None:
    class Silent:
        def put(self, value: Tensor) -> None: ...
        def end(self) -> None: ...

    with pytest.raises(RequestError, match="a streamer takes one row"):
        llama.generate(
            **batch(9, 9),
            max_new_tokens=4,
            streamer=Silent(),
            custom_generate=hf.generate,
            pace=pace,
        )


def test_rows_that_need_padding_need_a_padding_token(llama: PreTrainedModel, pace: Pace) -> None:
    inputs = batch(9, 4)
    free = llama.generate(**inputs, do_sample=False, max_new_tokens=12, pad_token_id=0)
    stop = StoppingCriteriaList([StopsAt({int(free[0, 9 + 2])})])
    with pytest.raises(RequestError, match="pad_token_id is not set"):
        llama.generate(
            **inputs, do_sample=False, max_new_tokens=12, stopping_criteria=stop,
            custom_generate=hf.generate, pace=pace,
        )  # fmt: skip


def test_a_failing_processor_is_named_and_all_rows_are_freed(
    llama: PreTrainedModel, pace: Pace
) -> None:
    def fail_on_the_long_text(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] > 12:
            raise ValueError("too long for me")
        return scores

    with pytest.raises(DecodingError, match="too long for me"):
        llama.generate(
            **batch(9, 4), max_new_tokens=12, pad_token_id=0, custom_generate=hf.generate,
            logits_processor=LogitsProcessorList([fail_on_the_long_text]), pace=pace,
        )  # fmt: skip
    assert pace.engine.num_rows == pace.engine.num_waiting == 0


# --- without a pace -------------------------------------------------------------------------------


def test_an_assistant_model_is_used_and_its_pace_is_cached() -> None:
    model = tiny_model("llama")
    assistant = perturbed(model, 0.02)
    assistant.generation_config.num_assistant_tokens = 6
    inputs, settings = batch(9), {"do_sample": False, "max_new_tokens": 24}
    expected = model.generate(**inputs, **settings)

    def run(**extra: Any) -> hf.GenerateOutput:
        return model.generate(
            **inputs, **settings, **extra, custom_generate=hf.generate, return_dict_in_generate=True
        )

    output = run(assistant_model=assistant)
    cached = model._paceline_cached.pace
    run(assistant_model=assistant)

    assert torch.equal(output.sequences, expected)
    assert output.completions[0].drafter == "assistant_model"
    assert max(r.drafted for r in output.completions[0].rounds) == 6
    assert model._paceline_cached.pace is cached
    lookup = run(prompt_lookup_num_tokens=5)
    assert torch.equal(lookup.sequences, expected)
    assert lookup.completions[0].drafter == "prompt_lookup"
    assert run().completions[0].drafter == "none"


def test_a_cached_pace_is_replaced_when_the_weights_change() -> None:
    """The compiled forward packs the weights, so an old pace would write the old text."""
    model = tiny_model("llama")
    inputs, settings = batch(9), {"do_sample": False, "max_new_tokens": 16}
    before = model.generate(**inputs, **settings, custom_generate=hf.generate)
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight))
    after = model.generate(**inputs, **settings)

    assert not torch.equal(before, after)
    assert torch.equal(model.generate(**inputs, **settings, custom_generate=hf.generate), after)


def test_a_model_with_a_cached_pace_can_be_copied_and_pickled() -> None:
    model = tiny_model("llama")
    inputs, settings = batch(9), {"do_sample": False, "max_new_tokens": 8}
    expected = model.generate(**inputs, **settings, custom_generate=hf.generate)

    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other._paceline_cached.pace is None
        found = other.generate(**inputs, **settings, custom_generate=hf.generate)
        assert torch.equal(found, expected)
    torch.save(model, io.BytesIO())


def test_for_an_assistant_of_another_width_the_message_shows_how_to_compare_tokenizers() -> None:
    model, narrow = tiny_model("llama"), tiny_model("llama", vocab_size=200)
    with pytest.raises(ConfigError, match="compares the tokenizers themselves"):
        model.generate(
            **batch(9), max_new_tokens=4, custom_generate=hf.generate, drafters={"narrow": narrow}
        )


def test_without_a_policy_a_pace_uses_its_only_drafter_or_a_lookup(llama: PreTrainedModel) -> None:
    inputs = batch(9) | {"do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True}
    expected = llama.generate(**inputs)
    for drafters, policy in (({"noisy": perturbed(llama, 0.05)}, "fixed"), ({}, "untrained")):
        pace = paceline.load(target=llama, tokenizer=byte_tokenizer(), drafters=drafters)
        found = llama.generate(**inputs, custom_generate=hf.generate, pace=pace)
        assert torch.equal(found.sequences, expected.sequences)
        wanted = next(iter(drafters), "suffix")
        assert {(c.decision.arm, c.decision.policy) for c in found.completions} == {
            (wanted, policy)
        }


def test_two_drafters_without_a_policy_need_a_choice(llama: PreTrainedModel) -> None:
    lookup = PromptLookup("lookup", PromptLookupSettings())
    drafters = {"lookup": lookup, "noisy": perturbed(llama, 0.05)}
    inputs = batch(9) | {"do_sample": False, "max_new_tokens": 8}
    with pytest.raises(RequestError, match=r"chooses among lookup, noisy; name one with drafter="):
        llama.generate(**inputs, custom_generate=hf.generate, drafters=drafters)
    expected = llama.generate(**inputs)
    for name in itertools.chain(drafters, ["none"]):
        found = llama.generate(
            **inputs, custom_generate=hf.generate, drafters=drafters, drafter=name
        )
        assert torch.equal(found, expected)
