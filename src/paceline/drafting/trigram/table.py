"""Tri-gram statistics as one file: for every pair of tokens the likeliest successors.

The file is in the safetensors format: a JSON header, then flat arrays, which are mapped into memory and
never read as a whole. Of the tokenizer it knows only the hash. Symbols: V tokens, P pairs, E kept
tri-grams.

    starts     [V+1] int64   the pairs with first token t are starts[t] to starts[t+1]
    offsets    [P+1] int64   the successors of pair i are offsets[i] to offsets[i+1]
    seconds    [P] int32     second tokens, ascending per first token
    successors [E] int32     per pair the likeliest first, of equals the smaller id
    weights    [E] float32   P(successor | pair), before pruning
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from shlex import quote
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from paceline.errors import ArtefactError, ConfigError, VocabularyError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FORMAT: Final = "paceline trigram table 1"
MAX_SUCCESSORS: Final = 16  # maximum per pair, in a table and in learned statistics
ARRAYS: Final[dict[str, tuple[str, np.dtype[Any]]]] = {
    "starts": ("I64", np.dtype("<i8")),
    "offsets": ("I64", np.dtype("<i8")),
    "seconds": ("I32", np.dtype("<i4")),
    "successors": ("I32", np.dtype("<i4")),
    "weights": ("F32", np.dtype("<f4")),
}
_LONGEST_HEADER: Final = 1 << 20
_NUMBERS: Final = ("num_tokens", "num_pairs", "num_trigrams", "max_successors", "min_count")


class Table(NamedTuple):
    """The arrays of a table, read-only."""

    starts: np.ndarray
    offsets: np.ndarray
    seconds: np.ndarray
    successors: np.ndarray
    weights: np.ndarray

    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self)


@dataclass(frozen=True, slots=True)
class TableFacts:
    """The origin and the size of a table."""

    tokenizer: str  # hash of the token-to-id map
    num_tokens: int  # of the text
    num_pairs: int
    num_trigrams: int  # kept
    max_successors: int
    min_count: int
    sha256: str  # of the arrays


def empty_table() -> Table:
    """Return the statistics of no text."""
    arrays = {name: np.zeros(0, dtype) for name, (_, dtype) in ARRAYS.items()}
    arrays["starts"], arrays["offsets"] = np.zeros(1, np.int64), np.zeros(1, np.int64)
    for array in arrays.values():
        array.setflags(write=False)
    return Table(**arrays)


def header(facts: TableFacts, sizes: Mapping[str, int]) -> bytes:
    """Return the file's first bytes. sizes: number of elements of each array."""
    fields: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            **{name: str(value) for name, value in asdict(facts).items()},
        }
    }
    place = 0
    for name, (code, dtype) in ARRAYS.items():
        end = place + sizes[name] * dtype.itemsize
        fields[name] = {"dtype": code, "shape": [sizes[name]], "data_offsets": [place, end]}
        place = end
    text = json.dumps(fields).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_facts(path: Path) -> TableFacts:
    """Read the file's header. Raises ConfigError if it is missing, ArtefactError if damaged."""
    return _read_header(path)[0]


def load_table(path: Path) -> tuple[Table, TableFacts]:
    """Map the arrays of a file; return them with the facts. Raises as `read_facts` does."""
    facts, sizes, start = _read_header(path)
    arrays = {}
    for name, (_, dtype) in ARRAYS.items():
        if sizes[name]:
            mapped = np.memmap(path, dtype, mode="r", offset=start, shape=(sizes[name],))
            arrays[name] = np.asarray(mapped)
        else:
            arrays[name] = getattr(empty_table(), name)
        start += sizes[name] * dtype.itemsize
    table = Table(**arrays)
    if table.starts[-1] != facts.num_pairs or table.offsets[-1] != facts.num_trigrams:
        raise _damaged(path, "its arrays do not fit together")
    return table, facts


def check_tokenizer(name: str, path: Path, facts: TableFacts, tokenizer: str) -> None:
    """Raise VocabularyError if the table was built with another tokenizer than the target's."""
    if facts.tokenizer != tokenizer:
        raise VocabularyError(
            f"drafter '{name}': {path} was built with another tokenizer ({facts.tokenizer}) than "
            f"the target's ({tokenizer}); build one with `paceline trigram build FILE --out TABLE`"
        )


def _read_header(path: Path) -> tuple[TableFacts, dict[str, int], int]:
    """Return (facts, number of elements of each array, offset of the first array)."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= _LONGEST_HEADER else b""
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: no such tri-gram table; build it with `paceline trigram build FILE --out "
            f"{quote(str(path))}`"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    try:
        fields = json.loads(text)
        raw = fields["__metadata__"]
        if raw["format"] != FORMAT:
            raise _damaged(path, f"it is of format '{raw['format']}', not '{FORMAT}'")
        facts = TableFacts(
            tokenizer=raw["tokenizer"],
            sha256=raw["sha256"],
            **{name: int(raw[name]) for name in _NUMBERS},
        )
        sizes = {name: int(fields[name]["shape"][0]) for name in ARRAYS}
        in_order = list(fields) == ["__metadata__", *ARRAYS]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise _damaged(path, "it has no such header") from error
    start = 8 + len(text)
    num_bytes = sum(sizes[name] * dtype.itemsize for name, (_, dtype) in ARRAYS.items())
    fits = sizes["offsets"] == sizes["seconds"] + 1 and sizes["weights"] == sizes["successors"]
    if not in_order or not fits or start + num_bytes != size or sizes["starts"] < 1:
        raise _damaged(path, f"{size} bytes where {start + num_bytes} are expected")
    return facts, sizes, start


def _damaged(path: Path, why: str) -> ArtefactError:
    return ArtefactError(
        f"{path}: not a tri-gram table, or a damaged one: {why}; build it again with "
        "`paceline trigram build FILE --out TABLE`"
    )
