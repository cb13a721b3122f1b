"""Commands in messages, completed so that they run as they are printed.

A message names a command in backticks: `paceline learn`. Before it is shown, the command gets those
options of the running command that it also takes: the configuration, the paths, the dtype. Where the
shell does not find this program by its name, as after `make demo`, its path replaces the name. Words in
capitals, as in `paceline collect PROMPTS`, are for the user to fill in.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from typer.core import TyperCommand

from paceline.errors import PacelineError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

NAME: Final = "paceline"
SHARED: Final = ("config", "store", "costs", "policy", "dtype", "exact", "device", "threads")
"""Options that mean the same in every verb that has them."""
_COMMAND: Final = re.compile(r"`paceline ([^`]+)`")
_RUNNING: ContextVar[Any] = ContextVar("running", default=None)


class Verb(TyperCommand):
    """A verb; the commands in its errors can be run as they are printed."""

    interrupted: ClassVar = "interrupted"
    """The message after Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        token = _RUNNING.set(ctx)
        try:
            return super().invoke(ctx)
        except PacelineError as error:
            error.args = (runnable(str(error)),)
            raise
        except KeyboardInterrupt:
            from rich.console import Console

            Console(stderr=True).print(f"[bold]paceline:[/] {self.interrupted}", soft_wrap=True)
            raise
        finally:
            _RUNNING.reset(token)


class ResumingVerb(Verb):
    """A verb that continues where it stopped when it is run again."""

    interrupted: ClassVar = (
        "interrupted; finished work is kept, and the same command continues from there"
    )


def command(*words: str | Path) -> str:
    """Return `paceline WORDS` quoted for a shell, with the options of the running verb."""
    return runnable(f"`{NAME} {shlex.join(map(str, words))}`").strip("`")


def runnable(text: str) -> str:
    """Return a message with its commands completed by the options of the running verb."""
    running = _RUNNING.get()
    if running is None:
        return text
    program = _program()
    return _COMMAND.sub(lambda found: f"`{program} {_completed(found[1], running)}`", text)


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a sentence as one line at any terminal width, so that a command in it can be copied."""
    console.print(runnable(text), style=style, markup=False, highlight=False, soft_wrap=True)


def _program() -> str:
    """Return this program's name, or its path where the shell finds none or another by the name."""
    called = sys.argv[0]
    if Path(called).name != NAME or os.sep not in called:
        return NAME
    found = shutil.which(NAME)
    return NAME if found and Path(found).samefile(called) else shlex.quote(called)


def _completed(written: str, running: Any) -> str:
    words = shlex.split(written)
    verb = _find(words, running)
    if verb is None:
        return written
    added: list[str] = []
    for own in verb.params:
        given = own.name in SHARED and _is_given(own.name, running)
        if given and not {*own.opts, *own.secondary_opts} & {*words}:
            added += _option(own, running.params[own.name])
    return " ".join([written, shlex.join(added)]) if added else written


def _find(words: Sequence[str], running: Any) -> Any:
    """Return the verb that words begin with (`trigram build` is one), or None."""
    found = running.find_root().command
    for word in words:
        if not hasattr(found, "commands"):
            break
        found = found.commands.get(word)
    return found


def _is_given(name: str, running: Any) -> bool:
    source = running.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE" and running.params[name] is not None


def _option(option: Any, value: object) -> list[str]:
    if isinstance(value, bool):
        return [option.opts[0] if value else option.secondary_opts[0]]
    return [option.opts[0], str(value)]
