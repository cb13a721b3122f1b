"""Self-checks of a loaded model: each kind of engine step gives the same logits as transformers.

`check_packed_forward` feeds rows as the engine does (prompts in pieces, one row alone, rows that share
a call, a tree, an accepted path, a draft taken back) and compares the logits with transformers' plain
forward. `check_exact` compares the bits of exact mode, `check_sublayers` checks skipped sub-layers.
Texts are longer than the layers' windows if that is affordable; `visibility.py` reads windows of any
length from the model's own mask code. Symbols: N tokens, W tokens per row, V logits width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import DynamicCache

from paceline.errors import ModelError
from paceline.models.cache import RowCache
from paceline.models.cuda.paged_cache import BLOCK as PAGED_BLOCK
from paceline.models.cuda.paged_cache import PagedCache
from paceline.models.exact import BLOCK as EXACT_BLOCK
from paceline.models.packing import Span
from paceline.models.sublayers import LayerSubset, SubLayers
from paceline.models.visibility import FAILURES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.models.language_model import LanguageModel

_CACHE_BLOCK: Final = 8  # so that short texts cross the row cache's blocks
_SHORT: Final = 4  # tokens of the short prompts
_LONG: Final = 12  # and of the long one, unless a window needs more
_DECODED: Final = 7  # positions that the long row needs after its prompt
_PAST: Final = 4  # tokens of a prompt after the end of a window
_FEW: Final = 40  # tokens; padding shorter texts costs less than one more forward
_LONGEST: Final = 1100  # tokens; longer windows are only read from the mask code
# multiply-adds of all forwards over the long row, for one or two seconds
_AFFORDABLE: Final = {"cpu": 2e11, "cuda": 2e13}
_TRIES: Final = 4  # texts in half precision, before a model is refused
_FORWARDS: Final = 4  # over the long row: one packed, and the plain ones
# Names, in configurations, of bounds on what a token sees.
_BOUNDS: Final = (
    "sliding_window", "attention_chunk_size", "index_topk", "index_topk_blocks", "keep_window_size",
    "attention_window", "attention_window_size", "local_attention", "window_size", "block_size",
)  # fmt: skip
_TREE: Final = (
    (True, False, False, False),
    (True, True, False, False),
    (True, False, True, False),
    (True, False, True, True),
)
_KEPT: Final = (0, 2, 3)  # the path of the tree that is accepted


def check_packed_forward(language_model: LanguageModel, seed: int = 0) -> None:
    """Compare the steps of rounds with transformers' plain forward, on random tokens.

    Raises ModelError if any logit differs by more than the model's dtype explains, or if the model
    bounds what a token sees in a way that this check cannot reach.
    """
    name, kind = language_model.name, type(language_model.model).__name__
    _check_cached_windows(language_model)
    num_prompt = past_windows(language_model, _LONG, _DECODED)
    _check_bounds(language_model, num_prompt + _DECODED)
    float32 = language_model.dtype == torch.float32
    # of half the bits a near tie of two experts may be cut either way, which moves all logits of a
    # place; a wrong forward is off at the same places whatever the tokens are
    least: list[float] = []
    for more in range(1 if float32 else _TRIES):
        steps, differences, scale = _differences(language_model, num_prompt, seed + more)
        least = list(map(min, least or differences, differences))
        worst = max(least)
        if worst <= (1e-3 if float32 else 0.15) * max(scale, 1e-6):
            return
    reasons = "; ".join(language_model.visibility.reasons)
    raise ModelError(
        f"{name}: the packed forward of {kind} differs from transformers' by {worst:.3g} at "
        f"{steps[least.index(worst)]} (logits vary by {scale:.3g}); this architecture is not supported"
        f"{reasons and ': ' + reasons}{_other_forward(language_model)}"
    )


def _differences(
    language_model: LanguageModel, num_prompt: int, seed: int
) -> tuple[list[str], list[float], float]:
    """(step, difference from the plain forward) of every place looked at, and the logits' spread.

    Raises ModelError where either forward fails.
    """
    name, kind = language_model.name, type(language_model.model).__name__
    fed = _Fed(language_model, torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        try:
            _feed_rounds(fed, num_prompt)
        except FAILURES as error:
            reasons = "; ".join(language_model.visibility.reasons) or str(error)
            raise ModelError(f"{name}: {kind} cannot run the packed forward: {reasons}") from error
        finally:
            fed.release()
        try:
            differences, scale = _compare(fed)
        except FAILURES as error:
            raise ModelError(
                f"{name}: {kind} cannot be checked: transformers' own forward over its text fails "
                f"with {type(error).__name__}: {error}"
            ) from error
    return [step for step, _, _ in fed.found], differences, scale


def past_windows(language_model: LanguageModel, at_least: int, after: int) -> int:
    """Return the length of a prompt that exceeds every affordable window and block.

    after: positions that must stay free after it. Raises ModelError if the context is too short.
    """
    budget = _AFFORDABLE.get(language_model.device.type, _AFFORDABLE["cpu"])
    parameters = sum(p.numel() for p in language_model.model.parameters())
    most = min(_LONGEST, int(budget / max(1, parameters) / _FORWARDS))
    bounds = [w for w in language_model.visibility.windows.values() if w is not None]
    bounds += _declared(language_model).values()
    if isinstance(language_model.cache, PagedCache):
        bounds.append(PAGED_BLOCK)
    wanted = [at_least, *(bound + _PAST for bound in bounds if bound + _PAST <= most)]
    room = language_model.context_length - after
    if room < _SHORT:
        raise ModelError(
            f"{language_model.name}: a context of {language_model.context_length} tokens is too "
            f"short for the self-check, which needs {after + _SHORT}"
        )
    return min(max(wanted), room)


def _declared(language_model: LanguageModel) -> dict[str, int]:
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


def _check_bounds(language_model: LanguageModel, length: int) -> None:
    """Raise ModelError for a bound on what a token sees that is not reached and no mask shows."""
    seen = language_model.visibility
    complete = not seen.reasons
    for name, bound in _declared(language_model).items():
        shown = complete and name in ("sliding_window", "attention_chunk_size")
        if bound >= length and not shown and bound not in seen.windows.values():
            raise ModelError(
                f"{language_model.name}: {type(language_model.model).__name__} is not supported: its "
                f"'{name}' of {bound} is beyond the {length} tokens that the self-check can afford, "
                "and its masks do not show it"
            )


def _check_cached_windows(language_model: LanguageModel) -> None:
    """Raise ModelError if transformers' own cache drops positions that a layer's mask lets it see.

    Then `generate` and the plain forward disagree, so there is no right text to compare with.
    """
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


@dataclass(slots=True)
class _Fed:
    """Three neighbouring rows, fed step by step, with the logits of every step."""

    model: LanguageModel
    generator: torch.Generator
    cache: Any = None
    slots: list[int] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=lambda: [[], [], []])  # as cached
    found: list[tuple[str, list[int], Tensor]] = field(default_factory=list)  # step, text, [V]

    def __post_init__(self) -> None:
        # a paged model is checked with its own cache, which its captured graphs use
        own = self.model.cache
        # exact mode needs blocks of its own size
        rows = RowCache() if self.model.exact else RowCache(block=_CACHE_BLOCK)
        self.cache = own if isinstance(own, PagedCache) else rows
        self.slots = [self.cache.acquire() for _ in self.texts]

    def feed(
        self, step: str, widths: dict[int, int], prefill: bool = False, tree: bool = False
    ) -> None:
        """Feed random tokens to rows. tree: those of the first row named are a tree's nodes."""
        rows, vocab = list(widths), self.model.num_logits
        pieces = [torch.randint(vocab, (n,), generator=self.generator) for n in widths.values()]
        spans = [Span(self.slots[r], len(self.texts[r]), widths[r], prefill) for r in rows]
        ancestors: list[Tensor | None] = [None] * len(rows)
        if tree:
            ancestors[0] = torch.tensor(_TREE)
        hidden = self.model.forward(torch.cat(pieces), spans, ancestors, cache=self.cache)
        places: list[int] = []
        texts: list[list[int]] = []
        at = 0
        for row, piece, seen in zip(rows, pieces, ancestors, strict=True):
            # of a prompt's piece, the last tokens are enough
            for k in range(max(0, len(piece) - _PAST) if prefill else 0, len(piece)):
                path = piece[: k + 1] if seen is None else piece[seen[k]]
                places.append(at + k)
                texts.append([*self.texts[row], *path.tolist()])
            self.texts[row] += piece.tolist()
            at += len(piece)
        logits = self.model.unembed(hidden[places]).float().cpu()
        self.found += [(step, text, row) for text, row in zip(texts, logits, strict=True)]

    def keep_path(self, row: int) -> None:
        """Accept a path of the tree that was just fed."""
        nodes, start = self.texts[row][-len(_TREE) :], len(self.texts[row]) - len(_TREE)
        self.texts[row][start:] = [nodes[k] for k in _KEPT]
        places = torch.tensor([start + k for k in _KEPT])
        self.cache.copy_positions(self.slots[row], places, start)

    def forget(self, row: int, count: int) -> None:
        """Remove a row's last tokens; their cache entries stay, stale."""
        del self.texts[row][-count:]

    def release(self) -> None:
        for slot in self.slots:
            self.cache.release(slot)


