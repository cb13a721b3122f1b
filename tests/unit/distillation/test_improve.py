"""A drafter is trained further on logged requests, and adopted only where held-out acceptance rises."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.distillation import KilledError, tiny_target, tiny_tokenizer, write_prompts
from support.logged import answer, header_of, logged, random_prompts
from support.training import check_teacher, rule_texts
from transformers import AutoModelForCausalLM

from paceline.assembly import Pace, build_from_objects
from paceline.config import Config, LogSection, ModelSection
from paceline.distillation import adoption
from paceline.distillation import improve as improving
from paceline.distillation.adoption import HEADING, IMPROVEMENTS, WEIGHTS, with_section
from paceline.distillation.comparison import MeasureIntervals
from paceline.distillation.improve import DrafterFolder, improve
from paceline.distillation.improve_settings import ImproveSettings
from paceline.distillation.improve_texts import ImproveTexts, TextRecord, add_data
from paceline.distillation.logged import SERVED, prompt_key, read_requests, split_by_prompt
from paceline.distillation.settings import StudentShape
from paceline.distillation.student import build_student
from paceline.distillation.train import Lesson
from paceline.errors import ConfigError
from paceline.intervals import Interval
from paceline.store import TrainedOn
from paceline.verbs.improvement import improve_drafter, improve_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.store import LoggedDecision

SHAPE = StudentShape(num_layers=1, hidden_size=16, mlp_size=24, num_heads=2, num_kv_heads=1)
CARD = "# mine: a drafter\n\n## Acceptance\n\nof before\n"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def pace() -> Pace:
    config = Config(target=ModelSection(model="in memory"))
    return Pace(build_from_objects(tiny_target(), tiny_tokenizer(), {}, config))


@pytest.fixture
def drafter(tmp_path: Path) -> DrafterFolder:
    """Return an untrained drafter in bfloat16, with a card and a record of its training prompts."""
    folder = tmp_path / "mine"
    student = build_student(tiny_target(), SHAPE, "random", seed=0)
    student.to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    TrainedOn.of(["w1 w2 w3"]).save(folder)
    return DrafterFolder("mine", folder, num_draft_tokens=3)


def settings(**changes: Any) -> ImproveSettings:
    plain = {
        "learning_rate": 2e-2,
        "epochs": 10.0,
        "batch_tokens": 128,
        "checkpoint_every": 2,
        "validate_every": 5.0,
        "least_held_out": 8,
        "teacher_top_k": 4,
    }
    return ImproveSettings.model_validate({**plain, **changes})


def requests(pace: Pace, prompts: Sequence[Sequence[int]], step: int = 7) -> list[LoggedDecision]:
    return [logged(header_of(pace), prompt, answer(prompt, step)) for prompt in prompts]


def words(tokens: Sequence[int]) -> str:
    return " ".join(f"w{token - 3}" for token in tokens)


def contents(folder: Path) -> dict[str, str]:
    """Return path -> hash of every file in a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def parts_of(pace: Pace, decisions: Sequence[LoggedDecision]) -> dict[tuple[int, ...], str]:
    """Return prompt -> the name of its part, at the default shares."""
    header = header_of(pace)
    texts = read_requests(decisions, header.target, header.tokenizer, 64)
    split = split_by_prompt(texts.examples, 0.2, 0.1)
    return {
        tuple(example.tokens[: example.num_prompt].tolist()): name
        for name, part in split._asdict().items()
        for example in part
    }


def changed_when_held_out(pace: Pace, count: int = 80) -> list[LoggedDecision]:
    """Return a log whose held-out answers follow another rule than those to learn from."""
    decisions = requests(pace, random_prompts(count))
    parts = parts_of(pace, decisions)
    return [
        logged(d.header, d.prompt_tokens, answer(d.prompt_tokens, 11))
        if d.prompt_tokens and parts[d.prompt_tokens] == "held_out"
        else d
        for d in decisions
    ]


# --- adopted or not -------------------------------------------------------------------------------


