"""Distillation on tiny random models: the silent mistakes between texts and a drafter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from paceline.distillation.head import losses_and_matches, weighted_cross_entropy
from support.distillation import (
    VOCAB,
    KilledError,
    distill_settings,
    tiny_settings,
    tiny_target,
    tiny_tokenizer,
    write_prompts,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
)

from paceline.assembly import Pace, build_from_objects
from paceline.config import Config, ModelSection
from paceline.contracts import PromptRecord
from paceline.distillation import TrainingProgress, distill
from paceline.distillation.batches import Example, collate, in_order, pack_epoch
from paceline.distillation.prompts import choose_prompts
from paceline.distillation.settings import StudentShape
from paceline.distillation.student import build_student, num_parameters, project
from paceline.distillation.train import (
    DomainQuality,
    hidden_states,
    learning_rate,
    measure_quality,
    plan_batches,
    train,
)
from paceline.errors import ConfigError, StoreError
from paceline.models.language_model import LanguageModel
from paceline.models.self_checks import check_packed_forward
from paceline.models.vocabulary import Vocabulary
from paceline.store import TrainedOn, is_validation, part_of, read_prompts, take_by_hash, take_part

if TYPE_CHECKING:
    from collections.abc import Callable

TINY = StudentShape(num_layers=2, hidden_size=16, mlp_size=24, num_heads=2, num_kv_heads=1)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def student(seed: int = 0) -> LlamaForCausalLM:
    return build_student(tiny_target(), TINY, "random", seed)


def texts(count: int, seed: int = 0, domain: str = "d") -> list[Example]:
    """Return texts of a learnable rule: each token is a function of the previous one."""
    random = np.random.default_rng(seed)
    examples = []
    for i in range(count):
        num_prompt, num_output = int(random.integers(1, 6)), int(random.integers(1, 12))
        tokens = (random.integers(VOCAB) + 7 * np.arange(num_prompt + num_output)) % VOCAB
        examples.append(Example(f"{domain}/{i}", domain, tokens.astype(np.int64), num_prompt))
    return examples


# --- student --------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["svd", "random"])
def test_a_student_has_the_targets_vocabulary_and_runs_packed(init: str, tmp_path: Path) -> None:
    target = tiny_target()
    made = build_student(target, TINY, init, seed=0)  # type: ignore[arg-type]
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert type(loaded) is LlamaForCausalLM
    for name in ("vocab_size", "max_position_embeddings", "eos_token_id", "rope_parameters"):
        assert getattr(loaded.config, name) == getattr(target.config, name), name
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    check_packed_forward(LanguageModel(loaded, "student"))


def test_a_student_is_a_function_of_the_seed_and_does_not_change_the_callers_randomness() -> None:
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    first, again, other = student(1), student(1), student(2)

    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)
    )
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)


def test_projection_is_the_whitened_strongest_directions() -> None:
    """The weakest directions (eigh sorts upwards) would lose the target's geometry."""
    torch.manual_seed(0)
    embedding = torch.randn(30, 8) * torch.tensor([9.0, 7, 5, 3, 1, 1, 0.5, 0.1]) + 4
    projected = project(embedding, 3)
    best = torch.linalg.svd(embedding - embedding.mean(dim=0), full_matrices=False)[0][:, :3]

    # singular vectors are determined up to their sign
    torch.testing.assert_close(projected.abs(), best.abs() * (0.02 / best.std()), atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match="exceeds the target's 8"):
        project(embedding, 9)


# --- loss -----------------------------------------------------------------------------------------


def test_sliced_head_equals_plain_cross_entropy_in_value_and_gradients() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(600, 16, requires_grad=True)  # more than two slices
    head = torch.randn(VOCAB, 16, requires_grad=True)
    targets, weights = torch.randint(VOCAB, (600,)), torch.rand(600)

    plain = (F.cross_entropy(hidden @ head.T, targets, reduction="none") * weights).sum()
    expected = torch.autograd.grad(3 * plain, [hidden, head])
    ours = weighted_cross_entropy(hidden, head, targets, weights)
    found = torch.autograd.grad(3 * ours, [hidden, head])

    torch.testing.assert_close(ours, plain)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    losses, matches = losses_and_matches(hidden.detach(), head.detach(), targets)
    torch.testing.assert_close((losses * weights).sum(), plain.detach())
    assert torch.equal(matches, (hidden @ head.T).argmax(-1) == targets)