def _feed_rounds(fed: _Fed, num_prompt: int) -> None:
    """Feed the steps of a few rounds to a long row and two short ones."""
    half = num_prompt // 2
    fed.feed("a prompt's first piece", {0: half, 1: _SHORT}, prefill=True)
    fed.feed("a prompt's last piece", {0: num_prompt - half, 2: _SHORT}, prefill=True)
    fed.feed("one row alone", {0: 1})
    fed.feed("a tree and a chain", {0: 4, 1: 2, 2: 1}, tree=True)
    fed.keep_path(0)
    fed.feed("chains of one length", {0: 2, 1: 2, 2: 2})
    fed.forget(0, 2)
    fed.forget(1, 1)
    fed.feed("rows of one token, of which some had a draft taken back", {0: 1, 1: 1, 2: 1})


def _compare(fed: _Fed) -> tuple[list[float], float]:
    """Return the difference of each place to the plain forward, and the spread of its logits."""
    float32 = fed.model.dtype == torch.float32
    differences, scale = [0.0] * len(fed.found), 0.0
    texts = [text for _, text, _ in fed.found]
    whole = [t for t in texts if not any(len(o) > len(t) and o[: len(t)] == t for o in texts)]
    long = max(map(len, whole))
    # texts of similar length share a forward; padding goes at their ends
    near = [2 * len(text) > long or long < _FEW for text in whole]
    for side in (True, False):
        group = [text for text, is_near in zip(whole, near, strict=True) if is_near == side]
        if not group:
            continue
        plain = _plain(fed.model, group)
        for at, (_, text, found) in enumerate(fed.found):
            row = next((i for i, t in enumerate(group) if t[: len(text)] == text), None)
            if row is None:
                continue
            expected = plain[row, len(text) - 1].float().cpu()
            if not expected.isfinite().all():
                raise ModelError(
                    f"{fed.model.name}: the logits are not finite; the weights are damaged "
                    f"or too large for {fed.model.dtype}"
                )
            # nan_to_num: Python's max would pass over a nan
            off = (found - expected).nan_to_num(nan=float("inf"))
            # rounding moves single logits far; a wrong forward moves all of them
            difference = (off.abs().max() if float32 else off.square().mean().sqrt()).item()
            differences[at] = max(differences[at], difference)
            scale = max(scale, expected.std().item())
    return differences, scale


