"""Encoders: each turns what is known of a request before decoding into features of its own.

`target_hidden` costs nothing, since the target has read the prompt; `text_stats` and `hashed_ngrams`
need no model; `sentence` runs one of its own. A policy is given the features of one or several, side by
side, and its artefact names them, so that serving runs those alone. Knows no drafter and no policy.
Symbols: D the target's hidden size, F features, n prompt tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np

from paceline.config import SelectionSection
from paceline.errors import ConfigError, RequestError
from paceline.models.sentence import SentenceModel
from paceline.noise.splitmix import mix
from paceline.selection.features import STATISTICS, hidden_states, statistics

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from paceline.contracts import Context


class Encoder(ABC):
    """Features of one kind. `version` is raised when they are computed otherwise than before."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    needs_prefill: ClassVar[bool] = False
    """Whether it reads the target's hidden states; the others need a prompt's tokens and text only."""

    def __init__(self, num_features: int) -> None:
        self.num_features = num_features  # F

    @abstractmethod
    def encode(self, context: Context) -> np.ndarray:
        """[F] float32."""

    def identity(self) -> str:
        """One line; features of another line are other features."""
        return f"version={self.version}, features={self.num_features}"


class TargetHidden(Encoder):
    """The target's final hidden state, averaged over the prompt and at its last token. F = 2 D."""

    name: ClassVar[str] = "target_hidden"
    needs_prefill: ClassVar[bool] = True

    def __init__(self, hidden_size: int) -> None:
        super().__init__(2 * hidden_size)

    def encode(self, context: Context) -> np.ndarray:
        return hidden_states(context)


class TextStats(Encoder):
    """Length, how much the prompt repeats itself, temperature and load: `features.STATISTICS`."""

    name: ClassVar[str] = "text_stats"

    def __init__(self) -> None:
        super().__init__(len(STATISTICS))

    def encode(self, context: Context) -> np.ndarray:
        return statistics(context)


class HashedNgrams(Encoder):
    """Which tokens and pairs of tokens the prompt holds, hashed into places with a sign.

    Counts enter as square roots, so that frequent tokens do not drown the rest; the vector has length
    1. Equal sums of hashed features keep inner products without bias (Weinberger et al. 2009).
    """

    name: ClassVar[str] = "hashed_ngrams"
    _BITS: Final = 8  # 256 places

    def __init__(self) -> None:
        super().__init__(1 << self._BITS)

    def encode(self, context: Context) -> np.ndarray:
        tokens = np.asarray(context.prompt_tokens, dtype=np.uint64)  # [n]
        # an id is below 2**32, so a pair is told from a single token by its upper half
        pairs = (tokens[:-1] + np.uint64(1)) << np.uint64(32) | tokens[1:]
        grams, counts = np.unique(np.concatenate((tokens, pairs)), return_counts=True)
        mixed: np.ndarray = mix(grams)
        signs = np.where(mixed & np.uint64(1), 1.0, -1.0)
        places = (mixed >> np.uint64(64 - self._BITS)).astype(np.int64)
        vector = np.bincount(places, signs * np.sqrt(counts), minlength=self.num_features)
        return (vector / max(float(np.linalg.norm(vector)), 1e-12)).astype(np.float32)


class Sentence(Encoder):
    """A sentence encoder's vector of the prompt's text, for what the target's own states may miss."""

    name: ClassVar[str] = "sentence"

    def __init__(self, model: SentenceModel) -> None:
        super().__init__(model.dimension)
        self._model = model

    def encode(self, context: Context) -> np.ndarray:
        if context.text is None:
            raise RequestError(
                "the encoder 'sentence' needs the prompt's text, and only ids are here"
            )
        return self._model.encode(context.text())

    def identity(self) -> str:
        return f"{super().identity()}, model={self._model.fingerprint()}"


class FeatureEncoder:
    """Several encoders' features side by side: what a policy is given."""

    def __init__(self, encoders: Sequence[Encoder]) -> None:
        self.encoders = tuple(encoders)
        self.num_features = sum(encoder.num_features for encoder in self.encoders)  # F
        self.spans = spans_of({e.name: e.num_features for e in self.encoders})

    def __call__(self, context: Context) -> np.ndarray:
        """[F] float32. Raises RequestError without a prompt."""
        if not len(context.prompt_tokens):
            raise RequestError("the prompt is empty; give at least one token")
        return np.concatenate([encoder.encode(context) for encoder in self.encoders])

    def identities(self) -> dict[str, str]:
        """Each encoder's line, in the order of the features."""
        return {encoder.name: encoder.identity() for encoder in self.encoders}


def spans_of(widths: Mapping[str, int]) -> dict[str, slice]:
    """Where each encoder's features stand when they are put side by side."""
    ends = np.cumsum(list(widths.values())).tolist()
    return {
        name: slice(end - width, end)
        for (name, width), end in zip(widths.items(), ends, strict=True)
    }


def build_encoder(
    hidden_size: int, section: SelectionSection | None = None, names: Sequence[str] | None = None
) -> FeatureEncoder:
    """The encoders of a configuration, or the named ones with its settings; loads what they need.

    hidden_size: the target's. Raises ConfigError on an unknown name, ModelError where `sentence` has
    no usable model.
    """
    section = section or SelectionSection()
    return FeatureEncoder(
        [_build(name, hidden_size, section) for name in names or section.encoders]
    )


def _build(name: str, hidden_size: int, section: SelectionSection) -> Encoder:
    if name == TargetHidden.name:
        return TargetHidden(hidden_size)
    if name == Sentence.name:
        if section.sentence_model is None:
            raise ConfigError("the encoder 'sentence' needs 'selection.sentence_model'")
        return Sentence(SentenceModel.load(section.sentence_model))
    for kind in (TextStats, HashedNgrams):
        if name == kind.name:
            return kind()
    raise ConfigError(
        f"there is no encoder '{name}'; there are: target_hidden, text_stats, hashed_ngrams, sentence"
    )


def kept_encoders(section: SelectionSection, hidden_size: int) -> FeatureEncoder:
    """What a collection keeps: every encoder that runs no model, and `sentence` where it has one."""
    names = [TargetHidden.name, TextStats.name, HashedNgrams.name]
    names += [Sentence.name] if section.sentence_model is not None else []
    return build_encoder(hidden_size, section, names)
