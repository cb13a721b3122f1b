"""The jobs that Python hands to compiled code: their tables, and where their buffers lie.

A job is one call: a forward, a chain, or the logits of given hidden states. Symbols: N packed tokens,
W tokens of a tree.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import torch

from paceline.models.compiled import tables as t
from paceline.models.compiled.attention import attention_bytes
from paceline.models.compiled.entry import MAX_THREADS
from paceline.models.compiled.phases import num_phases
from paceline.models.compiled.products import BLOCK_ROWS, ROOM_ROWS, TILE_BYTES
from paceline.models.compiled.sharing import LINE, MAX_PIECES
from paceline.models.compiled.tables import rounded
from paceline.models.compiled.weights import float_bits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.models.compiled.cache import PackedRows
    from paceline.models.compiled.team import Lent
    from paceline.models.compiled.weights import PackedModel
    from paceline.models.packing import ChainEnds, Draw, Span
    from paceline.models.sublayers import LayerSubset

_SCORE_UNIT: Final = 256  # positions; rows of scores are rounded up to it
_QUERIES: Final = 32  # of a piece of attention where a row has several
_FEWEST_QUERY_TOKENS: Final = 8
_MAX_LAYOUTS: Final = 512
_WRITTEN: Final = struct.Struct(f"{t.FIRST_BUFFER + t.NUM_BUFFERS}q")  # the job's own fields


class _Shape(NamedTuple):
    """The numbers that decide the sizes of a job's buffers."""

    tokens: int
    rows: int
    picked: int
    steps: int
    threads: int
    queries: int  # of a piece of attention
    score_room: int
    width: int  # of the widest tree, else 0
    weighs: bool = False  # whether a chain may end by its tokens' probabilities


