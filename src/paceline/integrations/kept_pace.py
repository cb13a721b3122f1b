"""A pace for a model that came to `generate` without one, made of what came instead and kept with it.

Knows no decoding. It is kept as long as the same drafters are given and the weights stay as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch

from paceline.assembly import Pace, load
from paceline.config import MAX_DRAFT_TOKENS
from paceline.drafting.prompt_lookup import PromptLookup, PromptLookupSettings
from paceline.errors import ConfigError, RequestError
from paceline.models.weights_monitor import WeightsMonitor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import GenerationConfig, PreTrainedModel

    from paceline.drafting.base import Drafter

    Drafting = PreTrainedModel | Drafter

_KEPT: Final = "_paceline_kept"  # the attribute of a model under which its pace is kept


class _Ids:
    """In a tokenizer's place where only ids are known: every id is a token, nothing has a text."""

    eos_token_id = None
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}
    all_special_ids: ClassVar[list[int]] = []

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(self._num_tokens)}

    def decode(self, tokens: Sequence[int], **kwargs: Any) -> str:
        return ""


class _Kept:
    """A pace kept on its model, with what it was made from; copies of the model start without."""

    def __init__(
        self,
        made_from: tuple[Any, ...] = (),
        pace: Pace | None = None,
        watches: Sequence[WeightsMonitor] = (),
    ) -> None:
        """watches: one per model it was made from."""
        self.made_from, self.pace, self._watches = made_from, pace, watches

    def serves(self, made_from: tuple[Any, ...]) -> bool:
        """Return whether there is a pace, made from the same models, whose weights have not changed."""
        if self.pace is None or self.made_from != made_from:
            return False
        return not any(watch.has_changed() for watch in self._watches)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Kept:
        return _Kept()

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()


def pace_of(
    model: PreTrainedModel,
    config: GenerationConfig,
    pace: Pace | None,
    drafters: Mapping[str, Drafting] | None,
    assistant: PreTrainedModel | None,
) -> Pace:
    """The pace to decode with: the given one, or one made from what was given instead."""
    given = {
        "pace": pace,
        "drafters": drafters,
        "assistant_model": assistant,
        "prompt_lookup_num_tokens": config.prompt_lookup_num_tokens,
    }
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise RequestError(f"{' and '.join(names)} say different things; give one of them")
    if pace is not None:
        if pace.parts.target.model is not model:
            raise ConfigError(
                "pace= was made for another model object; make it with paceline.load(target=model, "
                "tokenizer=tokenizer, drafters=...)"
            )
        return pace
    lookup = (config.prompt_lookup_num_tokens, config.max_matching_ngram_size)
    sources = dict(drafters or {})
    if assistant is not None:
        sources["assistant_model"] = assistant
    made_from = (sources, lookup)
    kept: Any = getattr(model, _KEPT, None)
    if kept is None or not kept.serves(made_from):
        made = _make_pace(model, sources, *lookup)
        kept = _Kept(made_from, made, [WeightsMonitor(m) for m in (model, *sources.values())])
        setattr(model, _KEPT, kept)
    found: Pace = kept.pace
    return found


def _make_pace(
    model: PreTrainedModel,
    sources: Mapping[str, Drafting],
    lookup_tokens: int | None,
    lookup_ngram: int | None,
) -> Pace:
    """As transformers takes an assistant: models of one logits width share their tokenizer."""
    ready: dict[str, Any] = {}
    width = model.get_output_embeddings().weight.shape[0]
    for name, source in sources.items():
        ready[name] = source
        if isinstance(source, torch.nn.Module):
            theirs = source.get_output_embeddings().weight.shape[0]
            if theirs != width:
                raise ConfigError(
                    f"'{name}' has {theirs} logits, the target {width}; if they share a tokenizer, "
                    "give pace=paceline.load(target=model, tokenizer=tokenizer, drafters={name: "
                    "(drafter, its_tokenizer)}), which compares the tokenizers themselves"
                )
    if lookup_tokens is not None:
        _check_length("prompt_lookup_num_tokens", lookup_tokens)
        ngram = lookup_ngram or 2  # transformers' default
        settings = PromptLookupSettings(
            num_draft_tokens=lookup_tokens, min_ngram=1, max_ngram=ngram
        )
        ready["prompt_lookup"] = PromptLookup("prompt_lookup", settings)
    pace = load(target=model, tokenizer=_Ids(width), drafters=ready)  # type: ignore[arg-type]
    for name, source in sources.items():
        config: Any = getattr(source, "generation_config", None)
        asked = getattr(config, "num_assistant_tokens", None)
        if asked is not None:
            _check_length("num_assistant_tokens", asked)
            pace.parts.drafters[name].num_draft_tokens = asked
    return pace


def _check_length(setting: str, num_tokens: int) -> None:
    if not 1 <= num_tokens <= MAX_DRAFT_TOKENS:
        raise RequestError(
            f"{setting} must be between 1 and {MAX_DRAFT_TOKENS} here, got {num_tokens}"
        )
