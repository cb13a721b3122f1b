"""The build of tri-gram statistics from any amount of text, within a bound on memory.

Every tri-gram is one integer. A full buffer is sorted and counted into a run on disk. _FAN_IN runs of
one level are merged into one of the next, and the last merge is pruned into the table. A killed build
continues after its last run. No tri-gram crosses two sequences. Knows no tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
from pydantic import Field

from paceline.config import Section
from paceline.drafting.trigram.table import ARRAYS, MAX_SUCCESSORS, TableFacts, header
from paceline.errors import ConfigError
from paceline.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    Keys = NDArray[np.uint64]
    Counts = NDArray[np.int64]

_BITS: Final = 21  # per token id; a key holds three
_FAN_IN: Final = 16
_BATCH: Final = 64  # pieces per call of the tokenizer
_BYTES_PER_TRIGRAM: Final = 48  # to buffer, sort and count it
_STATE: Final = "state.json"


class Corpus(Protocol):
    """A source of text: pieces in a fixed order, and their tokens."""

    name: str  # identifies the corpus when a killed build continues
    size: int  # in the unit in which pieces are measured

    def pieces(self) -> Iterator[tuple[Any, int]]:
        """Yield each piece and its size."""

    def tokens(self, pieces: Sequence[Any]) -> Sequence[Sequence[int]]:
        """Return the tokens of each piece."""


class BuildSettings(Section):
    """The settings of a build.

    max_successors: maximum kept per pair. min_count: tri-grams seen less often are dropped.
    memory_mb: bound on the memory of the build, without the tokenizer and one pair's successors.
    """

    max_successors: int = Field(default=12, ge=1, le=MAX_SUCCESSORS)
    min_count: int = Field(default=1, ge=1)
    memory_mb: int = Field(default=256, ge=1)


def build_table(
    corpora: Sequence[Corpus],
    out: Path,
    tokenizer: str,
    settings: BuildSettings | None = None,
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> TableFacts:
    """Write the table of all corpora together; return its facts.

    tokenizer: hash of the token-to-id map. Unfinished work is kept in the folder `out`.part. Raises
    ConfigError if `out` is a folder, if a corpus cannot be read, or for a token id that is too large.
    """
    settings = settings or BuildSettings()
    if out.is_dir():
        raise ConfigError(f"{out}: is a folder; name the file to write")
    recipe = {
        "tokenizer": tokenizer,
        "corpora": [[corpus.name, corpus.size] for corpus in corpora],
        "memory_mb": settings.memory_mb,
    }
    runs = _Runs(out.with_name(out.name + ".part"), recipe, settings.memory_mb << 20)
    total = sum(corpus.size for corpus in corpora)
    done = 0
    buffer: list[Keys] = []
    num_buffered = num_pieces = 0
    for batch, corpus in _batches(corpora):
        done += sum(size for _, size in batch)
        num_pieces += len(batch)
        if num_pieces <= runs.num_pieces:
            continue  # an earlier, killed build counted it
        for sequence in corpus.tokens([piece for piece, _ in batch]):
            runs.num_tokens += len(sequence)
            buffer.append(_keys(sequence))
            num_buffered += len(buffer[-1])
        if num_buffered >= runs.buffer_size:
            runs.add(buffer, num_pieces)
            buffer, num_buffered = [], 0
        on_progress("read", done, total)
    runs.add(buffer, num_pieces)
    facts = _write_table(runs, out, tokenizer, settings, on_progress)
    shutil.rmtree(runs.folder)
    return facts


def _batches(corpora: Sequence[Corpus]) -> Iterator[tuple[list[tuple[Any, int]], Corpus]]:
    for corpus in corpora:
        pieces = corpus.pieces()
        while batch := list(islice(pieces, _BATCH)):
            yield batch, corpus


def _keys(sequence: Sequence[int]) -> Keys:
    """Return each tri-gram of a sequence of tokens as one integer, in the same order."""
    tokens = np.asarray(sequence, dtype=np.uint64)
    if len(tokens) and int(tokens.max()) >> _BITS:
        raise ConfigError(f"token id {tokens.max()}: tri-grams hold ids below {1 << _BITS}")
    shift = np.uint64(_BITS)
    keys: Keys = (((tokens[:-2] << shift) | tokens[1:-1]) << shift) | tokens[2:]
    return keys


# --- runs -----------------------------------------------------------------------------------------


class _Runs:
    """Sorted, counted runs on disk, by level, and the number of pieces that they hold."""

    def __init__(self, folder: Path, recipe: dict[str, Any], memory: int) -> None:
        """Take over the runs of a killed build of the same recipe; delete any others."""
        self.folder = folder
        self.recipe = recipe
        self.buffer_size = max(1, memory // _BYTES_PER_TRIGRAM)
        self.levels: list[list[str]] = []
        self.num_pieces = self.num_tokens = self._num_made = 0
        try:
            state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            state = {}
        if state.get("recipe") == recipe:
            self.levels = state["levels"]
            self.num_pieces, self.num_tokens = state["num_pieces"], state["num_tokens"]
            self._num_made = state["num_made"]
        elif folder.is_dir():
            shutil.rmtree(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{folder}: cannot be made ({error})") from error

    def add(self, buffer: Sequence[Keys], num_pieces: int) -> None:
        """Write keys as a run, merge full levels, and record the progress."""
        stale: list[str] = []
        if any(len(keys) for keys in buffer):
            keys, counts = np.unique(np.concatenate(buffer), return_counts=True)
            new = self._write(iter([(keys, counts.astype(np.int64))]))
            for level in range(len(self.levels) + 1):
                if level == len(self.levels):
                    self.levels.append([])
                self.levels[level].append(new)
                if len(self.levels[level]) < _FAN_IN:
                    break
                new = self._write(self._merged(self.levels[level]))
                stale += self.levels[level]
                self.levels[level] = []
        self.num_pieces = num_pieces
        state = {
            "recipe": self.recipe,
            "levels": self.levels,
            "num_pieces": self.num_pieces,
            "num_tokens": self.num_tokens,
            "num_made": self._num_made,
        }
        write_atomically(self.folder / _STATE, json.dumps(state).encode())
        for name in stale:
            for suffix in (".keys", ".counts"):
                (self.folder / (name + suffix)).unlink()

    def merged(self) -> Iterator[tuple[Keys, Counts]]:
        """Yield all tri-grams in order, each once, in blocks."""
        return self._merged([name for level in self.levels for name in level])

    def num_counted(self) -> int:
        """Return the number of tri-grams in all runs; one in several runs counts in each."""
        names = [name for level in self.levels for name in level]
        return sum((self.folder / f"{name}.keys").stat().st_size // 8 for name in names)

    def _write(self, blocks: Iterator[tuple[Keys, Counts]]) -> str:
        name = f"run-{self._num_made:06d}"
        self._num_made += 1
        with (
            (self.folder / f"{name}.keys").open("wb") as key_file,
            (self.folder / f"{name}.counts").open("wb") as count_file,
        ):
            for keys, counts in blocks:
                key_file.write(keys.data)
                count_file.write(counts.data)
        return name

    def _merged(self, names: Sequence[str]) -> Iterator[tuple[Keys, Counts]]:
        files = [
            (
                np.memmap(self.folder / f"{name}.keys", np.uint64, mode="r"),
                np.memmap(self.folder / f"{name}.counts", np.int64, mode="r"),
            )
            for name in names
        ]
        size = max(1, self.buffer_size // max(1, len(files)))
        places = [0] * len(files)
        while True:
            live = [i for i, (keys, _) in enumerate(files) if places[i] < len(keys)]
            if not live:
                return
            blocks = {i: files[i][0][places[i] : places[i] + size] for i in live}
            # up to this key every block is complete
            unfinished = [b[-1] for i, b in blocks.items() if places[i] + size < len(files[i][0])]
            bound = min(unfinished) if unfinished else None
            all_keys, all_counts = [], []
            for i, block in blocks.items():
                n = len(block) if bound is None else int(np.searchsorted(block, bound, "right"))
                all_keys.append(block[:n])
                all_counts.append(files[i][1][places[i] : places[i] + n])
                places[i] += n
            yield _summed(np.concatenate(all_keys), np.concatenate(all_counts))


def _summed(keys: Keys, counts: Counts) -> tuple[Keys, Counts]:
    """Return each key once, in order, with the sum of its counts."""
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    first = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
    return keys[first], np.add.reduceat(counts, first)


# --- the table ------------------------------------------------------------------------------------


def _write_table(
    runs: _Runs,
    out: Path,
    tokenizer: str,
    settings: BuildSettings,
    on_progress: Callable[[str, int, int], None],
) -> TableFacts:
    """Prune the merged runs into one file per array, then join these into the table."""
    files = {name: (runs.folder / f"{name}.array").open("wb+") for name in ARRAYS}
    pairs_of_first = np.zeros(0, dtype=np.int64)
    total, done, end = runs.num_counted(), 0, 0
    try:
        files["offsets"].write(np.zeros(1, dtype=np.int64).data)
        for keys, counts in _whole_pairs(runs.merged()):
            done += len(keys)
            pairs, sizes, successors, weights = _pruned(keys, counts, settings)
            first = (pairs >> np.uint64(_BITS)).astype(np.int64)
            seen = np.bincount(first, minlength=len(pairs_of_first))
            seen[: len(pairs_of_first)] += pairs_of_first
            pairs_of_first = seen
            second = pairs & np.uint64((1 << _BITS) - 1)
            files["seconds"].write(second.astype("<i4").data)
            files["offsets"].write((end + np.cumsum(sizes)).astype("<i8").data)
            files["successors"].write(successors.astype("<i4").data)
            files["weights"].write(weights.astype("<f4").data)
            end += int(sizes.sum())
            on_progress("merge", min(done, total), total)
        starts = np.r_[0, np.cumsum(pairs_of_first)].astype("<i8")
        files["starts"].write(starts.data)
        num_elements = {n: f.tell() // ARRAYS[n][1].itemsize for n, f in files.items()}
        facts = TableFacts(
            tokenizer=tokenizer,
            num_tokens=runs.num_tokens,
            num_pairs=num_elements["seconds"],
            num_trigrams=num_elements["successors"],
            max_successors=settings.max_successors,
            min_count=settings.min_count,
            sha256=_hash(files),
        )
        # in the folder of `out`, because a rename cannot cross file systems
        joined = runs.folder / "joined"
        with joined.open("wb") as file:
            file.write(header(facts, num_elements))
            for part in files.values():
                part.seek(0)
                shutil.copyfileobj(part, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
    finally:
        for part in files.values():
            part.close()
    joined.replace(out)
    on_progress("merge", total, total)
    return facts


def _hash(files: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for file in files.values():
        file.seek(0)
        hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()[:32]


def _whole_pairs(blocks: Iterator[tuple[Keys, Counts]]) -> Iterator[tuple[Keys, Counts]]:
    """Yield the same tri-grams in blocks that do not split a pair's successors."""
    shift = np.uint64(_BITS)
    held: list[tuple[Keys, Counts]] = []
    for block in blocks:
        held.append(block)
        keys = np.concatenate([k for k, _ in held])
        counts = np.concatenate([c for _, c in held])
        cut = int(np.searchsorted(keys, (keys[-1] >> shift) << shift))
        if cut:
            yield keys[:cut], counts[:cut]
        held = [(keys[cut:], counts[cut:])]
    if held:
        yield held[0]


def _pruned(
    keys: Keys, counts: Counts, settings: BuildSettings
) -> tuple[Keys, Counts, Keys, NDArray[np.float64]]:
    """Return (pairs, number of kept successors of each, the successors, their probabilities)."""
    pair = keys >> np.uint64(_BITS)
    first = np.flatnonzero(np.r_[True, pair[1:] != pair[:-1]])
    totals = np.add.reduceat(counts, first)
    member = np.repeat(np.arange(len(first)), np.diff(np.r_[first, len(keys)]))
    weights = counts / totals[member]
    order = np.lexsort((keys, -counts, member))  # the likeliest first, of equals the smaller id
    rank = np.arange(len(keys)) - first[member]
    order = order[(rank < settings.max_successors) & (counts[order] >= settings.min_count)]
    sizes = np.bincount(member[order], minlength=len(first))
    kept = sizes > 0
    successors = keys[order] & np.uint64((1 << _BITS) - 1)
    return pair[first][kept], sizes[kept], successors, weights[order]
