"""The facts of versus_engines: one JSON line per timed call, after one with the options of the run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

DECODE, PREFILL, FORWARD, READ = "decode", "prefill", "forward", "read"
Key = tuple[str, str, str, int, str]


@dataclass(frozen=True, slots=True)
class Call:
    """One timed call.

    kind: of the call, one of those above. prompt: ids of the prompts, joined. tokens: emitted ones; of
    a prefill or a forward, those that it read; of a read, bytes. outputs: of the first turn only, whose
    texts are compared.
    """

    kind: str
    case: str
    peer: str
    mode: str
    turn: int
    prompt: str
    seconds: float
    tokens: int
    outputs: list[list[int]] | None = None

    @property
    def key(self) -> Key:
        """What was timed, and in which turn."""
        return self.case, self.peer, self.mode, self.turn, self.prompt


class Facts:
    """The calls of a run, in a file that a later run can continue."""

    def __init__(self, path: Path, options: Mapping[str, Any], resume: bool) -> None:
        """Open the file; without `resume` its content is lost.

        options: those that calls depend on. Raises ValueError if the file was made with others.
        """
        self._path = path
        self.calls: list[Call] = []
        self._keys: set[Key] = set()
        if resume and path.is_file():
            self._read(options)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"options": options}) + "\n", encoding="utf-8")

    def _read(self, options: Mapping[str, Any]) -> None:
        head, *lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        found = json.loads(head)["options"]
        if found != options:
            raise ValueError(f"{self._path} was made with {found}, not with {options}")
        if lines and not lines[-1].endswith("\n"):  # killed while it wrote
            lines.pop()
            self._path.write_text(head + "".join(lines), encoding="utf-8")
        self.calls = [Call(**json.loads(line)) for line in lines]
        self._keys = {call.key for call in self.calls}

    def add(self, call: Call) -> None:
        """Append a call."""
        self.calls.append(call)
        self._keys.add(call.key)
        fields = {name: value for name, value in asdict(call).items() if value is not None}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")

    def has(self, key: Key) -> bool:
        """Return whether the call with this key was timed."""
        return key in self._keys
