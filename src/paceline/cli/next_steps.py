"""Commands that the program tells its user to run, completed so that they run as printed.

A message names a command in backticks: `paceline learn`. Before it is shown, the command gets those
options of the running command that it also takes: the configuration, the paths, the dtype. Words in
capitals, as in `paceline collect PROMPTS`, stand for values that the user fills in.
"""

from __future__ import annotations

import re
import shlex
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from typer.core import TyperCommand

from paceline.errors import PacelineError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

SHARED: Final = ("config", "store", "costs", "policy", "dtype", "exact", "device", "threads")
"""Options that mean the same in every verb that has them."""
_COMMAND: Final = re.compile(r"`paceline ([^`]+)`")
_RUNNING: ContextVar[Any] = ContextVar("running", default=None)


class Verb(TyperCommand):
    """A verb whose errors name commands that can be run as they are printed."""

    def invoke(self, ctx: Any) -> Any:
        token = _RUNNING.set(ctx)
        try:
            return super().invoke(ctx)
        except PacelineError as error:
            error.args = (runnable(str(error)),)
            raise
        finally:
            _RUNNING.reset(token)


def command(*words: str | Path) -> str:
    """Return `paceline WORDS` quoted for a shell, with the options that the running verb was given."""
    return runnable(f"`paceline {shlex.join(map(str, words))}`").strip("`")


def runnable(text: str) -> str:
    """Return a message with its commands completed by the options that the running verb was given."""
    running = _RUNNING.get()
    if running is None:
        return text
    return _COMMAND.sub(lambda found: f"`paceline {_completed(found[1], running)}`", text)


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a sentence in one line at any terminal width, so that a command in it can be copied."""
    console.print(runnable(text), style=style, markup=False, highlight=False, soft_wrap=True)


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
