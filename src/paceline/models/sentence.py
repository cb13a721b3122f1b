"""A text as one vector: a transformers encoder and what sentence-transformers put behind it.

Reads the folders that sentence-transformers saves without needing that package, and any plain encoder,
whose token states are averaged. Only what such folders commonly hold is understood: pooling by mean or
first token, and scaling to length 1; anything else is refused by name.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import AutoModel, AutoTokenizer
from transformers.utils.hub import cached_file

from paceline.errors import ModelError
from paceline.models.loading import quiet_transformers

if TYPE_CHECKING:
    import numpy as np

_MODULES = "modules.json"
_LENGTH = "sentence_bert_config.json"
_LONGEST = 512  # tokens read of a text, where the model sets no limit of its own


class SentenceModel:
    """Texts to vectors [D] float32, one at a time, on the CPU."""

    def __init__(
        self, model: Any, tokenizer: Any, by_first: bool, to_length_1: bool, longest: int = _LONGEST
    ) -> None:
        """by_first: the vector is the first token's state, else the mean over all tokens. longest:
        tokens that are read of a text.
        """
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._by_first, self._to_length_1 = by_first, to_length_1
        positions = getattr(model.config, "max_position_embeddings", None) or _LONGEST
        padding = getattr(model.config, "pad_token_id", None)
        if padding:  # RoBERTa and its kin count positions from behind the padding's id
            positions -= padding + 1
        self._longest = max(1, min(positions, tokenizer.model_max_length, longest))
        self.dimension = int(model.config.hidden_size)

    @classmethod
    def load(cls, source: str) -> SentenceModel:
        """From a folder or a hub name. Raises ModelError if it cannot be read or is of another build."""
        try:
            with quiet_transformers():
                tokenizer = AutoTokenizer.from_pretrained(source)
                model = AutoModel.from_pretrained(
                    source, dtype=torch.float32, use_safetensors=True, output_loading_info=False
                )
                by_first, to_length_1 = _read_modules(source)
                longest = _read_json(source, _LENGTH, {}).get("max_seq_length") or _LONGEST
        except (OSError, ValueError, KeyError, SafetensorError, HFValidationError) as error:
            reason = " ".join(str(error).split("\n")[0].split())
            raise ModelError(
                f"{source}: no usable sentence encoder ({reason}); give a folder or hub name with a "
                "transformers encoder in safetensors and its tokenizer"
            ) from error
        return cls(model, tokenizer, by_first, to_length_1, longest)

    def encode(self, text: str) -> np.ndarray:
        """[D] float32; of a long text its beginning."""
        inputs = self._tokenizer(
            text, truncation=True, max_length=self._longest, return_tensors="pt"
        )
        with torch.inference_mode():
            states = self._model(**inputs).last_hidden_state[0]  # [n, D]
        vector = states[0] if self._by_first else states.mean(dim=0)
        if self._to_length_1:
            vector = vector / vector.norm().clamp(min=1e-12)
        found: np.ndarray = vector.float().numpy()
        return found

    def fingerprint(self) -> str:
        """A short hash of the weights, of the vocabulary, and of how states become a vector."""
        digest = hashlib.sha256(f"{self._by_first} {self._to_length_1} {self._longest}".encode())
        digest.update(json.dumps(sorted(self._tokenizer.get_vocab().items())).encode())
        for name, parameter in self._model.named_parameters():
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            flat = parameter.detach().flatten()
            digest.update(flat[:: max(1, flat.numel() // 64)].numpy().tobytes())
        return digest.hexdigest()[:16]


def _read_modules(source: str) -> tuple[bool, bool]:
    """(pooled by the first token, scaled to length 1), from what sentence-transformers left."""
    by_first = to_length_1 = False
    for module in _read_json(source, _MODULES, []):
        kind = module["type"].rsplit(".", 1)[-1]
        if kind == "Pooling":
            by_first = _pools_by_first(source, module["path"])
        elif kind == "Normalize":
            to_length_1 = True
        elif kind != "Transformer":
            raise ValueError(f"its module '{kind}' is not one that is understood here")
    return by_first, to_length_1


def _pools_by_first(source: str, folder: str) -> bool:
    config = _read_json(source, f"{folder}/config.json", {})
    # named in newer folders, flagged in older ones
    modes = config.get("pooling_mode") or [
        key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
        for key, is_set in config.items()
        if key.startswith("pooling_mode_") and is_set
    ]
    modes = [modes] if isinstance(modes, str) else modes
    if modes not in (["mean"], ["cls"]):
        raise ValueError(f"it pools by {', '.join(modes) or '?'}; mean or cls is understood here")
    return bool(modes == ["cls"])


def _read_json(source: str, name: str, absent: Any) -> Any:
    """What a file of the folder or hub name holds, or `absent` where there is none."""
    found = cached_file(
        source,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return json.loads(Path(found).read_text(encoding="utf-8")) if found else absent
