"""Models with an encoder in a training: sources, labels, start token, students and teachers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from support.distillation import VOCAB, KilledError, tiny_settings, tiny_target
from support.encoder_decoders import (
    KINDS,
    START,
    T5_FAMILY,
    TINY_T5,
    own_logits,
    repeated_texts,
    source_texts,
    tiny_encoder_decoder,
)
from support.training import (
    TINY,
    killer,
    new_student,
    run,
    same_weights,
    trainer,
    without_speed,
)
from transformers import AutoModelForSeq2SeqLM, LlamaForCausalLM, T5ForConditionalGeneration

from paceline.distillation.batches import collate
from paceline.distillation.distributions import (
    LiveDistributions,
    _packed_hidden,
    open_distributions,
    read_distributions,
    store_distributions,
)
from paceline.distillation.encoder_decoder_students import copy_encoder_decoder_layers
from paceline.distillation.objective import judge
from paceline.distillation.reading import (
    check_target,
    fits,
    hidden_states,
    output_scale,
    with_prompt_weight,
    with_sources,
)
from paceline.distillation.replays import replay_validation
from paceline.distillation.settings import StudentShape
from paceline.distillation.student import build_student, make_student, num_parameters
from paceline.distillation.train import Lesson
from paceline.errors import ConfigError
from paceline.models.language_model import LanguageModel
from paceline.models.self_checks import check_packed_forward

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from paceline.distillation.batches import Example

TEXTS = source_texts(12)
EVERYTHING = slice(0, None)


def t5_student(seed: int = 0) -> PreTrainedModel:
    return build_student(tiny_encoder_decoder(), TINY_T5, "random", seed, "t5")


@pytest.fixture(scope="module")
def target() -> LanguageModel:
    return LanguageModel(tiny_encoder_decoder(), "target")


# --- reading --------------------------------------------------------------------------------------


def test_a_decoder_reads_the_start_token_and_the_answer_and_its_encoder_the_prompt() -> None:
    """Labels that are shifted by a token, or of the source, would show here."""
    batch = collate(TEXTS, prompt_weight=0.0)
    read = with_sources(batch, START)
    flat, at = read.tokens.flatten(), 0
    for i, example in enumerate(TEXTS):
        prompt, output = example.tokens[: example.num_prompt], example.tokens[example.num_prompt :]
        assert read.sources[i][read.is_source[i]].tolist() == prompt.tolist()
        places = read.places[batch.examples == i].tolist()
        # what each place reads, and the label that it is learned to predict
        assert flat[places].tolist() == [START, *output[:-1].tolist()]
        assert batch.targets[at : at + len(output)].tolist() == output.tolist()
        at += len(output)
    assert at == len(batch.targets)
    assert batch.weights.tolist() == [1.0] * at


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_has_the_logits_of_each_text_alone(kind: str) -> None:
    """Neither a source's padding nor an answer's reaches a learned position."""
    model = tiny_encoder_decoder(kind)
    batch = collate(TEXTS, 0.0)
    with torch.inference_mode():
        head = model.get_output_embeddings().weight
        found = hidden_states(model, batch) * output_scale(model) @ head.T
    expected = torch.cat([own_logits(model, example) for example in TEXTS])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_only_tokens_of_answers_have_a_place() -> None:
    with pytest.raises(ValueError, match="no distribution of a prompt's tokens"):
        with_sources(collate(TEXTS, prompt_weight=0.2), START)


def test_the_weight_of_prompts_is_refused_or_zero_with_an_encoder(target: LanguageModel) -> None:
    settings = tiny_settings()
    assert settings.prompt_weight > 0
    causal = tiny_target()
    assert with_prompt_weight(settings, causal).prompt_weight == settings.prompt_weight
    for models in ((target.model, causal), (causal, target.model)):
        assert with_prompt_weight(settings, *models).prompt_weight == 0
        with pytest.raises(ConfigError, match=r"prompt_weight 0.5: an encoder reads the prompts"):
            with_prompt_weight(tiny_settings(prompt_weight=0.5), *models)
        with_prompt_weight(tiny_settings(prompt_weight=0.0), *models)


def test_texts_fit_by_their_source_and_their_answer() -> None:
    """A BART has positions of their own for either."""
    model, text = tiny_encoder_decoder("bart"), TEXTS[0]
    long = replace(text, tokens=torch.zeros(128).long().numpy(), num_prompt=64)
    assert fits(model, long)
    assert not fits(model, replace(long, num_prompt=65))
    assert not fits(model, replace(long, num_prompt=63))
    assert not fits(model, replace(long, num_prompt=0))


def test_a_target_of_sounds_is_refused_by_name(target: LanguageModel) -> None:
    check_target(target)
    assert target.encoder is not None
    target.encoder.feature_shape = (8, 40)
    try:
        with pytest.raises(ConfigError, match="T5ForConditionalGeneration reads features"):
            check_target(target)
    finally:
        target.encoder.feature_shape = None


# --- teachers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_distributions_are_the_targets_after_each_source(kind: str, tmp_path: Path) -> None:
    """Live and cached; those of another row or of another place would show."""
    model = tiny_encoder_decoder(kind)
    target = LanguageModel(model, "target")
    part = [TEXTS[i] for i in (7, 2, 5, 0)]
    batch = collate(part, 0.0)
    expected = torch.cat([own_logits(model, example) for example in part]).softmax(-1)
    _, live = LiveDistributions.of(target, 1.0).teacher(batch, part).buckets(EVERYTHING)
    torch.testing.assert_close(live, expected, rtol=1e-3, atol=1e-5)

    settings = with_prompt_weight(tiny_settings(teacher_top_k=5), model)
    store = open_distributions(tmp_path, target, settings)
    store_distributions(target, TEXTS, store)
    cached = read_distributions([store], TEXTS).teacher(batch, part)
    ids, p = cached.buckets(EVERYTHING)
    top = expected.topk(5)
    assert ids is not None
    assert torch.equal(ids, top.indices)
    torch.testing.assert_close(p[:, :-1], top.values, rtol=3e-3, atol=1e-4)


def test_packed_rows_have_the_states_of_the_padded_batch(target: LanguageModel) -> None:
    """As a compiled forward reads them: each row's source is its own."""
    batch = collate(TEXTS, 0.0)
    with torch.inference_mode():
        packed, padded = _packed_hidden(target, batch), hidden_states(target.model, batch)
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-4)
    slots = [target.acquire() for _ in TEXTS]
    assert sorted(slots) == list(range(len(TEXTS))), "the rows of the batch were not released"
    for slot in slots:
        target.release(slot)


