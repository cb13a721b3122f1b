"""The first hour at the command line: what the program advises runs as printed and leads on; a policy
that does not fit stops only what needs it; tables can be read in 80 columns.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import typer
import yaml
from support.examples import EXAMPLES
from transformers import tokenization_utils_base

import paceline
from paceline.assembly import build_from_objects
from paceline.bench.doctor import line_before_weights
from paceline.cli import main
from paceline.cli.app import app
from paceline.config import Config, ModelSection, load_config
from paceline.contracts import NONE, PromptRecord, identity_of_arms
from paceline.errors import ArtefactError
from paceline.models.loading import load_tokenizer
from paceline.testing.tiny_models import tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SOURCE = Path(__file__).parents[2] / "src" / "paceline"
COMMAND = re.compile(r"`paceline ([^`]+)`")
LONG_NAME = "a-drafter-with-a-rather-long-name"
WIDTH = 80
PROGRAM: Any = typer.main.get_command(app)

# --- every message in the source --------------------------------------------------------------------


def literals(path: Path) -> Iterator[tuple[int, str]]:
    """Return (line, text) of a module's strings but its docstrings; X replaces formatted values."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            inside.add(id(node.value))  # a docstring
        if isinstance(node, ast.JoinedStr):
            inside.update(id(part) for part in ast.walk(node) if part is not node)
            parts = (p.value if isinstance(p, ast.Constant) else "X" for p in node.values)
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and id(node) not in inside:
            yield node.lineno, str(node.value)


@cache
def messages() -> list[tuple[str, str]]:
    """Return (place, text) of every string of the source that a user may read."""
    completes = SOURCE / "cli" / "next_steps.py"  # holds the pattern of a command, and no command
    return [
        (f"{path.relative_to(SOURCE)}:{line}", text)
        for path in sorted(set(SOURCE.rglob("*.py")) - {completes})
        for line, text in literals(path)
    ]


def parse(words: list[str]) -> None:
    """Raise unless the command line takes these words after `paceline`."""
    group = PROGRAM
    context = group.make_context("paceline", list(words))
    rest = list(words)
    while hasattr(group, "commands"):
        name, group, rest = group.resolve_command(context, rest)
        context = group.make_context(name, list(rest), parent=context)


def test_every_command_in_a_message_is_one_that_the_program_takes() -> None:
    found = [(where, words) for where, text in messages() for words in COMMAND.findall(text)]
    assert len(found) > 40
    wrong = []
    for where, words in found:
        try:
            parse(shlex.split(words))
        except Exception as error:  # noqa: BLE001 - whatever the parser says
            wrong.append(f"{where}: `paceline {words}`: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "words", [["lern"], ["collect"], ["learn", "--polcy", "x"], ["trigram", "build", "text"]]
)
def test_a_command_that_does_not_run_is_recognised(words: list[str]) -> None:
    with pytest.raises(Exception, match=r"(?i)no such|missing"):
        parse(words)


def test_commands_stand_in_backticks_where_they_are_completed() -> None:
    verbs = "|".join(PROGRAM.commands)
    bare = re.compile(rf"\bpaceline ({verbs})\b")
    places = [where for where, text in messages() if bare.search(COMMAND.sub("", text))]
    # the commands of cards, whose words stand in lists, and the name of a format
    cards = ["distillation/card.py", "distillation/pretrain_card.py"]
    allowed = [*cards, "drafting/trigram/table.py"]
    assert [place.partition(":")[0] for place in places] == allowed


# --- as a user meets them ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(save_tiny_models: Callable[[int], Path]) -> Path:
    """Folders `target` and `near`, with a context of 1024 tokens."""
    return save_tiny_models(1024)


@pytest.fixture
def config(models: Path, tmp_path: Path) -> Path:
    """Return a configuration with long names, in a folder whose name a shell would split."""
    folder = tmp_path / "my models"
    folder.mkdir()
    return write_config(folder / "some.yaml", models)