def test_a_half_precision_head_has_nearly_the_same_gradients() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(300, 16, requires_grad=True)
    head = (torch.randn(VOCAB, 16) * 0.3).requires_grad_()
    targets, weights = torch.randint(VOCAB, (300,)), torch.full((300,), 1 / 300)
    exact = torch.autograd.grad(
        weighted_cross_entropy(hidden, head, targets, weights), [hidden, head]
    )
    half = torch.autograd.grad(
        weighted_cross_entropy(hidden, head, targets, weights, torch.bfloat16), [hidden, head]
    )
    for a, b in zip(exact, half, strict=True):
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999


# --- batches --------------------------------------------------------------------------------------


def test_a_text_has_the_same_loss_in_a_batch_and_alone() -> None:
    """Padding or a neighbour's tokens in a text would change its loss."""
    model, examples = student(), texts(5)
    head = model.get_output_embeddings().weight
    with torch.inference_mode():
        together = collate(examples, prompt_weight=0.3)
        losses, _ = losses_and_matches(hidden_states(model, together), head, together.targets)
        for i, example in enumerate(examples):
            alone = model(input_ids=torch.from_numpy(example.tokens[:-1])[None]).logits[0]
            wanted = torch.from_numpy(example.tokens[1:])
            expected = F.cross_entropy(alone, wanted, reduction="none")
            own = together.examples == i
            torch.testing.assert_close(losses[own], expected, atol=1e-5, rtol=1e-5)
            # planted bug: texts that begin one token later must have another loss
            assert not torch.allclose(losses[own].roll(1), expected) or len(expected) == 1


def test_answer_tokens_have_weight_1_and_prompt_tokens_the_prompt_weight() -> None:
    example = Example("a", "d", np.arange(10, 17), num_prompt=3)
    both = collate([example], prompt_weight=0.25)
    assert both.targets.tolist() == [11, 12, 13, 14, 15, 16]
    assert both.weights.tolist() == [0.25, 0.25, 1, 1, 1, 1]

    answers = collate([example], prompt_weight=0.0)
    assert answers.targets.tolist() == [13, 14, 15, 16]
    assert answers.weights.tolist() == [1, 1, 1, 1]
    assert answers.places.tolist() == [2, 3, 4, 5]


def test_an_epoch_has_every_text_once_within_the_budget() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 70, 500)]
    first, again = pack_epoch(lengths, 64, 5, 0), pack_epoch(lengths, 64, 5, 0)

    assert first == again
    assert first != pack_epoch(lengths, 64, 5, 1)
    for batches in (first, in_order(lengths, 64)):
        assert sorted(i for batch in batches for i in batch) == list(range(500))
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 64


def test_part_of_an_epoch_is_part_of_its_batches() -> None:
    examples = texts(80)
    whole = plan_batches(examples, tiny_settings(epochs=1.0))
    half = plan_batches(examples, tiny_settings(epochs=1.5))
    assert half[: len(whole)] == whole
    assert 0.4 < len(half) / len(whole) - 1 < 0.6


# --- training -------------------------------------------------------------------------------------


def test_loss_falls_and_matches_rise_on_a_tiny_set(tmp_path: Path) -> None:
    model, examples = student(), texts(60)
    before = measure_quality(model, examples)["d"]
    train(model, examples, examples, tiny_settings(epochs=12.0), tmp_path / "c.pt")
    after = measure_quality(model, examples)["d"]

    assert after.loss < 0.3 * before.loss
    assert after.match_rate > 0.9
    assert after.num_tokens == sum(e.num_output for e in examples)


def losses_by_part(model: LlamaForCausalLM, examples: list[Example]) -> tuple[float, float]:
    """Return the mean losses of (prompt tokens, answer tokens)."""
    batch = collate(examples, prompt_weight=0.5)
    with torch.inference_mode():
        head = model.get_output_embeddings().weight
        losses, _ = losses_and_matches(hidden_states(model, batch), head, batch.targets)
    of_prompt = batch.weights < 1
    return float(losses[of_prompt].mean()), float(losses[~of_prompt].mean())


