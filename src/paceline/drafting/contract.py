"""The contract of a drafter, checked at every call: in a round, in a replay, in a union.

A drafter may be the user's own code, so everything it returns is checked; a breach raises a
DrafterError that names the drafter. Ids outside the target's vocabulary are allowed: the target rejects
them. This module knows no engine. Symbols: R rows, K width of a proposal's arrays, V the target's logits
width.
"""

from __future__ import annotations

import operator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, isfinite
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from paceline.contracts import Drafts
from paceline.drafting.drawing import STOCHASTIC
from paceline.errors import ENDS_ALL, DrafterError, describe, shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from paceline.contracts import RowView

MAX_NODES: Final = 1024
"""Maximum number of tokens per draft, whatever a drafter declares: a tree's mask grows quadratically."""

# maximum number of calls of `prepare` per piece of a text: a union prepares one part per call, and a
# part with another tokenizer may need several pieces for one piece of the target's text
_CALLS_PER_PIECE: Final = 64

_MASS_ERROR: Final = 0.01  # of the sum of a distribution in half precision

_CHANCE_ERROR: Final = 1e-6  # by which rounding may lift a token's chance above its parent's

_INTEGERS: Final = frozenset(
    (
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
        *map(np.dtype, ("int64", "int32", "int16", "int8", "uint8")),
    )
)


class Proposer(Protocol):
    """The part of `Drafter` that rounds and replays call. It avoids an import circle."""

    num_draft_tokens: int

    def start(self, rows: Sequence[RowView]) -> None: ...
    def prepare(self, row: RowView, max_tokens: int) -> bool: ...
    def propose(self, rows: Sequence[RowView], limits: Sequence[int]) -> Drafts: ...
    def finish(self, rows: Sequence[RowView]) -> None: ...
    def state_bytes(self, lengths: Sequence[int]) -> int: ...


@dataclass(slots=True)
class Draft:
    """One row's proposal: a chain, or a tree where `parents` are given."""

    tokens: list[int]
    parents: list[int] | None = None  # index of the token each one follows, -1 for the row's last
    probs: Tensor | None = None  # [k, V] of a stochastic chain, float32
    chances: list[float] | None = None  # as in `Drafts`; none exceeds its parent's


@contextmanager
def blaming(name: str, kind: str = "drafter") -> Iterator[None]:
    """Raise the errors of the block, except `ENDS_ALL`, as a DrafterError that names the drafter."""
    try:
        yield
    except ENDS_ALL:
        raise
    except BaseException as error:
        raise DrafterError(f"{kind} '{name}': {describe(error)}") from error


# --- numbers it declares -----------------------------------------------------------------------


def read_length(drafter: Proposer) -> int:
    """Return the drafter's `num_draft_tokens`, a whole number, 0 or more."""
    length = drafter.num_draft_tokens
    if type(length) is not int:
        length = read_whole("num_draft_tokens", length)
    if length < 0:
        raise DrafterError(f"num_draft_tokens is {length}; it must be 0 or more")
    return length


def read_state_bytes(drafter: Proposer, lengths: Sequence[int]) -> float:
    """Return the drafter's `state_bytes`, a finite number, 0 or more."""
    given: Any = drafter.state_bytes(lengths)
    try:
        num_bytes = float(given)
    except (TypeError, ValueError):
        num_bytes = -1.0
    if isinstance(given, str) or not 0.0 <= num_bytes < float("inf"):
        raise DrafterError(
            f"state_bytes gave {shown(given)}; it must be a number of bytes, 0 or more"
        )
    return num_bytes


def read_whole(what: str, given: Any) -> int:
    """Return a whole number of any library as an int. Raises DrafterError for anything else."""
    if not isinstance(given, bool | np.bool_):
        try:
            return operator.index(given)
        except TypeError:
            pass  # reported below
    raise DrafterError(f"{what} must be a whole number, got {shown(given)}")


# --- its own prefill ------------------------------------------------------------------------------


