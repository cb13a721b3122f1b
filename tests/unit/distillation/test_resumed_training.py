"""Trainings that end early: killed, interrupted, at a loss that is not finite, or on a full disk."""

from __future__ import annotations

import errno
import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.distillation import KilledError, tiny_settings, tiny_target
from support.training import (
    SmoothedText,
    killer,
    new_student,
    rule_texts,
    run,
    same_weights,
    trainer,
    without_speed,
)

from paceline.distillation.student import copy_layers
from paceline.distillation.teachers import LiveTeacher
from paceline.distillation.train import Lesson
from paceline.errors import ConfigError
from paceline.testing.tiny_models import tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from paceline.distillation.batches import Batch, Example
    from paceline.distillation.train import TrainingProgress

ANSWERS, TEXTS = rule_texts(60), rule_texts(20, seed=4, domain="t", step=11)
VALIDATION = rule_texts(9, seed=1)
LESSON = Lesson(ANSWERS, TEXTS, SmoothedText())
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "averaged": {"ema_decay": 0.9, "loss": "tvd++"},
    "accumulated": {"accumulate": 3, "epochs": 5.0, "loss": "lk_hybrid"},
    "mixed": {"text_share": 0.4, "pretrain_text": ["any.txt"], "loss": "kl"},
    "exact": {"autocast": False, "loss": "negative_log_acceptance", "prompt_weight": 0.0},
}


class Losses(dict[int, float]):
    """The reported loss of each step. A step that runs twice must have the same one."""

    def __call__(self, progress: TrainingProgress) -> None:
        assert self.setdefault(progress.step, progress.loss) == progress.loss


@pytest.mark.parametrize("step", [1, 4, 7])
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_a_killed_run_ends_as_an_uninterrupted_one(variant: str, step: int, tmp_path: Path) -> None:
    """With the bits of its weights, its losses and its history.

    A checkpoint without the optimizer's moments, the step, the averages or the best weights would fail.
    """
    settings, losses = tiny_settings(**VARIANTS[variant]), Losses()
    whole = new_student()
    plain = run(trainer(whole, LESSON, settings, tmp_path / "whole"), VALIDATION, losses)
    assert plain.step > 7
    assert len(plain.history) >= 3

    killed = trainer(new_student(), LESSON, settings, tmp_path / "part")
    with pytest.raises(KilledError):
        run(killed, VALIDATION, killer(step))
    # step 1 has no checkpoint yet; otherwise the weights are replaced by its own
    student = new_student(seed=0 if step == 1 else 99)
    resumed = trainer(student, LESSON, settings, tmp_path / "part")
    assert resumed.training.step == step // 2 * 2
    result = run(resumed, VALIDATION, losses)

    assert len(losses) == plain.step
    assert without_speed(result.history) == without_speed(plain.history)
    assert (result.best_step, result.best_score) == (plain.best_step, plain.best_score)
    assert result.tokens == plain.tokens
    assert same_weights(whole, student)


def test_a_student_with_dropout_resumes_alike(tmp_path: Path) -> None:
    """A copy of layers has its architecture's dropout, which draws from the global random state."""
    target = tiny_model("gpt2", vocab_size=40, context=64, resid_pdrop=0.3, embd_pdrop=0.3)
    settings = tiny_settings(epochs=1.0, learning_rate=1e-3)
    ends = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        ends.append(copy_layers(target, [0]))
        run(trainer(ends[-1], LESSON, settings, tmp_path / f"{seed}"), VALIDATION)
    assert same_weights(*ends)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first, again = new_student(), new_student(7)
    run(trainer(first, LESSON, tiny_settings(), tmp_path / "c"), VALIDATION)
    result = run(trainer(again, LESSON, tiny_settings(), tmp_path / "c"), VALIDATION, killer(1))
    assert same_weights(first, again)
    assert len(result.history) == 3


# --- checkpoints of other runs --------------------------------------------------------------------


