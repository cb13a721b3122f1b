"""A model's weights packed for the compiled forward, with the tables that describe them.

Sizes are rounded up with zeros: hidden states to 64 numbers, heads to 32. Symbols: O outputs, I inputs,
D hidden size, H query heads, Hkv key-value heads, d head size, F MLP size, V logits.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
import torch.nn.functional as F

from paceline.models.compiled import tables as t
from paceline.models.compiled.cache import CacheShape
from paceline.models.compiled.positions import PositionTables
from paceline.models.compiled.rows import BYTES_OF_32
from paceline.models.compiled.tables import rounded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.models.compiled.facts import CrossFacts, Facts, LayerFacts

GROUP: Final = 64
HEAD_UNIT: Final = 32
_LANES: Final = 16
LINE: Final = 64  # bytes of a cache line
_PIECE: Final = 1 << 25  # minimum bytes of an arena's piece

# a thread that is late may read a table after its model is gone, so the tables stay, a few kilobytes
_TABLES: Final[list[np.ndarray]] = []


def pack(weight: Tensor, room: int) -> Tensor:
    """Return a weight [O, I] by 16 outputs and words of four bytes.

    O is padded to a multiple of 64, and I to `room`.
    """
    outputs, inputs = weight.shape
    whole = F.pad(weight, (0, room - inputs, 0, -outputs % GROUP))
    word = 4 // weight.element_size()
    blocks = whole.view(-1, _LANES, whole.shape[1] // word, word)
    return blocks.permute(0, 2, 1, 3).contiguous()


def pack_int8(weight: Tensor, room: int) -> Tensor:
    """Return a weight [O, I] as bytes, by groups of 64 outputs, each followed by 64 scales.

    Symmetric by output: weight = scale * (byte - 128). Blocks and words are those of `pack`, with four
    inputs to a word.
    """
    whole = F.pad(weight.float(), (0, room - weight.shape[1], 0, -weight.shape[0] % GROUP))
    scales = (whole.abs().amax(dim=1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    numbers = (whole / scales[:, None]).round().add(128).to(torch.uint8)
    blocks = numbers.view(-1, GROUP // _LANES, _LANES, room // 4, 4).transpose(2, 3)
    factors = scales.view(-1, GROUP).contiguous().view(torch.uint8)
    return torch.cat([blocks.reshape(len(factors), -1), factors], dim=1).contiguous()


def pad_heads(weight: Tensor, heads: int, dim: int) -> Tensor:
    """Return a weight or bias with every head's part of a dimension padded to 32."""
    parts = weight.unflatten(dim, (heads, -1)).movedim(dim + 1, -1)
    padded = F.pad(parts, (0, -parts.shape[-1] % HEAD_UNIT))
    return padded.movedim(-1, dim + 1).flatten(dim, dim + 1)


def padded_row(numbers: Tensor, size: int) -> Tensor:
    """Return numbers [n] as float32 [size], with zeros at the end."""
    return F.pad(numbers.float(), (0, size - len(numbers))).contiguous()