def prepare_piece(drafter: Proposer, row: RowView, max_tokens: int, num_calls: int) -> bool:
    """Prepare one piece of a row's prefill; return whether it was the last.

    num_calls: calls for this row so far. Raises DrafterError for an answer that is not a bool, and
    when the number of calls shows that the prefill does not end.
    """
    answer: Any = drafter.prepare(row, max_tokens)
    if answer is True or (isinstance(answer, np.bool_) and answer):
        return True
    if not isinstance(answer, bool | np.bool_):
        raise DrafterError(
            f"prepare returned {shown(answer)}; it must return True when nothing is left, else False"
        )
    most = _CALLS_PER_PIECE * (1 + ceil(len(row.tokens) / max_tokens))
    if num_calls + 1 >= most:
        raise DrafterError(
            f"prepare was called {most} times for {len(row.tokens)} tokens, {max_tokens} at a time, "
            "and is not done; it must return True when nothing is left"
        )
    return False


def prepare_all(drafter: Proposer, row: RowView, max_tokens: int) -> None:
    """Prepare a started row completely, piece by piece."""
    num_calls = 0
    while not prepare_piece(drafter, row, max_tokens, num_calls):
        num_calls += 1


# --- its proposals --------------------------------------------------------------------------------


def read_drafts(
    proposed: Drafts,
    rows: Sequence[RowView],
    limits: Sequence[int],
    num_draft_tokens: int,
    num_logits: int | None = None,
) -> list[Draft]:
    """Return each row's draft. Raises DrafterError if a proposal breaks the contract of `propose`.

    num_draft_tokens: from `read_length`. num_logits: V; None does not read distributions.
    """
    if not isinstance(proposed, Drafts):
        raise DrafterError(f"proposed {shown(proposed)}; `propose` must return a `Drafts`")
    lengths = _lengths(proposed.lengths, len(rows))
    is_tree, most = proposed.parents is not None, min(num_draft_tokens, MAX_NODES)
    if is_tree and proposed.probs is not None:
        raise DrafterError("proposed a tree with probabilities, which trees do not have")
    width = 0
    for i, length in enumerate(lengths):
        allowed = most if is_tree or limits[i] >= most else max(0, limits[i])
        if not 0 <= length <= allowed:
            raise DrafterError(f"proposed {length} tokens where {allowed} were allowed")
        width = length if length > width else width
    tokens = _read_ids("tokens", proposed.tokens, len(rows), width)
    drafts = [
        Draft(tokens[i] if length == width else tokens[i][:length])
        for i, length in enumerate(lengths)
    ]
    if proposed.parents is not None:
        parents = _read_ids("parents", proposed.parents, len(rows), width)
        for i, length in enumerate(lengths):
            own = parents[i] if length == width else parents[i][:length]
            drafts[i].parents = own
            deepest = tree_depth(own)
            if deepest > max(0, limits[i]):
                raise DrafterError(f"proposed a tree {deepest} deep where {limits[i]} was allowed")
    elif proposed.probs is not None and num_logits is not None:
        _read_probs(proposed.probs, rows, drafts, width, num_logits)
    if proposed.chances is not None:
        _read_chances(proposed.chances, drafts, width)
    return drafts


def _lengths(given: Any, num_rows: int) -> list[int]:
    if type(given) is not list:
        try:
            given = list(given.tolist() if isinstance(given, Tensor | np.ndarray) else given)
        except TypeError:
            raise DrafterError(
                f"lengths must be {num_rows} whole numbers, got {shown(given)}"
            ) from None
    if len(given) != num_rows:
        raise DrafterError(f"proposed for {len(given)} rows instead of {num_rows}")
    for i, length in enumerate(given):
        if type(length) is not int:
            given = [*given[:i], read_whole("a length", length), *given[i + 1 :]]
    return given  # type: ignore[no-any-return]