class _Layout:
    """Where the buffers of a job lie, by their distance from the first."""

    def __init__(self, model: PackedModel, shape: _Shape) -> None:
        facts = model.facts
        products = ((shape.picked, model.logit_room), (shape.tokens, model.mlp_outputs))
        pieces = max(-(-rows // BLOCK_ROWS) * outputs // 64 for rows, outputs in products)
        if pieces > MAX_PIECES:
            raise ValueError(
                f"{pieces} pieces of a product are too many; score fewer tokens at once"
            )
        rows = rounded(max(shape.tokens, shape.picked), ROOM_ROWS)
        self.scratch_stride = rounded(_scratch_bytes(model, shape), LINE)
        sizes = {
            t.STREAM: rows * model.room * 4,
            t.INPUTS: rows * model.row_bytes(model.room),
            t.PROJECTED: rows * model.outputs * 4,
            t.ATTENDED: rows * model.row_bytes(facts.heads * model.head_room),
            t.ACTIVATED: rows * model.row_bytes(model.mlp_room),
            t.ADDED: rows * model.room * 4,
            t.BEST: model.logit_room // 64 * shape.picked * 16,
            t.CHOICES: shape.picked * 8,
            t.CHAIN: shape.rows * shape.steps * 8,
            t.SURENESS: shape.rows * shape.steps * 4 if shape.weighs else 0,
            t.IDS: shape.tokens * 8,
            t.POSITIONS: shape.tokens * 8,
            t.PICKED: shape.picked * 8,
            t.SPANS: shape.rows * t.SPAN_SIZE * 8,
            t.ENDING: (1 + t.CHANCES) * 8 if shape.weighs else 0,
            t.SKIPPED: 2 * model.num_layers * 8,
            t.SCRATCH: self.scratch_stride * shape.threads,
        }
        at = 0
        self.at: dict[int, int] = {}
        for field in range(t.FIRST_BUFFER, t.FIRST_BUFFER + t.NUM_BUFFERS):
            # what Python writes lies together, to be written at once
            at = at if t.IDS < field <= t.SKIPPED else rounded(at, LINE)
            self.at[field] = at
            at += sizes[field]
        self.num_bytes = rounded(at, LINE)
        self._placed: tuple[int, tuple[int, ...]] = (-1, ())  # the last base and its addresses
        phases = num_phases(model.num_layers, shape.steps)
        self.counter_bytes = phases * LINE * (1 + shape.threads)

    def addresses(self, base: int) -> tuple[int, ...]:
        """Return the addresses of the buffers, the first of which lies at `base`."""
        placed = self._placed  # read and replaced as one, since callers on several threads share it
        if placed[0] != base:
            placed = self._placed = (base, tuple(base + at for at in self.at.values()))
        return placed[1]


def _scratch_bytes(model: PackedModel, shape: _Shape) -> int:
    """Return the bytes of a thread's scratch: inputs, the sums of a piece, and attention's."""
    inputs = ROOM_ROWS * 4 * model.room + TILE_BYTES
    return inputs + attention_bytes(
        model.head_room,
        model.value_room,
        shape.queries,
        model.groups,
        shape.score_room,
        shape.width,
    )


class Runnable:
    """A packed model, the code that runs it, and the layouts of its jobs."""

    def __init__(self, packed: PackedModel, run_address: int) -> None:
        """run_address: of the machine code; see `native.run_address`."""
        self.packed, self.run_address = packed, run_address
        self.query_tokens = max(_FEWEST_QUERY_TOKENS, _QUERIES // packed.groups)
        self._layouts: dict[_Shape, _Layout] = {}

    def layout(self, shape: _Shape) -> _Layout:
        """Return the layout of a job's buffers, which jobs of one shape share."""
        found = self._layouts.get(shape)
        if found is None:
            if len(self._layouts) >= _MAX_LAYOUTS:
                self._layouts.clear()
            found = self._layouts[shape] = _Layout(self.packed, shape)
        return found


class Job:
    """One job in a lent workspace."""

    def __init__(self, runnable: Runnable, lent: Lent) -> None:
        self._runnable, self._packed, self._lent = runnable, runnable.packed, lent

    def pack(
        self,
        tokens: Sequence[int],
        spans: Sequence[Span],
        parents: Sequence[Sequence[int] | None] | None,
        cache: PackedRows,
        picked: Sequence[int],
        steps: int = 0,
        skip: LayerSubset | None = None,
        draws: Sequence[Draw | None] | None = None,
        ends: ChainEnds | None = None,
    ) -> None:
        """Write the rows of a forward. picked: places of which logits are wanted.

        draws: of the rows of a chain; None for the most likely tokens. ends: of such a chain.
        """
        packed, more, sources = self._packed, max(0, steps - 1), cache.sources
        numbers: list[int] = []
        positions: list[int] = []
        self._paths: list[np.ndarray] = []  # alive until the job has run
        first = longest = widest = widest_tree = most_seen = 0
        for i, span in enumerate(spans):
            stop = span.start + span.width
            cache.extend(span.slot, stop + more)
            tree = parents[i] if parents else None
            address = 0
            if tree:
                paths = paths_of(tree)
                positions.extend(span.start + len(path) - 1 for path in paths)
                self._paths.append(_path_table(paths))
                address = self._paths[-1].ctypes.data
                widest_tree = max(widest_tree, span.width)
            else:
                positions.extend(range(span.start, stop))
            draw = _GREEDY if draws is None else _draw_fields(draws[i])
            least = 0 if ends is None else float_bits(ends.least[i])
            source = _NO_SOURCE if sources is None else _source_fields(sources, span.slot)
            numbers += (
                first, span.width, span.start, *cache.place(span.slot), *draw, address, _ONE, least,
                *source,
            )  # fmt: skip
            first += span.width
            longest, widest = max(longest, stop + more), max(widest, span.width)
            most_seen = max(most_seen, source[-1])
        packed.reserve_positions(longest)
        splits = widest > self._runnable.query_tokens
        queries = (self._runnable.query_tokens if splits else widest) * packed.groups
        room = rounded(max(longest, most_seen), _SCORE_UNIT)
        shape = _Shape(
            first, len(spans), len(picked), steps, _num_threads(), queries, room, widest_tree,
            ends is not None,
        )  # fmt: skip
        flags = () if skip is None else _flags(skip, packed.num_layers)
        ending = () if ends is None else (0, *_bits_of(ends.chances))
        layout = self._place(shape, (*tokens, *positions, *picked, *numbers, *ending, *flags))
        self._weighs = int(ends is not None)
        self._head = (
            packed.address, self._runnable.run_address, first, len(spans), len(picked), steps,
            room, layout.scratch_stride, int(splits), self._runnable.query_tokens,
            packed.num_layers, int(skip is not None),
        )  # fmt: skip

    def pack_hidden(self, places: int) -> None:
        """Ask for the logits of given final hidden states, which `run` takes."""
        layout = self._place(_Shape(0, 0, places, 0, _num_threads(), 0, 0, 0), range(places))
        self._weighs = 0
        self._head = (
            self._packed.address, self._runnable.run_address, 0, 0, places, 0,
            0, layout.scratch_stride, 0, 1, 0, 0,
        )  # fmt: skip

    def _place(self, shape: _Shape, integers: Sequence[int]) -> _Layout:
        """Give the job its buffers, and write its integers from IDS on."""
        workspace = self._lent.workspace
        self._layout = layout = self._runnable.layout(shape)
        self._threads = shape.threads
        workspace.reserve(layout.num_bytes, layout.counter_bytes)
        # faster than assigning to a numpy slice, which converts the numbers one by one
        _struct_of(len(integers)).pack_into(workspace.integers.data, layout.at[t.IDS], *integers)
        return layout

    def integers(self, field: int, count: int) -> list[int]:
        """Return integers that the job has written."""
        at = self._layout.at[field] // 8
        found: list[int] = self._lent.workspace.integers[at : at + count].tolist()
        return found

    def floats(self, field: int, count: int) -> list[float]:
        """Return float32 numbers that the job has written."""
        at = self._layout.at[field] // 4
        written = self._lent.workspace.integers.view(np.float32)[at : at + count]
        found: list[float] = written.tolist()
        return found

    def run(
        self, hidden: Tensor | None = None, logits: Tensor | None = None, limit: int | None = None
    ) -> None:
        """Run the job and fill hidden [N, HIDDEN_ROOM] and logits, if given.

        limit: ids below it may be chosen. After `pack_hidden`, hidden is read.
        """
        workspace = self._lent.workspace
        _WRITTEN.pack_into(
            workspace.job.data,
            0,
            *self._head,
            0 if hidden is None else hidden.data_ptr(),
            0 if logits is None else logits.data_ptr(),
            self._packed.num_logits if limit is None else limit,
            self._weighs,
            *self._layout.addresses(workspace.base),
        )
        self._lent.run(self._threads)


@lru_cache(maxsize=_MAX_LAYOUTS)
def _struct_of(count: int) -> struct.Struct:
    return struct.Struct(f"{count}q")


def _num_threads() -> int:
    """Return the threads of a job: torch's, as far as a team goes."""
    return min(torch.get_num_threads(), MAX_THREADS)


def paths_of(parents: Sequence[int]) -> list[list[int]]:
    """Return the places on the path to each token of a tree, its own included, from the root on."""
    paths = [[0]]
    for k, parent in enumerate(parents):
        paths.append([*paths[parent + 1], k + 1])
    return paths


@lru_cache(maxsize=64)
def _bits_of(chances: tuple[float, ...]) -> tuple[int, ...]:
    return tuple(map(float_bits, chances))


_NO_SOURCE: Final = (0, 0, 0)


def _source_fields(sources: PackedRows, slot: int) -> tuple[int, int, int]:
    """Return a row's SOURCE, SOURCE_CAPACITY and SOURCE_LENGTH."""
    length = sources.length(slot)
    if length == 0:
        raise IndexError(f"the row of slot {slot} has no source")
    return (*sources.place(slot), length)


_GREEDY: Final = (0, 0, 0)
_ONE: Final = float_bits(1.0)


def _draw_fields(draw: Draw | None) -> tuple[int, int, int]:
    """Return a row's SEED, DRAWN_AT and COLDNESS_F."""
    if draw is None:
        return _GREEDY
    seed = (draw.seed + 2**63) % 2**64 - 2**63
    return seed, draw.position, float_bits(1 / draw.temperature)


def _path_table(paths: Sequence[Sequence[int]]) -> np.ndarray:
    """Return [W, W + 1] int64: the length of each path and its places."""
    rows = [[len(path), *path, *[0] * (len(paths) - len(path))] for path in paths]
    return np.array(rows, np.int64)


def _flags(skip: LayerSubset, num_layers: int) -> list[int]:
    """Return 1 for each attention, and then for each MLP, that is left out."""
    flags = [0] * (2 * num_layers)
    for index in skip.attention:
        flags[index] = 1
    for index in skip.mlp:
        flags[num_layers + index] = 1
    return flags