def test_a_checkpoint_of_other_settings_or_texts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    with pytest.raises(KilledError):
        run(trainer(new_student(), LESSON, tiny_settings(), path), VALIDATION, killer(3))
    other_texts = Lesson(rule_texts(60, seed=4), TEXTS, SmoothedText())
    for lesson, settings, pretrain_tokens in (
        (LESSON, tiny_settings(loss="kl"), 0),
        (LESSON, tiny_settings(accumulate=2), 0),
        (other_texts, tiny_settings(), 0),
        (Lesson(ANSWERS, TEXTS[:-1]), tiny_settings(), 0),
        (LESSON, tiny_settings(), 500),  # of the other phase
    ):
        with pytest.raises(ConfigError, match="other settings or other texts"):
            trainer(new_student(), lesson, settings, path, pretrain_tokens)
    wider = copy_layers(tiny_target(), [0])
    with pytest.raises(ConfigError, match="other settings or other texts"):
        trainer(wider, LESSON, tiny_settings(), path)
    # these do not change which steps are made
    free = tiny_settings(learning_rate=2e-2, checkpoint_every=5, threads=1, dtype="float32")
    assert trainer(new_student(), LESSON, free, path).training.step == 2

    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigError, match="cannot be read; delete it"):
        trainer(new_student(), LESSON, tiny_settings(), path)


# --- Ctrl-C ---------------------------------------------------------------------------------------