@pytest.mark.parametrize("prompt_weight", [0.0, 1.0])
def test_a_student_learns_answers_and_prompts_only_as_far_as_they_weigh(
    prompt_weight: float, tmp_path: Path
) -> None:
    """Prompts count up by one and answers by seven, so the one does not teach the other.

    A loss on prompts instead of answers, or on both, shows in the loss of the wrong part.
    """
    random = np.random.default_rng(0)
    examples = []
    for i in range(80):
        prompt = (random.integers(VOCAB) + np.arange(7)) % VOCAB
        answer = (prompt[-1] + 7 * np.arange(1, 8)) % VOCAB
        tokens = np.concatenate([prompt, answer]).astype(np.int64)
        examples.append(Example(f"d/{i}", "d", tokens, len(prompt)))
    model = student()
    prompts_before, answers_before = losses_by_part(model, examples)
    settings = tiny_settings(epochs=12.0, prompt_weight=prompt_weight)
    train(model, examples, examples, settings, tmp_path / "c.pt")
    prompts, answers = losses_by_part(model, examples)

    assert answers < 0.5 * answers_before
    if prompt_weight == 0.0:
        assert prompts > 0.95 * prompts_before
    else:
        assert prompts < 0.5 * prompts_before


def test_the_loss_of_a_step_is_the_mean_weighted_by_part(tmp_path: Path) -> None:
    examples, model = texts(8, seed=2), student()
    settings = tiny_settings(epochs=1.0, batch_tokens=1000, prompt_weight=0.25, autocast=False)
    batch = collate(examples, 0.25)
    with torch.inference_mode():
        head = model.get_output_embeddings().weight
        losses, _ = losses_and_matches(hidden_states(model, batch), head, batch.targets)
    expected = float((losses * batch.weights).sum() / batch.weights.sum())
    assert expected != pytest.approx(float(losses.mean()), rel=1e-4)

    seen: list[float] = []
    train(model, examples, examples, settings, tmp_path / "c.pt", lambda p: seen.append(p.loss))

    assert seen == [pytest.approx(expected, rel=1e-5)]


def test_a_trained_student_has_the_weights_of_its_best_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the last weights, and not a reference to weights that are still trained."""
    rates, seen = iter([0.5, 0.9, 0.1]), []

    def scripted(model: LlamaForCausalLM, _: object) -> dict[str, DomainQuality]:
        seen.append({name: weight.clone() for name, weight in model.state_dict().items()})
        return {"d": DomainQuality(1.0, next(rates), 1)}

    monkeypatch.setattr("paceline.distillation.train.measure_quality", scripted)
    model = student()
    result = train(model, texts(100), texts(9), tiny_settings(validate_every=1.0), tmp_path / "c")

    assert result.best_match == 0.9
    assert result.best_step == result.history[1]["step"] < result.step
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, seen[1][name]), name


def killer(step: int) -> Callable[[TrainingProgress], None]:
    def kill(progress: TrainingProgress) -> None:
        if progress.step == step:
            raise KilledError

    return kill


@pytest.mark.parametrize("step", [1, 4, 7])
def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(
    step: int, tmp_path: Path
) -> None:
    """A checkpoint without the optimizer's moments, the step or the best weights would fail here."""
    examples, settings = texts(60), tiny_settings()
    whole = student()
    plain = train(whole, examples, texts(9, seed=1), settings, tmp_path / "whole.pt")
    assert plain.step > 8

    with pytest.raises(KilledError):
        train(student(), examples, texts(9, seed=1), settings, tmp_path / "part.pt", killer(step))
    resumed = student(seed=99)  # replaced by the checkpoint's weights
    if not (tmp_path / "part.pt").exists():
        resumed = student()
    result = train(resumed, examples, texts(9, seed=1), settings, tmp_path / "part.pt")

    assert result.history == plain.history
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_of_other_settings_or_texts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    with pytest.raises(KilledError):
        train(student(), texts(60), texts(9), tiny_settings(), path, killer(3))
    for examples, settings in (
        (texts(60), tiny_settings(learning_rate=2e-2)),
        (texts(60, seed=4), tiny_settings()),
    ):
        with pytest.raises(ConfigError, match="other settings or other texts"):
            train(student(), examples, texts(9), settings, path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigError, match="cannot be read; delete it"):
        train(student(), texts(60), texts(9), tiny_settings(), path)


