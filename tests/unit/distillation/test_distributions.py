"""The target's distributions along texts: their positions, stored and live, resumed and checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from support.distillation import VOCAB, KilledError, tiny_settings, tiny_target
from support.training import new_student, rule_texts

from paceline.distillation import distributions as module
from paceline.distillation.batches import Example, collate
from paceline.distillation.distributions import (
    LiveDistributions,
    StoredDistributions,
    gather_distributions,
    open_distributions,
    read_distributions,
    store_distributions,
)
from paceline.distillation.objective import judge, sliced_loss
from paceline.distillation.reading import hidden_states
from paceline.errors import ConfigError, StoreError
from paceline.models.language_model import LanguageModel
from paceline.testing.tiny_models import tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from paceline.distillation.settings import DistillSettings

EVERYTHING = slice(0, None)


@pytest.fixture(scope="module", params=["compiled", "transformers"])
def target(request: pytest.FixtureRequest) -> LanguageModel:
    return LanguageModel(tiny_target(), "target", request.param)


def stored(
    target: LanguageModel, examples: list[Example], folder: Path, settings: DistillSettings
) -> StoredDistributions:
    store = open_distributions(folder, target, settings)
    store_distributions(target, examples, store)
    return read_distributions([store], examples)


def own_softmax(
    target: LanguageModel, example: Example, first: int, temperature: float = 1.0
) -> torch.Tensor:
    """Return the target's distributions of the tokens from `first` on, by its own plain forward."""
    with torch.inference_mode():
        logits = target.model(input_ids=torch.from_numpy(example.tokens)[None]).logits[0]
    # the logits at a position are of the token after it; those at the text's end are not needed
    return (logits[first - 1 : -1] / temperature).softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("prompt_weight", [0.0, 0.2])
def test_stored_are_the_most_probable_tokens_of_the_targets_softmax(
    prompt_weight: float, temperature: float, target: LanguageModel, tmp_path: Path
) -> None:
    """Positions: of the answer's tokens alone, or of all tokens but the first."""
    examples = rule_texts(30)
    settings = tiny_settings(
        prompt_weight=prompt_weight, teacher_top_k=5, teacher_temperature=temperature
    )
    found = stored(target, examples, tmp_path, settings)
    for example in examples:
        first = 1 if prompt_weight else example.num_prompt
        expected = own_softmax(target, example, first, temperature).topk(5)
        place = found.places[example.id]
        assert place.stop - place.start == len(example.tokens) - first
        assert torch.equal(found.ids[place].long(), expected.indices)
        torch.testing.assert_close(
            found.probabilities[place].float(), expected.values, rtol=2e-3, atol=1e-6
        )
    assert found.ids.shape == (max(p.stop for p in found.places.values()), 5)


@pytest.mark.parametrize(("of_store", "of_batch"), [(0.0, 0.0), (0.2, 0.0), (0.2, 0.2)])
def test_rows_of_a_batch_are_those_of_its_positions(
    of_store: float, of_batch: float, target: LanguageModel, tmp_path: Path
) -> None:
    """In any order of texts. A store with prompts also serves batches of answers, as in validation."""
    examples = rule_texts(20)
    settings = tiny_settings(prompt_weight=of_store, teacher_top_k=5)
    found = stored(target, examples, tmp_path, settings)
    part = [examples[i] for i in (7, 2, 19, 0)]
    batch = collate(part, of_batch)
    ids, p = found.teacher(batch, part).buckets(EVERYTHING)
    firsts = [1 if of_batch else e.num_prompt for e in part]
    expected = torch.cat([own_softmax(target, e, f) for e, f in zip(part, firsts, strict=True)])
    top = expected.topk(5)
    assert ids is not None
    assert torch.equal(ids, top.indices)
    torch.testing.assert_close(p[:, :-1], top.values, rtol=3e-3, atol=1e-5)
    torch.testing.assert_close(p.sum(-1), torch.ones(len(p)))

    live = LiveDistributions.of(target, 1.0).teacher(batch, part)
    no_ids, whole = live.buckets(EVERYTHING)
    assert no_ids is None
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-6)
    # a slice of rows is a slice of the result
    torch.testing.assert_close(live.buckets(slice(3, 6))[1], whole[3:6])
    slots = [target.acquire() for _ in part]
    assert sorted(slots) == list(range(len(part))), "the rows of the batch were not released"
    for slot in slots:
        target.release(slot)


def test_all_stored_tokens_but_one_have_nearly_the_loss_of_the_live_target(
    target: LanguageModel, tmp_path: Path
) -> None:
    examples = rule_texts(12)
    settings = tiny_settings(teacher_top_k=VOCAB - 1)
    batch = collate(examples, settings.prompt_weight)
    teachers = [
        stored(target, examples, tmp_path, settings).teacher(batch, examples),
        LiveDistributions.of(target, 1.0).teacher(batch, examples),
    ]
    student = new_student()
    head = student.get_output_embeddings().weight
    hidden = hidden_states(student, batch)
    for name in ("kl", "tvd++", "lk_hybrid"):
        pairs = [sliced_loss(hidden, head, batch.weights, t, name) for t in teachers]  # type: ignore[arg-type]
        gradients = [
            torch.autograd.grad(pair.loss, hidden, retain_graph=True)[0].flatten() for pair in pairs
        ]
        losses = [float(pair.loss.detach()) for pair in pairs]
        assert losses[0] == pytest.approx(losses[1], rel=2e-3)
        assert float(pairs[0].accepted) == pytest.approx(float(pairs[1].accepted), rel=2e-3)
        assert torch.cosine_similarity(*gradients, dim=0) > 0.999
    figures = [judge(hidden.detach(), head.detach(), batch.targets, t).accepted for t in teachers]
    torch.testing.assert_close(*figures, rtol=1e-2, atol=1e-3)