# --- students -------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["svd", "random"])
def test_a_t5_student_has_the_targets_vocabulary_and_start_token(init: str, tmp_path: Path) -> None:
    target = tiny_encoder_decoder()
    made = build_student(target, TINY_T5, init, 0, "t5")  # type: ignore[arg-type]
    made.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert type(loaded) is T5ForConditionalGeneration
    for name in ("vocab_size", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        assert getattr(loaded.config, name) == getattr(target.config, name), name
    assert len(loaded.encoder.block) == 2
    assert len(loaded.decoder.block) == 1
    assert loaded.config.is_gated_act
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert 0.8 < float(made.get_input_embeddings().weight.detach().std()) < 1.2
    check_packed_forward(LanguageModel(loaded, "student"))


def test_the_kind_of_a_new_student_follows_the_target(target: LanguageModel) -> None:
    causal = LanguageModel(tiny_target(), "target")
    plain = {"embedding_init": "random"}
    for of, settings, kind in (
        (target, tiny_settings(**plain), T5ForConditionalGeneration),
        (target, tiny_settings(architecture="llama", **plain), LlamaForCausalLM),
        (causal, tiny_settings(**plain), LlamaForCausalLM),
        (causal, tiny_settings(architecture="t5", **plain), T5ForConditionalGeneration),
    ):
        assert type(make_student(of, settings)) is kind
    # with the vocabulary of the bundled target
    small = make_student(target, tiny_settings(**plain))
    assert 1.5e6 < num_parameters(small) + (8192 - VOCAB) * 128 < 1.7e6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": TINY.model_dump()}, "num_kv_heads 1: a T5 has as many as num_heads, 2"),
        ({"shape": TINY_T5.model_dump(), "architecture": "llama"}, "a Llama has no encoder"),
        ({"target_layers": [2]}, "target_layers: 2 is not one of the target's 2 decoder layers"),
        ({"target_encoder_layers": [0, 3]}, "target_encoder_layers: 3 is not one .* 3 encoder la"),
        ({"target_encoder_layers": [0]}, "2 decoder layers and 1 encoder layers: transformers"),
        ({"shape": {**TINY_T5.model_dump(), "num_layers": 3}}, "3 decoder layers and 2 encoder"),
        ({"target_layers": [0], "architecture": "t5"}, "'architecture' is of a new student"),
    ],
    ids=["heads", "causal", "decoder", "encoder", "deep copy", "deep shape", "architecture"],
)
def test_settings_that_make_no_student_are_refused(
    changes: dict[str, object], message: str, target: LanguageModel
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_student(target, tiny_settings(embedding_init="random", **changes))


def test_layers_of_an_encoder_are_refused_for_a_causal_target() -> None:
    causal = LanguageModel(tiny_target(), "target")
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no encoder; remove it"):
        make_student(causal, tiny_settings(target_encoder_layers=[0]))


def all_logits(model: PreTrainedModel) -> torch.Tensor:
    return torch.cat([own_logits(model, example) for example in TEXTS[:4]])


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_layers_is_the_same_when_loaded(kind: str, tmp_path: Path) -> None:
    """All layers are the target; of others, T5's first one keeps the biases that all share."""
    model = tiny_encoder_decoder(kind)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    whole = copy_encoder_decoder_layers(model, [0, 1], [0, 1, 2]).eval()
    assert torch.equal(all_logits(whole), all_logits(model))
    some = copy_encoder_decoder_layers(model, [1], [2, 0]).eval()
    some.save_pretrained(tmp_path)
    loaded, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(all_logits(loaded), all_logits(some), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(all_logits(some), all_logits(whole), atol=1e-2)
    if kind in ("t5", "mt5"):
        bias = some.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        own = model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        assert torch.equal(bias, own)
    check_packed_forward(LanguageModel(loaded, "student"))
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


def test_a_copys_cache_holds_its_own_layers() -> None:
    for kind in (*T5_FAMILY, "bart"):
        copy = copy_encoder_decoder_layers(tiny_encoder_decoder(kind), [1, 0], [2, 0]).eval()
        text = torch.tensor([[3, 9, 4, 17, 5]])
        greedy = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
        cached, plain = (copy.generate(text, use_cache=use, **greedy) for use in (True, False))
        assert torch.equal(cached, plain)


@pytest.mark.parametrize("kind", ["t5", "umt5", "bart"])
def test_a_student_goes_on_from_a_checkpoint(
    kind: str, target: LanguageModel, tmp_path: Path
) -> None:
    model = tiny_encoder_decoder(kind, seed=7)
    model.save_pretrained(tmp_path)
    found = make_student(target, tiny_settings(start_from=str(tmp_path)))
    assert same_weights(found, model)


def test_a_checkpoint_that_shifts_its_logits_is_refused(
    target: LanguageModel, tmp_path: Path
) -> None:
    model = tiny_encoder_decoder("marian")
    model.final_logits_bias.normal_()
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="MarianMTModel scales, caps or shifts its logits"):
        make_student(target, tiny_settings(start_from=str(tmp_path)))


def test_a_damaged_checkpoint_is_named(target: LanguageModel, tmp_path: Path) -> None:
    t5_student().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="not a causal LM or encoder-decoder"):
        make_student(target, tiny_settings(start_from=str(tmp_path)))


