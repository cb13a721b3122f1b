"""A causal language model as the rest of paceline sees it: packed forward, unembed, row caches.

Behind it stands the lean forward where it fits and transformers' own elsewhere. Knows no drafting,
sampling or text. Symbols: N packed tokens, D hidden size, V logits width.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Final, Literal

import torch

from paceline.errors import ModelError
from paceline.models.adapter import TransformersForward
from paceline.models.cache import RowCache
from paceline.models.cuda.batch import attention_kernel
from paceline.models.cuda.graphs import StaticForward
from paceline.models.cuda.paged_cache import PagedCache
from paceline.models.kinds import why_not_packed
from paceline.models.lean import LeanForward, why_not_lean
from paceline.models.peft_adapters import base_of
from paceline.models.visibility import look_at
from paceline.models.weights_monitor import WeightsMonitor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from paceline.models.interfaces import Forward, KVCache
    from paceline.models.packing import Span
    from paceline.models.sublayers import LayerSubset

ForwardChoice = Literal["auto", "lean", "transformers"]

# for ALiBi, which has no last position: more positions than any cache holds
_ENDLESS: Final = 1 << 20


class LanguageModel:
    """The packed forward of one transformers model, with the caches of its rows.

    Several roles may share the weights (a target drafting for itself) by building several of these.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        forward: ForwardChoice = "auto",
        exact: bool = False,
        paged: bool | None = None,
    ) -> None:
        """forward: `lean` insists on the lean forward, `auto` takes it where it fits.

        exact: a token's bits hang on its own row alone, see `exact.py`; needs the lean forward.
        paged: run over a paged cache, as on CUDA; None is by the device, tests say it.
        """
        model = base_of(model, name)
        self.name = name
        self.model = model.eval()
        reason = why_not_packed(model)
        if reason is not None:
            raise ModelError(f"{name}: {type(model).__name__} is not supported: {reason}")
        config = model.config.get_text_config()
        self.context_length, self.context_note = context_length_of(config)
        self.num_layers: int = config.num_hidden_layers
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = _input_device(model)
        self._paged_cache: PagedCache | None = None
        self.cache: KVCache
        if self.device.type == "cuda" if paged is None else paged:
            attention_kernel()  # so that a missing triton is reported now
            self.cache = self._paged_cache = PagedCache(self.device)
        else:
            self.cache = RowCache(self.device, exact)
        self.visibility = look_at(model, self.context_length, self.device)
        self.exact = exact
        self._take_weights(forward)

    def _take_weights(self, forward: ForwardChoice) -> None:
        model, name = self.model, self.name
        reason = "the configuration says so" if forward == "transformers" else why_not_lean(model)
        reason = reason or next(iter(self.visibility.reasons), None)
        self._forward: Forward
        self._static: StaticForward | None = None
        if reason is None:
            self._forward = lean = LeanForward(model, self.visibility.windows, self.exact)
            if self._paged_cache is not None:
                self._static = StaticForward(lean, self._paged_cache, self.context_length)
        elif forward == "lean" or self.exact:
            mode = "exact mode" if self.exact else "the lean forward"
            raise ModelError(f"{name}: cannot run {mode}, because {reason}")
        else:
            self._forward = TransformersForward(model, name, self.visibility.windows)
        # of what the body gives, which a small OPT projects down at its end
        self.hidden_size: int
        self.num_logits: int
        self.num_logits, self.hidden_size = model.get_output_embeddings().weight.shape
        self._watch = WeightsMonitor(model)  # last, since packing moves weights on CUDA

    @property
    def forward_kind(self) -> str:
        """`lean` or `transformers`: whose code runs the weights."""
        return self._forward.kind

    def has_changed(self) -> bool:
        """Return whether the weights changed since they were read; see `WeightsMonitor`."""
        return self._watch.has_changed()

    def reload(self) -> None:
        """Read the model's weights again; keys and values cached with the old ones are invalid.

        Raises ModelError if more than the values of the weights changed.
        """
        kind, facts = self.forward_kind, (self.dtype, self.device, self.num_logits)
        found = self.model.dtype, _input_device(self.model)
        if (*found, self.model.get_output_embeddings().weight.shape[0]) == facts:
            with torch.inference_mode(False), torch.no_grad():  # as at load
                self._take_weights("transformers" if kind == "transformers" else "auto")
            if self.forward_kind == kind:
                return
        raise ModelError(
            f"{self.name}: the model changed after it was loaded, and in more than the values of its "
            "weights (dtype, device, vocabulary or layers); load it again with paceline.load"
        )

    def acquire(self) -> int:
        """A slot for a new row."""
        return self.cache.acquire()

    def release(self, slot: int, damaged: bool = False) -> None:
        """Give a row's slot back; its cached text is forgotten.

        damaged: what is cached there may not be finite, and must not reach the slot's next row.
        """
        if damaged:
            self.cache.clear(slot)
        self.cache.release(slot)

    def forward(
        self,
        tokens: Tensor,
        spans: Sequence[Span],
        ancestors: Sequence[Tensor | None] | None = None,
        cache: KVCache | None = None,
        skip: LayerSubset | None = None,
    ) -> Tensor:
        """Final hidden states [N, D] of N packed tokens, row after row as `spans` lists them.

        tokens: [N] int64. ancestors: per span None for a chain, or [W, W] bool with True where the
        column's token is an ancestor of the row's token or the token itself. Each token's keys and
        values are cached at start + its place in the span. skip: sub-layers that are left out, and
        whose cache is neither read nor written.
        """
        cache = self.cache if cache is None else cache
        if self._static is not None and cache is self.cache and skip is None:
            hidden = self._static.hidden(tokens.cpu(), spans, ancestors)
            if hidden is not None:
                return hidden
        ids, batch = cache.pack(tokens, spans, ancestors)
        return self._forward.hidden(ids, batch, skip)

    @property
    def drafts_whole_chains(self) -> bool:
        """Whether `draft_chain` is there: several steps without coming back to the host."""
        return self._static is not None

    def draft_chain(
        self, tokens: Tensor, spans: Sequence[Span], num_drafted: int, num_tokens: int
    ) -> Tensor | None:
        """A greedy chain [R, K] of ids below `num_tokens` behind each row's tokens, on the CPU.

        tokens, spans: as in `forward`. All drafted tokens but the last are cached behind the row's own.
        None where the batch is too large for it.
        """
        assert self._static is not None
        return self._static.draft(tokens, spans, num_drafted, num_tokens)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of final hidden states [..., D]."""
        return self._forward.logits(hidden)

    def fingerprint(self) -> str:
        """A short hash of shapes and sampled weights, the same in every dtype the model runs in."""
        digest = hashlib.sha256(type(self.model).__name__.encode())
        for name, parameter in self.model.named_parameters():
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            whole: Any = parameter.detach()
            if whole.is_meta:  # offloaded: its values are elsewhere between forwards
                continue
            if type(whole) is not torch.Tensor and hasattr(whole, "dequantize"):
                whole = whole.dequantize()  # quantised weights hide in a tensor of their own kind
            flat = whole.flatten()
            sample = flat[:: max(1, flat.numel() // 64)][:64]
            digest.update(sample.to(torch.bfloat16).float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def num_bytes(self) -> int:
        """Bytes of the weights in memory, tied ones once."""
        return sum(_num_bytes(p.data) for p in {id(p): p for p in self.model.parameters()}.values())

    @property
    def position_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return cache_bytes_per_position(self.model.config, self.dtype)

    def __repr__(self) -> str:
        return f"LanguageModel({self.name!r}, {self.dtype}, {self.device})"


def cache_bytes_per_position(config: Any, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all layers, by a model's configuration."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None)
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        heads = 1  # older Falcon, GPT BigCode
    heads = heads or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * size * dtype.itemsize)


def _num_bytes(tensor: Any) -> int:
    """Bytes of a weight; of a quantised one, of the tensors it is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return 0 if tensor.is_meta else int(tensor.nbytes)
    names, _ = tensor.__tensor_flatten__()
    return sum(_num_bytes(getattr(tensor, name)) for name in names)


