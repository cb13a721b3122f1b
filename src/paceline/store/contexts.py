"""The order of all places of a text by the tokens before them, which makes every context a range.

The context of a place is the tokens before it in its document, the nearest first, at most MAX_CONTEXT of
them. Sorting is by prefix doubling: the ranks of contexts of k tokens at two places give that of 2k
tokens. This module knows no files. Symbols: N tokens, D documents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_CONTEXT: Final = 32
"""Maximum number of tokens of a context, a power of two."""


def sort_by_context(tokens: NDArray[np.int32], starts: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return the places 0 to N - 1 of a text [N], sorted by context; equal contexts by place.

    A context that ends at the beginning of its document precedes its continuations. starts: [D + 1] the
    first place of each document, then N. Tokens are -1 or more.
    """
    if not len(tokens):
        return np.zeros(0, dtype=np.int32)
    depths = np.arange(len(tokens)) - np.repeat(starts[:-1], np.diff(starts))
    # rank 0 is the empty context; the text is read by places, so ranks[p] is of the context before p
    ranks = np.zeros(len(tokens), dtype=np.int64)
    ranks[1:] = np.where(depths[1:] > 0, tokens[:-1] + 2, 0)
    length = 1
    while length < MAX_CONTEXT:
        earlier = np.zeros(len(tokens), dtype=np.int64)
        earlier[length:] = np.where(depths[length:] >= length, ranks[:-length], 0)
        keys = ranks * (int(ranks.max()) + 1) + earlier
        order = np.argsort(keys)
        is_new = np.diff(keys[order], prepend=-1) != 0
        ranks[order] = np.cumsum(is_new) - 1
        length *= 2
        if is_new.all():
            break
    return np.argsort(ranks, kind="stable").astype(np.int32)
