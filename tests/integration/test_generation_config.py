"""Requests start from the model's own generation configuration, and what a call sets goes before it.

The yardstick is transformers' `generate` on the same model, which reads the same configuration.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from transformers import GenerationConfig, WatermarkingConfig

import paceline
from paceline.cli import main
from paceline.collection.trajectories import DecodeTask, EncodedPrompt
from paceline.contracts import GREEDY, PromptRecord
from paceline.distillation.outputs import decode_outputs, open_outputs, read_examples
from paceline.distillation.settings import AnswerSampling
from paceline.errors import ConfigError, RequestError
from paceline.integrations import hf
from paceline.layer_search.subset_replay import decode
from paceline.logit_rules import apply_rules
from paceline.testing.tiny_models import perturbed, tiny_model
from paceline.testing.tokenizers import byte_tokenizer
from paceline.warping import warp

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from paceline.assembly import Pace

PROMPT = "abc abc abc"
IDS: list[int] = byte_tokenizer()(PROMPT)["input_ids"]
EVERY_THIRD = list(range(0, 259, 3))


def model_with(**settings: Any) -> PreTrainedModel:
    model = tiny_model("llama")
    model.generation_config = GenerationConfig(**{"pad_token_id": 0, **settings})
    return model


def pace_with(**settings: Any) -> Pace:
    model = model_with(**settings)
    drafters = {"noisy": perturbed(model, 0.05)}
    return paceline.load(target=model, tokenizer=byte_tokenizer(), drafters=drafters)


def by_transformers(model: PreTrainedModel, ids: list[int] = IDS, **call: Any) -> list[int]:
    x = torch.tensor([ids])
    output = model.generate(x, attention_mask=torch.ones_like(x), **call)
    tokens: list[int] = output[0, len(ids) :].tolist()
    return tokens


PLAIN = by_transformers(model_with(), max_new_tokens=16)


# --- the model's settings -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 1},
        {"repetition_penalty": 0.7, "no_repeat_ngram_size": 2},
        {"suppress_tokens": PLAIN[:1]},
        {"suppress_tokens": torch.tensor(PLAIN[:2])},
        {"suppress_tokens": []},
        {"suppress_tokens": [999, -1, PLAIN[0]]},  # those that cannot come are passed over
        {"suppress_tokens": [999]},
        {"begin_suppress_tokens": PLAIN[:1]},
        {"begin_suppress_tokens": torch.tensor(PLAIN[:1]), "repetition_penalty": 1.2},
        {"bad_words_ids": [[PLAIN[2]]]},
        {"bad_words_ids": [PLAIN[1:3], [PLAIN[0]]], "no_repeat_ngram_size": 2},
        {"sequence_bias": [[[PLAIN[0]], -9.0], [PLAIN[2:4], -9.0]], "repetition_penalty": 1.5},
        {"min_new_tokens": 8, "eos_token_id": PLAIN[3]},
        {"min_length": len(IDS) + 9, "eos_token_id": EVERY_THIRD},
        {"min_length": len(IDS) + 9, "min_new_tokens": 3, "eos_token_id": EVERY_THIRD},
        {"min_new_tokens": 16, "eos_token_id": EVERY_THIRD},
        {"forced_eos_token_id": 7},
        {"forced_bos_token_id": 7},  # behind a prompt of one token only
        {"exponential_decay_length_penalty": (2, 1.9), "eos_token_id": 33},
        {"exponential_decay_length_penalty": (2, 1.9), "suppress_tokens": [5], "eos_token_id": 33},
        {"remove_invalid_values": True, "renormalize_logits": True},
        {"eos_token_id": PLAIN[3]},
        {"eos_token_id": [PLAIN[5], PLAIN[3]]},
        {"eos_token_id": (PLAIN[5], PLAIN[3])},
        {"eos_token_id": torch.tensor([PLAIN[5], PLAIN[3]])},
        {"eos_token_id": torch.tensor(PLAIN[3])},
        {"max_new_tokens": 5},
        {"max_new_tokens": None, "max_length": len(IDS) + 4},
        {"max_new_tokens": 6, "max_length": len(IDS) + 4},
        {"temperature": 0.6, "top_p": 0.9, "top_k": 3},  # do_sample is not set, so greedy
        {"do_sample": False, "temperature": 0.6, "typical_p": 0.5},
        # what changes nothing, or only how fast or how much beside the tokens
        {"num_beams": 1, "guidance_scale": 1.0, "cache_implementation": "hybrid"},
        {"early_stopping": True, "length_penalty": 2.0, "use_cache": False},
    ],
    ids=lambda settings: "+".join(settings),
)
def test_a_setting_of_the_model_acts_as_in_generate(settings: dict[str, Any]) -> None:
    pace = pace_with(**{"max_new_tokens": 16, **settings})
    model = pace.parts.target.model
    expected = by_transformers(model)
    more = {"ignore_eos": True} if "eos_token_id" not in settings else {}
    for arm in ("none", "noisy"):
        assert pace.complete(PROMPT, drafter=arm, **more).token_ids == expected
    found = by_transformers(model, custom_generate=hf.generate, pace=pace, drafter="noisy")
    assert found == expected


def test_what_is_only_for_transformers_own_decoding_is_passed_over() -> None:
    settings = {"output_scores": True, "return_dict_in_generate": True, "num_assistant_tokens": 7}
    pace = pace_with(prompt_lookup_num_tokens=3, prefill_chunk_size=8, **settings)
    found = pace.complete(PROMPT, drafter="none", max_new_tokens=16, ignore_eos=True)
    assert found.token_ids == PLAIN


def test_settings_that_look_at_the_prompts_length() -> None:
    """A prompt of one token, and one that begins what is forced and suppressed."""
    pace = pace_with(max_new_tokens=9, forced_bos_token_id=7, begin_suppress_tokens=[7, PLAIN[0]])
    expected = by_transformers(pace.parts.target.model, IDS[:1])
    assert expected[0] == 7
    assert pace.complete(IDS[:1], drafter="noisy", ignore_eos=True).token_ids == expected


def test_a_stop_string_of_the_model_stops() -> None:
    text = byte_tokenizer().decode(PLAIN)
    for stops in (text[5], [text[6], text[5]]):
        pace = pace_with(stop_strings=stops)
        found = pace.complete(PROMPT, drafter="none", ignore_eos=True)
        assert found.finish_reason == "stop"
        assert found.text == text[: text.index(text[5])]
        longer = pace.complete(PROMPT, drafter="none", ignore_eos=True, stop=(), max_new_tokens=16)
        assert longer.token_ids == PLAIN


def test_without_settings_of_its_own_a_model_answers_greedily_up_to_the_usual_length() -> None:
    request = pace_with().request(PROMPT, drafter="none")
    assert request.max_new_tokens == 256
    assert request.sampling.temperature == 0.0
    assert request.rules is None


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},  # Qwen2.5
        {"temperature": 0.6, "top_p": 0.9},
        {"temperature": 1.5, "min_p": 0.1, "no_repeat_ngram_size": 2},
        {"temperature": 0.8, "typical_p": 0.7, "top_k": 9},
        {"epsilon_cutoff": 0.003, "temperature": 0.9},
        {"eta_cutoff": 0.01, "top_p": 0.95},
        {"top_h": 0.5, "temperature": 0.7, "top_k": 9},
        {"temperature": 0.7, "renormalize_logits": True},
    ],
    ids=lambda settings: "+".join(settings) or "sample",
)
def test_what_the_model_samples_from_is_what_generate_samples_from(
    settings: dict[str, Any],
) -> None:
    """transformers' own default top_k of 50 is not in a model's configuration, so it is not used."""
    pace = pace_with(do_sample=True, **settings)
    request = pace.request(PROMPT, drafter="none")
    model = pace.parts.target.model
    logits = torch.randn(1, 259, generator=torch.Generator().manual_seed(0)) * 2
    config, _ = model._prepare_generation_config(None, **{"top_k": 0, **settings})
    model._prepare_special_tokens(config)
    x = torch.tensor([IDS])
    expected = model._get_logits_processor(config, len(IDS))(x, logits.clone()).softmax(dim=-1)

    ruled = apply_rules(request.rules, logits, [IDS], len(IDS)) if request.rules else logits
    found = warp(ruled, request.sampling)

    assert torch.allclose(found, expected, atol=1e-6)
    assert request.sampling.method == "residual"
    if "typical_p" not in settings and "top_h" not in settings and "eta_cutoff" not in settings:
        # drafters that sample know it
        assert request.sampling.temperature == settings.get("temperature", 1.0) or "epsilon" in str(
            settings
        )


def test_a_seed_repeats_an_answer_that_the_model_samples() -> None:
    pace = pace_with(do_sample=True, temperature=0.9, max_new_tokens=12)
    texts = [pace.complete(PROMPT, drafter=arm, seed=5).token_ids for arm in ("none", "noisy")]
    assert texts[0] == texts[1]
    assert pace.complete(PROMPT, drafter="none", seed=6).token_ids != texts[0]


def test_a_configuration_that_is_changed_after_load_is_read() -> None:
    pace = pace_with(max_new_tokens=16)
    assert pace.complete(PROMPT, drafter="none", ignore_eos=True).token_ids == PLAIN
    pace.parts.target.model.generation_config.repetition_penalty = 1.3
    expected = by_transformers(pace.parts.target.model)
    assert expected != PLAIN
    assert pace.complete(PROMPT, drafter="none", ignore_eos=True).token_ids == expected


# --- the call's settings before the model's -------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "call"),
    [
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.0}),
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.6}),
        ({"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}),
        ({"sequence_bias": [[[PLAIN[0]], -9.0]]}, {"repetition_penalty": 1.6}),
        ({"bad_words_ids": [[PLAIN[0]]]}, {"suppress_tokens": [PLAIN[1]]}),
        ({"suppress_tokens": PLAIN[:3]}, {"suppress_tokens": []}),
        ({"suppress_tokens": PLAIN[:3]}, {"suppress_tokens": PLAIN[3:4]}),
        ({"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 0}),
        ({"max_length": 2}, {"max_new_tokens": 7}),
        ({"max_new_tokens": 3}, {"max_new_tokens": 7}),
        ({"max_new_tokens": 3, "forced_eos_token_id": 7}, {"max_new_tokens": 5}),
        ({"min_length": 40, "eos_token_id": EVERY_THIRD}, {"min_new_tokens": 0}),
        ({"min_new_tokens": 9, "eos_token_id": EVERY_THIRD}, {"min_new_tokens": 2}),
    ],
    ids=str,
)
def test_a_setting_of_the_call_goes_before_the_models(
    settings: dict[str, Any], call: dict[str, Any]
) -> None:
    pace = pace_with(**{"max_new_tokens": 16, **settings})
    expected = by_transformers(pace.parts.target.model, **{"min_length": None, **call})
    if "min_new_tokens" in call:
        expected = by_transformers(pace.parts.target.model, **call, min_length=0)
    more = {"ignore_eos": True} if "eos_token_id" not in settings else {}
    for arm in ("none", "noisy"):
        assert pace.complete(PROMPT, drafter=arm, **call, **more).token_ids == expected


def test_a_length_of_the_call_goes_before_a_least_length_of_the_model() -> None:
    pace = pace_with(min_new_tokens=9, eos_token_id=EVERY_THIRD)
    found = pace.complete(PROMPT, drafter="none", max_new_tokens=4)
    assert len(found.token_ids) == 4 and not set(found.token_ids) & set(EVERY_THIRD)
    with pytest.raises(RequestError, match="min_new_tokens 6 is above max_new_tokens 4"):
        pace.request(PROMPT, drafter="none", max_new_tokens=4, min_new_tokens=6)


def test_a_call_that_is_greedy_leaves_the_models_sampling_aside() -> None:
    own = {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.8, "min_p": 0.1}
    pace = pace_with(**own, typical_p=0.9, max_new_tokens=16)
    found = pace.complete(PROMPT, drafter="noisy", temperature=0, ignore_eos=True)
    assert found.token_ids == PLAIN
    with pytest.raises(RequestError, match="top_k given with temperature 0"):
        pace.request(PROMPT, drafter="none", temperature=0, top_k=3)


def test_a_temperature_of_the_call_samples_with_the_models_filters() -> None:
    pace = pace_with(do_sample=False, temperature=0.2, top_p=0.9)
    sampling = pace.request(PROMPT, drafter="none", temperature=0.8, top_k=7).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.8, 0.9, 7)
    sampling = pace.request(PROMPT, drafter="none", temperature=0.8, top_p=1.0).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.8, 1.0, 0)


def test_whole_numbers_are_numbers() -> None:
    pace = pace_with(bad_words_ids=[[0]], max_new_tokens=16)
    call = {"drafter": "none", "ignore_eos": True}
    expected = by_transformers(pace.parts.target.model, repetition_penalty=2.0)
    assert pace.complete(PROMPT, repetition_penalty=2, **call).token_ids == expected
    sampling = pace.request(PROMPT, temperature=2, top_p=1, min_p=0, top_k=3, **call).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (2.0, 1.0, 3)
    pace.parts.target.model.generation_config.repetition_penalty = 2
    assert pace.complete(PROMPT, **call).token_ids == expected


def test_rules_that_only_paceline_has_join_the_models() -> None:
    pace = pace_with(repetition_penalty=1.3, bad_words_ids=[[5]], max_new_tokens=8)

    def lift(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, 9] += 100.0
        return scores

    call = {"repetition_penalty": 1.6, "presence_penalty": 0.5}
    request = pace.request(PROMPT, drafter="none", processors=[lift], **call)
    assert request.rules is not None
    assert request.rules.repetition_penalty == 1.0  # it is among the processors
    assert request.rules.processors[0].penalty == 1.6  # type: ignore[attr-defined]
    assert request.rules.processors[-1] is lift and len(request.rules.processors) == 3
    assert request.rules.presence_penalty == 0.5
    assert set(pace.complete(PROMPT, drafter="none", processors=[lift]).token_ids) == {9}


def test_a_scope_of_the_call_holds_for_its_own_penalty() -> None:
    """A penalty on the prompt's tokens and one on the answer's only give different answers."""
    call = {"repetition_penalty": 1.6, "repetition_scope": "output", "max_new_tokens": 16}
    expected = pace_with().complete(PROMPT, drafter="none", ignore_eos=True, **call).token_ids
    for own in ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3, "bad_words_ids": [[0]]}):
        found = pace_with(**own).complete(PROMPT, drafter="noisy", ignore_eos=True, **call)
        assert found.token_ids == expected


# --- where the answer ends ------------------------------------------------------------------------


def test_the_tokenizers_end_stops_where_the_model_names_none() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(PLAIN[4])
    model = model_with(max_new_tokens=16)
    pace = paceline.load(target=model, tokenizer=tokenizer, drafters={})
    assert pace.complete(PROMPT, drafter="none").token_ids == PLAIN[: PLAIN.index(PLAIN[4]) + 1]
    model.generation_config.eos_token_id = PLAIN[6]
    assert pace.complete(PROMPT, drafter="none").token_ids == PLAIN[: PLAIN.index(PLAIN[6]) + 1]


# --- left aside, by configuration, pace or call ---------------------------------------------------


def test_none_leaves_all_but_the_end_aside() -> None:
    settings = {"do_sample": True, "repetition_penalty": 1.9, "eos_token_id": PLAIN[5]}
    model = model_with(max_new_tokens=3, num_beams=4, **settings)
    plain = PLAIN[: PLAIN.index(PLAIN[5]) + 1]
    for defaults, call in (("none", {}), (None, {"generation_config": "none"})):
        pace = paceline.load(
            target=model, tokenizer=byte_tokenizer(), drafters={}, generation_config=defaults
        )
        assert pace.complete(PROMPT, drafter="none", **call).token_ids == plain
        assert pace.generate([PROMPT], drafter="none", **call)[0].token_ids == plain
        text = pace.complete(PROMPT, drafter="none", **call).text
        assert text and "".join(pace.stream_text(PROMPT, drafter="none", **call)) == text


def test_a_word_that_is_neither_auto_nor_none_is_refused(tmp_path: Path) -> None:
    pace = pace_with()
    with pytest.raises(RequestError, match="must be auto, no_beams or none; got 'vllm'"):
        pace.request(PROMPT, generation_config="vllm")
    with pytest.raises(ConfigError, match="must be auto, no_beams or none; got 'vllm'"):
        paceline.load(
            target=model_with(),
            tokenizer=byte_tokenizer(),
            drafters={},
            generation_config="vllm",  # type: ignore[arg-type]
        )
    path = tmp_path / "paceline.yaml"
    path.write_text(yaml.safe_dump({"target": {"model": "x"}, "generation_config": "vllm"}))
    with pytest.raises(ConfigError, match=r"'generation_config': .*'auto', 'no_beams' or 'none'"):
        paceline.load(path)


@pytest.mark.parametrize("defaults", ["auto", "none"])
def test_the_command_line_reads_the_same(
    defaults: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model = model_with(repetition_penalty=1.3, max_new_tokens=9, eos_token_id=258)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    path = tmp_path / "paceline.yaml"
    target = {"model": "model", "dtype": "float32", "device": "cpu"}
    path.write_text(yaml.safe_dump({"target": target, "generation_config": defaults}))

    def run(*more: str) -> list[int]:
        arguments = ["generate", PROMPT, "-c", str(path), "-d", "none", "--raw", "--json", *more]
        monkeypatch.setattr("sys.argv", ["paceline", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
        tokens: list[int] = json.loads(capsys.readouterr().out)["token_ids"]
        return tokens

    if defaults == "none":
        model.generation_config = GenerationConfig(max_new_tokens=256, eos_token_id=258)
        assert run("--max-new-tokens", "20") == by_transformers(model, max_new_tokens=20)
        return
    assert run() == by_transformers(model)
    assert run("--max-new-tokens", "12") == by_transformers(model, max_new_tokens=12)


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 4},
        {"num_beam_groups": 2, "num_beams": 2, "diversity_penalty": 0.5},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "high"},
        {"guidance_scale": 1.5},
        {"force_words_ids": [[5]], "num_beams": 2},
        {"constraints": [object()], "num_beams": 2},
        {"watermarking_config": WatermarkingConfig()},
        {"encoder_repetition_penalty": 1.5},
        {"encoder_no_repeat_ngram_size": 3},
        {"num_return_sequences": 2},
        {"token_healing": True},
        {"max_time": 3.0},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_cannot_be_honoured_is_named_with_the_way_out(settings: dict[str, Any]) -> None:
    pace = pace_with(max_new_tokens=16)
    for name, value in settings.items():  # not validated: some of transformers' own are deprecated
        setattr(pace.parts.target.model.generation_config, name, value)
    names = "|".join(settings)
    with pytest.raises(RequestError, match=rf"sets ({names})=.*'generation_config: none'"):
        pace.complete(PROMPT, drafter="none")
    call = {"generation_config": "none", "max_new_tokens": 16, "ignore_eos": True}
    assert pace.complete(PROMPT, drafter="none", **call).token_ids == PLAIN


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_length": 5}, "prompt has 11 tokens .* max_length=5 .* give max_new_tokens"),
        ({"repetition_penalty": -1.0}, "cannot be used: .*penalty.*'generation_config: none'"),
        ({"do_sample": True, "top_p": -7.0}, "cannot be used: .*top_p"),
        ({"suppress_tokens": "abc"}, "sets suppress_tokens='abc', which are not token ids"),
        ({"begin_suppress_tokens": [0.5]}, "sets begin_suppress_tokens=.0.5., which are not token"),
        ({"eos_token_id": "7"}, "sets eos_token_id='7', which are not token ids; correct it there"),
        ({"eos_token_id": [7, None]}, "sets eos_token_id=.7, None., which are not token ids"),
        ({"max_length": "30"}, "sets max_length='30', which is not a whole number"),
        ({"max_new_tokens": "7"}, "sets max_new_tokens='7', which is not a whole number"),
        ({"min_length": "4"}, "sets min_length='4', which is not a whole number"),
        ({"min_new_tokens": 2.5}, "sets min_new_tokens=2.5, which is not a whole number"),
        ({"stop_strings": 5}, "sets stop_strings=5, which is not a string or a list"),
        ({"forced_eos_token_id": "x"}, "cannot be used: .*'generation_config: none'"),
        (
            {"exponential_decay_length_penalty": (3,), "eos_token_id": 7},
            "cannot be used: .*'generation_config: none'",
        ),
    ],
    ids=lambda settings: next(iter(settings)) if isinstance(settings, dict) else "",
)
def test_a_setting_of_the_model_that_is_wrong_is_named(settings: dict[str, Any], says: str) -> None:
    pace = pace_with()
    for name, value in settings.items():
        setattr(pace.parts.target.model.generation_config, name, value)
    with pytest.raises(RequestError, match=says):
        pace.complete(PROMPT, drafter="none")


# --- what stays greedy ----------------------------------------------------------------------------


def test_collection_distillation_and_layer_search_stay_greedy_and_without_rules(
    tmp_path: Path,
) -> None:
    """Trajectories are the target's greedy text, without the model's own sampling and rules."""
    settings = {"do_sample": True, "temperature": 2.0, "repetition_penalty": 1.9, "num_beams": 3}
    pace = pace_with(max_new_tokens=2, **settings)
    pace.parts.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    pace.parts.tokenizer.eos_token = None

    store = open_outputs(pace, tmp_path, 16)
    prompts = [PromptRecord("a", "d", PROMPT)]
    greedy = (AnswerSampling(),)
    decode_outputs(pace, prompts, greedy, store, 16)
    (example,) = read_examples(store, prompts, greedy)
    assert example.tokens[example.num_prompt :].tolist() == PLAIN

    task = DecodeTask([EncodedPrompt("a", "d", tuple(IDS), GREEDY)], 16)
    (row,) = task.run(pace, lambda n: None).trajectories
    assert list(row["output_tokens"]) == PLAIN

    (trajectory,) = decode(pace, [IDS], 16)
    assert list(trajectory.output) == PLAIN
