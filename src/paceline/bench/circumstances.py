"""The circumstances of a measurement: machine, versions, threads, commit, command."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from paceline.models.compiled.processor import kernels

if TYPE_CHECKING:
    from collections.abc import Mapping


def cpu_model() -> str:
    """Return the processor's name from the system."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_capability() -> str:
    """Return the instruction sets that matter for low-precision products."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text(encoding="utf-8").split() if info.is_file() else []
    found = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags]
    return ", ".join(found) or platform.machine()


def commit() -> str:
    """Return the commit of the checkout that this package runs from; "none" for an installed one."""
    folder = Path(__file__).resolve().parent
    try:
        shown = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=10"],
            cwd=folder, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return shown.stdout.strip()


def _without_folders(argument: str) -> str:
    """Return an argument of the command line; of an absolute path, its last part."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def circumstances() -> dict[str, str | int]:
    """Return all circumstances, ready for JSON. `kernels` are those of the compiled forward."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu_model(),
        "cpu_capability": cpu_capability(),
        "kernels": kernels(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "device": device,
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "paceline": version("paceline"),
        "commit": commit(),
        "command": " ".join([Path(sys.argv[0]).name, *map(_without_folders, sys.argv[1:])]),
    }


def headline(facts: Mapping[str, Any], *packages: str) -> str:
    """Return a line for the top of a table: machine, torch and other packages, commit, date."""
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", *packages))
    return (
        f"{facts['cpu']} ({facts['cpu_capability']}), {facts['threads']} threads, {versions}, commit "
        f"{facts['commit']}, {facts['date']}."
    )
