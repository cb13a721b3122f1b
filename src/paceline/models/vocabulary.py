"""Comparison of vocabularies by their token-to-id maps.

Embedding tables are often padded (Qwen), so equal vocabularies may have unequal logit widths, and
unequal ones equal widths.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from paceline.errors import VocabularyError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# for modules that receive a tokenizer and must not import transformers
Tokenizer: TypeAlias = "PreTrainedTokenizerBase"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The token-to-id map of a tokenizer."""

    ids: dict[str, int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        """Return the vocabulary of a tokenizer."""
        return cls(dict(tokenizer.get_vocab()))

    @property
    def num_tokens(self) -> int:
        """Number of ids, from 0 to the highest; logits at or above it are padding."""
        return max(self.ids.values()) + 1

    def hash(self) -> str:
        """Return a short fingerprint of the map, equal for equal maps."""
        canonical = json.dumps(sorted(self.ids.items()), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def difference(self, other: Vocabulary) -> str | None:
        """Return how `other` differs from this map in one clause; None if they are equal."""
        if self.ids == other.ids:
            return None
        missing = self.ids.keys() - other.ids.keys()
        extra = other.ids.keys() - self.ids.keys()
        moved = [t for t, i in self.ids.items() if other.ids.get(t, i) != i]
        parts = [f"{len(self.ids)} against {len(other.ids)} tokens"]
        if missing:
            parts.append(f"{len(missing)} missing (such as {min(missing)!r})")
        if extra:
            parts.append(f"{len(extra)} of its own (such as {min(extra)!r})")
        if moved:
            token = min(moved, key=self.ids.__getitem__)
            parts.append(
                f"{len(moved)} with another id (such as {token!r}: {self.ids[token]} against "
                f"{other.ids[token]})"
            )
        return ", ".join(parts)


def check_same_vocabulary(drafter: str, target: Vocabulary, other: Vocabulary) -> None:
    """Raise VocabularyError with the difference unless the maps are equal."""
    difference = target.difference(other)
    if difference is not None:
        raise VocabularyError(
            f"drafter '{drafter}' does not share the target's vocabulary: {difference}; use a "
            "drafter trained with the target's tokenizer, or kind 'cross_vocabulary'"
        )
