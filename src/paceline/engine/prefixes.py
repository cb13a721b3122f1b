"""Prompts that begin alike share their prefill: blocks of cached entries, found by what leads to them.

A block is found by a hash of all tokens up to its end, so a conversation that goes on, or requests
with one system prompt, start behind what was prefilled before. Bounded; the least recently used
blocks go first. Each keeps the sum of the target's hidden states so far, for the policy's features.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.models.packing import PREFILL_BLOCK as BLOCK

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from torch import Tensor

    from paceline.models.interfaces import KVCache


@dataclass(slots=True)
class _Block:
    entries: list[Tensor]  # [2 * Hkv, BLOCK, D] of every layer
    hidden_sum: np.ndarray  # [D] over all positions up to the block's end


class PrefixStore:
    """At most `max_positions` positions of past prompts, in whole blocks; 0 keeps nothing."""

    def __init__(self, max_positions: int) -> None:
        self._max_blocks = max_positions // BLOCK
        self._blocks: OrderedDict[bytes, _Block] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def load(self, prompt: Sequence[int], cache: KVCache, slot: int) -> list[np.ndarray]:
        """Write the known blocks of a prompt into a row; the hidden sums at their ends.

        The prompt's last token is always left to be run, since its logits are wanted.
        """
        sums: list[np.ndarray] = []
        for key in _keys(prompt[:-1]) if self._blocks else ():
            block = self._blocks.get(key)
            if block is None:
                break
            self._blocks.move_to_end(key)
            cache.write(slot, len(sums) * BLOCK, block.entries)
            sums.append(block.hidden_sum)
        return sums

    def keep(
        self,
        prompt: Sequence[int],
        cache: KVCache,
        slot: int,
        sums: Sequence[np.ndarray],
    ) -> None:
        """Copy a prefilled prompt's whole blocks that are not known yet."""
        if not self._max_blocks:
            return
        for k, (key, hidden_sum) in enumerate(zip(_keys(prompt), sums, strict=False)):
            if k == self._max_blocks:
                break  # more of one prompt than fits would only push out its own beginning
            if key not in self._blocks:
                entries = cache.read(slot, k * BLOCK, (k + 1) * BLOCK)
                self._blocks[key] = _Block(entries, hidden_sum)
            self._blocks.move_to_end(key)
        while len(self._blocks) > self._max_blocks:
            self._blocks.popitem(last=False)

    def clear(self) -> None:
        """Forget all blocks."""
        self._blocks.clear()

    def num_bytes(self) -> int:
        """Bytes held now."""
        return sum(t.nbytes for block in self._blocks.values() for t in block.entries)


def _keys(prompt: Sequence[int]) -> Iterator[bytes]:
    """A key for every whole block, hashed with all that stands before it."""
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, len(prompt) - BLOCK + 1, BLOCK):
        digest.update(array("q", prompt[start : start + BLOCK]).tobytes())
        yield digest.digest()