def write_config(path: Path, models: Path) -> Path:
    near = {"model": str(models / "near"), "num_draft_tokens": 4}
    raw = {
        "target": {"model": str(models / "target"), "dtype": "float32"},
        "drafters": {
            LONG_NAME: {"kind": "draft_model", "settings": near},
            "lookup": {"kind": "prompt_lookup", "settings": {"min_ngram": 1}},
        },
        "learning": {"max_epochs": 20},
    }
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    tasks = ("translation", "math", "code", "summary")
    lines = [
        json.dumps({"id": f"{task}{i}", "domain": task, "prompt": f"{task} {i} " + "ab " * i})
        for task in tasks
        for i in range(6)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str]]:
    """Run `paceline WORDS` in a folder without a configuration, in a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    def run(*words: str | Path, program: str | Path = "paceline") -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [str(program), *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        shown = capsys.readouterr()
        check_tables(shown.out)
        return code, shown.out + shown.err

    return run


def check_tables(text: str) -> None:
    """Raise unless nothing is cut and no line of a table is wider than the terminal."""
    assert "…" not in text
    tables = [line for line in text.splitlines() if line and line[0] in "┃│┏┡├└"]
    assert all(len(line) <= WIDTH for line in tables), text


def advised(text: str) -> list[list[str]]:
    return [shlex.split(words) for words in COMMAND.findall(text)]


def test_what_the_program_advises_leads_from_nothing_to_an_answer(
    config: Path, prompts: Path, run: Callable[..., tuple[int, str]]
) -> None:
    """Run each command as it was printed, with the user's own prompts for PROMPTS."""
    wanted = ("generate", "ab ab ab", "--max-new-tokens", "4", "-c", str(config))
    code, text = run(*wanted)
    assert code == 0 and text.count("note: no policy is used") == 1
    assert "'auto' is drafter 'suffix'" in text
    told = advised(text)
    assert [words[0] for words in told] == ["collect", "profile", "learn"]
    for words in told:
        own = [str(prompts) if word == "PROMPTS" else word for word in words]
        # how long the answers are has nothing to do with what is advised
        more = ("--max-new-tokens", "8") if words[0] == "collect" else ()
        code, text = run(*own, *more)
        assert code == 0, text
        if words[0] == "collect":
            assert advised(text) == told[1:]  # `next: ...`
    for verb in ("data", "evaluate", "drafters", "doctor"):
        code, text = run(verb, "-c", config)
        assert code == 0 and LONG_NAME in text, text
    assert "'auto' is the policy's choice" in text
    code, text = run(*wanted, "--stats")
    assert code == 0 and "block efficiency" in text and "no policy" not in text


def test_an_advised_command_is_given_the_flags_of_the_one_that_advises_it(
    config: Path, prompts: Path, tmp_path: Path, run: Callable[..., tuple[int, str]]
) -> None:
    store, costs = tmp_path / "store", tmp_path / "the costs.json"
    flags = ("-c", config, "--dtype", "float32", "--threads", "1")
    code, text = run("collect", prompts, *flags, "--store", store, "--max-new-tokens", "4")
    assert code == 0, text
    profile, learn = advised(text)
    given = ["--config", str(config)]
    assert profile == ["profile", *given, "--dtype", "float32", "--threads", "1"]
    assert learn == ["learn", *given, "--store", str(store)]
    code, text = run(*learn, "--costs", costs)
    assert code == 2
    assert advised(text) == [["profile", *given, "--costs", str(costs)]]
    code, text = run("data", "-c", config, "--store", store)
    assert code == 0 and ["profile", *given] in advised(text)


def test_what_the_demo_prints_to_try_next_runs(
    config: Path, tmp_path: Path, run: Callable[..., tuple[int, str]]
) -> None:
    sizes = ("--timed", "1", "--collected", "4", "--max-new-tokens", "8")
    out = tmp_path / "of the demo"
    code, text = run("demo", "-c", config, "--out", out, "--dtype", "bfloat16", *sizes)
    assert code == 0, text
    names = [line[1:].split() for line in text.splitlines() if line.startswith("│")]
    assert LONG_NAME in {name.partition("@")[0] for name, *_ in names}
    steps = [
        shlex.split(line.removeprefix("  paceline "))
        for line in text.partition("Try next:")[2].splitlines()
        if line
    ]
    assert [words[0] for words in steps] == ["generate", "doctor", "demo"]
    generate, doctor, demo = steps
    code, text = run(*generate)
    assert code == 0 and "block efficiency" in text, text
    code, text = run(*doctor)
    assert code == 0 and "'auto' is the policy's choice" in text, text
    assert "x none on" in text  # it is priced with what the demo measured
    code, text = run(*demo, *sizes)
    assert code == 0, text
    assert (tmp_path / "elsewhere" / "demo-output" / "paceline.yaml").is_file()
    assert "Try next:" in text and "paceline demo" not in text  # this was float32


