"""The verb `distill` on a tiny target: which prompts are answered, learned and recorded."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from support.distillation import (
    KilledError,
    distill_settings,
    tiny_target,
    tiny_tokenizer,
    write_prompts,
)
from support.training import check_teacher, without_speed
from transformers import AutoModelForCausalLM, AutoTokenizer

from paceline.assembly import Pace, build_from_objects
from paceline.config import Config, ModelSection
from paceline.contracts import PromptRecord
from paceline.distillation import TrainingProgress, distill
from paceline.distillation.model_folders import publish_folder
from paceline.distillation.prices import Prices
from paceline.distillation.prompts import choose_prompts
from paceline.distillation.settings import DistillSettings, StudentShape
from paceline.distillation.student import build_student, num_parameters
from paceline.distillation.train import Lesson, Trainer
from paceline.errors import ArtefactError, ConfigError, StoreError
from paceline.models.language_model import LanguageModel
from paceline.models.self_checks import check_packed_forward
from paceline.models.vocabulary import Vocabulary
from paceline.store import TrainedOn, is_validation, part_of, read_prompts, take_by_hash, take_part

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.distillation.batches import Example


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
    assert set(report.measures.tasks) == {"apples", "pears"}
    assert report.num_parameters == num_parameters(model)
    assert {p.phase for p in seen} == {"answers apples", "answers pears", "distributions", "align"}
    assert [p for p in seen if p.phase == "align"][-1].step == report.steps
    assert not out.with_name("draft.part").exists()

    facts = json.loads((out / "training.json").read_text())
    readme = (out / "README.md").read_text()
    assert facts["examples"] == report.num_examples < 30
    capped = take_by_hash(take_part(read_prompts([apples]), "training"), 30)
    own = facts["data"]["apples"]
    assert own["prompts"] == own["answers"] == report.num_examples
    assert own["prompts"] + own["validation"] == len(capped)
    for word in (
        "apples book",
        "MIT",
        "apache-2.0",
        "| pears | no |",
        """'max_prompts={"apples": 30}'""",
    ):
        assert word in readme, word
    assert str(tmp_path) not in readme + json.dumps(facts)


def all_phases(tmp_path: Path, **changes: object) -> DistillSettings:
    """Return settings with every phase. The text is of other words than the prompts."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i * 3 % 37}" for i in range(400)), encoding="utf-8")
    plain = {"pretrain_text": [str(text)], "pretrain_tokens": 300, "text_share": 0.3, "loss": "kl"}
    return distill_settings(tmp_path, **{**plain, "teacher_top_k": 8, **changes})


@pytest.mark.parametrize(("phase", "step"), [("pretrain", 3), ("align", 1), ("align", 3)])
def test_a_killed_distillation_ends_with_the_same_drafter(
    phase: str, step: int, pace: Pace, tmp_path: Path
) -> None:
    """The phases before the killed one are not trained again."""
    apples = write_prompts(tmp_path / "apples.jsonl", "apples", 40)
    settings = all_phases(tmp_path, ema_decay=0.5)
    distill(pace, [apples], tmp_path / "whole", settings)

    def kill(progress: TrainingProgress) -> None:
        if (progress.phase, progress.step) == (phase, step):
            raise KilledError

    with pytest.raises(KilledError):
        distill(pace, [apples], tmp_path / "part", settings, kill)
    assert not (tmp_path / "part").exists()
    seen: list[TrainingProgress] = []
    distill(pace, [apples], tmp_path / "part", settings, seen.append)

    steps = [p.step for p in seen if p.phase == phase]
    assert steps[0] == step // 2 * 2 + 1
    assert ("pretrain" in {p.phase for p in seen}) == (phase == "pretrain")
    whole, part = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "part"))
    assert whole == part
    histories = [
        without_speed(json.loads((tmp_path / n / "training.json").read_text())["history"])
        for n in ("whole", "part")
    ]
    assert histories[0] == histories[1]


@pytest.mark.parametrize("changes", [{}, {"teacher": "live"}, {"target_layers": [0]}], ids=str)
def test_every_phase_makes_a_drafter_that_loads(
    changes: dict[str, object], pace: Pace, tmp_path: Path
) -> None:
    apples = write_prompts(tmp_path / "apples.jsonl", "apples", 40)
    seen: list[TrainingProgress] = []
    report = distill(pace, [apples], tmp_path / "a", all_phases(tmp_path, **changes), seen.append)
    expected = {"answers apples", "pretrain", "align"}
    if "teacher" not in changes:
        expected.add("distributions")
        last = [p for p in seen if p.phase == "distributions"][-1]
        assert last.step == last.total > 20
    assert {p.phase for p in seen} == expected
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    check_packed_forward(LanguageModel(model, "draft"))
    assert 0 < report.measures.mean.acceptance <= 1


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


