"""Compiled code is kept on disk, and made again where its file is missing or damaged."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING

import pytest
from numba import njit

from paceline.models.compiled import native
from paceline.models.compiled.memory import put_int

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SCRIPT = """
from paceline.models.compiled.native import control_functions
lead, follow = control_functions()
import numpy as np
team = np.ones(1000, np.int64)  # told to stop
assert follow(team.ctypes.data, 0, 1, 7, 10) == 7
"""


@njit(error_model="numpy")
def add(target: int, a: int, b: int) -> None:
    """Write a + b at an address."""
    put_int(target, a + b)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of compiled code, which is empty."""
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    return native.cache_folder()


class Compilations:
    """Builds the function for the cache, and counts how often."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> Callable[..., None]:
        self.count += 1
        return add

    def sum_of_three_and_four(self) -> int:
        address = native.function_address("add", self, 3)
        found = ctypes.c_int64(0)
        call = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(address)
        call(ctypes.addressof(found), 3, 4)
        return found.value


def test_code_is_compiled_once(folder: Path, tmp_path: Path) -> None:
    compilations = Compilations()

    assert [compilations.sum_of_three_and_four() for _ in range(3)] == [7, 7, 7]
    assert compilations.count == 1
    assert [path.name for path in folder.iterdir()] == ["add.o"]
    assert folder.parent.parent == tmp_path


def truncated(data: bytes) -> bytes:
    return data[:-100]


def empty(data: bytes) -> bytes:
    return b""


def shorter_than_its_checksum(data: bytes) -> bytes:
    return data[:20]


def with_one_changed_byte(data: bytes) -> bytes:
    return data[:200] + bytes([data[200] ^ 1]) + data[201:]


def of_something_else(data: bytes) -> bytes:
    return b"something else\n" * 100


@pytest.mark.parametrize(
    "damage",
    [truncated, empty, shorter_than_its_checksum, with_one_changed_byte, of_something_else],
)
def test_a_damaged_file_is_made_again(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    compilations = Compilations()
    compilations.sum_of_three_and_four()
    file = folder / "add.o"
    whole = file.read_bytes()
    file.write_bytes(damage(whole))

    assert compilations.sum_of_three_and_four() == 7
    assert compilations.count == 2
    assert native._read(file) is not None
    assert compilations.sum_of_three_and_four() == 7 and compilations.count == 2


def test_code_works_where_no_folder_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("where a folder should be")
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "file"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        assert Compilations().sum_of_three_and_four() == 7
    [warning] = caught
    assert "cannot be kept" in str(warning.message)
    assert "set PACELINE_CACHE to a folder that can be written" in str(warning.message)


def test_the_folder_depends_on_the_setting_and_else_on_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = native.source_version()
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "set"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert native.cache_folder() == tmp_path / "set" / "compiled" / version
    monkeypatch.delenv("PACELINE_CACHE")
    assert native.cache_folder() == tmp_path / "xdg" / "paceline" / "compiled" / version
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert native.cache_folder() == tmp_path / ".cache" / "paceline" / "compiled" / version


def test_processes_may_compile_at_once(tmp_path: Path) -> None:
    environment = os.environ | {"PACELINE_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT]
    started = [
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]

    for process in started:
        said = process.communicate(timeout=600)[1].splitlines()
        assert process.returncode == 0, said
        assert all(line.startswith("paceline compiles its forward") for line in said)
    files = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["follow.o", "lead.o"]