def test_the_learning_rate_rises_then_falls_to_its_final_share() -> None:
    settings = tiny_settings(learning_rate=1.0, warmup_share=0.1, final_learning_rate=0.1)
    rates = [learning_rate(step, 100, settings) for step in range(101)]
    assert rates.index(max(rates)) in (9, 10)
    assert max(rates) == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


# --- choice of prompts ----------------------------------------------------------------------------


def test_split_and_cap_do_not_depend_on_the_order_of_lines() -> None:
    records = [PromptRecord(f"p/{i}", "d", "x") for i in range(2000)]
    forward, backward = take_by_hash(records, 300), take_by_hash(records[::-1], 300)
    assert forward == backward
    assert forward == take_by_hash(records, 900)[:300]

    # the validation share of a cap is that of all prompts
    for some in (records, forward):
        share = sum(is_validation(r.id, 0.1) for r in some) / len(some)
        assert 0.07 < share < 0.13


# --- the verb -------------------------------------------------------------------------------------


@pytest.fixture
def pace() -> Pace:
    config = Config(target=ModelSection(model="unused"))
    return Pace(build_from_objects(tiny_target(), tiny_tokenizer(), {}, config))


def test_distill_writes_a_drafter_that_loads_and_describes_itself(
    pace: Pace, tmp_path: Path
) -> None:
    apples = write_prompts(tmp_path / "apples.jsonl", "apples", 40)
    pears = write_prompts(tmp_path / "pears.jsonl", "pears", 40)
    seen: list[TrainingProgress] = []
    out = tmp_path / "zoo" / "draft"
    settings = distill_settings(tmp_path, max_prompts={"apples": 30})
    report = distill(pace, [apples], out, settings, seen.append, also_measure=[pears])

    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == 0
    check_packed_forward(LanguageModel(model, "draft"))
    assert Vocabulary.of(AutoTokenizer.from_pretrained(out)) == pace.parts.vocabulary
    assert set(report.quality) == {"apples", "pears"}
    assert report.num_parameters == num_parameters(model)
    assert {p.phase for p in seen} == {"decode", "train"}
    assert [p for p in seen if p.phase == "train"][-1].step == report.steps
    assert not out.with_name("draft.part").exists()

    facts = json.loads((out / "training.json").read_text())
    readme = (out / "README.md").read_text()
    assert facts["examples"] == report.num_examples < 30
    assert facts["data"]["apples"]["texts"] == 30
    for word in (
        "apples book",
        "MIT",
        "apache-2.0",
        "| pears | no |",
        """'max_prompts={"apples": 30}'""",
    ):
        assert word in readme, word
    assert str(tmp_path) not in readme + json.dumps(facts)


def test_a_drafter_records_the_prompts_it_was_trained_on_and_no_others(
    pace: Pace, tmp_path: Path
) -> None:
    apples = write_prompts(tmp_path / "apples.jsonl", "apples", 40)
    pears = write_prompts(tmp_path / "pears.jsonl", "pears", 40)
    settings = distill_settings(tmp_path, max_prompts={"apples": 30})
    report = distill(pace, [apples], tmp_path / "a", settings, also_measure=[pears])
    record = TrainedOn.load(tmp_path / "a")
    assert record is not None

    given = read_prompts([apples])
    capped = take_by_hash(take_part(given, "training"), 30)
    trained = [r for r in capped if not is_validation(r.id, 0.2)]
    assert len(trained) == report.num_examples
    assert 0 < len(record) <= report.num_examples
    for record_of in given:  # validation prompts and those beyond the cap are unseen
        expected = record_of.prompt in {r.prompt for r in trained}
        assert (record_of.prompt in record) == expected
    assert not any(r.prompt in record for r in read_prompts([pears]))


def test_a_prompt_without_an_answer_is_not_recorded_as_trained_on(
    pace: Pace, tmp_path: Path
) -> None:
    apples = write_prompts(tmp_path / "apples.jsonl", "apples", 30)
    too_long = " ".join(["w1"] * 80)
    ids = [f"long/{i}" for i in range(4)]
    assert any(part_of(id) == "training" and not is_validation(id, 0.2) for id in ids)
    with apples.open("a", encoding="utf-8") as file:
        for id in ids:
            file.write(json.dumps({"id": id, "domain": "apples", "prompt": too_long}) + "\n")

    distill(pace, [apples], tmp_path / "a", distill_settings(tmp_path))

    record = TrainedOn.load(tmp_path / "a")
    assert record is not None
    assert too_long not in record
    assert len(record) > 10


