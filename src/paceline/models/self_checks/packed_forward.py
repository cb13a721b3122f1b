"""The self-check of the packed forward: each step of a round gives transformers' plain logits.

Rows are fed as the engine feeds them: prompts in pieces, one row alone, rows that share a call, a tree,
an accepted path, a draft taken back. Symbols: N tokens, W tokens per row, V logits width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from paceline.errors import ModelError
from paceline.models.packing import Span
from paceline.models.self_checks.bounds import (
    PAST_BOUND,
    check_bounds,
    check_cached_windows,
    past_windows,
)
from paceline.models.visibility import FAILURES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.models.encoder_decoder import Source
    from paceline.models.language_model import LanguageModel

_SHORT: Final = 4  # tokens of the short prompts
_DECODED: Final = 7  # positions that the long row needs after its prompt
_FEW: Final = 40  # tokens; padding shorter texts costs less than one more forward
_TRIES: Final = 4  # texts in half precision, before a model is refused
_TREE: Final = (-1, -1, 1)  # the parents of its nodes, without the root's
_PATHS: Final = ([0], [0, 1], [0, 2], [0, 2, 3])  # to each node from the root
_ACCEPTED: Final = (0, 2, 3)  # the path of the tree that is accepted
_SOURCES: Final = (9, 70, 5)  # tokens of the rows' sources


def check_packed_forward(language_model: LanguageModel, seed: int = 0) -> None:
    """Compare the steps of rounds with transformers' plain forward, on random tokens.

    Raises ModelError if any logit differs by more than the model's dtype explains, or if the model
    bounds what a token sees in a way that this check cannot reach.
    """
    name, kind = language_model.name, type(language_model.model).__name__
    check_cached_windows(language_model)
    block = language_model.cache.for_checks().block
    num_prompt = past_windows(language_model, block + PAST_BOUND, _DECODED)
    check_bounds(language_model, num_prompt + _DECODED)
    float32 = _is_float32(language_model)
    # in half precision a near tie of two experts may be cut either way, which moves all logits of a
    # place; a wrong forward differs at the same places whatever the tokens are
    least: list[float] = []
    for more in range(1 if float32 else _TRIES):
        steps, differences, scale = _differences(language_model, num_prompt, seed + more)
        least = list(map(min, least or differences, differences))
        worst = max(least)
        if worst <= (1e-3 if float32 else 0.15) * max(scale, 1e-6):
            return
    reasons = "; ".join(language_model.visibility.reasons)
    own = language_model.forward_kind
    remedy = "" if own == "transformers" else f" by the {own} forward; set 'forward: transformers'"
    raise ModelError(
        f"{name}: the packed forward of {kind} differs from transformers' by {worst:.3g} at "
        f"{steps[least.index(worst)]} (logits vary by {scale:.3g}); this architecture is not supported"
        f"{reasons and ': ' + reasons}{remedy}"
    )


def _differences(
    language_model: LanguageModel, num_prompt: int, seed: int
) -> tuple[list[str], list[float], float]:
    """Return the step and the difference from the plain forward of every place, and the logits' spread.

    Raises ModelError if either forward fails.
    """
    name, kind = language_model.name, type(language_model.model).__name__
    rows = _FedRows(language_model, torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        try:
            _feed_rounds(rows, num_prompt)
        except FAILURES as error:
            reasons = "; ".join(language_model.visibility.reasons) or str(error)
            raise ModelError(f"{name}: {kind} cannot run the packed forward: {reasons}") from error
        finally:
            rows.release()
        try:
            differences, scale = _compare(rows)
        except FAILURES as error:
            raise ModelError(
                f"{name}: {kind} cannot be checked: transformers' own forward over its text fails "
                f"with {type(error).__name__}: {error}"
            ) from error
    return [place.step for place in rows.places], differences, scale


class _Place(NamedTuple):
    """One token that was fed: its step, its row, the row's text up to it, and its logits."""

    step: str
    row: int
    text: list[int]
    logits: Tensor  # [V]

    def holds(self, other: _Place) -> bool:
        """Return whether the other's text is the beginning of this one's, in the same row."""
        return self.row == other.row and self.text[: len(other.text)] == other.text


