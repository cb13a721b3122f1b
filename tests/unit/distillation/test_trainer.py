"""The training loop on tiny students: what is learned, what a step's loss is, which weights remain."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from support.distillation import VOCAB, tiny_settings, tiny_target
from support.training import (
    SmoothedText,
    new_student,
    rule_texts,
    run,
    same_weights,
    score_by_loss,
    trainer,
)

from paceline.distillation.batches import Example, collate, total_weight
from paceline.distillation.distributions import LiveDistributions
from paceline.distillation.losses import LOSSES
from paceline.distillation.objective import judge
from paceline.distillation.reading import hidden_states
from paceline.distillation.replays import replay_validation, with_losses
from paceline.distillation.schedule import learning_rate, plan_steps
from paceline.distillation.settings import DistillSettings
from paceline.distillation.teachers import TextTeacher
from paceline.distillation.train import Lesson, choose_arithmetic
from paceline.models.language_model import LanguageModel

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from paceline.distillation.replays import TextReplay
    from paceline.distillation.train import TrainingProgress

Weights = dict[str, torch.Tensor]


def mean_of(replays: list[TextReplay], kind: str) -> float:
    return float(torch.cat([getattr(replay, kind) for replay in replays]).float().mean())


def mean_loss(student: PreTrainedModel, examples: list[Example]) -> float:
    return mean_of(replay_validation(student, examples, None), "losses")


def copied(student: PreTrainedModel) -> Weights:
    return {name: weight.clone() for name, weight in student.state_dict().items()}


def has_weights(student: PreTrainedModel, weights: Weights) -> bool:
    return all(torch.equal(w, weights[name]) for name, w in student.state_dict().items())


# --- what is learned ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_teaches_a_rule(name: str, tmp_path: Path) -> None:
    """The acceptance and the greedy matches rise, on texts that the student has not seen."""
    student, unseen = new_student(), rule_texts(20, seed=8)
    before = replay_validation(student, unseen, SmoothedText())
    settings = tiny_settings(loss=name, epochs=20.0, validate_every=5.0)
    lesson = Lesson(rule_texts(60), distributions=SmoothedText())
    run(trainer(student, lesson, settings, tmp_path / "c.pt"), unseen)
    after = replay_validation(student, unseen, SmoothedText())

    for kind, most in (("matches", 0.9), ("accepted", 0.8)):
        assert mean_of(before, kind) < 0.2
        assert mean_of(after, kind) > most


def test_cross_entropy_learns_the_text_and_not_the_distributions(tmp_path: Path) -> None:
    """The stored distributions may be those of the validation texts alone."""

    class Refusing:
        def teacher(self, batch: object, examples: object) -> TextTeacher:
            raise AssertionError("no distributions are needed")

    examples = rule_texts(20)
    plain, given = new_student(), new_student()
    settings = tiny_settings(loss="cross_entropy")
    run(trainer(plain, examples, settings, tmp_path / "a"), examples)
    run(trainer(given, Lesson(examples, (), Refusing()), settings, tmp_path / "b"), examples)
    assert same_weights(plain, given)


def test_distributions_move_the_student_towards_the_target(tmp_path: Path) -> None:
    """The acceptance against the target itself, on texts that are not the target's own."""
    target = LanguageModel(tiny_target(), "target")
    live = LiveDistributions.of(target, 1.0)
    examples, student = rule_texts(60), new_student()
    before = replay_validation(student, examples, live)
    settings = tiny_settings(loss="kl", teacher="live", epochs=20.0, validate_every=5.0)

    def validate(student: PreTrainedModel) -> tuple[float, dict[str, Any]]:
        return mean_of(replay_validation(student, examples, live), "accepted"), {}

    trainer(student, Lesson(examples, (), live), settings, tmp_path / "c.pt").run(validate)
    after = replay_validation(student, examples, live)
    rates = mean_of(before, "accepted"), mean_of(after, "accepted")
    assert rates[1] > rates[0] + 0.15


def losses_by_part(model: PreTrainedModel, examples: list[Example]) -> tuple[float, float]:
    """Return the mean losses of (prompt tokens, answer tokens)."""
    batch = collate(examples, prompt_weight=0.5)
    with torch.inference_mode():
        head = model.get_output_embeddings().weight
        hidden, teacher = hidden_states(model, batch), TextTeacher(batch.targets)
        losses = judge(hidden, head, batch.targets, teacher).losses
    of_prompt = batch.weights < 1
    return float(losses[of_prompt].mean()), float(losses[~of_prompt].mean())


