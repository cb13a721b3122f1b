"""Bounds on the earlier tokens that a token sees: the length of a check's text, and models refused.

`visibility.py` reads windows of any length from the model's own mask code; a check's text is longer than
the windows if that is affordable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from transformers import DynamicCache

from paceline.errors import ModelError

if TYPE_CHECKING:
    from paceline.models.language_model import LanguageModel

PAST_BOUND: Final = 4  # tokens of a text after the end of a window or block
_SHORTEST: Final = 4  # tokens of a prompt
_LONGEST: Final = 1100  # tokens; longer windows are only read from the mask code
# multiply-adds of all forwards over the text, for one or two seconds
_AFFORDABLE: Final = {"cpu": 2e11, "cuda": 2e13}
_FORWARDS: Final = 4  # over the text: one packed, and the plain ones
# Names, in configurations, of bounds on the tokens that a token sees.
_BOUNDS: Final = (
    "sliding_window", "attention_chunk_size", "index_topk", "index_topk_blocks", "keep_window_size",
    "attention_window", "attention_window_size", "local_attention", "window_size", "block_size",
)  # fmt: skip


def past_windows(language_model: LanguageModel, at_least: int, after: int) -> int:
    """Return the length of a prompt that exceeds every affordable window.

    after: positions that must stay free after it. Raises ModelError if the context is too short.
    """
    budget = _AFFORDABLE.get(language_model.device.type, _AFFORDABLE["cpu"])
    parameters = sum(p.numel() for p in language_model.model.parameters())
    affordable = min(_LONGEST, int(budget / max(1, parameters) / _FORWARDS))
    bounds = [w for w in language_model.visibility.windows.values() if w is not None]
    bounds += _configured_bounds(language_model).values()
    lengths = [bound + PAST_BOUND for bound in bounds]
    room = language_model.context_length - after
    if room < _SHORTEST:
        raise ModelError(
            f"{language_model.name}: a context of {language_model.context_length} tokens is too "
            f"short for the self-check, which needs {after + _SHORTEST}"
        )
    return min(max([at_least, *(n for n in lengths if n <= affordable)]), room)


def check_bounds(language_model: LanguageModel, length: int) -> None:
    """Raise ModelError for a configured bound that neither a text of `length` nor a mask shows."""
    seen = language_model.visibility
    is_complete = not seen.reasons
    for name, bound in _configured_bounds(language_model).items():
        shown = is_complete and name in ("sliding_window", "attention_chunk_size")
        if bound >= length and not shown and bound not in seen.windows.values():
            raise ModelError(
                f"{language_model.name}: {type(language_model.model).__name__} is not supported: its "
                f"'{name}' of {bound} is beyond the {length} tokens that the self-check can afford, "
                "and its masks do not show it"
            )


def check_cached_windows(language_model: LanguageModel) -> None:
    """Raise ModelError if transformers' own cache drops positions that a layer's mask lets it see.

    Then `generate` and the plain forward disagree, so there is no right text to compare with.
    """
    if language_model.encoder is not None:
        return  # such a model's cache has two parts, neither of which drops positions
    cache = DynamicCache(config=language_model.model.config)
    for index, seen in language_model.visibility.windows.items():
        window = getattr(cache.layers[index], "sliding_window", None) if cache.layers else None
        # it keeps the last `window - 1` of a list, and the last 0 are all
        kept = "all" if window == 1 else window
        if window is not None and (
            kept == "all" or window < (seen or language_model.context_length)
        ):
            raise ModelError(
                f"{language_model.name}: {type(language_model.model).__name__} is not supported: "
                f"layer {index} sees {seen or 'all'} earlier tokens by its mask, and transformers' "
                f"cache keeps {kept} of them, so its text with and without a cache differs"
            )


def _configured_bounds(language_model: LanguageModel) -> dict[str, int]:
    """Return the bounds in a model's configuration that are below its context, by name."""
    config: Any = language_model.model.config.get_text_config()
    values = {name: _number(config, name) for name in _BOUNDS}
    return {n: v for n, v in values.items() if v and 0 < v < language_model.context_length}


def _number(config: Any, name: str) -> int | None:
    try:
        value = getattr(config, name, None)
    except (AttributeError, ValueError):  # differs by layer: read from the mask code
        return None
    return value if type(value) is int else None
