"""A language model as the rest of paceline sees it: packed forward, unembed, row caches.

On a CPU the compiled forward runs the weights if it fits, elsewhere the lean one, transformers' own
otherwise; each has its cache.
Knows no drafting, sampling or text. Symbols: N packed tokens, D hidden size, V logits width.
"""

from __future__ import annotations

import hashlib
import itertools
from typing import TYPE_CHECKING, Any, cast

import torch

from paceline.errors import ModelError
from paceline.models.adapter import TransformersForward
from paceline.models.cache import RowCache
from paceline.models.compiled.cache import PackedRows
from paceline.models.compiled.forward import CompiledForward
from paceline.models.cuda.batch import attention_kernel
from paceline.models.cuda.graphs import StaticForward
from paceline.models.cuda.paged_cache import PagedCache
from paceline.models.encoder_decoder import Encoder, is_encoder_decoder, num_layers_of
from paceline.models.forward_choice import ForwardChoice, Weights, choose_forward, not_on
from paceline.models.lean import LeanForward
from paceline.models.model_facts import (
    cache_bytes_per_position,
    context_length_of,
    why_not_packed,
)
from paceline.models.peft_adapters import base_of
from paceline.models.reading import Reading
from paceline.models.scores import Scores
from paceline.models.visibility import look_at
from paceline.models.weights_monitor import WeightsMonitor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from paceline.models.interfaces import BatchCache, BatchForward, KVCache
    from paceline.models.packing import ChainEnds, Draw, Span
    from paceline.models.sublayers import LayerSubset
    from paceline.store.trained_on import TrainedOn


