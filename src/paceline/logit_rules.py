"""Penalties, biases and bans on the target's logits, as functions of the text before them.

The only module for settings that depend on the text. Definitions: transformers' for the repetition
penalty, n-grams, minimum length and suppression; OpenAI's for presence and frequency penalties.
Symbols: n places, V logits.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from paceline.contracts import LogitRules

_BANNED = float("-inf")


def apply_rules(
    rules: LogitRules,
    logits: Tensor,
    texts: Sequence[Sequence[int]],
    num_prompt: int,
    stop_token_ids: Iterable[int] = (),
) -> Tensor:
    """Return the logits after all rules, a new float32 tensor [n, V].

    logits: [n, V]. texts: n texts, prompt and output before each place; the first `num_prompt` tokens
    of each are the prompt. stop_token_ids: banned until `min_new_tokens` are written. Raises ValueError
    if a processor returns scores of another shape.
    """
    changed = logits.float().clone()
    for scores, text in zip(changed, texts, strict=True):
        _penalise(rules, scores, text, num_prompt)
        num_new = len(text) - num_prompt
        banned = set(rules.suppress_tokens)
        if rules.no_repeat_ngram_size:
            banned |= _ngram_ends(text, rules.no_repeat_ngram_size)
        if num_new < rules.min_new_tokens:
            banned |= set(stop_token_ids)
        if banned:
            scores[sorted(banned)] = _BANNED
        for processor in rules.processors:
            ids = torch.tensor([list(text)], device=logits.device)
            processed = processor(ids, scores[None].clone())
            if processed.shape != (1, len(scores)):  # `copy_` would broadcast it
                raise ValueError(
                    f"a processor returned scores of shape {list(processed.shape)}; "
                    f"return [1, {len(scores)}]"
                )
            scores.copy_(processed[0])
        if num_new < len(rules.forced_tokens):
            scores.fill_(_BANNED)
            scores[rules.forced_tokens[num_new]] = 0.0
    return changed


def _penalise(rules: LogitRules, scores: Tensor, text: Sequence[int], num_prompt: int) -> None:
    """Apply the bias and the three penalties in place. scores: [V]."""
    if rules.logit_bias:
        ids = torch.tensor(list(rules.logit_bias), device=scores.device)
        scores[ids] += torch.tensor(list(rules.logit_bias.values())).to(scores)
    output = text[num_prompt:]
    if rules.repetition_penalty != 1.0:
        seen = text if rules.repetition_scope == "all" else output
        ids = torch.tensor(sorted(set(seen)), dtype=torch.int64, device=scores.device)
        before = scores[ids]
        penalty = rules.repetition_penalty
        scores[ids] = torch.where(before < 0, before * penalty, before / penalty)
    if rules.presence_penalty or rules.frequency_penalty:
        counts = Counter(text if rules.presence_scope == "all" else output)
        ids = torch.tensor(list(counts), dtype=torch.int64, device=scores.device)
        times = torch.tensor(list(counts.values())).to(scores)
        scores[ids] -= rules.presence_penalty + rules.frequency_penalty * times


def _ngram_ends(text: Sequence[int], size: int) -> set[int]:
    """Return the tokens that would repeat an n-gram of `size` tokens of the text."""
    if len(text) < size:
        return set()
    last = tuple(text[len(text) - size + 1 :])
    return {
        text[i + size - 1]
        for i in range(len(text) - size + 1)
        if tuple(text[i : i + size - 1]) == last
    }
