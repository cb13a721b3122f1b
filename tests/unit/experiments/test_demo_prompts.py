"""The demo's prompts: their form, and that they share nothing with each other or the training text.

Where PACELINE_DATA names the folder of the training records, the written prompts are compared with
them as well.
"""

import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from paceline.experiments import demo_prompts as demo
from paceline.experiments.demo_prompts import (
    PREFIXES,
    cut_function,
    demo_prompts,
    harvest_functions,
    load_written,
)

DOMAINS = ("math", "translation", "code", "summary")
NUM_HARVESTED = 72  # as many as there are written prompts of a domain
RUN = 8  # words in a row that no written prompt may share with the training text

DATA_FOLDER = os.environ.get("PACELINE_DATA")


@pytest.fixture(scope="module")
def harvested() -> list[demo.HarvestedFunction]:
    return harvest_functions(NUM_HARVESTED)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def runs(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + RUN]) for i in range(len(found) - RUN + 1)}


def bare(prompt: str) -> str:
    """Return the prompt without its fixed first line."""
    return prompt.split("\n", 1)[1] if prompt.startswith(tuple(PREFIXES.values())) else prompt


def texts_in(record: object) -> list[str]:
    if isinstance(record, str):
        return [record]
    children = record.values() if isinstance(record, dict) else record
    if not isinstance(record, dict | list):
        return []
    return [text for child in children for text in texts_in(child)]


def cut_source(source: str) -> demo.Cut | None:
    source = textwrap.dedent(source).strip("\n")
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    return cut_function(next(nodes), source.split("\n"))


# --- the written prompts --------------------------------------------------------------------------


@pytest.mark.parametrize("domain", ["math", "translation"])
def test_written_prompts_are_enough_and_in_the_training_form(domain: str) -> None:
    records = load_written(domain)

    assert len(records) >= 60
    assert {record.domain for record in records} == {domain}
    assert all(record.id.startswith(f"demo/{domain}/") for record in records)
    for record in records:
        prefix, text = PREFIXES[domain], record.prompt.removeprefix(PREFIXES[domain])
        assert record.prompt == prefix + text.strip()
        assert "\n" not in text
        assert 12 <= len(text.split()) <= 70


def test_written_math_problems_end_by_asking() -> None:
    assert all(record.prompt.endswith("?") for record in load_written("math"))


def test_written_prompts_do_not_repeat_one_another() -> None:
    records = [record for domain in ("math", "translation") for record in load_written(domain)]
    counts = Counter(run for record in records for run in runs(bare(record.prompt)))

    assert len({record.id for record in records}) == len(records)
    assert [run for run, count in counts.items() if count > 1] == []


def test_no_written_prompts_for_a_harvested_domain() -> None:
    with pytest.raises(ValueError, match=r"code.*math.*translation"):
        load_written("code")


if DATA_FOLDER:  # a test that exists only where there is something to compare with

    @pytest.mark.parametrize(
        "path", sorted(Path(DATA_FOLDER).glob("*.jsonl")), ids=lambda path: path.stem
    )
    def test_written_prompts_share_no_run_of_words_with_the_data(path: Path) -> None:
        owners = {
            run: record.id
            for domain in ("math", "translation")
            for record in load_written(domain)
            for run in runs(bare(record.prompt))
        }
        shared: list[tuple[str, str]] = []
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                for text in texts_in(json.loads(line)):
                    common = owners.keys() & runs(bare(text))
                    shared += [(owners[run], " ".join(run)) for run in common]

        assert shared == []


# --- the harvested prompts ------------------------------------------------------------------------


def test_harvested_functions_are_third_party(harvested: list[demo.HarvestedFunction]) -> None:
    stdlib = Path(sysconfig.get_path("stdlib")).resolve()
    for function in harvested:
        path = function.path.resolve()
        # The folder of third-party packages usually lies inside the standard library's.
        inside = path.relative_to(stdlib).parts if path.is_relative_to(stdlib) else ()
        assert not inside or {"site-packages", "dist-packages"} & set(inside)
        assert function.package not in sys.stdlib_module_names
        assert function.package in path.parts
        assert "tests" not in path.parts


