"""The engine equals a plain loop round by round, which has no caches, batches or packing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from paceline import noise
from paceline.assembly import Pace, build_from_objects
from paceline.config import Config, ModelSection
from paceline.contracts import SamplingParams
from paceline.testing.tiny_models import perturbed, tiny_model
from paceline.testing.tokenizers import byte_tokenizer
from paceline.warping import warp

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPTS = [tuple(text) for text in (b"to be or not to be", b"a", b"spam, spam, eggs and spam")]
K = 4  # what `draft_model` drafts by default


def plain_loop(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    prompt: tuple[int, ...],
    max_new_tokens: int,
    params: SamplingParams,
) -> tuple[list[int], list[tuple[int, int]]]:
    """Speculative decoding as the papers write it: (emitted tokens, (drafted, accepted) by round)."""
    seed = torch.tensor(params.seed)

    def distribution(model: PreTrainedModel, text: list[int]) -> torch.Tensor:
        logits = model(input_ids=torch.tensor([text])).logits[0, -1]
        if params.method != "greedy":
            return warp(logits, params)
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).float()

    def draw(probs: torch.Tensor, position: int, stream: int) -> int:
        e = noise.exponential(seed, torch.tensor(position), stream, len(probs))
        return int(noise.race(probs, e))

    residual = params.method == "residual"
    own = noise.DRAFT if residual else noise.TARGET
    text = list(prompt)
    text.append(draw(distribution(target, text), len(text), noise.TARGET))
    rounds = []
    while len(text) < len(prompt) + max_new_tokens:
        start = len(text)
        drafted: list[int] = []
        q = []
        for _ in range(min(K, len(prompt) + max_new_tokens - start - 1)):
            q.append(distribution(drafter, text + drafted))
            # a draft that was rejected is never drawn again
            at = start + len(drafted)
            drafted.append(draw(q[-1], noise.of_round(at, start) if residual else at, own))
        accepted = 0
        for k, token in enumerate(drafted):
            p = distribution(target, text)
            if params.method == "residual":
                u = noise.uniform(seed, torch.tensor(start + k), noise.ACCEPT)
                keep = bool(u < p[token] / q[k][token])
            else:
                keep = token == draw(p, start + k, noise.TARGET)
            if not keep:
                rest = (p - q[k]).clamp(min=0.0) if params.method == "residual" else p
                text.append(draw(rest, start + k, noise.TARGET))
                break
            text.append(token)
            accepted += 1
        else:
            text.append(draw(distribution(target, text), len(text), noise.TARGET))
        rounds.append((len(drafted), accepted))
    return text[len(prompt) :], rounds


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(0.8, top_p=0.9, seed=5, method="residual"),
        SamplingParams(1.2, top_k=20, seed=6, method="invariant"),
    ],
    ids=lambda params: params.method,
)
@torch.inference_mode()
def test_tokens_and_rounds_are_those_of_the_plain_loop(
    architecture: str, params: SamplingParams
) -> None:
    target = tiny_model(architecture)
    near = perturbed(target, 0.1)
    pace = Pace(
        build_from_objects(
            target, byte_tokenizer(), {"near": near}, Config(target=ModelSection(model="memory"))
        )
    )
    requests, expected = [], {}
    for i, prompt in enumerate(PROMPTS):
        expected[str(i)] = plain_loop(target, near, prompt, 24, params)
        sampling = "auto" if params.method == "greedy" else params.method
        requests.append(
            pace.request(
                list(prompt),
                id=str(i),
                drafter="near",
                max_new_tokens=24,
                temperature=params.temperature,
                top_k=params.top_k,
                top_p=params.top_p,
                seed=params.seed,
                sampling=sampling,
            )
        )

    for completion in pace.stream(requests):
        tokens, rounds = expected[completion.request_id]
        assert completion.token_ids == tokens
        assert [(r.drafted, r.accepted) for r in completion.rounds] == rounds
    assert any(accepted for _, rounds in expected.values() for _, accepted in rounds)
