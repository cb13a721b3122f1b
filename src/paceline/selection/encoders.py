"""Encoders, which compute features of a request before it is decoded.

`target_hidden` costs nothing, since the target has read the prompt; `text_stats` and `hashed_ngrams`
need no model; `sentence` runs its own. A policy gets the features of one or several encoders,
concatenated. Its artefact names them, so that serving runs only these. This module knows no drafter
and no policy. Symbols: D the target's hidden size, F features, n prompt tokens.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
from safetensors import SafetensorError

from paceline.config import SelectionSection
from paceline.errors import ConfigError, ModelError, RequestError
from paceline.noise.splitmix import mix
from paceline.selection.features import STATISTICS, hidden_states, statistics

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from paceline.contracts import Context


_PROBE: Final = "a"  # a text that every sentence encoder can read


class Encoder(ABC):
    """One kind of features. `version` increases when their computation changes."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    needs_prefill: ClassVar[bool] = False
    """Reads the target's hidden states; the other encoders need only the prompt's tokens and text."""

    def __init__(self, num_features: int) -> None:
        self.num_features = num_features  # F

    @abstractmethod
    def encode(self, context: Context) -> np.ndarray:
        """Return the features, [F] float32."""

    def identity(self) -> str:
        """Return one line; encoders with different lines compute different features."""
        return f"version={self.version}, features={self.num_features}"


class TargetHidden(Encoder):
    """The target's final hidden states, the mean over the prompt and the last token's. F = 2 D."""

    name: ClassVar[str] = "target_hidden"
    needs_prefill: ClassVar[bool] = True

    def __init__(self, hidden_size: int) -> None:
        super().__init__(2 * hidden_size)

    def encode(self, context: Context) -> np.ndarray:
        return hidden_states(context)


class TextStats(Encoder):
    """Length, repetition within the prompt, temperature and load: `features.STATISTICS`."""

    name: ClassVar[str] = "text_stats"

    def __init__(self) -> None:
        super().__init__(len(STATISTICS))

    def encode(self, context: Context) -> np.ndarray:
        return statistics(context)


class HashedNgrams(Encoder):
    """The prompt's tokens and pairs of tokens, hashed into positions with a sign.

    Square roots of counts keep frequent tokens from dominating; the vector has length 1. Signed hashing
    leaves inner products unbiased (Weinberger et al. 2009).
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
    """The vector that a sentence-transformers model gives the prompt's text, computed on the CPU.

    Of a long text the model reads the beginning, up to its `max_seq_length` tokens.
    """

    name: ClassVar[str] = "sentence"
    version: ClassVar[int] = 2

    def __init__(self, source: str) -> None:
        """source: folder or hub name. Raises ConfigError without sentence-transformers, ModelError if
        the model cannot be read.
        """
        self._model = _load_sentence_transformer(source)
        super().__init__(len(self._encode(_PROBE)))

    def encode(self, context: Context) -> np.ndarray:
        if context.text is None:
            raise RequestError(
                "the encoder 'sentence' needs the prompt's text, and only ids are here"
            )
        return self._encode(context.text())

    def _encode(self, text: str) -> np.ndarray:
        vector: np.ndarray = self._model.encode(text, show_progress_bar=False)
        return vector.astype(np.float32, copy=False)

    def identity(self) -> str:
        return f"{super().identity()}, model={_fingerprint(self._model)}"


def _load_sentence_transformer(source: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ConfigError(
            "the encoder 'sentence' needs sentence-transformers; install it with: "
            "pip install 'paceline[sentence]'"
        ) from error
    from paceline.models.loading import quiet_transformers

    model_kwargs = {"dtype": "float32", "use_safetensors": True}
    try:
        with quiet_transformers():
            model = SentenceTransformer(source, device="cpu", model_kwargs=model_kwargs)
        model.encode(_PROBE, show_progress_bar=False)
    except (
        AttributeError, ImportError, KeyError, OSError, RuntimeError, SafetensorError, ValueError
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split("\n")[0].split())
        raise ModelError(
            f"{source}: no usable sentence encoder ({reason}); give a folder or hub name of a "
            "sentence-transformers model, or of a transformers encoder in safetensors and its tokenizer"
        ) from error
    return model


def _fingerprint(model: Any) -> str:
    """Return a short hash of a model's modules, vocabulary and a sample of its weights."""
    modules = [type(module).__name__ for module in model]
    pooling = [getattr(module, "pooling_mode", None) for module in model]
    vocabulary = sorted(model.tokenizer.get_vocab().items())
    facts = [modules, pooling, model.max_seq_length, vocabulary]
    digest = hashlib.sha256(json.dumps(facts, default=str).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().flatten()
        digest.update(flat[:: max(1, flat.numel() // 64)].numpy().tobytes())
    return digest.hexdigest()[:16]


class FeatureEncoder:
    """The concatenated features of several encoders, which are a policy's input."""

    def __init__(self, encoders: Sequence[Encoder]) -> None:
        self.encoders = tuple(encoders)
        self.num_features = sum(encoder.num_features for encoder in self.encoders)  # F
        self.spans = spans_of({e.name: e.num_features for e in self.encoders})

    def __call__(self, context: Context) -> np.ndarray:
        """Return [F] float32. Raises RequestError without a prompt."""
        if not len(context.prompt_tokens):
            raise RequestError("the prompt is empty; give at least one token")
        return np.concatenate([encoder.encode(context) for encoder in self.encoders])

    def identities(self) -> dict[str, str]:
        """Return each encoder's line, in the order of the features."""
        return {encoder.name: encoder.identity() for encoder in self.encoders}


def spans_of(widths: Mapping[str, int]) -> dict[str, slice]:
    """Return the place of each encoder's features in the concatenated ones. widths: F of each."""
    ends = np.cumsum(list(widths.values())).tolist()
    return {
        name: slice(end - width, end)
        for (name, width), end in zip(widths.items(), ends, strict=True)
    }


def build_encoder(
    hidden_size: int, section: SelectionSection | None = None, names: Sequence[str] | None = None
) -> FeatureEncoder:
    """Build the encoders of a configuration, or the named ones with its settings.

    hidden_size: the target's. Raises ConfigError for an unknown name or a missing package, ModelError
    if the model of `sentence` is not usable.
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
        return Sentence(section.sentence_model)
    for kind in (TextStats, HashedNgrams):
        if name == kind.name:
            return kind()
    raise ConfigError(
        f"there is no encoder '{name}'; there are: target_hidden, text_stats, hashed_ngrams, sentence"
    )


def kept_encoders(section: SelectionSection, hidden_size: int) -> FeatureEncoder:
    """Build the encoders whose features a collection keeps.

    These are all encoders without a model, and `sentence` if its model is configured.
    """
    names = [TargetHidden.name, TextStats.name, HashedNgrams.name]
    names += [Sentence.name] if section.sentence_model is not None else []
    return build_encoder(hidden_size, section, names)
