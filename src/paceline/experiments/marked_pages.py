"""Pages with a part that a command writes, between two marks; the rest is written by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.errors import ConfigError
from paceline.files import write_atomically

if TYPE_CHECKING:
    from pathlib import Path


def replace_between(page: Path, begin: str, end: str, body: str) -> None:
    """Replace the text between the marks of a page. Raises ConfigError if page or marks are missing."""
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{page}: cannot be read ({error})") from error
    before, has_begin, rest = text.partition(begin)
    _, has_end, after = rest.partition(end)
    if not has_begin or not has_end:
        raise ConfigError(f"{page}: it must have the lines '{begin}' and '{end}'")
    write_atomically(page, f"{before}{begin}\n\n{body}\n{end}{after}".encode())
