"""A paper's claims and their sources."""

from __future__ import annotations

from typing import Final, Literal

from paceline.config import Section

Source = Literal["abstract", "code", "notes", "summary"]
SOURCES: Final[dict[Source, str]] = {
    "abstract": "the paper's abstract",
    "code": "the authors' released code",
    "notes": "third parties' notes that cite the paper's sections; not confirmed by us",
    "summary": "a third party's published summary; not confirmed by us",
}


class Claim(Section):
    """One claim of a paper; `source` is where it was read."""

    text: str
    source: Source

    def __str__(self) -> str:
        return f"{self.text} (from {SOURCES[self.source]})"