# --- training -------------------------------------------------------------------------------------


def first_losses(model: PreTrainedModel, examples: list[Example]) -> float:
    """Return the mean loss of the first tokens of answers."""
    replays = replay_validation(model, examples, None)
    return float(torch.stack([replay.losses[0] for replay in replays]).mean())


def test_answers_are_learned_from_their_sources_alone(tmp_path: Path) -> None:
    """Training on prompts instead of answers, or with labels of another place, learns no answer."""
    unseen, student = repeated_texts(30, seed=9), t5_student()
    before = first_losses(student, unseen)
    settings = tiny_settings(epochs=14.0, validate_every=7.0, batch_tokens=192, prompt_weight=0.0)
    run(trainer(student, repeated_texts(150), settings, tmp_path / "c.pt"), unseen)
    after = first_losses(student, unseen)
    assert after < 0.4 * before
    # the source of another text does not help
    other = []
    for example in unseen:
        tokens = example.tokens.copy()
        tokens[: example.num_prompt] = (tokens[: example.num_prompt] + 5) % VOCAB
        other.append(replace(example, tokens=tokens))
    assert first_losses(student, other) > before


def test_the_loss_of_a_step_is_the_mean_over_answers_without_padding(tmp_path: Path) -> None:
    texts, student = source_texts(6), t5_student()
    expected = torch.cat([
        torch.nn.functional.cross_entropy(
            own_logits(student, e), torch.from_numpy(e.tokens[e.num_prompt :]), reduction="none"
        )
        for e in texts
    ])  # fmt: skip
    settings = tiny_settings(batch_tokens=1000, epochs=1.0, prompt_weight=0.0, autocast=False)
    first = run(trainer(student, texts, settings, tmp_path / "c.pt"), texts)
    assert first.step == 1
    assert first.loss == pytest.approx(float(expected.mean()), rel=1e-4)