def test_a_learnable_log_improves_the_drafter(
    pace: Pace, drafter: DrafterFolder, tmp_path: Path
) -> None:
    before = contents(drafter.folder)
    decisions = requests(pace, random_prompts(80))
    report = improve(pace, drafter, decisions, settings())

    assert report.is_adopted and report.out == drafter.folder
    assert report.rise.block_efficiency.low > 0 and report.after.match_rate.value > 0.8
    assert report.rise.block_efficiency.value == pytest.approx(
        report.after.block_efficiency.value - report.before.block_efficiency.value
    )
    assert report.kept == tmp_path / "mine.before" and contents(report.kept) == before
    after = contents(drafter.folder)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {WEIGHTS, "README.md", "trained_on.npy", IMPROVEMENTS}
    model = AutoModelForCausalLM.from_pretrained(drafter.folder, dtype="auto")
    assert model.dtype == torch.bfloat16  # as before
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "mine.before"}


def test_the_records_name_the_prompts_trained_on_and_hold_no_text(
    pace: Pace, drafter: DrafterFolder
) -> None:
    decisions = requests(pace, random_prompts(80))
    improve(pace, drafter, decisions, settings())

    trained_on = TrainedOn.load(drafter.folder)
    assert trained_on is not None and "w1 w2 w3" in trained_on
    for prompt, part in parts_of(pace, decisions).items():
        assert (words(prompt) in trained_on) == (part == "training")
    card = (drafter.folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith(CARD) and card.count(HEADING) == 1
    written = card + (drafter.folder / IMPROVEMENTS).read_text(encoding="utf-8")
    assert words(decisions[0].prompt_tokens or ())[:8] not in written
    [entry] = json.loads((drafter.folder / IMPROVEMENTS).read_text(encoding="utf-8"))
    assert entry["rise"]["block_efficiency"]["low"] > 0


def test_a_drafter_that_does_not_rise_on_held_out_requests_stays(
    pace: Pace, drafter: DrafterFolder, tmp_path: Path
) -> None:
    """Judged on its training part, this drafter would be adopted."""
    before = contents(drafter.folder)
    report = improve(pace, drafter, changed_when_held_out(pace), settings())

    assert not report.is_adopted and report.kept is None
    assert report.rise.block_efficiency.low <= 0
    assert contents(drafter.folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_rise_without_confidence_is_not_adopted(
    pace: Pace, drafter: DrafterFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsure = Interval(0.3, -0.01, 0.6)
    sure = Interval(0.3, 0.1, 0.6)
    rise = {SERVED: MeasureIntervals(sure, sure, unsure)}
    monkeypatch.setattr(improving, "compare", lambda *rest: rise)
    before = contents(drafter.folder)
    report = improve(pace, drafter, requests(pace, random_prompts(80)), settings(epochs=0.1))
    assert not report.is_adopted
    assert contents(drafter.folder) == before


def test_weights_are_chosen_by_block_efficiency_at_the_drafters_length(
    pace: Pace, drafter: DrafterFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[float, dict[str, Any]]] = []

    class Validating(improving.Trainer):  # type: ignore[name-defined, misc]
        def run(self, validate: Any, *rest: Any) -> Any:
            found.append(validate(self.student))
            raise KilledError

    monkeypatch.setattr(improving, "Trainer", Validating)
    with pytest.raises(KilledError):
        improve(pace, drafter, requests(pace, random_prompts(80)), settings())
    [(score, figures)] = found
    assert score == pytest.approx(figures["block_efficiency"]["3"], abs=1e-4)


def test_the_targets_distributions_at_the_temperature_are_learned(
    pace: Pace, drafter: DrafterFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    lessons: list[Lesson] = []

    def capture(student: Any, lesson: Lesson, *rest: Any) -> None:
        lessons.append(lesson)
        raise KilledError

    monkeypatch.setattr(improving, "Trainer", capture)
    own = settings(loss="kl", teacher_temperature=0.5)
    with pytest.raises(KilledError):
        improve(pace, drafter, requests(pace, random_prompts(80)), own)
    check_teacher(pace, lessons[0], own)


def test_no_step_reads_a_held_out_text(
    pace: Pace, drafter: DrafterFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that held-out texts choose would be judged too well by them."""
    given: dict[str, set[str]] = {"training": set(), "judging": set()}

    class Recorder(improving.Trainer):  # type: ignore[name-defined, misc]
        def __init__(self, student: Any, lesson: Any, *rest: Any) -> None:
            given["training"] |= {example.id for example in lesson.answers}
            super().__init__(student, lesson, *rest)

        def run(self, validate: Any, *rest: Any) -> Any:
            given["chooses"] = set()
            replay = improving.replay_validation

            def record(student: Any, examples: Any, distributions: Any) -> Any:
                given["chooses"] |= {example.id for example in examples}
                return replay(student, examples, distributions)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(improving, "replay_validation", record)
                return super().run(validate, *rest)

    replay = improving.replay_validation

    def judge(student: Any, examples: Any, distributions: Any) -> Any:
        given["judging"] |= {example.id for example in examples}
        return replay(student, examples, distributions)

    monkeypatch.setattr(improving, "Trainer", Recorder)
    monkeypatch.setattr(improving, "replay_validation", judge)
    report = improve(pace, drafter, requests(pace, random_prompts(80)), settings(epochs=1.0))
    sizes = {name: len(ids) for name, ids in given.items()}
    counts = report.counts
    judged = given["judging"] - given["chooses"]
    assert sizes["training"] == counts["training"] and sizes["chooses"] == counts["validation"]
    assert len(judged) == counts["held_out"]
    assert not judged & given["training"] and not given["chooses"] & given["training"]


def test_another_folder_leaves_the_drafter_as_it_is(
    pace: Pace, drafter: DrafterFolder, tmp_path: Path
) -> None:
    before = contents(drafter.folder)
    decisions = requests(pace, random_prompts(80))
    report = improve(pace, drafter, decisions, settings(loss="kl"), out=tmp_path / "new" / "one")

    assert report.out == tmp_path / "new" / "one" and report.kept == drafter.folder
    assert contents(drafter.folder) == before
    assert {*contents(report.out)} == {*before, IMPROVEMENTS}
    assert HEADING in (report.out / "README.md").read_text(encoding="utf-8")
    AutoModelForCausalLM.from_pretrained(report.out)
    with pytest.raises(ConfigError, match="exists; name another folder"):
        improve(pace, drafter, decisions, settings(), out=report.out)


def test_a_second_improvement_keeps_both_earlier_folders(
    pace: Pace, drafter: DrafterFolder, tmp_path: Path
) -> None:
    improve(pace, drafter, requests(pace, random_prompts(80)), settings())
    between = contents(drafter.folder)
    other = requests(pace, random_prompts(160, seed=1), step=11)
    report = improve(pace, drafter, other, settings())

    assert report.is_adopted and report.kept == tmp_path / "mine.before-2"
    assert contents(report.kept) == between and (tmp_path / "mine.before").is_dir()
    card = (drafter.folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith(CARD) and card.count(HEADING) == 1
    assert "| 1 |" in card and "| 2 |" in card


def test_a_drafter_without_a_record_of_its_training_gets_none(
    pace: Pace, drafter: DrafterFolder
) -> None:
    """A record of the logged prompts alone would say that it was trained on nothing else."""
    (drafter.folder / "trained_on.npy").unlink()
    report = improve(pace, drafter, requests(pace, random_prompts(80)), settings())
    assert report.is_adopted and TrainedOn.load(drafter.folder) is None
    assert any("no record of its training prompts" in note for note in report.notes)


# --- kills ----------------------------------------------------------------------------------------


def test_a_killed_run_leaves_the_drafter_and_continues_with_its_texts(
    pace: Pace, drafter: DrafterFolder, tmp_path: Path
) -> None:
    """The log has grown before the second call; other texts would not fit the checkpoint."""
    before = contents(drafter.folder)
    decisions = requests(pace, random_prompts(80))
    whole = replace(drafter, folder=shutil.copytree(drafter.folder, tmp_path / "whole" / "mine"))
    improve(pace, whole, decisions, settings())

    steps = []

    def kill(progress: Any) -> None:
        if progress.phase == "align":
            steps.append(progress.step)
        if steps and steps[-1] == 5:
            raise KilledError

    with pytest.raises(KilledError):
        improve(pace, drafter, decisions, settings(), on_progress=kill)
    assert contents(drafter.folder) == before

    grown = [*decisions, *requests(pace, random_prompts(30, seed=5))]
    resumed: list[int] = []

    def follow(progress: Any) -> None:
        if progress.phase == "align":
            resumed.append(progress.step)

    improve(pace, drafter, grown, settings(), on_progress=follow)
    assert resumed[0] == 5  # the checkpoint is of step 4
    assert contents(drafter.folder)[WEIGHTS] == contents(whole.folder)[WEIGHTS]


def test_a_second_process_is_refused_while_the_first_one_trains(
    pace: Pace, drafter: DrafterFolder
) -> None:
    """Also after a new run has removed the files of an earlier one from the folder of its work."""
    decisions = requests(pace, random_prompts(80))

    def second(progress: Any) -> None:
        if progress.phase == "align":
            with pytest.raises(ConfigError, match="another process trains there"):
                improve(pace, drafter, decisions, settings())
            raise KilledError

    with pytest.raises(KilledError):
        improve(pace, drafter, decisions, settings(), on_progress=second)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "\xff"])
def test_a_damaged_record_of_texts_begins_a_new_run(content: str, tmp_path: Path) -> None:
    (tmp_path / "texts.json").write_text(content, encoding="latin-1")
    (tmp_path / "align.pt").write_bytes(b"of the damaged run")
    (tmp_path / "lock").write_bytes(b"")
    examples = rule_texts(3)
    assert TextRecord(tmp_path, b"models").freeze(examples) == examples
    assert {path.name for path in tmp_path.iterdir()} == {"texts.json", "lock"}
    assert TextRecord(tmp_path, b"models").freeze(examples[::-1]) == examples


@pytest.mark.parametrize("killed_at", ["kept", "trained_on.npy", WEIGHTS, IMPROVEMENTS])
def test_a_kill_while_the_weights_are_replaced_is_finished_by_the_next_run(
    pace: Pace, drafter: DrafterFolder, killed_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(drafter.folder)
    decisions = requests(pace, random_prompts(80))
    write, copy = adoption.write_atomically, shutil.copytree

    def killed_write(path: Path, data: bytes) -> None:
        if path.parent == drafter.folder and path.name == killed_at:
            raise KilledError
        write(path, data)

    def killed_copy(source: Path, goal: Path, **rest: Any) -> Path:
        if killed_at == "kept" and goal.name == "mine.before.part":
            goal.mkdir()
            raise KilledError
        return copy(source, goal, **rest)

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(adoption, "write_atomically", killed_write)
        patch.setattr(shutil, "copytree", killed_copy)
        improve(pace, drafter, decisions, settings())
    AutoModelForCausalLM.from_pretrained(drafter.folder)  # either the old weights or the new ones
    if killed_at != IMPROVEMENTS:
        assert contents(drafter.folder)[WEIGHTS] == before[WEIGHTS]

    report = improve(pace, drafter, decisions, settings())
    assert report.is_adopted and report.rise.block_efficiency.low > 0
    assert report.kept is not None and contents(report.kept) == before
    assert contents(drafter.folder)[WEIGHTS] != before[WEIGHTS]
    assert (drafter.folder / IMPROVEMENTS).is_file()
    assert {path.name for path in drafter.folder.parent.iterdir()} == {"mine", "mine.before"}


# --- the log --------------------------------------------------------------------------------------


def test_prompts_are_split_once_and_whole(pace: Pace) -> None:
    prompts = random_prompts(200)
    decisions = requests(pace, prompts)
    repeated = [
        logged(d.header, d.prompt_tokens or (), answer(d.prompt_tokens or (), 3)) for d in decisions
    ]
    header = header_of(pace)

    alone = parts_of(pace, decisions)
    grown = parts_of(pace, requests(pace, random_prompts(300, seed=9)) + decisions[::-1])
    assert {prompt: grown[prompt] for prompt in alone} == alone
    shares = [list(alone.values()).count(name) / 200 for name in ("held_out", "validation")]
    assert shares == pytest.approx([0.2, 0.08], abs=0.06)

    texts = read_requests([*decisions, *repeated, *decisions], header.target, header.tokenizer, 64)
    assert len(texts.examples) == 400  # equal texts count once
    split = split_by_prompt(texts.examples, 0.2, 0.1)
    keys = [{prompt_key(e) for e in part} for part in split]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
    assert len(split.held_out) == len(keys[2])  # one answer per prompt
    assert len(split.training) == 2 * len(keys[0])


def test_the_turns_of_a_conversation_are_in_one_part(pace: Pace) -> None:
    """A later turn repeats the answers of earlier ones, which would be trained on and judge."""
    header = header_of(pace)
    decisions, conversation = [], {}
    for prompt in random_prompts(60, length=8):
        turn = prompt
        for _ in range(3):
            conversation[tuple(turn)] = tuple(prompt)
            decisions.append(logged(header, turn, answer(turn, 7, 6)))
            turn = [*turn, *answer(turn, 7, 6), 5, 9]
    texts = read_requests(decisions, header.target, header.tokenizer, 64)
    split = split_by_prompt(texts.examples, 0.3, 0.2)
    owners = [
        {conversation[tuple(e.tokens[: e.num_prompt].tolist())] for e in part} for part in split
    ]
    assert not owners[0] & owners[1] and not owners[0] & owners[2] and not owners[1] & owners[2]
    assert min(map(len, owners)) > 3 and sum(map(len, owners)) == 60
    assert len(split.held_out) == len(owners[2])  # turns are not independent


def test_what_a_drafter_was_trained_on_does_not_judge_it(
    pace: Pace, drafter: DrafterFolder
) -> None:
    decisions = requests(pace, random_prompts(80))
    held_out = [p for p, part in parts_of(pace, decisions).items() if part == "held_out"]
    TrainedOn.of(words(prompt) for prompt in held_out[:5]).save(drafter.folder)
    report = improve(pace, drafter, decisions, settings(epochs=0.1))
    assert report.counts["held_out"] == len(held_out) - 5
    assert sum(report.counts[n] for n in ("training", "validation", "held_out")) == 80


def test_requests_of_others_are_left_out_and_counted(pace: Pace, drafter: DrafterFolder) -> None:
    decisions = requests(pace, random_prompts(84))
    strange = replace(decisions[0].header, target="another")
    spelled = replace(decisions[0].header, tokenizer="another")
    mixed = [
        replace(decisions[0], header=strange),
        replace(decisions[1], header=spelled),
        replace(decisions[2], has_rules=True),
        replace(decisions[3], finish_reason="cancelled"),
        *decisions[4:],
    ]
    report = improve(pace, drafter, mixed, settings(epochs=0.1))
    assert report.left_out == {
        "were served by another target": 1,
        "were served with another tokenizer": 1,
        "had rules for the logits": 1,
        "did not finish": 1,
    }
    assert report.counts["conversations"] == 80


def test_a_log_that_is_too_small_or_unusable_says_so(
    pace: Pace, drafter: DrafterFolder, tmp_path: Path
) -> None:
    decisions = requests(pace, random_prompts(20))
    with pytest.raises(ConfigError, match=r"the log has 20 different.*about 100 prompts"):
        improve(pace, drafter, decisions, settings(least_held_out=20))
    bare = [replace(d, prompt_tokens=None, output_tokens=None) for d in decisions]
    with pytest.raises(ConfigError, match=r"none of 20 .*no token ids \(log.tokens: ids keeps"):
        improve(pace, drafter, bare, settings())
    with pytest.raises(ConfigError, match="the log is empty"):
        improve(pace, drafter, [], settings())
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


# --- mixed-in answers -----------------------------------------------------------------------------


def test_answers_of_prompt_files_have_their_share_and_no_held_out_prompt(
    pace: Pace, tmp_path: Path
) -> None:
    path = write_prompts(tmp_path / "old.jsonl", "old", 40)
    lines = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    # the prompts of the file were served as well
    header = header_of(pace)
    served = requests(pace, [pace.encode([{"role": "user", "content": text}]) for text in lines])
    texts = read_requests(served, header.target, header.tokenizer, 64)
    for share in (0.2, 0.9):
        own = settings(data_share=share, outputs=tmp_path / "outputs", part="all", max_new_tokens=6)
        split = split_by_prompt(texts.examples, 0.3, 0.2)
        found = ImproveTexts(split, {}, 40)
        add_data(found, pace, [path], own, lambda *progress: None)
        added = [example for examples in found.data.values() for example in examples]
        tokens = sum(len(e.tokens) for e in added)
        logged_tokens = sum(len(e.tokens) for e in split.training)
        assert added and tokens <= logged_tokens * share / (1 - share)
        assert not {prompt_key(e) for e in added} & {prompt_key(e) for e in found.judged}
        assert found.counts["data"] == len(added) == len(found.training) - len(split.training)
        assert lines[0] in found.data_prompts or len(found.data_prompts) < 40


def test_a_drafter_learns_from_prompt_files_as_well(
    pace: Pace, drafter: DrafterFolder, tmp_path: Path
) -> None:
    path = write_prompts(tmp_path / "old.jsonl", "old", 40)
    changes = {"outputs": tmp_path / "outputs", "max_new_tokens": 6, "loss": "tvd", "epochs": 0.2}
    decisions = requests(pace, random_prompts(80))
    report = improve(pace, drafter, decisions, settings(**changes), data=[path])
    assert 0 < report.counts["data"] < report.counts["training"]


# --- settings and the configuration ---------------------------------------------------------------


def test_the_section_of_a_new_drafter_gives_the_rest() -> None:
    section = {"learning_rate": 0.5, "epochs": 90, "loss": "tvd", "size": "medium", "data": ["a"]}
    config = Config(target=ModelSection(model="x"), distillation=section)
    found = improve_settings(config, {"epochs": 2})
    assert (found.loss, found.epochs, found.learning_rate) == ("tvd", 2, 3e-4)
    with pytest.raises(ConfigError, match="'size' is of a new drafter"):
        improve_settings(config, {"size": "small"})
    with pytest.raises(ConfigError, match="unknown key"):
        improve_settings(config, {"held": 2})


def test_drafters_that_cannot_be_trained_are_refused(tmp_path: Path) -> None:
    drafters = {
        "lookup": {"kind": "prompt_lookup"},
        "hub": {"kind": "draft_model", "settings": {"model": "someone/model"}},
        "adapted": {"kind": "draft_model", "settings": {"model": str(tmp_path), "adapter": "a"}},
    }
    raw = {"target": {"model": "x"}, "drafters": drafters}
    config = Config.model_validate(raw)
    for name, message in {
        "other": "there is no drafter 'other'",
        "lookup": "'lookup' is a prompt_lookup",
        "hub": "someone/model is no local folder",
        "adapted": "has the adapter a; merge",
    }.items():
        with pytest.raises(ConfigError, match=message):
            improve_drafter(config, name)


def test_without_a_log_there_is_nothing_to_learn_from(drafter: DrafterFolder) -> None:
    raw = {
        "target": {"model": "x"},
        "drafters": {"mine": {"kind": "draft_model", "settings": {"model": str(drafter.folder)}}},
    }
    config = Config.model_validate(raw)
    assert config.log == LogSection()
    with pytest.raises(ConfigError, match=r"set log\.folder"):
        improve_drafter(config, "mine")


def test_a_section_replaces_the_one_before_and_no_other() -> None:
    figure = {"value": 0.5, "low": 0.25, "high": 0.75}
    figures = {"block_efficiency": figure, "match_rate": figure, "acceptance": None}
    entry = {
        "counts": {"training": 1200, "held_out": 30},
        "num_draft_tokens": 4,
        **dict.fromkeys(("before", "after", "rise"), figures),
    }
    first = with_section(CARD + "\n## How it was trained\n\nlong\n", [entry])
    assert "+0.500 (+0.250 to +0.750)" in first and "1,200 answers" in first
    moved = first + "\n## After\n\nmore\n"
    second = with_section(moved, [entry, entry])
    for part in (CARD, "## How it was trained\n\nlong\n", "## After\n\nmore\n"):
        assert part in second
    assert second.count(HEADING) == 1 and "| 2 |" in second