def _input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go in; of weights that accelerate has offloaded, where they are brought to."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return model.device if device is None else torch.device(device)


def context_length_of(config: Any) -> tuple[int, str | None]:
    """Return (usable positions, why they are fewer than the model's own, or None).

    config: of the text part. Raises ModelError if it names no length.
    """
    names = ("max_position_embeddings", "max_seq_len", "seq_length")  # most models; MPT; Bloom
    length = next((n for n in (getattr(config, name, None) for name in names) if n), None)
    if length is None and config.model_type == "bloom":
        length = _ENDLESS
    if length is None or length < 1:
        raise ModelError(
            f"{type(config).__name__} names no context length (max_position_embeddings)"
        )
    # longrope turns every angle once one position passes the original length, for all rows of a
    # forward at once; below it, rows cannot disturb one another
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *(p for p in rope.values() if isinstance(p, dict))):
        original = part.get("original_max_position_embeddings")
        if part.get("rope_type") == "longrope" and original and original < length:
            note = (
                f"its context is cut from {length} to {original} tokens: the model's rope type "
                "'longrope' changes the angles of the whole text beyond them, which is not "
                "supported"
            )
            return int(original), note
        if part.get("rope_type") == "dynamic" and length > 1:
            # a forward over a longer text leaves its angles behind, and only shorter ones clear them
            note = (
                f"its context is cut from {length} to {length - 1} tokens: the model's rope type "
                "'dynamic' keeps the angles of a longer text where one is as long as that"
            )
            return int(length) - 1, note
    return int(length), None