def _plain(language_model: LanguageModel, texts: Sequence[list[int]]) -> Tensor:
    """Return transformers' own logits [texts, longest, V]; those after a text's end are undefined."""
    longest = max(map(len, texts))
    ids = torch.tensor([[*t, *t[-1:] * (longest - len(t))] for t in texts])
    model: Any = language_model.model
    logits: Tensor = model(input_ids=ids.to(language_model.device), use_cache=False).logits
    return logits


def _other_forward(language_model: LanguageModel) -> str:
    if language_model.forward_kind == "transformers":
        return ""
    return " by the lean forward; set 'forward: transformers'"


def check_exact(language_model: LanguageModel, seed: int = 0) -> None:
    """Compare the bits of one row decoded alone, in drafts, in trees, and among other rows.

    Raises ModelError at the first difference: then this machine cannot keep exact mode's promise.
    """
    generator = torch.Generator().manual_seed(seed)
    length = past_windows(language_model, EXACT_BLOCK + 2, 14)
    prompt, other = (
        torch.randint(language_model.num_logits, (n,), generator=generator) for n in (length, 7)
    )
    text = torch.randint(language_model.num_logits, (12,), generator=generator)
    with torch.inference_mode():
        alone = _decode(language_model, prompt, text, other, [1] * 12, crowded=False)
        for widths in ([5, 4, 3], [1, 2, 9], [12]):
            for crowded in (False, True):
                drafted = _decode(language_model, prompt, text, other, widths, crowded)
                if not torch.equal(alone, drafted):
                    raise _differs(language_model, f"drafts of {widths} tokens")
        if not torch.equal(alone, _decode_tree(language_model, prompt, text)):
            raise _differs(language_model, "a tree")