def test_harvested_prompts_have_the_training_form(harvested: list[demo.HarvestedFunction]) -> None:
    for function in harvested:
        record = function.record()
        assert record.prompt == PREFIXES[function.domain] + function.text
        whole = function.text + ("\n    pass" if function.domain == "code" else "")
        (node,) = ast.parse(whole).body
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        assert node.name == function.qualname.rsplit(".", 1)[1]
        assert not node.decorator_list
        if function.domain == "code":
            assert not [child for child in node.body[:-1] if not isinstance(child, ast.Expr)]
            assert 30 <= len(function.text) <= 470
        else:
            assert ast.get_docstring(node) is None
            assert 52 <= len(function.text) <= 890


def test_harvested_text_stands_in_the_file_it_names(
    harvested: list[demo.HarvestedFunction],
) -> None:
    for function in harvested:
        source = function.path.read_text(encoding="utf-8")
        for line in function.text.split("\n"):
            assert line in source


def test_harvest_is_spread_over_packages_and_domains(
    harvested: list[demo.HarvestedFunction],
) -> None:
    by_domain = Counter(function.domain for function in harvested)
    by_package = Counter(function.package for function in harvested)

    assert by_domain == {"code": NUM_HARVESTED, "summary": NUM_HARVESTED}
    assert len(by_package) >= 8
    assert max(by_package.values()) <= len(harvested) // 4


def test_some_code_prompts_are_documented_and_some_are_not(
    harvested: list[demo.HarvestedFunction],
) -> None:
    documented = ['"""' in function.text for function in harvested if function.domain == "code"]

    assert 0.1 <= sum(documented) / len(documented) <= 0.9


