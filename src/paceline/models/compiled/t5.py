"""The decoders of T5, mT5 and UMT5, read from transformers' modules.

They have relative position biases instead of rotary angles, attention to a source in every layer, and
an MLP with or without a gate. Symbols: H heads.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paceline.models.compiled.facts import ACTIVATIONS, CrossFacts, Facts, LayerFacts
from paceline.models.relative_bias import biases_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from paceline.models.relative_bias import RelativeBias


@dataclass(frozen=True, slots=True)
class T5Reader:
    """How to read a decoder of the T5 family.

    scaled_if: the configuration's field that says whether logits are scaled; None if they never are.
    """

    scaled_if: str | None = None
    activation: str = "dense_act_fn"  # the configuration's field

    def body(self, model: Any) -> Any:
        return model.decoder

    def layers(self, model: Any) -> list[tuple[Any, Any, Any]]:
        """Return the modules of each layer that have linear ones, attention to the text first."""
        parts = [block.layer for block in model.decoder.block]
        return [
            (one.SelfAttention, two.EncDecAttention, mlp.DenseReluDense) for one, two, mlp in parts
        ]

    def facts(
        self, model: Any, windows: Mapping[int, int | None], num_positions: int
    ) -> tuple[Facts, list[LayerFacts]]:
        """Return the model's facts and those of its layers. windows: positions that each layer sees."""
        config, decoder = model.config, model.decoder
        scaled = self.scaled_if is not None and getattr(config, self.scaled_if)
        facts = Facts(
            hidden_size=config.d_model,
            mlp_size=config.d_ff,
            heads=config.num_heads,
            kv_heads=config.num_heads,
            head_dim=config.d_kv,
            half_turned=0,
            num_positions=num_positions,
            angles=None,
            embedding=decoder.embed_tokens.weight.data.contiguous(),
            final_norm=decoder.final_layer_norm.weight.data,
            head=model.lm_head.weight.data,
            head_bias=None,
            epsilon=config.layer_norm_epsilon,
            activation=ACTIVATIONS[config.dense_act_fn],
            logit_scale=config.d_model**-0.5 if scaled else 1.0,
            is_gated=config.is_gated_act,
        )
        attentions = {i: block.layer[0].SelfAttention for i, block in enumerate(decoder.block)}
        tables: dict[RelativeBias, _Bias] = {}  # layers that share one share its table
        biases = [tables.setdefault(b, _Bias(b)) for b in biases_of(attentions).values()]
        layers = [
            _read_layer(block.layer, bias, windows[i])
            for i, (block, bias) in enumerate(zip(decoder.block, biases, strict=True))
        ]
        return facts, layers


class _Bias:
    """A relative position bias in float32, whatever the model's dtype."""

    def __init__(self, bias: RelativeBias) -> None:
        self._bias = bias

    def __call__(self, length: int) -> Tensor:
        """Return [H, at least length] by distance. By a thread of its own, as `RotaryAngles` does."""
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(lambda: self._bias.by_distance(length).float()).result()


def _read_layer(parts: Any, bias: _Bias, window: int | None) -> LayerFacts:
    """Return the facts of a layer of attention to text, attention to the source, and MLP."""
    text, source, feed_forward = parts
    attention, cross, mlp = text.SelfAttention, source.EncDecAttention, feed_forward.DenseReluDense
    first = (mlp.wi_0, mlp.wi_1) if hasattr(mlp, "wi_0") else (mlp.wi,)
    return LayerFacts(
        qkv=tuple(module.weight.data for module in (attention.q, attention.k, attention.v)),
        qkv_bias=None,
        out=attention.o.weight.data,
        out_bias=None,
        gate_up=tuple(module.weight.data for module in first),
        gate_up_bias=None,
        down=mlp.wo.weight.data,
        down_bias=None,
        norm_1=text.layer_norm.weight.data,
        post_norm_1=None,
        norm_2=feed_forward.layer_norm.weight.data,
        post_norm_2=None,
        query_norm=None,
        key_norm=None,
        window=window,
        turns=-1,
        score_scale=attention.scaling,
        bias=bias,
        cross=CrossFacts(source.layer_norm.weight.data, cross.q.weight.data, cross.o.weight.data),
    )
