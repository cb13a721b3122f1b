"""A causal language model as the rest of paceline sees it: packed forward, unembed, row caches.

Behind it stands the lean forward where it fits and transformers' own elsewhere. Knows no drafting,
sampling or text. Symbols: N packed tokens, D hidden size, V logits width.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Literal

import torch

from paceline.errors import ModelError
from paceline.models.adapter import TransformersForward
from paceline.models.cache import RowCache
from paceline.models.cuda.batch import attention_kernel, batch_of
from paceline.models.cuda.graphs import StaticForward
from paceline.models.cuda.paged_cache import PagedCache
from paceline.models.lean import LeanForward, why_not_lean
from paceline.models.packing import ChainMasks, PackedBatch, Span
from paceline.models.peft_adapters import base_of
from paceline.models.weights_watch import WeightsWatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from paceline.models.sublayers import LayerSubset

Forward = Literal["auto", "lean", "transformers"]


class LanguageModel:
    """The packed forward of one transformers model, with the caches of its rows.

    Several roles may share the weights (a target drafting for itself) by building several of these.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        forward: Forward = "auto",
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
        config = model.config.get_text_config()
        self.context_length: int = _context_length(config)
        self.hidden_size: int = config.hidden_size
        self.num_layers: int = config.num_hidden_layers
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = _input_device(model)
        self._paged = self.device.type == "cuda" if paged is None else paged
        if self._paged:
            attention_kernel()  # what it lacks is said now
        self.cache: RowCache | PagedCache = PagedCache(self.device) if self._paged else RowCache()
        self._chain_masks = ChainMasks()
        self.exact = exact
        self._take_weights(forward)

    def _take_weights(self, forward: Forward) -> None:
        model, name = self.model, self.name
        self._forward: LeanForward | TransformersForward = TransformersForward(model, name)
        self.num_logits: int = model.get_output_embeddings().weight.shape[0]
        reason = "the configuration says so" if forward == "transformers" else why_not_lean(model)
        if reason is None:
            self._forward = LeanForward(model, self.exact)
        elif forward == "lean" or self.exact:
            mode = "exact mode" if self.exact else "the lean forward"
            raise ModelError(f"{name}: cannot run {mode}, because {reason}")
        self._static: StaticForward | None = None
        if isinstance(self.cache, PagedCache) and isinstance(self._forward, LeanForward):
            self._static = StaticForward(self._forward, self.cache, self.context_length)
        self._watch = WeightsWatch(model)  # last: on CUDA packing moves them

    @property
    def forward_kind(self) -> str:
        """`lean` or `transformers`: whose code runs the weights."""
        return self._forward.kind

    def has_changed(self) -> bool:
        """Whether the model's weights changed since they were taken; see `WeightsWatch`."""
        return self._watch.has_changed()

    def reload(self) -> None:
        """Take the model's weights as they are now; what caches hold of the old ones is void.

        Raises ModelError if more than their values changed.
        """
        kind, facts = self.forward_kind, (self.dtype, self.device, self.num_logits)
        found = self.model.dtype, _input_device(self.model)
        if (*found, self.model.get_output_embeddings().weight.shape[0]) == facts:
            with torch.inference_mode(False), torch.no_grad():  # as at load, whoever asks
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
        cache: RowCache | PagedCache | None = None,
        skip: LayerSubset | None = None,
    ) -> Tensor:
        """Final hidden states [N, D] of N packed tokens, row after row as `spans` lists them.

        tokens: [N] int64. ancestors: per span None for a chain, or [W, W] bool with True where the
        column's token is an ancestor of the row's token or the token itself. Each token's keys and
        values are cached at start + its place in the span. skip: sub-layers that are left out, and
        whose cache is neither read nor written.
        """
        cache = self.cache if cache is None else cache
        if isinstance(cache, PagedCache):
            return self._forward_paged(tokens.cpu(), spans, ancestors, cache, skip)
        packed = PackedBatch(
            spans,
            cache,
            self.device,
            ancestors,
            self._chain_masks,
            self.exact,
        )
        return self._forward.hidden(tokens.to(self.device), packed, skip)

    def _forward_paged(
        self,
        tokens: Tensor,
        spans: Sequence[Span],
        ancestors: Sequence[Tensor | None] | None,
        cache: PagedCache,
        skip: LayerSubset | None,
    ) -> Tensor:
        if self._static is not None and cache is self.cache and skip is None:
            hidden = self._static.hidden(tokens, spans, ancestors)
            if hidden is not None:
                return hidden
        ids, batch = batch_of(tokens, spans, ancestors, cache, self.device)
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
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
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


