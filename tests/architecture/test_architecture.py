"""The project as a whole: version, text, file names, public names, start-up.

Who may import whom is import-linter's work (`make check`); here is what it cannot say.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import paceline

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "paceline"

# Spelled in pieces, so that this file does not contain what it looks for.
FORBIDDEN_TEXT = {
    "a package registry's host": r"pypi\." + r"org|python" + r"hosted|download\.py" + r"torch",
    "a path of one machine": r"(?<![\w.-])/" + r"(?:work|home|root)/",
    "a folder outside the repository": r"(?<![\w-])" + r"shared" + r"/",
}
MAY_NAME_OUTSIDE_FOLDER = ".ci/run"

WRITTEN_BY_US = {"", ".cfg", ".css", ".html", ".ini", ".js", ".json", ".jsonl", ".lock", ".md"}
WRITTEN_BY_US |= {".py", ".sh", ".toml", ".txt", ".typed", ".yaml", ".yml"}
DATA_FILE = re.compile(r"(^|/)prompts/|(^|/)(tokenizer|vocab|merges)[^/]*$")

MAGNETS = {"common", "helpers", "manager", "misc", "utils"}


def project_files() -> list[Path]:
    """Return the files of the project: those that git lists, else those in its folders."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "-co", "--exclude-standard"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        folders = ["src/paceline", "tests", "docs", "benchmarks", "scripts", "examples", ".ci"]
        found = [*ROOT.glob("*"), *(path for name in folders for path in (ROOT / name).rglob("*"))]
    else:
        found = [ROOT / name for name in listing.split("\0") if name]
    return sorted(path for path in found if path.is_file() and "__pycache__" not in path.parts)


def our_texts() -> list[Path]:
    return [
        path
        for path in project_files()
        if path.suffix in WRITTEN_BY_US and not DATA_FILE.search(path.relative_to(ROOT).as_posix())
    ]


def run_python(code: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_one_version_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

    assert paceline.__version__ == project["version"]
    assert metadata.version("paceline") == project["version"]
    assert f"## [{project['version']}]" in changelog


def test_the_text_search_sees_the_project() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in our_texts()}

    assert {
        "Makefile",
        "pyproject.toml",
        "src/paceline/contracts.py",
        MAY_NAME_OUTSIDE_FOLDER,
    } <= names
    assert not any(name.startswith((".venv/", "build/")) for name in names)


@pytest.mark.parametrize("what", FORBIDDEN_TEXT)
def test_text_names_no_machine_and_no_registry(what: str) -> None:
    pattern = re.compile(FORBIDDEN_TEXT[what])
    places = []
    for path in our_texts():
        name = path.relative_to(ROOT).as_posix()
        if name == MAY_NAME_OUTSIDE_FOLDER and what == "a folder outside the repository":
            continue
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        places += [f"{name}:{i}: {line}" for i, line in enumerate(lines, 1) if pattern.search(line)]

    assert not places, f"{what} is named in\n" + "\n".join(places)


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("a package registry's host", "https://" + "pypi." + "org/simple"),
        ("a package registry's host", "files.python" + "hosted.org"),
        ("a path of one machine", "see /" + "work/main"),
        ("a path of one machine", "'/" + "home/me/models'"),
        ("a folder outside the repository", "../" + "shared" + "/data"),
    ],
)
def test_forbidden_text_is_recognised(what: str, line: str) -> None:
    assert re.search(FORBIDDEN_TEXT[what], line)


def test_no_module_is_a_magnet() -> None:
    names = [path for path in SOURCE.rglob("*") if path.stem in MAGNETS]

    assert not names, f"a module is named after what it does, not {names}"


def test_public_names_resolve() -> None:
    assert paceline.__all__
    assert len(set(paceline.__all__)) == len(paceline.__all__)
    for name in paceline.__all__:
        assert getattr(paceline, name) is not None, name


@pytest.mark.parametrize("module", ["torch", "transformers", "pyarrow", "matplotlib"])
def test_help_does_not_pay_for(module: str) -> None:
    """`paceline --help` is quick, because a verb's imports wait until that verb runs."""
    loaded = run_python(
        "import sys\n"
        "from paceline.cli import main\n"
        "sys.argv = ['paceline', '--help']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        f"print('LOADED' if {module!r} in sys.modules else 'ABSENT')\n"
    )
    assert loaded.splitlines()[-1] == "ABSENT"


def test_import_of_the_package_does_not_pay_for_torch() -> None:
    assert run_python("import sys, paceline; print('torch' in sys.modules)").strip() == "False"
