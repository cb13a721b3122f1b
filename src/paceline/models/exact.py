"""Exact mode on the CPU: arithmetic whose bits do not depend on the other tokens of a forward.

In bfloat16 a forward over a draft may round differently from forwards over its tokens one by one, so a
near tie may be decided differently. Here every number of a token is computed by calls whose shapes
depend on the token's own row and position alone:

- products run at numbers of rows for which a probe found equal bits, or, if there are none, in tiles of
  one size;
- attention of a prompt runs in blocks cut at fixed absolute positions; that of drafts token by token
  over cached text rounded up to whole blocks; a path of a tree is laid out as the chain it may become.

`self_checks.check_exact` compares whole forwards bit by bit and raises at a difference.
Symbols: N packed tokens, W tokens per row, H query heads, Hkv key-value heads, D head size.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F

from paceline.models.packing import PREFILL_BLOCK, store

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from paceline.models.packing import Run

# numbers of rows at which a product is tried
_PROBED: Final = (*range(1, 34), 48, 64, 100, 257)
_FEWEST: Final = (1, 2, 3, 4)
_TILES: Final = (8, 4, 2, 1)  # one row alone has no neighbours


def attend_exactly(
    runs: Sequence[Run],
    storage: Tensor,
    query: Tensor,
    key_value: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    """Return `RowBatch.attend` with bits that depend on each token's own row alone, [N, H, D].

    storage: [slots, 2 * Hkv, positions, D] of the layer; the other arguments are those of `attend`.
    """
    outputs = []
    for run in runs:
        stop = run.first + run.width
        store(run, storage, key_value[run.first : stop])
        row, q = storage[run.slots.start], query[run.first : stop]
        attend_row = _prefill if run.prefill else _chain if run.ancestors is None else _tree
        outputs.append(attend_row(run, row, q, scale, window))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _prefill(run: Run, row: Tensor, query: Tensor, scale: float, window: int | None) -> Tensor:
    """Attend from pieces of a prompt cut at PREFILL_BLOCKs, one call each. query: [W, H, D]."""
    outputs = []
    at, end = run.starts[0], run.starts[0] + run.width
    while at < end:
        stop = min(end, at // PREFILL_BLOCK * PREFILL_BLOCK + PREFILL_BLOCK)
        q = query[at - run.starts[0] : stop - run.starts[0]]
        mask = _causal(run, at, stop, stop, window, q)
        keys, values = row[:, :stop].chunk(2)
        groups = q.shape[1] // keys.shape[0]
        folded = q.unflatten(1, (-1, groups)).permute(1, 2, 0, 3).flatten(1, 2)
        out = F.scaled_dot_product_attention(
            folded[None], keys[None], values[None], attn_mask=mask.repeat(groups, 1), scale=scale
        )
        outputs.append(out[0].unflatten(1, (groups, -1)).permute(2, 0, 1, 3).flatten(1, 2))
        at = stop
    return torch.cat(outputs)


def _chain(run: Run, row: Tensor, query: Tensor, scale: float, window: int | None) -> Tensor:
    """Attend from tokens one by one, in a call per number of blocks they see. query: [W, H, D]."""
    start = run.starts[0]
    outputs = []
    for _, group in groupby(
        range(start, start + run.width), key=lambda position: position // PREFILL_BLOCK
    ):
        positions = list(group)
        first, stop = positions[0], positions[-1] + 1
        length = -(-stop // PREFILL_BLOCK) * PREFILL_BLOCK
        mask = _causal(run, first, stop, length, window, query)
        cached = row[None, :, :length].expand(len(positions), -1, -1, -1)
        q = query[first - start : stop - start]
        outputs.append(_attend_singly(q, cached, mask, scale))
    return torch.cat(outputs)


def _tree(run: Run, row: Tensor, query: Tensor, scale: float, window: int | None) -> Tensor:
    """Attend from nodes one by one, each with its ancestors' entries in the order of a chain."""
    assert run.ancestors is not None
    start = run.starts[0]
    outputs = []
    for node in range(run.width):
        line = start + run.ancestors[node].nonzero()[:, 0].to(row.device)
        position = start + len(line) - 1
        length = (position // PREFILL_BLOCK + 1) * PREFILL_BLOCK
        cached = row[:, :length].clone()
        cached[:, start : position + 1] = row.index_select(1, line)
        mask = _causal(run, position, position + 1, length, window, query)
        outputs.append(_attend_singly(query[node : node + 1], cached[None], mask, scale))
    return torch.cat(outputs)


def _attend_singly(query: Tensor, cached: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attend as a batch, which changes no bits. query: [w, H, D]; cached: [w, 2 * Hkv, L, D]."""
    keys, values = cached.chunk(2, dim=1)
    q = query.unflatten(1, (keys.shape[1], -1))
    out = F.scaled_dot_product_attention(
        q, keys, values, attn_mask=mask[:, None, None], scale=scale
    )
    return out.flatten(1, 2)


def _causal(
    run: Run, first: int, stop: int, length: int, window: int | None, like: Tensor
) -> Tensor:
    """Return the additive mask [stop - first, length] of positions first to stop - 1, built once."""
    key = (window, first, stop, length)
    mask = run.masks.get(key)
    if mask is None:
        positions = torch.arange(first, stop, device=like.device)[:, None]
        keys = torch.arange(length, device=like.device)
        hidden = keys > positions
        if window is not None:
            hidden |= keys <= positions - window
        mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
        run.masks[key] = mask.masked_fill_(hidden, float("-inf"))
    return mask


def find_rows(
    product: Callable[[Tensor], Tensor],
    add_to: Callable[[Tensor, Tensor], Tensor],
    num_inputs: int,
    like: Tensor,
) -> tuple[int, bool]:
    """Return (rows, fixed) with which the bits of a product depend on each row alone.

    product: x -> x W^T. add_to: (residual, x) -> residual + x W^T. fixed: whether the product must run
    at exactly `rows` rows; otherwise the bits are the same at `rows` and more. like: gives dtype and
    device.

    The probe runs copies of one row, since a kernel may sum the last rows of a call in another order
    than the first ones. Rounding hides most such differences; the residual is the negative sum, so that
    the bits remain that rounding would hide.
    """
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(1, num_inputs, generator=generator)
    row = (row * 2.0 ** torch.randint(-6, 7, row.shape, generator=generator)).to(like)
    with torch.inference_mode():
        negative = -product(row)
        found = {n: _at(n, row, negative, product, add_to) for n in _PROBED}
    alike = {n: bool((found[n] == found[n][0]).all()) for n in _PROBED}
    for fewest in _FEWEST:
        wanted = found[fewest][0]
        if all(alike[n] and torch.equal(found[n][0], wanted) for n in _PROBED if n >= fewest):
            return fewest, False
    return next(tile for tile in _TILES if alike[tile]), True


def _at(
    num_rows: int,
    row: Tensor,
    residual: Tensor,
    product: Callable[[Tensor], Tensor],
    add_to: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Return both forms of a product of copies of one row, [num_rows, 2 * out]."""
    x = row.expand(num_rows, -1).contiguous()
    sums = add_to(residual.expand(num_rows, -1).contiguous(), x)
    return torch.cat((product(x), sums), dim=1)
