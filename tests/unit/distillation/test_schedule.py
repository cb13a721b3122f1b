"""The steps of a training: passes over the answers, the share of text, and the learning rate."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.distillation import tiny_settings
from support.training import rule_texts

from paceline.distillation.batches import total_weight
from paceline.distillation.schedule import learning_rate, plan_steps, plan_text

ANSWERS = rule_texts(80)
# plain text has one token of prompt
TEXTS = [replace(text, num_prompt=1) for text in rule_texts(25, seed=3, domain="text")]


def with_text(share: float) -> dict[str, object]:
    return {"text_share": share, "pretrain_text": ["any.txt"]}


def test_part_of_an_epoch_is_part_of_its_batches() -> None:
    whole = plan_steps(ANSWERS, (), tiny_settings(epochs=1.0), 1)
    half = plan_steps(ANSWERS, (), tiny_settings(epochs=1.5), 1)
    assert half[: len(whole)] == whole
    assert 0.4 < len(half) / len(whole) - 1 < 0.6
    assert len(plan_steps(ANSWERS, (), tiny_settings(epochs=0.001), 1)) == 1


@pytest.mark.parametrize("per_step", [1, 2, 3])
def test_a_step_has_its_batches_in_order_and_their_weight(per_step: int) -> None:
    settings = tiny_settings(epochs=2.0, prompt_weight=0.3)
    single = plan_steps(ANSWERS, (), settings, 1)
    steps = plan_steps(ANSWERS, (), settings, per_step)
    flat = [batch for step in steps for batch in step.batches]
    assert flat == [batch for step in single for batch in step.batches]
    assert all(len(step.batches) == per_step for step in steps[:-1])
    for step in steps:
        weights = [total_weight(ANSWERS[i], 0.3) for batch in step.batches for i in batch]
        assert step.weight == pytest.approx(sum(weights))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.75])
def test_steps_of_text_are_the_stated_share_and_spread_evenly(share: float) -> None:
    settings = tiny_settings(epochs=6.0, **with_text(share))
    plain = plan_steps(ANSWERS, (), tiny_settings(epochs=6.0), 1)
    mixed = plan_steps(ANSWERS, TEXTS, settings, 1)

    assert [step for step in mixed if step.of_answers] == plain
    of_text = [step for step in mixed if not step.of_answers]
    assert len(of_text) / len(mixed) == pytest.approx(share, abs=0.02)
    assert of_text == plan_text(TEXTS, len(of_text), settings, 1)
    window = 20
    for first in range(0, len(mixed) - window, 5):
        own = sum(not step.of_answers for step in mixed[first : first + window])
        assert own / window == pytest.approx(share, abs=0.11)


def test_short_text_starts_again_in_another_order_with_all_its_tokens_learned() -> None:
    settings = tiny_settings(prompt_weight=0.0)
    steps = plan_text(TEXTS, 40, settings, 1)
    assert len(steps) == 40
    members = [i for step in steps for i in step.batches[0]]
    passes = [members[i : i + len(TEXTS)] for i in range(0, len(members), len(TEXTS))]
    assert len(passes) > 3
    assert all(sorted(one) == list(range(len(TEXTS))) for one in passes[:-1])
    assert passes[0] != passes[1]
    for step in steps:
        assert step.weight == sum(len(TEXTS[i].tokens) - 1 for i in step.batches[0])


def test_the_learning_rate_rises_then_falls_to_its_final_share() -> None:
    settings = tiny_settings(learning_rate=1.0, warmup_share=0.1, final_learning_rate=0.1)
    rates = [learning_rate(step, 100, settings) for step in range(101)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(rates) == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55)  # half of the cosine
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
