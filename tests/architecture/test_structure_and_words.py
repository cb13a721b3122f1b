"""Sizes of modules, the drawing of the rooms, and the wording of docstrings and comments."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "paceline"
MAX_LINES = 350

# numba's cache does not see changes in other modules, and a Triton kernel is one piece.
COMPILED_KERNELS = {
    "drafting/suffix_kernels.py",
    "drafting/trigram/kernels.py",
    "models/cuda/paged_attention.py",
}

# A docstring of a function starts with a verb in the imperative.
NO_VERB = re.compile(
    r"(A|All|Also|An|As|At|By|Each|Every|For|From|How|If|In|Its|Most|No|Not|Of|On|One|Same|The|Their|"
    r"These|This|Those|To|What|When|Where|Whether|Which|Who|Whose|With|Without)"
)
IDIOMS = re.compile(
    r"\b(beside|crew|by lot|lots of|hangs? on|speaks? for|stands? in for|let go|eyes|house|as it were|"
    r"goes on with|so many|whom|a round's worth|the law of)\b",
    re.IGNORECASE,
)


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield functions that a caller calls: no dunder methods, no properties."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
        is_property = any(name.endswith("property") for name in decorators)
        if not is_property and not node.name.startswith("__"):
            yield node


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_a_module_fits_in_the_head(path: Path) -> None:
    if name_of(path) not in COMPILED_KERNELS:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_docstrings_of_functions_start_with_a_verb(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for function in functions(tree):
        text = ast.get_docstring(function)
        first = re.split(r"[\s,:;.]", text, maxsplit=1)[0] if text else "Return"
        assert not NO_VERB.fullmatch(first), f"{function.name}: {text}"
        assert first[0].isupper(), f"{function.name}: {text}"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_no_idioms(path: Path) -> None:
    found = IDIOMS.search(path.read_text(encoding="utf-8"))

    assert found is None, found


def test_every_room_is_drawn_and_no_other() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    [contract] = [c for c in project["tool"]["importlinter"]["contracts"] if c["id"] == "rooms"]
    rooms = {
        name.strip()
        for layer in contract["layers"]
        for name in layer.split("|")
        if "(" not in name  # not built yet
    }
    drawing = (ROOT / "docs" / "images" / "rooms.svg").read_text(encoding="utf-8")
    drawn = set(re.findall(r'font-weight="600"[^>]*>([a-z_]+)<', drawing))

    assert drawn == rooms
