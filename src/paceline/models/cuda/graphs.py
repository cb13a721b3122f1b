"""The lean forward on fixed buffers: captured as a CUDA graph once per shape, then replayed.

A step of a small batch is about fifteen launches per layer, and a launch takes longer than its kernel.
So rows and tokens are padded to one of a few shapes, one vector holds everything that varies between
steps and is copied to the device at once, and the step is captured at the first use of its shape. A
drafter's greedy chain is captured as a whole: each argmax feeds the next step.

The work after a target's forward (unembedding, argmax, one copy back) is launched while the graph still
runs, so it is not captured. Without CUDA the same functions run on the same buffers, uncaptured.
Symbols: R rows, T packed tokens, D hidden size, K draft tokens, V logits width.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Any, Final

import torch

from paceline.models.cuda.batch import PagedBatch
from paceline.models.cuda.layout import PackedRows, Shape, lay_out

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from paceline.models.cuda.paged_cache import PagedCache
    from paceline.models.lean import LeanForward
    from paceline.models.packing import Span

ROWS: Final = (1, 2, 4, 8, 16, 32, 64)
TOKENS: Final = (1, 2, 4, 6, 8, 9, 12, 16, 24, 32, 40, 48, 64, 72, 96, 128, 192, 256)
_SPARE_POSITIONS: Final = 128  # after the context, for chains that draft beyond it
_WARM_UPS: Final = 2


def shape_of(num_rows: int, num_tokens: int) -> Shape | None:
    """Return the smallest shape that holds a batch, or None if all are too small."""
    if num_rows > ROWS[-1] or num_tokens > TOKENS[-1]:
        return None
    tokens = TOKENS[bisect_left(TOKENS, num_tokens)]
    return Shape(ROWS[bisect_left(ROWS, num_rows)], tokens, -(-tokens // 64))


class StaticForward:
    """The steps of one model over its own cache, by shape."""

    def __init__(self, forward: LeanForward, cache: PagedCache, context_length: int) -> None:
        self._forward = forward
        self._cache = cache
        self._num_positions = context_length + _SPARE_POSITIONS
        # computed once: a captured step keeps the table's address
        forward.reserve_positions(self._num_positions)
        self._steps: dict[tuple[int, ...], _Step] = {}
        self._version = cache.version
        self._pool: Any = None  # of memory, shared by all graphs

    def hidden(
        self,
        tokens: Tensor,
        spans: Sequence[Span],
        parents: Sequence[Sequence[int] | None] | None,
    ) -> Tensor | None:
        """Return final hidden states [N, D]; None for prefill or if no shape holds the batch."""
        shape = shape_of(len(spans), len(tokens))
        if shape is None or any(span.prefill for span in spans):
            return None
        step = self._step((shape.rows, shape.tokens), shape, spans, 0, self._forward.hidden)
        # a copy, because the next step of this shape overwrites it
        return step.run(tokens, spans, parents)[: len(tokens)].clone()

    def draft(
        self, tokens: Tensor, spans: Sequence[Span], num_drafted: int, num_tokens: int
    ) -> Tensor | None:
        """Return a greedy chain [R, K] after each row's tokens, on the CPU; None as in `hidden`.

        All but the last drafted token are cached after the row's own. num_tokens: greater ids are not
        drafted.
        """
        shape = shape_of(len(spans), len(tokens))
        if shape is None:
            return None

        def chain(ids: Tensor, batch: PagedBatch) -> Tensor:
            return self._draft(ids, batch, num_drafted, num_tokens)

        key = (shape.rows, shape.tokens, num_drafted, num_tokens)
        step = self._step(key, shape, spans, num_drafted - 1, chain)
        return step.run(tokens, spans, None)[: len(spans)].cpu()

    def _step(
        self,
        key: tuple[int, ...],
        shape: Shape,
        spans: Sequence[Span],
        ahead: int,
        function: Callable[[Tensor, PagedBatch], Tensor],
    ) -> _Step:
        """Return the step of a shape, with room in the cache for `ahead` more positions per row."""
        for span in spans:
            self._cache.extend(span.slot, span.start + span.width + ahead)
        self._cache.table()  # brought up to date
        if self._version != self._cache.version:
            self._steps.clear()  # their tensors have moved
            self._version = self._cache.version
        step = self._steps.get(key)
        if step is None:
            step = self._steps[key] = _Step(shape, self._cache, self._num_positions, function)
            if step.is_on_cuda:
                if self._pool is None:
                    self._pool = torch.cuda.graph_pool_handle()
                step.capture(self._pool)
        return step

    def _draft(self, ids: Tensor, batch: PagedBatch, num_drafted: int, num_tokens: int) -> Tensor:
        """Return [R, K]. Rows of padding draft meaningless tokens, which are cached in block 0."""
        hidden = self._forward.hidden(ids, batch)
        rows = batch.rows
        hidden = hidden[(rows.first + rows.width - 1).clamp_(min=0)]
        width = rows.width.clamp(max=1)
        first = torch.arange(len(width), device=width.device)
        start = rows.start + rows.width
        drafted = [self._best(hidden, num_tokens)]
        for _ in range(1, num_drafted):
            next_rows = PackedRows(
                rows.table,
                first=first,
                width=width,
                start=start,
                slot=rows.slot,
                position=start,
                place=self._cache.places_on_device(rows.slot, start) * width,
                bits=None,
                max_width=1,
                num_positions=self._num_positions,
            )
            next_batch = PagedBatch(next_rows, self._cache.layer)
            drafted.append(self._best(self._forward.hidden(drafted[-1], next_batch), num_tokens))
            start = start + 1
        return torch.stack(drafted, dim=1)

    def _best(self, hidden: Tensor, num_tokens: int) -> Tensor:
        """Return the likeliest id [R] below `num_tokens`."""
        return self._forward.logits(hidden)[:, :num_tokens].argmax(dim=-1)


class _Step:
    """A function of token ids and a batch on buffers of one shape, with its graph."""

    def __init__(
        self,
        shape: Shape,
        cache: PagedCache,
        num_positions: int,
        function: Callable[[Tensor, PagedBatch], Tensor],
    ) -> None:
        table = cache.table()
        device = table.device
        self.is_on_cuda = device.type == "cuda"
        self._shape = shape
        self._cache = cache
        self._function = function
        self._graph: Any = None
        with torch.inference_mode(False):
            self._host = torch.zeros(shape.size, dtype=torch.int64, pin_memory=self.is_on_cuda)
            self._device = torch.zeros(shape.size, dtype=torch.int64, device=device)
        self._copied: Any = torch.cuda.Event() if self.is_on_cuda else None
        max_width = shape.tokens - shape.rows // 2  # a smaller shape holds half the rows
        self._ids, rows = shape.read(self._device, table, max_width, num_positions)
        self._batch = PagedBatch(rows, cache.layer)
        self._output: Tensor | None = None

    def capture(self, pool: Any) -> None:
        """Record the function on zeros, which are rows of padding and use no row's blocks."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):  # kernels are compiled and workspaces taken here
                self._function(self._ids, self._batch)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # other threads may use the device meanwhile
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self._output = self._function(self._ids, self._batch)
        self._graph = graph

    def run(
        self,
        tokens: Tensor,
        spans: Sequence[Span],
        parents: Sequence[Sequence[int] | None] | None,
    ) -> Tensor:
        """Return the function's output for a batch, in a buffer that the next run overwrites."""
        if self._copied is not None:
            self._copied.synchronize()  # until the host's vector may be overwritten
        lay_out(self._host.numpy(), self._shape, tokens, spans, parents, self._cache.places)
        self._device.copy_(self._host, non_blocking=True)
        if self._graph is not None:
            self._copied.record()
            self._graph.replay()
        else:  # into the same tensor every time, as a replay
            output = self._function(self._ids, self._batch)
            self._output = output if self._output is None else self._output.copy_(output)
        assert self._output is not None
        return self._output