class LanguageModel(Reading):
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
        weights: Weights = "own",
    ) -> None:
        """forward: `compiled` or `lean` requires that forward; `auto` takes the compiled one on a CPU
        and the lean one on other devices if it fits, else transformers' own.

        exact: require that a token's bits depend on its own row alone, as they do in the compiled
        forward. paged: whether the cache is paged; None chooses by the device. weights: `int8` rounds
        those of the compiled forward to 8 bits, which gives another model's answers. Raises
        ModelError if the model is not supported.
        """
        model = base_of(model, name)
        self.name = name
        self.model = model.eval()
        reason = why_not_packed(model)
        if reason is not None:
            raise ModelError(f"{name}: {type(model).__name__} is not supported: {reason}")
        config = model.config.get_text_config()
        self.context_length, self.context_note = context_length_of(config)
        self.num_layers = num_layers_of(model)
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = _input_device(model)
        self._paged_cache: PagedCache | None = None
        has_sources = is_encoder_decoder(model)  # for which a paged cache has no place
        if paged and has_sources:
            raise ModelError(f"{name}: the cache of a model with an encoder cannot be paged")
        if paged or (paged is None and self.device.type == "cuda" and not has_sources):
            attention_kernel()  # so that a missing triton is reported now
            self._paged_cache = PagedCache(self.device)
        self.visibility = look_at(model, self.context_length, self.device)
        self._required = forward, exact, weights
        self.weights = weights
        self.trained_on: TrainedOn | None = None  # its training prompts, None: unknown
        self._read_weights()
        self.cache: KVCache = self._new_cache()

    def _read_weights(self) -> None:
        """Build the forward over the model's weights as they are now."""
        model, windows = self.model, self.visibility.windows
        not_here = not_on(self.device) if self._paged_cache is None else "its cache is paged"
        reason = next(iter(self.visibility.reasons), None)
        chosen = choose_forward(model, self.name, *self._required, not_here, reason)
        # such as `compiled (amx)`; and why it is another one
        self.forward_name, self.why_not_compiled = chosen.name, chosen.why_not_compiled
        self._compiled: CompiledForward | None = None
        self._static: StaticForward | None = None
        self._forward: CompiledForward | BatchForward
        if chosen.kind == "compiled":
            self._forward = self._compiled = CompiledForward(
                model, windows, self.context_length, self.weights
            )
        elif chosen.kind == "lean":
            self._forward = lean = LeanForward(model, windows)
            if self._paged_cache is not None:
                self._static = StaticForward(lean, self._paged_cache, self.context_length)
        else:
            self._forward = TransformersForward(model, self.name, self.visibility)
        self.encoder: Encoder | None = None
        if is_encoder_decoder(model):
            self.encoder = Encoder(model, self.name, self.visibility.cross_attentions)
        # of the body's output, which a small OPT projects down at its end
        self.hidden_size: int
        self.num_logits: int
        self.num_logits, self.hidden_size = model.get_output_embeddings().weight.shape
        self._monitor = WeightsMonitor(model)  # last, since joining moves weights on CUDA

    def _new_cache(self) -> KVCache:
        """Return an empty cache for the forward."""
        if self._compiled is not None:
            return self._compiled.new_cache()
        return self._paged_cache or RowCache(self.device, has_sources=self.encoder is not None)

    @property
    def forward_kind(self) -> str:
        """`compiled`, `lean` or `transformers`: the code that runs the weights."""
        return self._forward.kind

    @property
    def forward_note(self) -> str | None:
        """The forward of a model on the CPU that compiled code cannot run, with the reason.

        None if it is compiled, if its settings name a forward, or on another device.
        """
        if (
            self.why_not_compiled is None
            or self.device.type != "cpu"
            or self._required[0] != "auto"
        ):
            return None
        return f"{self.forward_name}; not compiled: {self.why_not_compiled}"

    @property
    def exact(self) -> bool:
        """Whether a token's bits depend on its own row alone."""
        return self._compiled is not None

    def has_changed(self) -> bool:
        """Return whether the weights changed since they were read; see `WeightsMonitor`."""
        return self._monitor.has_changed()

    def reload(self) -> None:
        """Read the model's weights again; keys and values cached with the old ones are invalid.

        Raises ModelError if more than the values of the weights changed.
        """
        kind, facts = self.forward_kind, (self.dtype, self.device, self.num_logits)
        found = self.model.dtype, _input_device(self.model)
        if (*found, self.model.get_output_embeddings().weight.shape[0]) == facts:
            with torch.inference_mode(False), torch.no_grad():  # as at load
                self._read_weights()
            if self.forward_kind == kind:
                return
        raise ModelError(
            f"{self.name}: the model changed after it was loaded, and in more than the values of its "
            "weights (dtype, device, vocabulary or layers); load it again with paceline.load"
        )

    def acquire(self) -> int:
        """Return a slot for a new row."""
        return self.cache.acquire()

    def release(self, slot: int, damaged: bool = False) -> None:
        """Give a row's slot back; its cached text is lost.

        damaged: its cached values may not be finite, and must not reach the slot's next row.
        """
        if damaged:
            self.cache.clear(slot)
        self.cache.release(slot)

    def forward(
        self,
        tokens: Tensor,
        spans: Sequence[Span],
        parents: Sequence[Sequence[int] | None] | None = None,
        cache: KVCache | None = None,
        skip: LayerSubset | None = None,
    ) -> Tensor:
        """Return final hidden states [N, D] of N packed tokens, row after row as in `spans`.

        tokens: [N] int64. parents: per span None for a chain; for a tree, the parent of each of its
        tokens but the first, which is the root: -1 for the root, else the parent's index among those
        tokens. Each token's keys and values are cached at start + its place in the span. cache: None
        for the model's own. skip: sub-layers that are left out, and whose cache is neither read nor
        written.
        """
        cache = self.cache if cache is None else cache
        if self._static is not None and cache is self.cache and skip is None:
            hidden = self._static.hidden(tokens.cpu(), spans, parents)
            if hidden is not None:
                return hidden
        if self._compiled is not None:
            assert isinstance(cache, PackedRows)
            return self._compiled.hidden(tokens.tolist(), spans, parents, cache, skip)
        ids, batch = cast("BatchCache", cache).pack(tokens, spans, parents)
        return cast("BatchForward", self._forward).hidden(ids, batch, skip)

    def score(
        self,
        tokens: Sequence[int],
        spans: Sequence[Span],
        parents: Sequence[Sequence[int] | None] | None = None,
        wants_logits: bool = True,
    ) -> Scores:
        """Return the scores of N packed tokens; spans and parents as in `forward`.

        wants_logits: whether the scores must have logits.
        """
        if self._compiled is not None:
            assert isinstance(self.cache, PackedRows)
            return self._compiled.score(tokens, spans, parents, self.cache, wants_logits)
        return Scores.of(self.unembed(self.forward(torch.tensor(tokens), spans, parents)))

    def logits_after(
        self, tokens: Sequence[int], spans: Sequence[Span], skip: LayerSubset | None = None
    ) -> Tensor:
        """Return logits [R, V] after the last token of each span; arguments as in `forward`."""
        ends = [end - 1 for end in itertools.accumulate(span.width for span in spans)]
        if self._compiled is not None:
            assert isinstance(self.cache, PackedRows)
            scores = self._compiled.score(tokens, spans, None, self.cache, places=ends, skip=skip)
            assert scores.logits is not None
            return scores.logits
        hidden = self.forward(torch.tensor(tokens), spans, skip=skip)
        return self.unembed(hidden if len(ends) == len(hidden) else hidden[ends])

    @property
    def drafts_whole_chains(self) -> bool:
        """Whether `draft_chain` may be called."""
        return self._static is not None or self._compiled is not None

    @property
    def drafts_sure_chains(self) -> bool:
        """Whether `draft_sure_chain` may be called."""
        return self._compiled is not None

    def draft_chain(
        self,
        tokens: Sequence[int],
        spans: Sequence[Span],
        num_drafted: int,
        num_tokens: int,
        draws: Sequence[Draw | None] | None = None,
    ) -> list[list[int]] | None:
        """Return a chain [R, K] of ids below `num_tokens` after each row's tokens.

        All K steps are one call. tokens, spans: as in `score`. draws: how each row's tokens are drawn,
        None for the most likely ones. All drafted tokens but the last are cached after the row's own.
        None if one call cannot do it.
        """
        if self._compiled is not None:
            assert isinstance(self.cache, PackedRows)
            return self._compiled.chain(
                tokens, spans, self.cache, num_drafted, num_tokens, draws=draws
            )
        if draws is not None:
            return None
        assert self._static is not None
        drafted = self._static.draft(torch.tensor(tokens), spans, num_drafted, num_tokens)
        chains: list[list[int]] | None = None if drafted is None else drafted.tolist()
        return chains

    def draft_sure_chain(
        self,
        tokens: Sequence[int],
        spans: Sequence[Span],
        num_drafted: int,
        num_tokens: int,
        ends: ChainEnds,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Return (greedy chains [R, k], their tokens' probabilities), k <= K steps long, by one call.

        It ends where `ends` says so for all rows. Otherwise as `draft_chain`. May be called if
        `drafts_sure_chains`.
        """
        assert self._compiled is not None
        assert isinstance(self.cache, PackedRows)
        return self._compiled.sure_chain(tokens, spans, self.cache, num_drafted, num_tokens, ends)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V] of final hidden states [..., D]."""
        return self._forward.logits(hidden)

    def fingerprint(self) -> str:
        """Return a short hash of shapes and sampled weights, the same in every dtype of the model."""
        digest = hashlib.sha256(type(self.model).__name__.encode())
        for name, parameter in self.model.named_parameters():
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            whole: Any = parameter.detach()
            if whole.is_meta:  # offloaded between forwards
                continue
            if type(whole) is not torch.Tensor and hasattr(whole, "dequantize"):
                whole = whole.dequantize()  # quantised weights have their own tensor type
            flat = whole.flatten()
            sample = flat[:: max(1, flat.numel() // 64)][:64]
            digest.update(sample.to(torch.bfloat16).float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def num_bytes(self) -> int:
        """Return the bytes of the weights in memory, tied ones once, without the packed copy."""
        return sum(_num_bytes(p.data) for p in {id(p): p for p in self.model.parameters()}.values())

    @property
    def packed_bytes(self) -> int:
        """Bytes of the copy of the weights that the compiled forward keeps."""
        return 0 if self._compiled is None else self._compiled.packed.num_bytes

    @property
    def position_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return cache_bytes_per_position(self.model.config, self.dtype, self._compiled is not None)

    def __repr__(self) -> str:
        return f"LanguageModel({self.name!r}, {self.dtype}, {self.device})"


def _num_bytes(tensor: Any) -> int:
    """Return the bytes of a weight; of a quantised one, those of its parts."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return 0 if tensor.is_meta else int(tensor.nbytes)
    names, _ = tensor.__tensor_flatten__()
    return sum(_num_bytes(getattr(tensor, name)) for name in names)


def _input_device(model: PreTrainedModel) -> torch.device:
    """Return the device of token ids; of offloaded weights, the one that accelerate loads them to."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return model.device if device is None else torch.device(device)