@pytest.mark.parametrize("loss", ["kl", "tvd++", "lk_hybrid"])
def test_a_student_gains_acceptance_by_the_targets_distributions(
    loss: str, target: LanguageModel, tmp_path: Path
) -> None:
    live = LiveDistributions.of(target, 1.0)
    texts = source_texts(40)

    def acceptance(model: PreTrainedModel) -> float:
        return float(torch.cat([r.accepted for r in replay_validation(model, texts, live)]).mean())

    student = t5_student()
    before = acceptance(student)
    settings = tiny_settings(
        loss=loss, teacher="live", prompt_weight=0.0, epochs=8.0, validate_every=8.0
    )
    lesson = Lesson(texts, (), live)
    trainer(student, lesson, settings, tmp_path / "c.pt").run(lambda own: (acceptance(own), {}))
    assert acceptance(student) > before + 0.1


@pytest.mark.parametrize("step", [1, 7])
def test_a_killed_run_ends_with_the_bits_of_an_uninterrupted_one(
    step: int, target: LanguageModel, tmp_path: Path
) -> None:
    live = LiveDistributions.of(target, 1.0)
    lesson, validation = Lesson(source_texts(60), source_texts(20, 4), live), source_texts(8, 1)
    settings = tiny_settings(
        loss="kl", prompt_weight=0.0, ema_decay=0.9, text_share=0.3, pretrain_text=["any.jsonl"]
    )
    whole = t5_student()
    plain = run(trainer(whole, lesson, settings, tmp_path / "whole"), validation)
    with pytest.raises(KilledError):
        run(trainer(t5_student(), lesson, settings, tmp_path / "part"), validation, killer(step))
    student = t5_student(seed=0 if step == 1 else 99)
    resumed = trainer(student, lesson, settings, tmp_path / "part")
    assert resumed.training.step == step // 2 * 2
    result = run(resumed, validation)
    assert without_speed(result.history) == without_speed(plain.history)
    assert same_weights(whole, student)


def test_a_causal_student_learns_the_targets_distributions_at_the_answers_places(
    target: LanguageModel,
) -> None:
    """Its text is the prompt and the answer; the teacher's rows are those of the same tokens."""
    batch, student = collate(TEXTS, 0.0), new_student()
    teacher = LiveDistributions.of(target, 1.0).teacher(batch, TEXTS)
    with torch.inference_mode():
        hidden = hidden_states(student, batch)
        figures = judge(hidden, student.get_output_embeddings().weight, batch.targets, teacher)
    at = 0
    for example in TEXTS:
        tokens = torch.from_numpy(example.tokens)
        with torch.inference_mode():
            logits = student(input_ids=tokens[None], use_cache=False).logits[0]
        q = logits[example.num_prompt - 1 : -1].softmax(-1)
        p = own_logits(target.model, example).softmax(-1)
        own = figures.accepted[at : at + len(q)]
        torch.testing.assert_close(own, torch.minimum(p, q).sum(-1), rtol=1e-3, atol=1e-4)
        at += len(q)


def test_a_shape_without_numbers_of_heads_shares_none() -> None:
    shape = StudentShape(num_layers=2, hidden_size=16, mlp_size=24, num_heads=2)
    assert shape.num_kv_heads == 2
    assert shape.encoder_layers == 2