def test_a_drafter_that_starts_from_another_was_trained_on_its_prompts_too(
    pace: Pace, tmp_path: Path
) -> None:
    files = {
        name: write_prompts(tmp_path / f"{name}.jsonl", name, 40)
        for name in ("apples", "pears", "plums")
    }
    settings = distill_settings(tmp_path)
    records: list[set[int]] = [set()]
    start = None
    for name, path in files.items():
        own = settings.model_copy(update={"start_from": start})
        start = tmp_path / f"draft-{name}"
        distill(pace, [path], start, own, also_measure=[p for p in files.values() if p != path])
        found = TrainedOn.load(start)
        assert found is not None
        records.append(set(found.hashes.tolist()))
        assert records[-2] < records[-1]
        assert any(record.prompt in found for record in read_prompts([path]))
    readme = (tmp_path / "draft-plums" / "README.md").read_text()
    for row in ("| apples | before |", "| plums | yes |"):
        assert row in readme

    (tmp_path / "draft-plums" / "training.json").write_text("[]")
    broken = settings.model_copy(update={"start_from": tmp_path / "draft-plums"})
    with pytest.raises(ArtefactError, match=r"training\.json"):
        distill(pace, [files["apples"]], tmp_path / "late", broken)


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

    def capture(student: object, lesson: Lesson, *rest: object) -> None:
        taken.extend(lesson.answers)
        raise KilledError

    monkeypatch.setattr("paceline.distillation.run.Trainer", capture)
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


