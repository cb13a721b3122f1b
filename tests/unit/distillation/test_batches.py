"""Batches of texts: padding, weights of prompts and answers, budgets and orders."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from support.training import new_student, rule_texts

from paceline.distillation.batches import Example, collate, in_order, pack_epoch, total_weight
from paceline.distillation.objective import judge
from paceline.distillation.reading import hidden_states
from paceline.distillation.teachers import TextTeacher


def test_a_text_has_the_same_loss_in_a_batch_and_alone() -> None:
    """Padding or a neighbour's tokens in a text would change its loss."""
    model, examples = new_student(), rule_texts(5)
    head = model.get_output_embeddings().weight
    with torch.inference_mode():
        together = collate(examples, prompt_weight=0.3)
        hidden, teacher = hidden_states(model, together), TextTeacher(together.targets)
        losses = judge(hidden, head, together.targets, teacher).losses
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


def test_the_weight_of_a_text_is_that_of_its_positions() -> None:
    examples = [
        *rule_texts(30),
        Example("a", "d", np.arange(5), 0),
        Example("b", "d", np.ones(1), 1),
    ]
    for prompt_weight in (0.0, 0.2, 1.0):
        batch = collate(examples, prompt_weight)
        for i, example in enumerate(examples):
            own = float(batch.weights[batch.examples == i].sum())
            assert abs(own - total_weight(example, prompt_weight)) < 1e-5


def test_an_epoch_has_every_text_once_within_the_budget() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 70, 500)]
    first, again = pack_epoch(lengths, 64, 5, 0), pack_epoch(lengths, 64, 5, 0)

    assert first == again
    assert first != pack_epoch(lengths, 64, 5, 1)
    assert first != pack_epoch(lengths, 64, 6, 0)
    for batches in (first, in_order(lengths, 64)):
        assert sorted(i for batch in batches for i in batch) == list(range(500))
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 64


def test_sources_are_padded_on_their_own() -> None:
    """A batch holds its longest source and its longest answer for every text."""
    random = np.random.default_rng(1)
    sources, answers = random.integers(1, 60, 300), random.integers(1, 60, 300)
    lengths = sources + answers
    batches = pack_epoch(lengths.tolist(), 400, 0, 0, sources.tolist())
    assert sorted(i for batch in batches for i in batch) == list(range(300))
    padded = [len(b) * (sources[b].max() + answers[b].max()) for b in batches]
    assert max(padded) <= 400
    assert sum(padded) < 1.35 * lengths.sum()
    assert pack_epoch(lengths.tolist(), 400, 0, 0, sources.tolist()) == batches
