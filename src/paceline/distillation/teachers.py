"""The target's next-token distributions of a batch, in the buckets that `losses` takes.

Symbols: n learned positions of a batch, V vocabulary, k stored tokens per position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_LEAST_REST: Final = 1e-6  # of the other tokens' probability, which rounding may make negative


class Teacher(Protocol):
    """The target's distributions at n positions."""

    def buckets(self, part: slice) -> tuple[Tensor | None, Tensor]:
        """Return token ids [m, k] and probabilities [m, k + 1], whose last is of all other tokens.

        Ids None: the probabilities [m, V] are of all tokens.
        """
        ...


@dataclass(frozen=True, slots=True)
class TextTeacher:
    """All probability on the token of the text."""

    targets: Tensor  # [n] int64

    def buckets(self, part: slice) -> tuple[Tensor | None, Tensor]:
        """Return the one token with probability 1."""
        ids = self.targets[part, None]
        p = torch.zeros(len(ids), 2, device=ids.device)
        p[:, 0] = 1
        return ids, p


@dataclass(frozen=True, slots=True)
class StoredTeacher:
    """The k most probable tokens of each position."""

    ids: Tensor  # [n, k] integers
    probabilities: Tensor  # [n, k]

    def buckets(self, part: slice) -> tuple[Tensor | None, Tensor]:
        """Return the stored tokens and the remaining probability."""
        p = self.probabilities[part].float()
        rest = (1 - p.sum(dim=-1, keepdim=True)).clamp(min=_LEAST_REST)
        p = torch.cat([p, rest], dim=-1)
        return self.ids[part].long(), p / p.sum(dim=-1, keepdim=True)


@dataclass(frozen=True, slots=True)
class LiveTeacher:
    """The target's own hidden states, from which the distributions are computed per slice."""

    hidden: Tensor  # [n, D]
    unembed: Callable[[Tensor], Tensor]  # [m, D] -> [m, V]
    temperature: float
    device: torch.device  # of the student

    @torch.no_grad()
    def buckets(self, part: slice) -> tuple[Tensor | None, Tensor]:
        """Return all probabilities."""
        logits = self.unembed(self.hidden[part]).float()
        return None, torch.softmax(logits / self.temperature, dim=-1).to(self.device)
