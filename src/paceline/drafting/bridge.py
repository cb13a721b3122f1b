"""Two tokenizers, and the level at which a draft model with one serves a target with the other.

same: equal ids, so it is a plain draft model. shared: enough common tokens, so it drafts the target's
ids (token-level intersection, arXiv 2502.05202). text: its greedy draft is written out and read by the
target's tokenizer (string-level exact match, same paper).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from paceline.models.translation import TokenBytes, share_cut_alike, share_of_vocabulary
from paceline.models.vocabulary import Vocabulary

if TYPE_CHECKING:
    from paceline.models.vocabulary import Tokenizer

Level = Literal["same", "shared", "text"]

KIND: Final = "cross_vocabulary"

# Below these shares a drafter of common tokens would read text that is cut unlike its training text, or
# could not express most of its drafts.
_MIN_CUT_ALIKE: Final = 0.8
_MIN_COMMON: Final = 0.5


@dataclass(frozen=True, slots=True)
class Bridge:
    """The bytes of both tokenizers' tokens, the level, and the reason for it."""

    target: TokenBytes
    own: TokenBytes
    level: Level
    why: str

    @classmethod
    def between(
        cls, target: Tokenizer, own: Tokenizer, wanted: Literal["auto", "shared", "text"] = "auto"
    ) -> Bridge:
        """Return the bridge at the wanted level; `auto` takes the first level that fits."""
        sides = TokenBytes(target), TokenBytes(own)
        if wanted == "auto" and Vocabulary.of(target).difference(Vocabulary.of(own)) is None:
            return cls(*sides, "same", "the same tokens: a plain draft model")
        common, alike = share_of_vocabulary(*sides), share_cut_alike(*sides)
        fits = common >= _MIN_COMMON and alike >= _MIN_CUT_ALIKE
        level: Level = ("shared" if fits else "text") if wanted == "auto" else wanted
        how = "drafts over them" if level == "shared" else "drafts text"
        why = f"{common:.0%} of the tokens in common, {alike:.0%} of text cut alike: {how}"
        return cls(*sides, level, why)

    def identity(self) -> dict[str, object]:
        """Return the bridge's part of a drafter's identity."""
        own = Vocabulary.of(self.own.tokenizer).hash()
        return {"kind": KIND, "level": self.level, "vocabulary": own}