def interleave(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """Return [2 F, ...] with 32 outputs of the gate before 32 of up; F is padded to 32.

    Without a gate, which is one part alone, return that.
    """
    if up is None:
        return gate
    missing = (0, 0) * (gate.ndim - 1) + (0, -len(gate) % HEAD_UNIT)
    halves = [F.pad(w, missing).unflatten(0, (-1, HEAD_UNIT)) for w in (gate, up)]
    return torch.stack(halves, dim=1).flatten(0, 2)


def float_bits(number: float) -> int:
    """Return a float32's bits, as a table holds it."""
    return int(struct.unpack("<I", struct.pack("<f", number))[0])


class Arena:
    """Copies of tensors in large pieces of memory, which the system can map by huge pages.

    A small page has an entry of its own in the processor's tables, and a forward reads thousands of
    them; numpy asks for huge pages where an array is large.
    """

    def __init__(self) -> None:
        self._pieces: list[np.ndarray] = []
        self._left = self._at = 0
        self.num_bytes = 0

    def keep(self, tensor: Tensor) -> int:
        """Copy a tensor and return the copy's address, a multiple of 64; 0 for one without data."""
        self.num_bytes += tensor.nbytes
        if tensor.is_meta:
            return 0
        size = rounded(tensor.nbytes, LINE)
        if size > self._left:
            # pages that are never written take no memory
            self._pieces.append(np.empty(max(size, _PIECE) + LINE, np.uint8))
            start = self._pieces[-1].ctypes.data
            self._at = rounded(start, LINE)
            self._left = max(size, _PIECE)
        offset = self._at - self._pieces[-1].ctypes.data
        self._pieces[-1][offset : offset + tensor.nbytes] = (
            tensor.flatten().view(torch.uint8).numpy()
        )
        address = self._at
        self._at, self._left = self._at + size, self._left - size
        return address


class PackedModel:
    """The packed weights of a model and the address of its table."""

    def __init__(
        self, facts: Facts, layers: Sequence[LayerFacts], weights: str, inputs: str
    ) -> None:
        """weights: `bfloat16` or `float32`, the model's own dtype, or `int8`.

        inputs: the kind of the products' inputs, see `rows.inputs_of`.
        """
        self.facts, self.weights, self._inputs = facts, weights, inputs
        self._pack = pack_int8 if weights == "int8" else pack
        self.groups = facts.heads // facts.kv_heads
        self.room = rounded(facts.hidden_size, GROUP)
        self.head_room = rounded(facts.head_dim, HEAD_UNIT)
        self.value_room = rounded(facts.head_dim, GROUP)
        self.mlp_room = rounded(facts.mlp_size, HEAD_UNIT if facts.is_gated else GROUP)
        self.mlp_outputs = self.mlp_room * (2 if facts.is_gated else 1)
        self.num_logits = facts.head.shape[0]
        self.logit_room = rounded(self.num_logits, GROUP)
        self.outputs = (facts.heads + 2 * facts.kv_heads) * self.head_room
        self.dtype = facts.embedding.dtype
        self.num_layers = len(layers)
        self.has_sources = any(layer.cross is not None for layer in layers)
        self._arena = Arena()
        self._table = np.zeros(t.MODEL_SIZE, np.int64)
        self._layers = np.zeros((len(layers), t.LAYER_SIZE), np.int64)
        _TABLES.extend((self._table, self._layers))
        self.address: int = self._table.ctypes.data
        for row, layer in zip(self._layers, layers, strict=True):
            self._fill_layer(row, layer)
        self._fill_model()
        self._positions = PositionTables(facts, layers, self._table, self._layers)

    def _address(self, tensor: Tensor | None) -> int:
        """Return a tensor's address and keep it; 0 for None."""
        if tensor is None:
            return 0
        return self._arena.keep(tensor)

    def _row(self, numbers: Tensor | None, size: int) -> int:
        return self._address(None if numbers is None else padded_row(numbers, size))

    def _fill_layer(self, row: np.ndarray, layer: LayerFacts) -> None:
        f = self.facts
        counts = (f.heads, f.kv_heads, f.kv_heads)
        qkv = [pad_heads(w, n, 0) for w, n in zip(layer.qkv, counts, strict=True)]
        row[t.QKV] = self._address(self._pack(torch.cat(qkv), self.room))
        if layer.qkv_bias is not None:
            biases = [pad_heads(b, n, 0) for b, n in zip(layer.qkv_bias, counts, strict=True)]
            row[t.QKV_BIAS] = self._row(torch.cat(biases), rounded(self.outputs, GROUP))
        row[t.OUT] = self._address(
            self._pack(pad_heads(layer.out, f.heads, 1), f.heads * self.head_room)
        )
        row[t.OUT_BIAS] = self._row(layer.out_bias, self.room)
        row[t.GATE_UP] = self._address(self._pack(interleave(*layer.gate_up), self.room))
        if layer.gate_up_bias is not None:
            row[t.GATE_UP_BIAS] = self._row(interleave(*layer.gate_up_bias), self.mlp_outputs)
        row[t.DOWN] = self._address(self._pack(layer.down, self.mlp_room))
        row[t.DOWN_BIAS] = self._row(layer.down_bias, self.room)
        norms = {
            t.NORM_1: layer.norm_1,
            t.POST_NORM_1: layer.post_norm_1,
            t.NORM_2: layer.norm_2,
            t.POST_NORM_2: layer.post_norm_2,
        }
        for place, norm in norms.items():
            row[place] = self._row(norm, self.room)
        for place, norm, heads in (
            (t.QUERY_NORM, layer.query_norm, f.heads),
            (t.KEY_NORM, layer.key_norm, f.kv_heads),
        ):
            if norm is not None:
                size = self.head_room * (heads if f.norms_whole else 1)
                numbers = pad_heads(norm, heads, 0) if f.norms_whole else norm
                row[place] = self._row(numbers, size)
        row[t.WINDOW] = layer.window or 0
        row[t.TURNS] = layer.turns
        row[t.SCORE_SCALE_F] = float_bits(layer.score_scale)
        row[t.SCORE_CAP_F] = float_bits(f.score_cap)
        if layer.cross is not None:
            self._fill_cross(row, layer.cross)

    def _fill_cross(self, row: np.ndarray, cross: CrossFacts) -> None:
        heads = self.facts.heads
        query, out = pad_heads(cross.query, heads, 0), pad_heads(cross.out, heads, 1)
        row[t.CROSS_NORM] = self._row(cross.norm, self.room)
        row[t.CROSS_QUERY] = self._address(self._pack(query, self.room))
        row[t.CROSS_OUT] = self._address(self._pack(out, heads * self.head_room))

    def _fill_model(self) -> None:
        f, table = self.facts, self._table
        table[t.HIDDEN], table[t.HIDDEN_ROOM] = f.hidden_size, self.room
        table[t.HEADS], table[t.KV_HEADS] = f.heads, f.kv_heads
        table[t.HEAD_SIZE], table[t.HEAD_ROOM] = f.head_dim, self.head_room
        table[t.VALUE_ROOM], table[t.HALF_TURNED] = self.value_room, f.half_turned
        table[t.MLP_ROOM], table[t.GATED] = self.mlp_room, f.is_gated
        table[t.MLP_GROUPS] = self.mlp_outputs // GROUP
        table[t.VOCABULARY] = self.num_logits
        table[t.VOCABULARY_GROUPS] = self.logit_room // GROUP
        table[t.EMBEDDING] = f.embedding.data_ptr()
        table[t.EMBEDDING_SCALE_F] = float_bits(f.embedding_scale)
        table[t.EPSILON_F] = float_bits(f.epsilon)
        table[t.FINAL_NORM] = self._row(f.final_norm, self.room)
        table[t.HEAD_WEIGHTS] = self._address(self._pack(f.head, self.room))
        table[t.HEAD_BIAS] = self._row(f.head_bias, self.logit_room)
        table[t.ACTIVATION] = f.activation
        table[t.LOGIT_SCALE_F] = float_bits(f.logit_scale)
        table[t.LOGIT_CAP_F] = float_bits(f.logit_cap)
        table[t.RESIDUAL_SCALE_F] = float_bits(f.residual_scale)
        table[t.NORM_WHOLE] = f.norms_whole
        table[t.LAYER_TABLE] = self._layers.ctypes.data

    def reserve_positions(self, num_positions: int) -> None:
        """Make the tables of angles and biases cover positions below `num_positions`."""
        self._positions.reserve(num_positions)

    def row_bytes(self, room: int) -> int:
        """Return the bytes of a row of inputs; see `rows.make_rows`."""
        return room // 32 * BYTES_OF_32[self._inputs]

    def cache_shape(self) -> CacheShape:
        """Return the sizes of the model's keys and values."""
        f, rooms = self.facts, (self.head_room, self.value_room)
        return CacheShape(self.num_layers, f.kv_heads, f.head_dim, *rooms, self.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weights."""
        return self._arena.num_bytes