def _read_ids(what: str, given: Any, num_rows: int, width: int) -> list[list[int]]:
    """Return the first `width` columns of an integer array [R, K]."""
    if not isinstance(given, Tensor | np.ndarray):
        raise DrafterError(f"{what} must be a torch tensor or a numpy array, got {shown(given)}")
    if given.dtype not in _INTEGERS:
        raise DrafterError(f"{what} must be int64, got {given.dtype}")
    shape = given.shape
    if len(shape) != 2:
        raise DrafterError(f"{what} must have the shape [rows, width], got {list(shape)}")
    if shape[0] != num_rows:
        raise DrafterError(f"proposed for {shape[0]} rows instead of {num_rows}")
    if shape[1] < width:
        raise DrafterError(f"{what} are {shape[1]} wide where a length says {width}")
    ids: list[list[int]] = (given if shape[1] == width else given[:, :width]).tolist()
    return ids


def tree_depth(parents: Sequence[int]) -> int:
    """Return the length of a tree's longest path.

    Raises DrafterError unless every parent precedes its children.
    """
    levels = [0]  # of the row's last token, then of the draft's
    for k, parent in enumerate(parents):
        if not -1 <= parent < k:
            raise DrafterError(
                f"proposed a tree whose parents are out of order: token {k} follows {parent}"
            )
        levels.append(levels[parent + 1] + 1)
    return max(levels)


def _read_chances(given: Any, drafts: Sequence[Draft], width: int) -> None:
    if not isinstance(given, np.ndarray) or given.dtype.kind != "f":
        kind = given.dtype if isinstance(given, np.ndarray) else shown(given)
        raise DrafterError(f"chances must be an array of floats, got {kind}")
    shape = given.shape
    if len(shape) != 2 or shape[0] != len(drafts) or shape[1] < width:
        raise DrafterError(
            f"chances must have the shape [{len(drafts)}, {width}], rows and width, got {list(shape)}"
        )
    for draft, chances in zip(drafts, given[:, :width].tolist(), strict=True):
        own: list[float] = []
        for k, chance in enumerate(chances[: len(draft.tokens)]):
            parent = k - 1 if draft.parents is None else draft.parents[k]
            above = own[parent] if parent >= 0 else 1.0
            if not 0.0 <= chance <= above + _CHANCE_ERROR:  # NaN fails, too
                raise DrafterError(
                    f"proposed token {k} with a chance of {chance:.4g}; it must be between 0 and its "
                    f"parent's, {above:.4g}"
                )
            own.append(min(chance, above))
        draft.chances = own


def _read_probs(
    given: Any, rows: Sequence[RowView], drafts: Sequence[Draft], width: int, num_logits: int
) -> None:
    """Set the distributions of the drafts whose judge reads them."""
    if not isinstance(given, Tensor) or not given.is_floating_point():
        kind = given.dtype if isinstance(given, Tensor) else shown(given)
        raise DrafterError(f"probs must be a tensor of floats, got {kind}")
    shape = list(given.shape)
    if len(shape) != 3 or shape[0] != len(rows) or shape[1] < width or shape[2] != num_logits:
        raise DrafterError(
            f"probs must have the shape [{len(rows)}, {width}, {num_logits}], rows, width and the "
            f"target's logits, got {shape}"
        )
    judged = [
        i for i, row in enumerate(rows) if drafts[i].tokens and row.sampling.method in STOCHASTIC
    ]
    if not judged:
        return
    probs = given[:, :width].detach().float()
    if len(judged) < len(rows):
        probs = probs[judged]
    # one copy from the device
    masses, lowest = torch.stack((probs.sum(dim=-1), probs.amin(dim=-1))).tolist()
    for place, i in enumerate(judged):
        draft = drafts[i]
        for k, token in enumerate(draft.tokens):
            mass, low = masses[place][k], lowest[place][k]
            if not (low >= 0 and isfinite(mass)):
                raise DrafterError(
                    f"proposed token {k} with probabilities that are negative or not finite"
                )
            # probabilities of ids outside the target's vocabulary are not in the sum
            least = 1.0 - _MASS_ERROR if 0 <= token < num_logits else 0.0
            if not least <= mass <= 1.0 + _MASS_ERROR:
                raise DrafterError(
                    f"proposed token {k} with probabilities that sum to {mass:.4g} instead of 1"
                )
        draft.probs = probs[place, : len(draft.tokens)]