def test_the_demo_replaces_its_own_configuration_and_nobody_elses(
    config: Path, run: Callable[..., tuple[int, str]]
) -> None:
    mine = config.rename(config.with_name("paceline.yaml"))
    (mine.parent / "work").mkdir()
    before = mine.read_bytes()
    code, text = run("demo", "-c", mine, "--out", mine.parent)
    assert code == 2 and str(mine) in text and "--out" in text
    assert mine.read_bytes() == before and (mine.parent / "work").is_dir()


@pytest.mark.parametrize("where", ["--out", "--store", "--plot"])
def test_a_place_that_cannot_be_written_is_one_line(
    where: str, learned: Path, prompts: Path, tmp_path: Path, run: Callable[..., tuple[int, str]]
) -> None:
    (tmp_path / "a file").touch()
    place = tmp_path / "a file" / "inside.png"  # for any user, root too
    words = {
        "--out": ("demo", "--timed", "1", "--collected", "4", "--max-new-tokens", "4"),
        "--store": ("collect", prompts),
        "--plot": ("learn",),
    }
    code, text = run(*words[where], "-c", learned, where, place)
    assert code == 2 and "Traceback" not in text
    assert str(tmp_path / "a file") in text and "cannot be read" in text


@pytest.mark.parametrize("flag", ["--timed", "--collected", "--max-new-tokens"])
def test_a_demo_of_nothing_is_refused(
    flag: str, config: Path, run: Callable[..., tuple[int, str]]
) -> None:
    code, text = run("demo", "-c", config, flag, "0")
    assert code == 2 and flag in text