@pytest.mark.parametrize("loss", ["cross_entropy", "kl", "tvd++"])
@pytest.mark.parametrize("prompt_weight", [0.0, 1.0])
def test_a_student_learns_answers_and_prompts_only_as_far_as_they_weigh(
    prompt_weight: float, loss: str, tmp_path: Path
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
    model = new_student()
    prompts_before, answers_before = losses_by_part(model, examples)
    settings = tiny_settings(
        loss=loss, epochs=12.0, validate_every=6.0, prompt_weight=prompt_weight
    )
    lesson = Lesson(examples, distributions=SmoothedText())
    run(trainer(model, lesson, settings, tmp_path / "c.pt"), examples)
    prompts, answers = losses_by_part(model, examples)

    assert answers < 0.5 * answers_before
    if prompt_weight == 0.0:
        assert prompts > 0.95 * prompts_before
    else:
        assert prompts < 0.5 * prompts_before


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_mixed_text_is_learned_next_to_the_answers(share: float, tmp_path: Path) -> None:
    """Even tokens in the answers and odd ones in the texts, so the one does not teach the other."""
    starts = [2 * i % VOCAB for i in range(48)]
    answers = [Example(f"a/{s}", "a", (s + 6 * np.arange(9)) % VOCAB, 1) for s in starts]
    texts = [Example(f"t/{s}", "t", (s + 1 + 4 * np.arange(9)) % VOCAB, 1) for s in starts]
    student = new_student()
    before = mean_loss(student, texts)
    settings = tiny_settings(
        epochs=12.0, validate_every=6.0, text_share=share, pretrain_text=["any.txt"]
    )
    training = run(trainer(student, Lesson(answers, texts), settings, tmp_path / "c"), answers)

    num_answers = len(plan_steps(answers, (), tiny_settings(epochs=12.0), 1))
    assert training.step == num_answers * (2 if share else 1)
    assert mean_loss(student, answers) < 0.3 * before
    assert (mean_loss(student, texts) < 0.3 * before) == bool(share)


# --- pre-training ---------------------------------------------------------------------------------


def test_pre_training_learns_the_stated_tokens_of_text_and_no_answer(tmp_path: Path) -> None:
    answers, texts = rule_texts(60, step=3), rule_texts(60, seed=5, domain="t")
    student, phases = new_student(), set()
    before = mean_loss(student, answers), mean_loss(student, texts)
    settings = tiny_settings(loss="kl", prompt_weight=0.0)
    trained = trainer(student, Lesson(answers, texts), settings, tmp_path / "p", 4000)
    training = run(trained, texts, lambda progress: phases.add(progress.phase))

    assert phases == {"pretrain"}
    assert training.step == 63  # 4000 / 64, rounded up
    assert 0.6 * 4000 < training.tokens <= 63 * 64  # the batches are not all full
    assert {entry["phase"] for entry in training.history} == {"pretrain"}
    assert mean_loss(student, texts) < 0.5 * before[1]
    assert mean_loss(student, answers) > 0.9 * before[0]

    # the alignment begins with these weights and a new optimizer
    pretrained = copied(student)
    aligned = trainer(student, Lesson(answers, texts), settings, tmp_path / "a")
    assert has_weights(student, pretrained)
    assert not aligned.optimizer.state
    run(aligned, answers)
    assert mean_loss(student, answers) < 0.5 * before[0]


# --- a step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["cross_entropy", "kl", "tvd"])
def test_the_loss_of_a_step_is_the_mean_weighted_by_part(loss: str, tmp_path: Path) -> None:
    examples, model = rule_texts(8, seed=2), new_student()
    settings = tiny_settings(
        loss=loss, epochs=1.0, batch_tokens=1000, prompt_weight=0.25, autocast=False
    )
    batch = collate(examples, 0.25)
    teacher = SmoothedText().teacher(batch, examples)
    with torch.inference_mode():
        logits = model(input_ids=batch.tokens).logits.flatten(0, 1)[batch.places]
    p = teacher.buckets(slice(None))[1]
    if loss == "cross_entropy":
        p = torch.nn.functional.one_hot(batch.targets, VOCAB).float()
    losses, _ = LOSSES[settings.loss](p, logits.softmax(-1))
    expected = float((losses * batch.weights).sum() / batch.weights.sum())
    assert expected != pytest.approx(float(losses.mean()), rel=1e-5)

    seen: list[float] = []
    lesson = Lesson(examples, distributions=SmoothedText())
    run(trainer(model, lesson, settings, tmp_path / "c"), examples, lambda p: seen.append(p.loss))
    assert seen == [pytest.approx(expected, rel=1e-4)]


def equal_texts(num: int) -> list[Example]:
    """Return texts of 9 tokens with prompts of very different lengths."""
    texts = rule_texts(num)
    start = [int(e.tokens[0]) for e in texts]
    return [
        Example(f"e/{i}", "d", (s + 7 * np.arange(9)) % VOCAB, 1 + 7 * (i % 5 == 0))
        for i, s in enumerate(start)
    ]


@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_two_accumulated_batches_are_nearly_one_of_twice_the_size(
    loss: str, tmp_path: Path
) -> None:
    """Weights of the halves differ, so a mean of their means would be another loss and direction."""
    examples = equal_texts(48)
    plain = {"loss": loss, "prompt_weight": 0.0, "autocast": False, "learning_rate": 1e-3}
    found = []
    for parts in (1, 2):
        student, seen = new_student(), []
        settings = tiny_settings(accumulate=parts, **plain)
        lesson = Lesson(examples, distributions=SmoothedText())
        trained = trainer(student, lesson, settings, tmp_path / str(parts))
        # the same texts per step, whatever the size of batches does to their order
        steps = plan_steps(examples, (), settings, 1)
        assert {len(step.batches[0]) for step in steps} == {8}
        size = 8 // parts
        trained.plan = [
            replace(step, batches=[step.batches[0][i : i + size] for i in range(0, 8, size)])
            for step in steps
        ]
        weights = [[total_weight_of(b, examples) for b in s.batches] for s in trained.plan]
        run(trained, examples, lambda progress, seen=seen: seen.append(progress.loss))
        found.append((seen, torch.cat([w.flatten() for w in student.state_dict().values()])))
    assert any(first != second for first, second in weights)
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert (found[0][1] - found[1][1]).abs().mean() < 1e-5


def total_weight_of(batch: list[int], examples: list[Example]) -> float:
    return sum(total_weight(examples[i], 0.0) for i in batch)


def test_each_step_has_its_learning_rate(tmp_path: Path) -> None:
    settings, seen = tiny_settings(), []
    trained = trainer(new_student(), rule_texts(30), settings, tmp_path / "c")

    def note(progress: TrainingProgress) -> None:
        seen.append([group["lr"] for group in trained.optimizer.param_groups])

    run(trained, rule_texts(3), note)
    total = len(trained.plan)
    assert seen == [[learning_rate(step, total, settings)] * 2 for step in range(total)]


def test_a_gradient_is_clipped_at_its_norm(tmp_path: Path) -> None:
    settings = tiny_settings(epochs=1.0, batch_tokens=1000, max_gradient_norm=0.01)
    trained = trainer(new_student(), rule_texts(8), settings, tmp_path / "c")
    assert run(trained, rule_texts(3)).step == 1
    moments = [state["exp_avg"].flatten() for state in trained.optimizer.state.values()]
    # the first step's mean is a tenth of its gradient
    assert float(torch.cat(moments).norm()) == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_tokens_are_those_that_the_student_read(tmp_path: Path) -> None:
    examples = rule_texts(30)
    training = run(trainer(new_student(), examples, tiny_settings(), tmp_path / "c"), examples)
    assert training.tokens == 3 * sum(len(e.tokens) - 1 for e in examples)
    assert training.seconds > 0
    assert training.cpu_seconds > 0


# --- validation -----------------------------------------------------------------------------------


def test_a_trained_student_has_the_weights_of_its_best_validation(tmp_path: Path) -> None:
    """Not the last weights, and not a reference to weights that are still trained."""
    scores, seen = iter([0.5, 0.9, 0.1]), []

    def scripted(model: PreTrainedModel) -> tuple[float, dict[str, Any]]:
        seen.append(copied(model))
        return next(scores), {}

    model, entries = new_student(), []
    trained = trainer(model, rule_texts(100), tiny_settings(validate_every=1.0), tmp_path / "c")
    result = trained.run(scripted, on_validated=entries.append)

    assert result.best_score == 0.9
    assert result.best_step == result.history[1]["step"] < result.step
    assert has_weights(model, seen[1])
    assert not any(torch.equal(seen[1][name], seen[2][name]) for name in seen[1])
    assert entries == result.history
    assert [entry["score"] for entry in entries] == [0.5, 0.9, 0.1]
    assert [e["step"] for e in entries] == [result.step // 3 * i for i in (1, 2)] + [result.step]


def test_the_last_step_is_validated(tmp_path: Path) -> None:
    settings = tiny_settings(epochs=1.0, validate_every=0.7)
    result = run(trainer(new_student(), rule_texts(60), settings, tmp_path / "c"), rule_texts(5))
    steps = [entry["step"] for entry in result.history]
    assert len(steps) == 2
    assert steps[-1] == result.step


@pytest.mark.parametrize("decay", [0.5, 0.95])
def test_the_average_of_the_weights_is_validated_and_remains(decay: float, tmp_path: Path) -> None:
    """The training itself goes on with the weights, not with their average."""
    examples = rule_texts(60)
    raw: list[Weights] = []
    plain_student = new_student()

    def note(progress: TrainingProgress) -> None:
        raw.append(copied(plain_student))

    run(trainer(plain_student, examples, tiny_settings(), tmp_path / "a"), examples, note)

    average, averages = {n: w.double() for n, w in raw[0].items()}, []
    for step, weights in enumerate(raw, 1):
        if step > 1:
            own = min(decay, (1 + step) / (10 + step))
            average = {n: own * a + (1 - own) * weights[n].double() for n, a in average.items()}
        averages.append(average)

    student, validated, ends = new_student(), [], []

    def validate(model: PreTrainedModel) -> tuple[float, dict[str, Any]]:
        validated.append(copied(model))
        return float(len(validated)), {}

    trained = trainer(student, examples, tiny_settings(ema_decay=decay), tmp_path / "b")
    result = trained.run(validate, lambda progress: ends.append(copied(student)))

    assert all(torch.equal(a[n], b[n]) for a, b in zip(ends, raw, strict=True) for n in a)
    assert len(validated) == 3
    for weights, entry in zip(validated, result.history, strict=True):
        for name, weight in weights.items():
            expected = averages[entry["step"] - 1][name].float()
            torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)
            assert not torch.equal(weight, raw[entry["step"] - 1][name])
    assert has_weights(student, validated[-1])


# --- replays --------------------------------------------------------------------------------------


def test_a_replay_has_the_figures_of_each_answer_alone() -> None:
    """In the order of the texts, at the answers' positions only."""
    student, examples = new_student(), rule_texts(25)
    target = LiveDistributions.of(LanguageModel(tiny_target(), "target"), 1.0)
    for distributions in (None, target):
        replays = replay_validation(student, examples, distributions)
        assert [r.example.id for r in replays] == [e.id for e in examples]
        for example, replay in zip(examples, replays, strict=True):
            tokens = torch.from_numpy(example.tokens)
            with torch.inference_mode():
                logits = student(input_ids=tokens[None]).logits[0, example.num_prompt - 1 : -1]
                p = tiny_target()(input_ids=tokens[None]).logits[0, example.num_prompt - 1 : -1]
            answer = tokens[example.num_prompt :]
            q = logits.softmax(-1)
            chance = q.gather(1, answer[:, None])[:, 0]
            torch.testing.assert_close(replay.losses, -chance.log(), rtol=1e-4, atol=1e-5)
            assert torch.equal(replay.matches, logits.argmax(-1) == answer)
            accepted = chance if distributions is None else torch.minimum(q, p.softmax(-1)).sum(-1)
            torch.testing.assert_close(replay.accepted, accepted, rtol=1e-4, atol=1e-5)


def test_the_loss_of_a_history_entry_is_the_mean_over_tasks_of_means_over_tokens() -> None:
    replays = replay_validation(
        new_student(), [*rule_texts(9), *rule_texts(3, seed=1, domain="e")], None
    )
    means = {
        task: torch.cat([r.losses for r in replays if r.example.domain == task]).mean()
        for task in ("d", "e")
    }
    figures = with_losses({"domains": {"d": {"x": 1}, "e": {}}}, replays)
    for task, mean in means.items():
        assert figures["domains"][task]["loss"] == pytest.approx(float(mean), abs=1e-4)
    assert figures["loss"] == pytest.approx(float(sum(means.values())) / 2, abs=1e-4)
    assert figures["domains"]["d"]["x"] == 1


def test_a_validation_leaves_the_training_as_it_is(tmp_path: Path) -> None:
    """Twice as many validations end with the same last weights."""
    last = []
    for every in (0.25, 3.0):
        student = new_student()
        settings = tiny_settings(validate_every=every)
        trained = trainer(student, rule_texts(60), settings, tmp_path / f"{every}")
        trained.run(score_by_loss(rule_texts(9)), lambda p, s=student: last.append((p, copied(s))))
    ends = [weights for progress, weights in last if progress.step == progress.total]
    assert len(ends) == 2
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize(
    ("kernels", "wanted"),
    [
        (("amx", "avx512", "generic"), True),
        (("avx512_bf16", "avx512", "generic"), True),
        (("avx512", "generic"), False),
        (("generic",), False),
    ],
)
def test_bfloat16_is_the_default_only_where_the_processor_multiplies_it(
    kernels: tuple[str, ...], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paceline.models.compiled.processor.available", lambda: kernels)
    chosen = choose_arithmetic(DistillSettings(), torch.device("cpu"))
    assert chosen.autocast is wanted
    for given in (True, False):
        kept = choose_arithmetic(DistillSettings(autocast=given), torch.device("cpu"))
        assert kept.autocast is given
