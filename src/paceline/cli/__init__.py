"""COMMAND: one thin file per verb, imported only when that verb runs.

Here only the errors are handled: what the user can mend is one line and exit code 2, a file or
folder that cannot be read or written included. Ctrl-C is 130; the verb itself says what it means.
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
        wrong = str(error)
    except OSError as error:
        if error.filename is None:
            raise
        wrong = f"{error.filename}: cannot be read or written ({error.strerror})"
    else:
        return
    Console(stderr=True).print(f"[bold red]paceline:[/] {escape(wrong)}", soft_wrap=True)
    sys.exit(2)