@pytest.mark.parametrize("teacher", ["cached", "live"])
def test_the_targets_distributions_at_the_temperature_are_learned(
    teacher: str, pace: Pace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lessons: list[Lesson] = []

    def capture(student: object, lesson: Lesson, *rest: object) -> None:
        lessons.append(lesson)
        raise KilledError

    monkeypatch.setattr("paceline.distillation.run.Trainer", capture)
    apples = write_prompts(tmp_path / "apples.jsonl", "apples", 30)
    settings = distill_settings(
        tmp_path, loss="kl", teacher=teacher, teacher_temperature=0.5, teacher_top_k=8
    )
    with pytest.raises(KilledError):
        distill(pace, [apples], tmp_path / "a", settings)

    [lesson] = lessons
    assert lesson.distributions is not None
    check_teacher(pace, lesson, settings)


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
    assert sum(p.phase.startswith("answers") for p in seen) == num_apples + expected

    # answers are stored: the second drafter decodes only the missing ones
    seen.clear()
    distill(pace, [pears], tmp_path / "b", settings, seen.append, also_measure=[apples])
    assert sum(p.phase.startswith("answers") for p in seen) == len(pears_read) - expected


def test_answers_of_another_target_or_limit_are_refused(pace: Pace, tmp_path: Path) -> None:
    apples = write_prompts(tmp_path / "apples.jsonl", "apples", 30)
    distill(pace, [apples], tmp_path / "a", distill_settings(tmp_path))
    other = distill_settings(tmp_path).model_copy(update={"max_new_tokens": 5})
    with pytest.raises(StoreError, match="max_new_tokens 6, now it is 5"):
        distill(pace, [apples], tmp_path / "b", other)


def test_mistakes_are_found_before_decoding(
    pace: Pace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apples = write_prompts(tmp_path / "apples.jsonl", "apples", 3)
    settings = distill_settings(tmp_path)
    with_events = distill_settings(tmp_path, events=tmp_path / "events")
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
    with pytest.raises(ConfigError, match=r"max_prompts names 'aples'.*did you mean 'apples'"):
        distill(
            pace, [apples], tmp_path / "a", distill_settings(tmp_path, max_prompts={"aples": 9})
        )
    with pytest.raises(ConfigError, match="teacher_top_k 40000 is not below"):
        distill(pace, [apples], tmp_path / "a", distill_settings(tmp_path, teacher_top_k=40_000))

    def lack(*arguments: object) -> None:
        raise ConfigError("pip install")

    for missing in ("import_figure", "_import_writer"):
        with monkeypatch.context() as patched:
            patched.setattr(f"paceline.distillation.curves.{missing}", lack)
            with pytest.raises(ConfigError, match="pip install"):
                distill(pace, [apples], tmp_path / "a", with_events)
    assert not list(tmp_path.glob("outputs/apples/*"))


def test_one_id_of_two_prompts_is_refused(tmp_path: Path) -> None:
    """Distributions are found by id, so those of one text would be learned along another."""
    paths, settings = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"], distill_settings(tmp_path)
    for path, word in zip(paths, ("w1", "w2"), strict=True):
        rows = [{"id": f"{i}", "domain": "d", "prompt": f"{word} w{i}"} for i in range(9)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for also_measure in ((), paths[1:]):
        data = paths if not also_measure else paths[:1]
        with pytest.raises(
            ConfigError, match=r"belongs to two prompts, of .*a.jsonl and .*b.jsonl"
        ):
            choose_prompts(data, settings, also_measure)
    shutil.copy(paths[0], paths[1])
    everything = settings.model_copy(update={"part": "all"})
    assert len(choose_prompts(paths, everything).files) == 2


def test_a_text_that_validates_is_not_trained_on_under_another_id(tmp_path: Path) -> None:
    """Part `all` has the texts as they are, also those that a file repeats."""
    path, settings = tmp_path / "a.jsonl", distill_settings(tmp_path, part="all")
    rows = [{"id": f"{i}", "domain": "d", "prompt": f"w{i % 10}  w1"} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (file,) = choose_prompts([path], settings).files
    training, validation = ({r.prompt for r in own} for own in (file.training, file.validation))
    assert training and validation
    assert not training & validation


# --- prices ---------------------------------------------------------------------------------------


def constant_prices(per_token: float) -> Prices:
    """Return prices of drafts up to 4 tokens, each of which costs a share of a plain round."""
    return Prices(np.ones(5), per_token * np.arange(5.0), 0.0, 64)


def speedup_at(prices: Prices, figures: dict[str, Any]) -> float:
    tau = figures["block_efficiency"]
    return max(tau[str(k)] / prices.round_costs[k] for k in range(1, 5))


def test_weights_are_chosen_by_the_speedup_at_the_prices(
    pace: Pace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by the loss, and not by the parameters."""
    found: list[tuple[float, dict[str, Any]]] = []

    class Validating(Trainer):
        def run(self, validate: Any, *rest: Any) -> Any:
            found.append(validate(self.student))
            raise KilledError

    monkeypatch.setattr("paceline.distillation.run.Trainer", Validating)
    apples, prices = write_prompts(tmp_path / "apples.jsonl", "apples", 40), constant_prices(0.3)
    with pytest.raises(KilledError):
        distill(pace, [apples], tmp_path / "a", distill_settings(tmp_path), prices=prices)
    [(score, figures)] = found
    assert figures["is_priced"]
    assert score == pytest.approx(speedup_at(prices, figures), abs=1e-4)


def test_a_continued_run_keeps_the_prices_of_its_beginning(pace: Pace, tmp_path: Path) -> None:
    """Scores at other prices could not be compared with those before the kill."""
    apples, out = write_prompts(tmp_path / "apples.jsonl", "apples", 40), tmp_path / "a"
    settings = distill_settings(tmp_path).model_copy(update={"validate_every": 0.2})
    first, second = constant_prices(0.1), constant_prices(0.9)

    def kill(progress: TrainingProgress) -> None:
        if (progress.phase, progress.step) == ("align", 3):
            raise KilledError

    with pytest.raises(KilledError):
        distill(pace, [apples], out, settings, kill, prices=first)
    distill(pace, [apples], out, settings, prices=second)
    facts = json.loads((out / "training.json").read_text())
    for figures in (*facts["history"], facts["measures"]):
        assert figures["predicted_speedup"] == pytest.approx(speedup_at(first, figures), abs=1e-4)


# --- what is written ------------------------------------------------------------------------------


def test_an_earlier_drafter_is_moved_and_not_removed_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between two of its files would leave a damaged drafter, which is not replaced either."""
    made, out, removed = tmp_path / "d.part" / "model", tmp_path / "d", []
    for folder in (made, out):
        folder.mkdir(parents=True)
        (folder / "name").write_text(folder.name)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: removed.append(path))
    publish_folder(made, out)
    assert out not in removed
    assert (out / "name").read_text() == "model"
    assert (made.with_name("before") / "name").read_text() == "d"


def test_text_is_cut_at_the_context_of_the_student(
    pace: Pace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Example] = []

    def capture(student: object, lesson: Lesson, *rest: object) -> None:
        taken.extend(lesson.texts)
        raise KilledError

    shape = StudentShape(num_layers=1, hidden_size=16, mlp_size=24, num_heads=2, num_kv_heads=1)
    student = build_student(tiny_target(), shape, "random", seed=0)
    student.config.max_position_embeddings = 20
    student.save_pretrained(tmp_path / "start")
    tiny_tokenizer().save_pretrained(tmp_path / "start")
    monkeypatch.setattr("paceline.distillation.run.Trainer", capture)
    settings = all_phases(tmp_path, start_from=str(tmp_path / "start"), loss="cross_entropy")
    apples = write_prompts(tmp_path / "apples.jsonl", "apples", 40)
    with pytest.raises(KilledError):
        distill(pace, [apples], tmp_path / "a", settings)
    assert max(len(example.tokens) for example in taken) == 20


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": float("inf")},
        {"validate_every": float("inf")},
        {"learning_rate": float("inf")},
        {"weight_decay": float("nan")},
        {"seed": -1},
        {"seed": 2**64},
        {"max_prompts": -1},
        {"max_prompts": {"apples": -1}},
        {"teacher_temperature": 1e-30},
    ],
    ids=str,
)
def test_numbers_that_no_training_has_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        DistillSettings.model_validate(change)