# --- storing --------------------------------------------------------------------------------------


def killer_after(num: int) -> Callable[[int], None]:
    def kill(done: int) -> None:
        if done >= num:
            raise KilledError

    return kill


def test_a_killed_computation_goes_on_with_the_missing_texts(
    target: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SHARD", 4)
    examples, settings = rule_texts(18), tiny_settings(teacher_top_k=5)
    whole = stored(target, examples, tmp_path / "whole", settings)

    store = open_distributions(tmp_path / "part", target, settings)
    with pytest.raises(KilledError):
        store_distributions(target, examples, store, killer_after(10))
    store = open_distributions(tmp_path / "part", target, settings)
    assert store.num_rows == 8  # two whole shards

    seen: list[int] = []
    store_distributions(target, examples, store, seen.append)
    assert seen[0] > 8
    assert seen[-1] == 18
    assert seen == sorted(seen)
    assert store.num_rows == 18
    resumed = read_distributions([store], examples)
    for example in examples:
        ours, theirs = resumed.places[example.id], whole.places[example.id]
        assert torch.equal(resumed.ids[ours], whole.ids[theirs])
        assert torch.equal(resumed.probabilities[ours], whole.probabilities[theirs])

    store_distributions(target, examples, store, killer_after(0))  # nothing is missing


def test_progress_counts_through_all_folders_up_to_the_number_of_texts(
    target: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paceline.distillation.distributions._BATCH_TOKENS", 32)  # several reports
    texts = [
        (tmp_path / "a", rule_texts(9)),
        (tmp_path / "b", rule_texts(7, seed=1, domain="e")),
    ]
    seen: list[tuple[str, int, int]] = []
    settings = tiny_settings(teacher_top_k=5)
    found = gather_distributions(target, texts, settings, lambda *report: seen.append(report))
    done = [count for _, count, _ in seen]
    assert {(stage, total) for stage, _, total in seen} == {("distributions", 16)}
    assert len(done) > 4
    assert done == sorted(set(done))
    assert (9 in done, done[-1]) == (True, 16)
    assert set(found.places) == {e.id for _, examples in texts for e in examples}


def test_texts_of_several_stores_are_read_together(target: LanguageModel, tmp_path: Path) -> None:
    settings = tiny_settings(teacher_top_k=5)
    first, second = rule_texts(9), rule_texts(7, seed=1, domain="e")
    stores = []
    for name, examples in (("a", first), ("b", second)):
        stores.append(open_distributions(tmp_path / name, target, settings))
        store_distributions(target, examples, stores[-1])
    part = [second[3], first[2]]
    found = read_distributions(stores, part)
    assert set(found.places) == {example.id for example in part}
    batch = collate(part, settings.prompt_weight)
    ids, _ = found.teacher(batch, part).buckets(EVERYTHING)
    expected = torch.cat([own_softmax(target, e, 1) for e in part]).topk(5).indices
    assert ids is not None
    assert torch.equal(ids, expected)


def test_other_settings_have_other_stores(target: LanguageModel, tmp_path: Path) -> None:
    folders = {
        open_distributions(tmp_path, target, tiny_settings(**changes)).folder
        for changes in (
            {},
            {"teacher_top_k": 5},
            {"teacher_temperature": 0.5},
            {"prompt_weight": 0.0},
        )
    }
    assert len(folders) == 4
    # the weight itself is not part of what is stored
    assert open_distributions(tmp_path, target, tiny_settings(prompt_weight=0.9)).folder in folders


def test_distributions_of_another_target_are_refused(target: LanguageModel, tmp_path: Path) -> None:
    open_distributions(tmp_path, target, tiny_settings())
    other = LanguageModel(tiny_model(vocab_size=VOCAB, context=64), "other")
    with pytest.raises(StoreError, match=r"was made with target .* delete this folder"):
        open_distributions(tmp_path, other, tiny_settings())


def test_distributions_of_another_answer_to_the_prompt_are_refused(
    target: LanguageModel, tmp_path: Path
) -> None:
    examples, settings = rule_texts(5), tiny_settings(teacher_top_k=5)
    stored(target, examples, tmp_path, settings)
    longer = Example(examples[2].id, "d", np.arange(30), examples[2].num_prompt)
    store = open_distributions(tmp_path, target, settings)
    with pytest.raises(StoreError, match=r"positions of 'd/2', whose text has 29; delete this"):
        read_distributions([store], [examples[0], longer])


def test_more_tokens_than_the_target_has_are_refused(target: LanguageModel, tmp_path: Path) -> None:
    for top_k in (VOCAB, VOCAB + 1):
        with pytest.raises(
            ConfigError, match=f"teacher_top_k {top_k} is not below the target's 40"
        ):
            open_distributions(tmp_path, target, tiny_settings(teacher_top_k=top_k))