def _context_length(config: Any) -> int:
    length = getattr(config, "max_position_embeddings", None)
    if length is None:
        raise ModelError(f"{type(config).__name__} names no max_position_embeddings")
    # longrope turns every angle once one position passes the original length, for all rows of a
    # forward at once; below it, rows cannot disturb one another
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        length = min(length, rope.get("original_max_position_embeddings") or length)
    return int(length)


def _other_forward(language_model: LanguageModel) -> str:
    if language_model.forward_kind == "transformers":
        return ""
    return " by the lean forward; set 'forward: transformers'"


def check_packed_forward(language_model: LanguageModel, seed: int = 0) -> None:
    """Compare a ragged tree forward with transformers' plain one on random tokens.

    Two rows of unequal length are prefilled together; then one verifies a tree with two branches
    while the other verifies a chain. Raises ModelError if any logit differs by more than the
    model's dtype explains: then this architecture keeps state the packed forward does not know.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab = language_model.num_logits
    long, short = (torch.randint(vocab, (n,), generator=generator) for n in (11, 5))
    tree, chain = (torch.randint(vocab, (n,), generator=generator) for n in (4, 2))
    parents = torch.tensor(
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool
    )
    # a paged model is checked over its own cache, where its captured steps run: the prompts go their
    # own way, the tree and the chain are such a step
    own = language_model.cache
    cache = own if isinstance(own, PagedCache) else RowCache()
    slots = [cache.acquire(), cache.acquire()]
    with torch.inference_mode():
        try:
            language_model.forward(
                torch.cat([long, short]),
                [Span(slots[0], 0, 11, prefill=True), Span(slots[1], 0, 5, prefill=True)],
                cache=cache,
            )
            hidden = language_model.forward(
                torch.cat([tree, chain]),
                [Span(slots[0], 11, 4), Span(slots[1], 5, 2)],
                ancestors=[parents, None],
                cache=cache,
            )
        except (TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise ModelError(
                f"{language_model.name}: {type(language_model.model).__name__} cannot run the "
                f"packed forward ({error})"
            ) from error
        packed = language_model.unembed(hidden).float().cpu()
        for slot in slots:
            cache.release(slot)
        paths = [(long, tree[[0, 1]]), (long, tree[[0, 2, 3]]), (short, chain)]
        places = [[0, 1], [0, 2, 3], [4, 5]]
        worst = 0.0
        scale = 0.0
        for (text, path), place in zip(paths, places, strict=True):
            ids = torch.cat([text, path])[None].to(language_model.device)
            plain = language_model.model(input_ids=ids, use_cache=False).logits[0]
            plain = plain[-len(place) :].float().cpu()
            if not plain.isfinite().all():
                raise ModelError(
                    f"{language_model.name}: the logits are not finite; the weights are damaged "
                    f"or too large for {language_model.dtype}"
                )
            # nan_to_num: Python's max would pass over a nan
            difference = (packed[place] - plain).abs().nan_to_num(nan=float("inf"))
            worst = max(worst, difference.max().item())
            scale = max(scale, plain.std().item())
    tolerance = 1e-3 if language_model.dtype == torch.float32 else 0.15
    if not worst <= tolerance * max(scale, 1e-6):
        raise ModelError(
            f"{language_model.name}: the packed forward of {type(language_model.model).__name__} "
            f"differs from transformers' by {worst:.3g} (logits vary by {scale:.3g}); this "
            f"architecture is not supported{_other_forward(language_model)}"
        )