@pytest.mark.parametrize("found", [None, "this program", "another one"])
def test_an_advised_command_calls_the_program_as_this_shell_finds_it(
    found: str | None,
    config: Path,
    tmp_path: Path,
    run: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = tmp_path / "an environment" / "paceline"
    for path in (program, tmp_path / "another" / "paceline"):
        path.parent.mkdir()
        path.touch(mode=0o755)
    places = {None: "nothing", "this program": "an environment", "another one": "another"}
    monkeypatch.setenv("PATH", str(tmp_path / places[found]))
    code, text = run("data", "-c", config, program=program)
    assert code == 2
    name = "paceline" if found == "this program" else shlex.quote(str(program))
    assert f"run `{name} collect PROMPTS --config " in text


@pytest.mark.parametrize(
    ("verb", "resumes"),
    [("profile", False), ("generate", False), ("collect", True), ("trigram", True)],
)
def test_an_interrupted_verb_says_that_something_is_kept_where_it_is(
    verb: str,
    resumes: bool,
    run: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("paceline.config.load_config", stop)
    words = {"generate": ("ab",), "collect": ("p",), "trigram": ("build", "p", "--out", "t")}
    code, text = run(verb, *words.get(verb, ()))
    assert code == 130 and "interrupted" in text and "Traceback" not in text
    assert ("finished work is kept" in text) == resumes


def test_of_a_prompt_that_is_too_long_only_the_request_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 8
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    said: list[object] = []
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", lambda *m: said.append(m))
    assert len(load_tokenizer(ModelSection(model=str(tmp_path)))("ab " * 10)["input_ids"]) > 8
    assert not said
    tokenizer("ab " * 10)
    assert said


# --- a policy that does not fit ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a configuration with a collection, costs and a policy."""
    folder = tmp_path_factory.mktemp("learned")
    path = write_config(folder / "some.yaml", models)
    settings = load_config(path)
    tasks = ("math", "code")
    records = [PromptRecord(f"{t}{i}", t, f"{t} {i} " + "ab " * i) for t in tasks for i in range(8)]
    paceline.collect(settings, records, 8)
    paceline.profile(settings)
    paceline.learn(settings)
    return folder


@pytest.fixture
def learned(everything: Path, tmp_path: Path) -> Path:
    """Return the configuration in a copy of that folder."""
    return shutil.copytree(everything, tmp_path / "my models") / "some.yaml"


def other_length(raw: dict[str, Any], folder: Path) -> None:
    raw["drafters"]["lookup"]["settings"]["num_draft_tokens"] = 3


def another_drafter(raw: dict[str, Any], folder: Path) -> None:
    raw["drafters"]["copy"] = {"kind": "prompt_lookup", "settings": {}}


def no_costs(raw: dict[str, Any], folder: Path) -> None:
    (folder / "runs" / "costs.json").unlink()


def a_guard_and_no_costs(raw: dict[str, Any], folder: Path) -> None:
    raw["selection"] = {"guard": True}
    no_costs(raw, folder)


def a_damaged_card(raw: dict[str, Any], folder: Path) -> None:
    (folder / "runs" / "policy" / "policy.json").write_text("{")


def damaged_weights(raw: dict[str, Any], folder: Path) -> None:
    (folder / "runs" / "policy" / "policy.safetensors").write_bytes(b"no weights")


@pytest.mark.parametrize(
    ("spoil", "reason", "advice"),
    [
        (other_length, "another drafter 'lookup'", "learn"),
        (another_drafter, "it does not know copy", "learn"),
        (no_costs, "cost table", "profile"),
        (a_guard_and_no_costs, "cost", "profile"),
        (a_damaged_card, "damaged", "learn"),
        (damaged_weights, "damaged", "learn"),
    ],
)
def test_a_policy_that_does_not_fit_leaves_auto_untrained_and_says_why(
    spoil: Callable[[dict[str, Any], Path], None],
    reason: str,
    advice: str,
    learned: Path,
    run: Callable[..., tuple[int, str]],
) -> None:
    raw = yaml.safe_load(learned.read_text())
    spoil(raw, learned.parent)
    learned.write_text(yaml.safe_dump(raw))
    request = ("generate", "ab ab", "--max-new-tokens", "3", "-c", learned)

    answers = set()
    for drafter in ("none", "lookup", LONG_NAME, "auto"):
        code, text = run(*request, "-d", drafter)
        assert code == 0 and text.count("note: no policy is used") == 1 and reason in text, text
        assert "'auto' is drafter 'suffix'" in text
        assert [advice, "--config", str(learned)] in advised(text)
        answers.add(text.partition("note: ")[0])
    assert len(answers) == 1
    # named by the user, it is wanted
    policy = learned.parent / "runs" / "policy"
    code, text = run(*request, "-d", "none", "--policy", policy)
    assert code == 2 and reason in text
    # and the doctor knows before weights are read
    code, text = run("doctor", "-c", learned)
    assert code == 0 and "no policy can be used" in text and reason in text, text
    assert "the policy's choice" not in text
    # in Python the same
    pace = paceline.load(learned)
    assert any(reason in note for note in pace.notes)
    plain = pace.complete("ab", drafter="none", max_new_tokens=6)
    assert pace.complete("ab", max_new_tokens=6).token_ids == plain.token_ids
    with pytest.raises(ArtefactError, match=reason):
        paceline.load(learned, policy=policy)


def test_drafters_that_were_not_collected_cannot_be_learned_from(
    learned: Path, run: Callable[..., tuple[int, str]]
) -> None:
    raw = yaml.safe_load(learned.read_text())
    another_drafter(raw, learned.parent)
    learned.write_text(yaml.safe_dump(raw))
    code, text = run("learn", "-c", learned)
    assert code == 2 and ["collect", "PROMPTS", "--config", str(learned)] in advised(text)


def test_the_doctor_says_whole_what_to_run_for_a_drafter_without_prices(
    learned: Path, run: Callable[..., tuple[int, str]]
) -> None:
    raw = yaml.safe_load(learned.read_text())
    another_drafter(raw, learned.parent)
    learned.write_text(yaml.safe_dump(raw))
    code, text = run("doctor", "-c", learned)
    assert code == 0 and "note: drafter 'copy': " in text
    assert all(words[-2:] == ["--config", str(learned)] for words in advised(text)), text


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_doctor_reads_of_a_drafter_what_it_says_of_itself(kind: str) -> None:
    parts = build_from_objects(
        tiny_model(), byte_tokenizer(), {}, Config(target=ModelSection(model="in memory"))
    )
    drafter = EXAMPLES[kind]("own", parts.build_context())
    recorded = identity_of_arms({"own": drafter.identity()})["own"]
    settings = SimpleNamespace(num_draft_tokens=drafter.num_draft_tokens)
    assert line_before_weights(kind, settings, recorded) == recorded  # type: ignore[arg-type]
    if kind != NONE:
        settings.num_draft_tokens += 1
        changed = identity_of_arms(
            {"own": {**drafter.identity(), "num_draft_tokens": settings.num_draft_tokens}}
        )["own"]
        assert line_before_weights(kind, settings, recorded) == changed  # type: ignore[arg-type]
    was = recorded.replace(f"kind={kind}", "kind=another", 1)
    assert line_before_weights(kind, drafter, was) == recorded  # type: ignore[arg-type]
