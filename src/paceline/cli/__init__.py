"""COMMAND: one thin file per verb, imported only when that verb runs.

Here only the errors are handled: what the user can mend is one line and exit code 2, Ctrl-C is 130.
"""

from __future__ import annotations

import sys
from typing import Final

_INTERRUPTED: Final = 130


def main() -> None:
    """The `paceline` command."""
    from rich.console import Console
    from rich.markup import escape

    from paceline.cli.app import app
    from paceline.errors import PacelineError

    try:
        app()
    except PacelineError as error:
        Console(stderr=True).print(f"[bold red]paceline:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)
    except SystemExit as stop:
        # typer turns Ctrl-C into this exit code and says nothing
        if stop.code == _INTERRUPTED:
            Console(stderr=True).print("[bold]paceline:[/] interrupted; what was finished is kept")
        raise
