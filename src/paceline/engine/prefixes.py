"""The store by which prompts that begin alike share their prefill, in blocks of cached entries.

The key of a block is a hash of all tokens up to its end, so a continued conversation, or requests with
one system prompt, start after the part that was prefilled before. The store is bounded and drops the
least recently used blocks. Each block stores the sum of the target's hidden states so far, for the
policy's features. Symbols: D hidden size.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from paceline.models.packing import PREFILL_BLOCK

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from torch import Tensor

    from paceline.models.interfaces import KVCache


@dataclass(slots=True)
class PromptHidden:
    """The target's final hidden states over the prefilled part of one prompt."""

    num_positions: int = 0
    total: np.ndarray | None = None  # [D] float32, their sum
    block_totals: list[np.ndarray] = field(default_factory=list)  # the sum at each block's end
    last: np.ndarray | None = None  # [D] float32, at the prompt's last token

    def add(self, hidden: Tensor) -> None:
        """Add a piece's states [w, D], block by block, so that sharing changes no bit of the sum."""
        while len(hidden):
            width = min(len(hidden), PREFILL_BLOCK - self.num_positions % PREFILL_BLOCK)
            total = hidden[:width].float().sum(dim=0).cpu().numpy()
            self.total = total if self.total is None else self.total + total
            self.num_positions += width
            if self.num_positions % PREFILL_BLOCK == 0:
                self.block_totals.append(self.total)
            hidden = hidden[width:]


@dataclass(slots=True)
class _Block:
    entries: list[Tensor]  # [2 * Hkv, PREFILL_BLOCK, D] of every layer
    hidden_sum: np.ndarray  # [D] over all positions up to the block's end


class PrefixStore:
    """The blocks of past prompts, at most `max_positions` positions; 0 stores nothing."""

    def __init__(self, max_positions: int) -> None:
        self._max_blocks = max_positions // PREFILL_BLOCK
        self._blocks: OrderedDict[bytes, _Block] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def load(self, prompt: Sequence[int], cache: KVCache, slot: int) -> list[np.ndarray]:
        """Write the known blocks of a prompt into a slot; return the hidden sums at their ends.

        The prompt's last token is never loaded, since its logits are needed.
        """
        sums: list[np.ndarray] = []
        for key in _keys(prompt[:-1]) if self._blocks else ():
            block = self._blocks.get(key)
            if block is None:
                break
            self._blocks.move_to_end(key)
            cache.write(slot, len(sums) * PREFILL_BLOCK, block.entries)
            sums.append(block.hidden_sum)
        return sums

    def keep(
        self,
        prompt: Sequence[int],
        cache: KVCache,
        slot: int,
        sums: Sequence[np.ndarray],
    ) -> None:
        """Copy those whole blocks of a prefilled prompt that are not stored yet."""
        if not self._max_blocks:
            return
        for k, (key, hidden_sum) in enumerate(zip(_keys(prompt), sums, strict=False)):
            if k == self._max_blocks:
                break  # a longer prompt than fits would drop its own beginning
            if key not in self._blocks:
                entries = cache.read(slot, k * PREFILL_BLOCK, (k + 1) * PREFILL_BLOCK)
                self._blocks[key] = _Block(entries, hidden_sum)
            self._blocks.move_to_end(key)
        while len(self._blocks) > self._max_blocks:
            self._blocks.popitem(last=False)

    def clear(self) -> None:
        """Drop all blocks."""
        self._blocks.clear()

    def num_bytes(self) -> int:
        """Return the bytes of all stored entries."""
        return sum(t.nbytes for block in self._blocks.values() for t in block.entries)


def _keys(prompt: Sequence[int]) -> Iterator[bytes]:
    """Yield a key for every whole block: the hash of all tokens up to its end."""
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, len(prompt) - PREFILL_BLOCK + 1, PREFILL_BLOCK):
        digest.update(array("q", prompt[start : start + PREFILL_BLOCK]).tobytes())
        yield digest.digest()
