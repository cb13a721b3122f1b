"""The noise of the sampled gradients of TVD and TVD++, at a trained student's and the target's p and q.

The paper draws tokens from the student and standardises their rewards, to reduce the variance. Where all
of q is known, as in training here, the sum over the vocabulary needs no draws. Measured on the gradient
of the student's output head. Symbols: n positions, V vocabulary, D hidden size, R draws.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from paceline.distillation.batches import collate
from paceline.distillation.distributions import LiveDistributions
from paceline.distillation.losses import rewards, sampled_tvd_slopes, tvd
from paceline.distillation.reading import hidden_states

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from paceline.distillation.batches import Example
    from paceline.models.language_model import LanguageModel

SAMPLES: Final = (1, 4, 16)  # per position
_TEXTS: Final = 4  # per task
_POSITIONS: Final = 256  # n, spread over all texts


@torch.inference_mode()
def measure_noise(
    target: LanguageModel, student: PreTrainedModel, texts: Sequence[Example], draws: int
) -> dict[str, Any]:
    """Return the noise of both gradients by the number of samples per position.

    `noise`: variance of a draw's gradient over the squared norm of the exact one. `cosine`: of a draw's
    gradient with the exact one, the mean over draws.
    """
    p, q, hidden = _distributions(target, student, texts)
    exact = _of_head(tvd(p, q)[1], q, hidden)
    mean = float((q * rewards(p, q)).sum(dim=-1).mean())
    deviation = max(1e-12, mean * (1 - mean)) ** 0.5
    generator = torch.Generator().manual_seed(0)
    rows = []
    for samples in SAMPLES:
        row: dict[str, Any] = {"samples": samples}
        for name, standardised in (("tvd", False), ("tvd++", True)):
            found = (
                _of_head(sampled_tvd_slopes(p, q, samples, generator, standardised), q, hidden)
                for _ in range(draws)
            )
            expected = exact / deviation if standardised else exact
            row[name] = _noise(found, expected)
        rows.append(row)
    return {"positions": len(p), "draws": draws, "mean_reward": round(mean, 4), "rows": rows}


def _distributions(
    target: LanguageModel, student: PreTrainedModel, texts: Sequence[Example]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return p [n, V], q [n, V] and the student's hidden states [n, D] of some positions."""
    by_task: dict[str, list[Example]] = {}
    for text in texts:
        by_task.setdefault(text.domain, []).append(text)
    chosen = [text for own in by_task.values() for text in own[:_TEXTS]]
    batch = collate(chosen, prompt_weight=0.0)
    n = len(batch.targets)
    places = torch.linspace(0, n - 1, min(n, _POSITIONS)).long()
    _, p = LiveDistributions.of(target, 1.0).teacher(batch, chosen).buckets(slice(0, n))
    hidden = hidden_states(student, batch)[places].float()
    head: Any = student.get_output_embeddings()  # type: ignore[no-untyped-call]
    logits = hidden @ head.weight.float().T
    return p[places].cpu(), torch.softmax(logits, dim=-1), hidden


def _of_head(slopes: Tensor, q: Tensor, hidden: Tensor) -> Tensor:
    """Return the gradient [V, D] of the mean over positions by the output head."""
    by_logits = slopes - q * slopes.sum(dim=-1, keepdim=True)
    return by_logits.T @ hidden / len(hidden)


def _noise(gradients: Iterator[Tensor], expected: Tensor) -> dict[str, float]:
    squared, cosines = [], []
    norm = expected.norm().clamp(min=1e-30)
    for gradient in gradients:
        squared.append(float((gradient - expected).square().sum()))
        length = gradient.norm().clamp(min=1e-30)
        cosines.append(float((gradient * expected).sum() / norm / length))
    return {
        "noise": round(sum(squared) / len(squared) / float(norm) ** 2, 3),
        "cosine": round(sum(cosines) / len(cosines), 4),
    }