def test_the_selection_for_training_is_capped_first_and_without_validation(tmp_path: Path) -> None:
    apples = write_prompts(tmp_path / "apples.jsonl", "apples", 60)
    settings = distill_settings(tmp_path, max_prompts={"apples": 25})
    records = read_prompts([apples])
    capped = take_by_hash(take_part(records, "training"), 25)
    expected = [r for r in capped if not is_validation(r.id, 0.2)]
    assert 0 < len(expected) < 25
    (file,) = choose_prompts([apples], settings).files
    assert file.training == expected
    assert {r.id for r in capped} == {r.id for r in file.training + file.validation}

    every = settings.model_copy(update={"part": "all", "max_prompts": None})
    (file,) = choose_prompts([apples], every).files
    assert {r.id for r in records} == {r.id for r in file.training + file.validation}


def test_the_answers_of_the_target_are_learned_and_not_the_prompts(
    pace: Pace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each text is a prompt as the target reads it, followed by the target's own answer."""
    apples = write_prompts(tmp_path / "apples.jsonl", "apples", 30)
    taken: list[Example] = []

    def capture(student: object, examples: list[Example], *rest: object) -> None:
        taken.extend(examples)
        raise KilledError

    monkeypatch.setattr("paceline.distillation.run.train", capture)
    with pytest.raises(KilledError):
        distill(pace, [apples], tmp_path / "a", distill_settings(tmp_path))

    prompts = {record.id: record.prompt for record in read_prompts([apples])}
    assert len(taken) > 10
    for example in taken:
        message = [{"role": "user", "content": prompts[example.id]}]
        answer = pace.complete(
            message, max_new_tokens=6, drafter="none", generation_config="none"
        ).token_ids
        assert example.tokens[: example.num_prompt].tolist() == list(pace.encode(message))
        assert example.tokens[example.num_prompt :].tolist() == answer


def test_of_other_tasks_only_validation_prompts_are_answered(pace: Pace, tmp_path: Path) -> None:
    apples = write_prompts(tmp_path / "apples.jsonl", "apples", 30)
    pears = write_prompts(tmp_path / "pears.jsonl", "pears", 30)
    settings = distill_settings(tmp_path)
    seen: list[TrainingProgress] = []
    distill(pace, [apples], tmp_path / "a", settings, seen.append, also_measure=[pears])
    pears_read = take_part(read_prompts([pears]), "training")
    num_apples = len(take_part(read_prompts([apples]), "training"))
    expected = sum(is_validation(r.id, 0.2) for r in pears_read)
    assert 0 < expected < len(pears_read)
    assert sum(p.phase == "decode" for p in seen) == num_apples + expected

    # answers are stored: the second drafter decodes only the missing ones
    seen.clear()
    distill(pace, [pears], tmp_path / "b", settings, seen.append, also_measure=[apples])
    assert sum(p.phase == "decode" for p in seen) == len(pears_read) - expected


def test_answers_of_another_target_or_limit_are_refused(pace: Pace, tmp_path: Path) -> None:
    apples = write_prompts(tmp_path / "apples.jsonl", "apples", 30)
    distill(pace, [apples], tmp_path / "a", distill_settings(tmp_path))
    other = distill_settings(tmp_path).model_copy(update={"max_new_tokens": 5})
    with pytest.raises(StoreError, match="max_new_tokens 6, now it is 5"):
        distill(pace, [apples], tmp_path / "b", other)


def test_mistakes_are_found_before_decoding(pace: Pace, tmp_path: Path) -> None:
    apples = write_prompts(tmp_path / "apples.jsonl", "apples", 3)
    settings = distill_settings(tmp_path)
    with pytest.raises(ConfigError, match="at least one file"):
        distill(pace, [], tmp_path / "a", settings)
    with pytest.raises(ConfigError, match="no such file of prompts"):
        distill(pace, [tmp_path / "plums.jsonl"], tmp_path / "a", settings)
    with pytest.raises(ConfigError, match="same name"):
        distill(pace, [apples, apples], tmp_path / "a", settings)
    precious = tmp_path / "precious"
    precious.mkdir()
    with pytest.raises(ConfigError, match="is not a distilled drafter"):
        distill(pace, [apples], precious, settings)
    assert not (tmp_path / "outputs").exists()
