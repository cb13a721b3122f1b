"""A peer's process behind the line protocol. It waits on its input while others work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Any, Final

from peers.installation import PeerError, last_line

if TYPE_CHECKING:
    from collections.abc import Sequence

_LOOK: Final = 0.05  # seconds between two looks at a process that should be idle
_LOOKS: Final = 100
_TICK: Final = os.sysconf("SC_CLK_TCK")


class Worker:
    """One running peer."""

    def __init__(self, command: Sequence[str], log: Path, threads: int) -> None:
        """Start the peer and wait until it is ready. log: of its messages.

        Raises PeerError with the last line of the log if it ends before.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("w", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )
        try:
            if self._read() != "ready":
                raise self._ended()
            self.settle()
        except BaseException:
            self.stop()
            raise

    def ask(self, **request: Any) -> dict[str, Any]:
        """Return the answer to a request, once the process is idle again. Raises PeerError."""
        assert self._process.stdin is not None
        if self._process.poll() is not None:
            raise self._ended()
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._read()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        self.settle()
        return answer

    def settle(self) -> None:
        """Wait until the process uses no processor time: threads may spin for a while after work.

        Raises PeerError if it still does after five seconds.
        """
        for _ in range(_LOOKS):
            before = self.cpu_seconds()
            sleep(_LOOK)
            if self.cpu_seconds() == before:
                return
        raise PeerError("it uses processor time while it waits for a request")

    def cpu_seconds(self) -> float:
        """Return the processor time of all threads, in steps of a clock tick (10 ms)."""
        stat = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="utf-8")
        after_name = stat.rpartition(")")[2].split()
        return (int(after_name[11]) + int(after_name[12])) / _TICK

    def stop(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.communicate()  # closes the pipes

    def _ended(self) -> PeerError:
        """Return the error of a process that has closed its output."""
        code, line = self._process.wait(), last_line(self._log)
        if code < 0:
            return PeerError(f"ended by {signal.Signals(-code).name}; it wrote last: {line}")
        return PeerError(line)

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()
