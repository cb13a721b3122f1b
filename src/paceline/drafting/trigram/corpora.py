"""The sources of tri-gram tables: text files, and token sequences such as a target's answers.

Text is read in pieces, so files may be larger than memory. A piece ends with a line, unless the line is
overlong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from paceline.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from paceline.models.vocabulary import Tokenizer

_PIECE: Final = 1 << 16  # characters
_REST_OF_LINE: Final = 1 << 12


class TextFiles:
    """UTF-8 files, measured in bytes. Raises ConfigError for a file that is missing or is not text."""

    def __init__(self, files: Sequence[Path], tokenizer: Tokenizer) -> None:
        self._files = list(files)
        self._tokenizer = tokenizer
        known = []
        for path in self._files:
            if not path.is_file():
                raise ConfigError(f"{path}: no such text file")
            known.append(f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}")
        self.name = "\n".join(known)
        self.size = sum(path.stat().st_size for path in self._files)

    def pieces(self) -> Iterator[tuple[str, int]]:
        for path in self._files:
            try:
                with path.open(encoding="utf-8") as file:
                    while text := file.read(_PIECE):
                        text += file.readline(_REST_OF_LINE)
                        yield text, len(text.encode())
            except UnicodeDecodeError as error:
                raise ConfigError(f"{path}: not UTF-8 text ({error.reason})") from error
            except OSError as error:
                raise ConfigError(f"{path}: cannot be read ({error})") from error

    def tokens(self, pieces: Sequence[str]) -> Sequence[Sequence[int]]:
        # verbose=False: no model reads the piece, so it may exceed a model's length
        encoded: Any = self._tokenizer(list(pieces), add_special_tokens=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids


class TokenSequences:
    """Texts as tokens, measured in sequences."""

    def __init__(self, name: str, sequences: Sequence[Sequence[int]]) -> None:
        self.name = name
        self.size = len(sequences)
        self._sequences = sequences

    def pieces(self) -> Iterator[tuple[Sequence[int], int]]:
        for sequence in self._sequences:
            yield sequence, 1

    def tokens(self, pieces: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        return pieces
