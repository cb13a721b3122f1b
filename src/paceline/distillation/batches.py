"""Training texts and their batches.

Texts of similar length share a batch and are padded on the right. Causal attention never reads the
padding, and an encoder has a mask (`reading`), so each text's loss is the same as alone. All orders are
functions of (seed, epoch). Knows no model. Symbols: B texts per batch, T their padded length.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_POOL: Final = 24  # batches whose texts are sorted by length together
_NEARLY: Final = 16  # tokens


@dataclass(frozen=True, slots=True)
class Example:
    """A training text: a prompt followed by the target's answer."""

    id: str
    domain: str
    tokens: np.ndarray  # [prompt + output] int64
    num_prompt: int

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt


@dataclass(frozen=True, slots=True)
class Batch:
    """One padded batch; `places` are the flattened positions whose next token is learned."""

    tokens: Tensor  # [B, T] int64
    places: Tensor  # [n] int64, of the B * T
    targets: Tensor  # [n] int64
    weights: Tensor  # [n] float32
    examples: Tensor  # [n] int64, index of the text, 0 to B - 1
    num_prompt: Tensor  # [B] int64

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


def pack_epoch(
    lengths: Sequence[int],
    batch_tokens: int,
    seed: int,
    epoch: int,
    sources: Sequence[int] | None = None,
) -> list[list[int]]:
    """Return an epoch's batches as text indices: each text once, at most `batch_tokens` padded tokens.

    sources: how many of each text's tokens an encoder reads, which are padded on their own. A longer
    text has its own batch.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    mean = max(1.0, float(np.mean(lengths))) if len(lengths) else 1.0
    pool = max(1, int(_POOL * batch_tokens / mean))
    own = np.zeros(len(lengths), dtype=np.int64) if sources is None else np.asarray(sources)
    rest = np.asarray(lengths, dtype=np.int64) - own
    # with a source, of nearly the same length in both
    first_key = rest if sources is None else rest // _NEARLY
    batches: list[list[int]] = []
    for first in range(0, len(order), pool):
        members = order[first : first + pool]
        members = members[np.lexsort((own[members], first_key[members]))]
        batches += _fill([int(i) for i in members], rest.tolist(), batch_tokens, own.tolist())
    return [batches[i] for i in random.permutation(len(batches))]


def _fill(
    members: Sequence[int],
    lengths: Sequence[int],
    batch_tokens: int,
    sources: Sequence[int] | None = None,
) -> list[list[int]]:
    """Return batches of texts in this order; sources: tokens in addition to the lengths."""
    batches: list[list[int]] = []
    width = source_width = 0
    for i in members:
        source = 0 if sources is None else sources[i]
        width, source_width = max(width, lengths[i]), max(source_width, source)
        if not batches or (len(batches[-1]) + 1) * (width + source_width) > batch_tokens:
            batches.append([])
            width, source_width = lengths[i], source
        batches[-1].append(i)
    return batches


def in_order(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Return batches in order of length, for validation."""
    members = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    return _fill(members, lengths, batch_tokens)


def first_learned(example: Example, prompt_weight: float) -> int:
    """Return the first position whose next token is learned."""
    return 0 if prompt_weight > 0 else max(0, example.num_prompt - 1)


def total_weight(example: Example, prompt_weight: float) -> float:
    """Return the sum of a text's weights in the loss."""
    num_answer = len(example.tokens) - max(1, example.num_prompt)
    return num_answer + prompt_weight * max(0, example.num_prompt - 1)


def collate(examples: Sequence[Example], prompt_weight: float) -> Batch:
    """Return one padded batch of texts. A text's last token is learned but not an input."""
    width = max(len(e.tokens) for e in examples) - 1
    tokens = np.zeros((len(examples), max(1, width)), dtype=np.int64)
    places, targets, weights, owners = [], [], [], []
    for i, example in enumerate(examples):
        num_inputs = len(example.tokens) - 1
        tokens[i, :num_inputs] = example.tokens[:-1]
        first = first_learned(example, prompt_weight)
        weight = np.full(num_inputs - first, prompt_weight, dtype=np.float32)
        weight[max(0, example.num_prompt - 1 - first) :] = 1.0
        places.append(i * width + np.arange(first, num_inputs))
        targets.append(example.tokens[1 + first :])
        weights.append(weight)
        owners.append(np.full(num_inputs - first, i))
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(np.concatenate(places)),
        torch.from_numpy(np.concatenate(targets)),
        torch.from_numpy(np.concatenate(weights)),
        torch.from_numpy(np.concatenate(owners)),
        torch.tensor([example.num_prompt for example in examples]),
    )