class _FedRows:
    """Three neighbouring rows, fed step by step, with the logits of every step."""

    def __init__(self, model: LanguageModel, generator: torch.Generator) -> None:
        self.model = model
        self.places: list[_Place] = []
        self._generator = generator
        self._cache = model.cache.for_checks()
        self._texts: list[list[int]] = [[], [], []]  # as cached
        self._slots = [self._cache.acquire() for _ in self._texts]
        self.sources = [self._read_source(row) for row in range(len(self._texts))]

    def _read_source(self, row: int) -> Source | None:
        """Read a random source into a row, of another length than the other rows'."""
        encoder = self.model.encoder
        if encoder is None:
            return None
        source = encoder.random_source(_SOURCES[row], self._generator)
        with torch.inference_mode():
            self.model.begin(self._slots[row], source, self._cache)
        return source

    def feed(
        self, step: str, widths: dict[int, int], prefill: bool = False, tree: bool = False
    ) -> None:
        """Feed random tokens to rows. tree: those of the first row named are a tree's nodes."""
        rows, vocab = list(widths), self.model.num_logits
        pieces = [torch.randint(vocab, (n,), generator=self._generator) for n in widths.values()]
        spans = [Span(self._slots[r], len(self._texts[r]), widths[r], prefill) for r in rows]
        parents = [_TREE if tree else None, *[None] * (len(rows) - 1)]
        hidden = self.model.forward(torch.cat(pieces), spans, parents, cache=self._cache)
        compared: list[int] = []
        texts: list[tuple[int, list[int]]] = []
        first = 0
        for row, piece, is_tree in zip(rows, pieces, parents, strict=True):
            # of a prompt's piece, the last tokens are enough
            for k in range(max(0, len(piece) - PAST_BOUND) if prefill else 0, len(piece)):
                path = piece[_PATHS[k]] if is_tree else piece[: k + 1]
                compared.append(first + k)
                texts.append((row, [*self._texts[row], *path.tolist()]))
            self._texts[row] += piece.tolist()
            first += len(piece)
        logits = self.model.unembed(hidden[compared]).float().cpu()
        self.places += [_Place(step, *text, own) for text, own in zip(texts, logits, strict=True)]

    def accept_path(self, row: int) -> None:
        """Accept a path of the tree that was just fed."""
        text = self._texts[row]
        nodes, start = text[-len(_PATHS) :], len(text) - len(_PATHS)
        text[start:] = [nodes[k] for k in _ACCEPTED]
        self._cache.copy_positions(self._slots[row], [start + k for k in _ACCEPTED], start)

    def take_back(self, row: int, count: int) -> None:
        """Remove a row's last tokens; their cache entries stay, stale."""
        del self._texts[row][-count:]

    def release(self) -> None:
        for slot in self._slots:
            self._cache.release(slot)


def _feed_rounds(rows: _FedRows, num_prompt: int) -> None:
    """Feed the steps of a few rounds to a long row and two short ones."""
    half = num_prompt // 2
    rows.feed("a prompt's first piece", {0: half, 1: _SHORT}, prefill=True)
    rows.feed("a prompt's last piece", {0: num_prompt - half, 2: _SHORT}, prefill=True)
    rows.feed("one row alone", {0: 1})
    rows.feed("a tree and a chain", {0: 4, 1: 2, 2: 1}, tree=True)
    rows.accept_path(0)
    rows.feed("chains of one length", {0: 2, 1: 2, 2: 2})
    rows.take_back(0, 2)
    rows.take_back(1, 1)
    rows.feed("rows of one token, of which some had a draft taken back", {0: 1, 1: 1, 2: 1})


def _compare(rows: _FedRows) -> tuple[list[float], float]:
    """Return the difference of each place to the plain forward, and the spread of its logits."""
    float32 = _is_float32(rows.model)
    differences, scale = [0.0] * len(rows.places), 0.0
    places = rows.places
    whole = [p for p in places if not any(len(o.text) > len(p.text) and o.holds(p) for o in places)]
    longest = max(len(place.text) for place in whole)
    # texts of similar length share a forward; padding goes at their ends
    is_long = [2 * len(place.text) > longest or longest < _FEW for place in whole]
    for side in (True, False):
        group = [place for place, long in zip(whole, is_long, strict=True) if long == side]
        if not group:
            continue
        plain = _plain_logits(rows, group)
        for at, place in enumerate(places):
            holder = next((i for i, other in enumerate(group) if other.holds(place)), None)
            if holder is None:
                continue
            expected = plain[holder, len(place.text) - 1].float().cpu()
            if not expected.isfinite().all():
                raise ModelError(
                    f"{rows.model.name}: the logits are not finite; the weights are damaged "
                    f"or too large for {rows.model.dtype}"
                )
            # nan_to_num: Python's max would pass over a nan
            off = (place.logits - expected).nan_to_num(nan=float("inf"))
            # rounding moves single logits far; a wrong forward moves all of them
            difference = (off.abs().max() if float32 else off.square().mean().sqrt()).item()
            differences[at] = max(differences[at], difference)
            scale = max(scale, expected.std().item())
    return differences, scale


def _is_float32(model: LanguageModel) -> bool:
    """Return whether rounding explains no difference that matters."""
    return model.dtype == torch.float32 and model.weights == "own"


def _plain_logits(rows: _FedRows, places: Sequence[_Place]) -> Tensor:
    """Return transformers' own logits [places, longest, V]; those after a text's end are undefined."""
    longest = max(len(place.text) for place in places)
    padded = [[*p.text, *p.text[-1:] * (longest - len(p.text))] for p in places]
    model: Any = rows.model.model
    ids = torch.tensor(padded, device=rows.model.device)
    encoder = rows.model.encoder
    if encoder is None:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits
    made = []
    for place, text in zip(places, ids, strict=True):
        source = rows.sources[place.row]
        assert source is not None
        given = encoder.as_inputs(source)
        made.append(model(**given, decoder_input_ids=text[None], use_cache=False).logits)
    return torch.cat(made)