def _differs(language_model: LanguageModel, what: str) -> ModelError:
    return ModelError(
        f"{language_model.name}: exact mode cannot be had on this machine: the logits after {what} "
        f"differ in their last bits from those of plain decoding in {language_model.dtype}; leave "
        "exact mode off, or use float32"
    )


def _decode(
    model: LanguageModel,
    prompt: Tensor,
    text: Tensor,
    other: Tensor,
    widths: Sequence[int],
    crowded: bool,
) -> Tensor:
    """Return the logits after each token of `text`, fed `widths` at a time. crowded: two rows."""
    cache = RowCache()
    rows = [cache.acquire(), cache.acquire()]
    spans = [Span(rows[0], 0, len(prompt), prefill=True)]
    if crowded:
        spans.insert(0, Span(rows[1], 0, len(other), prefill=True))
        model.forward(torch.cat([other, prompt]), spans, cache=cache)
    else:
        model.forward(prompt, spans, cache=cache)
    found, at = [], 0
    for width in widths:
        piece = text[at : at + width]
        span = Span(rows[0], len(prompt) + at, width)
        if crowded:
            neighbour = Span(rows[1], len(other) + at, 1)
            hidden = model.forward(torch.cat([text[:1], piece]), [neighbour, span], cache=cache)[1:]
        else:
            hidden = model.forward(piece, [span], cache=cache)
        found.append(model.unembed(hidden))
        at += width
    return torch.cat(found)


def _decode_tree(model: LanguageModel, prompt: Tensor, text: Tensor) -> Tensor:
    """Return the logits of `_decode` from trees of five nodes, two of them wrong."""
    cache = RowCache()
    row = cache.acquire()
    model.forward(prompt, [Span(row, 0, len(prompt), prefill=True)], cache=cache)
    # root, wrong child, right child, wrong grandchild, right grandchild
    lines = [[0], [0, 1], [0, 2], [0, 2, 3], [0, 2, 4]]
    ancestors = torch.zeros(5, 5, dtype=torch.bool)
    for node, line in enumerate(lines):
        ancestors[node, line] = True
    found = []
    for at in range(0, len(text), 3):
        right = text[at : at + 3]
        nodes = right[[0, 0, 1, 0, 2]]
        start = len(prompt) + at
        hidden = model.forward(nodes, [Span(row, start, 5)], [ancestors], cache=cache)
        found.append(model.unembed(hidden)[[0, 2, 4]])
        cache.copy_positions(row, torch.tensor([start, start + 2, start + 4]), start)
    return torch.cat(found)


def check_sublayers(language_model: LanguageModel, seed: int = 0) -> None:
    """Check the effect of skipped sub-layers on random tokens. Raises ModelError if it is wrong.

    With nothing skipped the hidden states must be the model's own; with everything skipped, those of
    the same model without decoder layers: embedding, last norm.
    """
    name, kind = language_model.name, type(language_model.model).__name__
    generator = torch.Generator().manual_seed(seed)
    length = past_windows(language_model, 7, 0)
    tokens = torch.randint(language_model.num_logits, (length,), generator=generator)

    def run(subset: LayerSubset | None) -> Tensor:
        cache = RowCache()
        span = Span(cache.acquire(), 0, length)
        return language_model.forward(tokens, [span], cache=cache, skip=subset)

    with torch.inference_mode():
        try:
            whole, none_skipped = run(None), run(LayerSubset())
            all_skipped = run(LayerSubset.everything(language_model.num_layers))
        except FAILURES as error:
            raise ModelError(
                f"{name}: the sub-layers of {kind} cannot be skipped ({error})"
            ) from error
        bare = _without_layers(language_model, tokens)
    tolerance = 1e-3 if language_model.dtype == torch.float32 else 0.05
    for found, expected in ((none_skipped, whole), (all_skipped, bare)):
        off = (found.float() - expected.float()).abs().max()
        if not off <= tolerance * expected.float().std():
            raise ModelError(
                f"{name}: the sub-layers of {kind} cannot be skipped: without them the hidden state "
                f"is off by {off:.2g}, so its layers do more than add to the residual stream"
            )


def _without_layers(language_model: LanguageModel, tokens: Tensor) -> Tensor:
    """Return hidden states [N, D] of transformers' own code without decoder layers."""
    body = language_model.model.base_model
    sublayers = SubLayers(body, language_model.num_layers, language_model.name)
    with sublayers.no_layers():
        ids = tokens[None].to(language_model.device)
        output: Any = body(input_ids=ids, use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden[0]
