"""The compiled forward: a model's packed weights, run by one call of machine code per forward.

A token's bits depend on its own row up to its own position alone, at every batch, draft width and
chunking of the prompt. Symbols: N packed tokens, D hidden size, R rows, K drafted tokens, V logits.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F

from paceline.models.compiled import tables as t
from paceline.models.compiled.cache import PackedRows
from paceline.models.compiled.family import facts_of
from paceline.models.compiled.jobs import Job, Runnable
from paceline.models.compiled.native import run_address
from paceline.models.compiled.processor import kernels
from paceline.models.compiled.rows import inputs_of
from paceline.models.compiled.team import borrowed
from paceline.models.compiled.weights import PackedModel
from paceline.models.scores import Scores

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from paceline.models.packing import ChainEnds, Draw, Span
    from paceline.models.sublayers import LayerSubset


class CompiledForward:
    """Body and head of a model; call `family.why_not_compiled` first. May be called by any thread."""

    kind: ClassVar[str] = "compiled"

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Mapping[int, int | None],
        num_positions: int,
        weights: str = "own",
    ) -> None:
        """windows: positions that each layer sees. num_positions: the model's context length.

        weights: `own` keeps those of the model, `int8` rounds them.
        """
        dtype = str(model.dtype).removeprefix("torch.")
        kind = dtype if weights == "own" else weights
        self.kernels = kernels()
        inputs = inputs_of(self.kernels, kind)
        self.packed = PackedModel(*facts_of(model, windows, num_positions), kind, inputs)
        self._runnable = Runnable(self.packed, run_address(self.kernels, dtype, kind))

    def new_cache(self) -> PackedRows:
        """Return an empty cache."""
        return PackedRows(self.packed.cache_shape(), self.packed.has_sources)

    def hidden(
        self,
        tokens: Sequence[int],
        spans: Sequence[Span],
        parents: Sequence[Sequence[int] | None] | None,
        cache: PackedRows,
        skip: LayerSubset | None = None,
    ) -> Tensor:
        """Return final hidden states [N, D]; arguments as in `LanguageModel.forward`."""
        out = torch.empty((len(tokens), self.packed.room), dtype=self.packed.dtype)
        with borrowed() as lent:
            job = Job(self._runnable, lent)
            job.pack(tokens, spans, parents, cache, [], skip=skip)
            job.run(hidden=out)
        return out[:, : self.packed.facts.hidden_size]

    def score(
        self,
        tokens: Sequence[int],
        spans: Sequence[Span],
        parents: Sequence[Sequence[int] | None] | None,
        cache: PackedRows,
        wants_logits: bool = True,
        places: Sequence[int] | None = None,
        skip: LayerSubset | None = None,
    ) -> Scores:
        """Return the scores at the given places [P], or at all N tokens."""
        places = range(len(tokens)) if places is None else places
        logits = self._new_logits(len(places)) if wants_logits else None
        with borrowed() as lent:
            job = Job(self._runnable, lent)
            job.pack(tokens, spans, parents, cache, places, skip=skip)
            job.run(logits=logits)
            return Scores(job.integers(t.CHOICES, len(places)), self._cut(logits))

    def chain(
        self,
        tokens: Sequence[int],
        spans: Sequence[Span],
        cache: PackedRows,
        num_drafted: int,
        num_tokens: int,
        skip: LayerSubset | None = None,
        draws: Sequence[Draw | None] | None = None,
    ) -> list[list[int]]:
        """Return a chain of K ids below `num_tokens` after each row's tokens.

        draws: how each row's tokens are drawn; None for the most likely ones. All drafted tokens but
        the last are cached after the row's own.
        """
        picked = [end - 1 for end in itertools.accumulate(span.width for span in spans)]
        with borrowed() as lent:
            job = Job(self._runnable, lent)
            job.pack(tokens, spans, None, cache, picked, num_drafted, skip, draws)
            job.run(limit=num_tokens)
            flat = job.integers(t.CHAIN, len(spans) * num_drafted)
        return [flat[i : i + num_drafted] for i in range(0, len(flat), num_drafted)]

    def sure_chain(
        self,
        tokens: Sequence[int],
        spans: Sequence[Span],
        cache: PackedRows,
        num_drafted: int,
        num_tokens: int,
        ends: ChainEnds,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Return (chains, their tokens' probabilities) of the most likely ids, up to the steps' end.

        All rows take the steps of the row that ends last.
        """
        picked = [end - 1 for end in itertools.accumulate(span.width for span in spans)]
        rows = len(spans)
        with borrowed() as lent:
            job = Job(self._runnable, lent)
            job.pack(tokens, spans, None, cache, picked, num_drafted, ends=ends)
            job.run(limit=num_tokens)
            flat = job.integers(t.CHAIN, rows * num_drafted)
            sure = job.floats(t.SURENESS, rows * num_drafted)
            [ended] = job.integers(t.ENDING, 1)
        steps, firsts = ended or num_drafted, range(0, rows * num_drafted, num_drafted)
        return [flat[i : i + steps] for i in firsts], [sure[i : i + steps] for i in firsts]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V] float32 of final hidden states [..., D]."""
        flat = hidden.reshape(-1, hidden.shape[-1]).to(self.packed.dtype)
        more = self.packed.room - flat.shape[-1]
        inputs = (F.pad(flat, (0, more)) if more else flat).contiguous()
        logits = self._new_logits(len(flat))
        if len(flat):
            with borrowed() as lent:
                job = Job(self._runnable, lent)
                job.pack_hidden(len(inputs))
                job.run(hidden=inputs, logits=logits)
        cut = self._cut(logits)
        assert cut is not None
        return cut.unflatten(0, hidden.shape[:-1]) if hidden.ndim != 2 else cut

    def _new_logits(self, places: int) -> Tensor:
        return torch.empty((places, self.packed.logit_room), dtype=torch.float32)

    def _cut(self, logits: Tensor | None) -> Tensor | None:
        return None if logits is None else logits[:, : self.packed.num_logits]
