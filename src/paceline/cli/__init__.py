"""COMMAND: one thin file per verb, imported only when that verb runs.

`main` handles errors: an error that the user can correct, such as a file that cannot be read or
written, is one line and exit code 2. Ctrl-C is exit code 130; the verb prints what it means.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the `paceline` command."""
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