class InStep:
    """Distributions that do something in the middle of a step, once."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self._left, self._act = step, act

    def teacher(self, batch: Batch, examples: Sequence[Example]) -> LiveTeacher:
        self._left -= 1
        if self._left == 0:
            self._act()
        return SmoothedText().teacher(batch, examples)


@pytest.fixture(autouse=True)
def default_ctrl_c() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also where the tests run as a job in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)  # to this thread, so that two of them are not merged


@pytest.mark.parametrize("step", [1, 4, 7])
def test_ctrl_c_in_a_step_saves_its_end(step: int, tmp_path: Path) -> None:
    settings, losses = tiny_settings(loss="kl", checkpoint_every=1000), Losses()
    whole = new_student()
    plain = run(trainer(whole, LESSON, settings, tmp_path / "whole"), VALIDATION, losses)

    handler = signal.getsignal(signal.SIGINT)
    lesson = Lesson(ANSWERS, TEXTS, InStep(step, press_ctrl_c))
    with pytest.raises(KeyboardInterrupt):
        run(trainer(new_student(), lesson, settings, tmp_path / "part"), VALIDATION, losses)
    assert signal.getsignal(signal.SIGINT) is handler

    student = new_student(99)
    resumed = trainer(student, LESSON, settings, tmp_path / "part")
    assert resumed.training.step == step
    result = run(resumed, VALIDATION, losses)
    assert without_speed(result.history) == without_speed(plain.history)
    assert same_weights(whole, student)


def test_ctrl_c_in_a_report_is_not_lost(tmp_path: Path) -> None:
    """Also in that of the last step, after which nothing is left to interrupt."""
    for step in (3, None):
        trained = trainer(new_student(), LESSON, tiny_settings(), tmp_path / f"{step}")
        last = step or len(trained.plan)

        def press(progress: TrainingProgress, last: int = last) -> None:
            if progress.step == last:
                press_ctrl_c()

        with pytest.raises(KeyboardInterrupt):
            run(trained, VALIDATION, press)
        again = trainer(new_student(), LESSON, tiny_settings(), tmp_path / f"{step}")
        assert again.training.step == min(last + 1, len(trained.plan))


def test_a_second_ctrl_c_ends_the_training_at_once(tmp_path: Path) -> None:
    def press_twice() -> None:
        press_ctrl_c()
        press_ctrl_c()
        raise AssertionError("the second one did not end it")

    lesson = Lesson(ANSWERS, TEXTS, InStep(4, press_twice))
    settings = tiny_settings(loss="kl", checkpoint_every=1000)
    with pytest.raises(KeyboardInterrupt):
        run(trainer(new_student(), lesson, settings, tmp_path / "c"), VALIDATION)
    assert not (tmp_path / "c").exists()


def test_a_training_in_another_thread_leaves_signals_alone(tmp_path: Path) -> None:
    found: list[int] = []

    def train() -> None:
        trained = trainer(new_student(), LESSON, tiny_settings(epochs=1.0), tmp_path / "c")
        found.append(run(trained, VALIDATION).step)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert found[0] > 2


# --- losses that are not finite -------------------------------------------------------------------


class NaNAfter(SmoothedText):
    """Distributions that are not numbers from a step on."""

    def __init__(self, step: int) -> None:
        self._left = step

    def teacher(self, batch: Batch, examples: Sequence[Example]) -> LiveTeacher:
        self._left -= 1
        teacher = super().teacher(batch, examples)
        return (
            teacher
            if self._left > 0
            else LiveTeacher(teacher.hidden * torch.nan, teacher.unembed, 1.0, teacher.device)
        )


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    settings, path = tiny_settings(loss="kl"), tmp_path / "c.pt"
    lesson = Lesson(ANSWERS, TEXTS, NaNAfter(6))
    message = r"the loss of step 6 is nan; the last checkpoint is kept in .*c\.pt: choose a "
    with pytest.raises(ConfigError, match=message + r"learning_rate below 0\.01 and run"):
        run(trainer(new_student(), lesson, settings, path), VALIDATION)

    lower, student = tiny_settings(loss="kl", learning_rate=1e-4), new_student()
    resumed = trainer(student, LESSON, lower, path)
    assert resumed.training.step == 4
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    run(resumed, VALIDATION)
    # no step moves a weight by more than the new rate and its decay
    most = (len(resumed.plan) - 4) * 1e-4 * 3
    assert all((w - before[n]).abs().max() < most for n, w in student.state_dict().items())
    assert not all(torch.equal(w, before[n]) for n, w in student.state_dict().items())


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_is_not_in_the_checkpoint(
    value: float, tmp_path: Path
) -> None:
    """The loss of its step is finite, and a checkpoint of the step would hold no numbers."""
    student, path = new_student(), tmp_path / "c.pt"
    steps = iter([1.0, 1.0, 1.0, value])
    student.model.norm.weight.register_hook(lambda gradient: gradient * next(steps))
    with pytest.raises(ConfigError, match=r"the gradient of step 4 is .* checkpoint is kept in"):
        run(trainer(student, LESSON, tiny_settings(), path), VALIDATION)
    resumed = new_student()
    assert trainer(resumed, LESSON, tiny_settings(), path).training.step == 2
    assert all(torch.isfinite(p).all() for p in resumed.parameters())


def test_a_learning_rate_that_ruins_the_first_steps_is_named(tmp_path: Path) -> None:
    settings = tiny_settings(learning_rate=1e30, checkpoint_every=1000)
    with pytest.raises(ConfigError, match=r"is nan; no checkpoint yet: .* below 1e\+30 and run"):
        run(trainer(new_student(), LESSON, settings, tmp_path / "c.pt"), VALIDATION)


# --- a full disk ----------------------------------------------------------------------------------


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, path = tiny_settings(), tmp_path / "c.pt"
    whole, student = new_student(), new_student(99)
    run(trainer(whole, LESSON, settings, tmp_path / "whole.pt"), VALIDATION)

    real, calls = os.fsync, iter(range(100))

    def full(descriptor: int) -> None:
        if next(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        message = r"checkpoint of step 6 cannot be written \(No space left on device\); the one be"
        with pytest.raises(ConfigError, match=message):
            run(trainer(new_student(), LESSON, settings, path), VALIDATION)

    resumed = trainer(student, LESSON, settings, path)
    assert resumed.training.step == 4
    run(resumed, VALIDATION)
    assert same_weights(whole, student)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.pt", "whole.pt"]


def test_a_job_that_ignores_ctrl_c_goes_on_ignoring_it(tmp_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lesson = Lesson(ANSWERS, TEXTS, InStep(1, press_ctrl_c))
    trained = trainer(new_student(), lesson, tiny_settings(loss="kl"), tmp_path / "c")
    run(trained, VALIDATION)
    assert trained.training.step == len(trained.plan)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
