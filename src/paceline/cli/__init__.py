"""COMMAND: one thin file per verb, imported only when that verb runs.

Here only the errors are handled: what the user can mend is one line and exit code 2, Ctrl-C is 130.
"""

from __future__ import annotations

import sys


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
    except KeyboardInterrupt:
        Console(stderr=True).print("[bold]paceline:[/] interrupted; what was finished is kept")
        sys.exit(130)
