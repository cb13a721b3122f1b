"""The methods of every engine: the process that runs it, and its arm. Knows no prompts and no times."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from peers.installation import NATIVE, VLLM, WHEEL, PeerError, Recipe, install, run_logged

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PACELINE: Final = "paceline"
LLAMA_CPP_NATIVE: Final = "llama.cpp native"
LLAMA_CPP: Final = "llama.cpp wheel"
VLLM_CPU: Final = "vLLM"
RECIPES: Final[dict[str, dict[str, Recipe]]] = {
    "llama.cpp": {LLAMA_CPP_NATIVE: NATIVE, LLAMA_CPP: WHEEL},
    "vllm": {VLLM_CPU: VLLM},
}
"""Value of --peers -> engine -> installation."""
PLAIN: Final = "plain"
GGUF_KINDS: Final = {"bfloat16": "bf16", "int8": "q8_0"}
"""Precision -> the kind of GGUF that stands next to it."""
_FOLDER: Final = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Method:
    """One engine in one mode. Methods with the same command share a process."""

    peer: str
    mode: str
    command: tuple[str, ...]
    arm: str = ""


@dataclass(frozen=True, slots=True)
class Weights:
    """One model on disk. drafter: folder of the small model that drafts for it."""

    name: str
    folder: Path
    drafter: Path | None
    arms: tuple[str, ...]  # of paceline
    configs: Mapping[str, Path]  # precision -> paceline's configuration
    ignore_eos: bool

    def num_bytes(self) -> dict[str, float]:
        """Return the bytes of the weights by model and precision: 2 or 1 per parameter."""
        stored = (self.folder / "model.safetensors").stat().st_size
        return {f"{self.name} {p}": stored / (2 if p == "int8" else 1) for p in self.configs}

    def gguf(self, folder: Path, kind: str, build: Path) -> Path:
        """Return the GGUF of the model's or the drafter's folder."""
        return build / f"{self.name}-{folder.name}-{kind}.gguf"


@dataclass(frozen=True, slots=True)
class Engines:
    """The engines that are installed, and the reasons why others are not."""

    pythons: Mapping[str, Path]  # engine -> Python of its environment
    refused: Mapping[str, str]  # engine -> reason
    build: Path  # of GGUF files
    threads: int

    def methods(self, weights: Weights, precision: str, rows: int) -> list[Method]:
        """Return the methods that are compared."""
        return [
            *self._paceline(weights, precision),
            *self._llama_cpp(weights, GGUF_KINDS[precision], rows),
            *(self._vllm(weights, precision) if precision == "bfloat16" else []),
        ]

    @property
    def versions(self) -> str:
        """The packages of the installed engines."""
        recipes = {name: recipe for peer in RECIPES.values() for name, recipe in peer.items()}
        return (
            ", ".join(f"{engine} ({recipes[engine].packages[0]})" for engine in self.pythons)
            or "no peers"
        )

    def convert(self, weights: Weights) -> None:
        """Write the GGUF files of llama.cpp. Raises PeerError if one cannot be written."""
        python = self.pythons.get(LLAMA_CPP) or self.pythons.get(LLAMA_CPP_NATIVE)
        for kind in (GGUF_KINDS[precision] for precision in weights.configs):
            for folder in (weights.folder, weights.drafter):
                out = folder and weights.gguf(folder, kind, self.build)
                if python and folder and out:
                    script = str(_FOLDER / "to_gguf.py")
                    command = [str(python), script, str(folder), str(out), kind]
                    run_logged(command, out.with_suffix(".log"))

    def _paceline(self, weights: Weights, precision: str) -> list[Method]:
        command = (sys.executable, _script("paceline"), str(weights.configs[precision]))
        return [Method(PACELINE, arm, command, arm) for arm in weights.arms]

    def _llama_cpp(self, weights: Weights, kind: str, rows: int) -> list[Method]:
        """The compiled one decodes a single row without drafts; the server does the rest."""
        threads, model = str(self.threads), str(weights.gguf(weights.folder, kind, self.build))
        found = []
        if rows == 1 and (python := self.pythons.get(LLAMA_CPP_NATIVE)):
            command = (str(python), _script("llama_cpp_native"), model, threads)
            found.append(Method(LLAMA_CPP_NATIVE, PLAIN, command))
        if python := self.pythons.get(LLAMA_CPP):
            modes = {PLAIN: PLAIN}
            if weights.drafter:
                drafter = weights.gguf(weights.drafter, kind, self.build)
                modes |= {"n-gram": "ngram", "draft model": str(drafter)}
            server = (str(python), _script("llama_cpp"), model, threads, str(rows))
            found += [Method(LLAMA_CPP, mode, (*server, way)) for mode, way in modes.items()]
        return found

    def _vllm(self, weights: Weights, dtype: str) -> list[Method]:
        if VLLM_CPU not in self.pythons:
            return []
        modes = {PLAIN: PLAIN}
        if weights.drafter:
            modes |= {"n-gram": "ngram", "suffix": "suffix", "draft model": str(weights.drafter)}
        python, folder = str(self.pythons[VLLM_CPU]), str(weights.folder)
        command = (python, _script("vllm"), folder, dtype, str(self.threads))
        return [Method(VLLM_CPU, mode, (*command, way)) for mode, way in modes.items()]


def install_engines(peers: Iterable[str], folder: Path, build: Path, threads: int) -> Engines:
    """Install the peers that are named; one that cannot be is refused with its reason."""
    pythons: dict[str, Path] = {}
    refused: dict[str, str] = {}
    for peer in peers:
        for engine, recipe in RECIPES[peer].items():
            try:
                pythons[engine] = install(recipe, folder)
            except PeerError as error:
                refused[engine] = f"cannot be installed: {error}"
    return Engines(pythons, refused, build, threads)


def _script(name: str) -> str:
    return str(_FOLDER / f"run_{name}.py")
