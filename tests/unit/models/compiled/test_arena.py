"""Copies of weights lie where compiled code expects them, and none overwrites another."""

from __future__ import annotations

import ctypes

import pytest
import torch

from paceline.models.compiled import weights
from paceline.models.compiled.weights import LINE, Arena


def bytes_at(address: int, like: torch.Tensor) -> bytes:
    return ctypes.string_at(address, like.nbytes)


@pytest.mark.parametrize("piece", [256, 1 << 25])
def test_copies_are_kept_side_by_side(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_PIECE", piece)
    arena = Arena()
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, generator=generator).to(torch.bfloat16) for n in range(1, 400, 13)]

    addresses = [arena.keep(tensor.clone()) for tensor in tensors]

    for address, tensor in zip(addresses, tensors, strict=True):
        assert address % LINE == 0
        assert bytes_at(address, tensor) == tensor.view(torch.uint8).numpy().tobytes()
    assert arena.num_bytes == sum(tensor.nbytes for tensor in tensors)


def test_a_tensor_without_data_is_only_counted() -> None:
    arena = Arena()
    assert arena.keep(torch.empty(7, 3, device="meta")) == 0
    assert arena.num_bytes == 84
