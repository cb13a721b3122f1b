"""Machine code kept on disk is of the present code of every module that it uses."""

from __future__ import annotations

import ast
import inspect
from typing import TYPE_CHECKING, Any

import pytest

from paceline.drafting import suffix_entry
from paceline.drafting.cascade import entry

if TYPE_CHECKING:
    from types import ModuleType


@pytest.mark.parametrize("module", [suffix_entry, entry])
def test_what_an_entry_calls_uses_other_modules_only_if_it_is_not_kept(module: ModuleType) -> None:
    """numba renews a kept function with its own file alone; an entry names the modules it uses."""
    others = {
        alias.name
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.ImportFrom) and node.module != "paceline.compiled"
        for alias in node.names
    }
    functions: list[Any] = [f for f in vars(module).values() if hasattr(f, "py_func")]
    own = [f for f in functions if f.py_func.__module__ == module.__name__]
    kept = [f for f in own if type(f._cache).__name__ != "NullCache"]

    assert own and kept
    for function in kept:
        assert others.isdisjoint(function.py_func.__code__.co_names), function.py_func.__name__