def test_harvest_does_not_depend_on_the_process(harvested: list[demo.HarvestedFunction]) -> None:
    code = (
        "import sys\n"
        "from paceline.experiments.demo_prompts import PACKAGES, harvest_functions\n"
        f"functions = harvest_functions({NUM_HARVESTED})\n"
        "assert not sys.modules.keys() & set(PACKAGES), 'imported what it reads'\n"
        "print(*(function.record().id for function in functions), sep='\\n')\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )

    assert finished.stderr == ""
    assert finished.stdout.split() == [function.record().id for function in harvested]


def test_a_smaller_harvest_is_the_beginning_of_a_larger_one(
    harvested: list[demo.HarvestedFunction],
) -> None:
    for domain in ("code", "summary"):
        small = [function for function in harvest_functions(5) if function.domain == domain]
        assert small == [function for function in harvested if function.domain == domain][:5]


def test_another_seed_harvests_other_functions(harvested: list[demo.HarvestedFunction]) -> None:
    other = {function.text for function in harvest_functions(NUM_HARVESTED, seed=1)}

    assert len(other - {function.text for function in harvested}) > NUM_HARVESTED


def test_too_large_a_harvest_names_what_exists() -> None:
    with pytest.raises(ValueError, match=r"100000 code prompts are needed, but only \d+ exist"):
        harvest_functions(100_000)


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the only package to harvest, next to one of the standard library."""
    folder = tmp_path / "madeup"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(demo, "PACKAGES", ("madeup", "email"))
    return folder


def put(path: Path, *functions: str, opening: str = "# Made up.") -> None:
    path.parent.mkdir(exist_ok=True)
    # A small file is passed over.
    path.write_text("\n".join([opening, "#" * 1000, *functions]) + "\n", encoding="utf-8")


def function(name: str, body: str = "return 0") -> str:
    return f"def {name}(first_argument, second_argument):\n    # {'x' * 80}\n    {body}\n" + (
        "    # to make the body long enough for a prompt, this comment says nothing at length\n"
        "    return first_argument\n"
    )


def harvested_names() -> list[str]:
    return sorted(f"{found.package}.{found.qualname}" for found in demo._in_turns(seed=0))


def test_only_code_written_for_the_package_is_harvested(made_up: Path) -> None:
    put(made_up / "plain.py", function("wanted"))
    put(made_up / "inner" / "deep.py", function("wanted_too"))
    put(made_up / "_vendor" / "copy.py", function("vendored"))
    put(made_up / "tests" / "check.py", function("tested"))
    put(made_up / "tables.py", function("made"), opening="# Generated by a script, do not edit.")
    (made_up / "bytes.py").write_bytes(b"# \xff\n" + b"#" * 1000 + b"\n")
    put(made_up / "broken.py", "def f(:")

    assert harvested_names() == ["madeup.inner.deep.wanted_too", "madeup.plain.wanted"]


def test_a_name_that_means_two_functions_is_left_out(made_up: Path) -> None:
    put(made_up / "plain.py", function("twice"), function("once"), function("twice", "pass"))

    assert harvested_names() == ["madeup.plain.once"]


def test_special_methods_are_left_out(made_up: Path) -> None:
    method = textwrap.indent(function("__call__") + function("call"), "    ")
    put(made_up / "plain.py", "class Box:\n" + method)

    assert harvested_names() == ["madeup.plain.Box.call"]


def test_equal_texts_count_once(made_up: Path) -> None:
    put(made_up / "plain.py", function("same"))
    put(made_up / "other.py", function("same"))

    assert len(harvested_names()) == 2
    with pytest.raises(ValueError, match="only 1 exist"):
        harvest_functions(2)


def test_warnings_about_harvested_source_stay_inside(made_up: Path) -> None:
    put(made_up / "plain.py", function("escaped", "text = '\\d'"))

    # Warnings are errors here: one that got out would also have cost the function.
    assert harvested_names() == ["madeup.plain.escaped"]


# --- how a function is cut ------------------------------------------------------------------------


def test_cut_splits_after_docstring_and_comments_and_leaves_decorators_out() -> None:
    cut = cut_source('''
        class Box:
            @property
            def size(
                self,
            ) -> int:
                """Number of things.

                Counts each once.
                """
                # Sets count each once.
                things = set(self.things)

                return len(things)  # not cached
        ''')

    assert cut is not None
    signature = "def size(\n    self,\n) -> int:\n"
    docstring = '    """Number of things.\n\n    Counts each once.\n    """\n'
    comment = "    # Sets count each once."
    body = "    things = set(self.things)\n\n    return len(things)  # not cached"
    assert cut.head == signature + docstring + comment
    assert cut.body == body
    assert cut.bare == f"{signature}{comment}\n{body}"
    assert cut.doc == "Number of things.\n\nCounts each once."


def test_cut_keeps_the_decorator_of_an_inner_function_in_the_body() -> None:
    cut = cut_source("""
        def outer(f):
            @wraps(f)
            def inner():
                return f()
            return inner
        """)

    assert cut is not None
    assert cut.head == "def outer(f):"
    assert cut.body.startswith("    @wraps(f)\n")


@pytest.mark.parametrize(
    "source",
    [
        "def f(x): return x",
        'def f(x):\n    """Only a docstring."""',
        "def f(\n    x,\n): return x",
        'def f(x):\n    """Doc."""; return x',
        "def f(x):\n  return x",
        "def f(x):\n    return 'é'",
        "def f(x):\n\treturn x",
        "def f(x):\n    return 'a\tb'",
        'class C:\n    def f(self):\n        return """\nflush left"""',
    ],
    ids=[
        "line",
        "no-body",
        "joined",
        "semicolon",
        "two-spaces",
        "not-ascii",
        "tab",
        "inner-tab",
        "flush-left",
    ],
)
def test_cut_refuses_what_it_cannot_cut_cleanly(source: str) -> None:
    assert cut_source(source) is None


# --- the two sets ---------------------------------------------------------------------------------


def test_collected_and_timed_prompts_share_nothing() -> None:
    collect, timed = demo_prompts(30, 10)
    everything = collect + timed

    assert Counter(record.domain for record in collect) == dict.fromkeys(DOMAINS, 30)
    assert Counter(record.domain for record in timed) == dict.fromkeys(DOMAINS, 10)
    assert len({record.id for record in everything}) == len(everything)
    assert len({bare(record.prompt) for record in everything}) == len(everything)
    assert all(record.prompt.startswith(PREFIXES[record.domain]) for record in everything)


def test_the_sets_depend_on_the_seed_alone() -> None:
    assert demo_prompts(20, 10, seed=3) == demo_prompts(20, 10, seed=3)
    assert demo_prompts(20, 10, seed=3) != demo_prompts(20, 10, seed=4)


def test_the_sets_do_not_depend_on_the_order_of_the_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = demo_prompts(20, 10)
    monkeypatch.setattr(demo, "load_written", lambda domain: load_written(domain)[::-1])

    assert demo_prompts(20, 10) == before


def test_all_written_prompts_can_be_used_but_not_one_more() -> None:
    existing = min(len(load_written("math")), len(load_written("translation")))
    collect, timed = demo_prompts(existing - 8, 8)

    assert len(collect) + len(timed) == 4 * existing
    with pytest.raises(ValueError, match=rf"{existing + 1} math .* only {existing} exist"):
        demo_prompts(existing - 7, 8)


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        demo_prompts(-1, 5)
