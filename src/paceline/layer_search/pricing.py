"""What a round costs as the target skips more or less: measured once, linear in what is kept.

Costs are a table of `costs.CostTable`: the target's verifying forward by width, the engine's own
seconds a round, and one drafted token as base + kept attentions + kept MLPs, under the subject
"draft". Two such tables price alike, so a search with a given table can be repeated anywhere.
"""

from __future__ import annotations

from collections import defaultdict
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from paceline.contracts import NONE, Request
from paceline.costs.table import ENGINE, FORWARD, ROUND, TARGET, CostTable, Measurement
from paceline.drafting.layer_skip import LayerSkip
from paceline.engine import Driver, Engine
from paceline.models.packing import Span
from paceline.models.sublayers import LayerSubset

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from paceline.assembly import Parts
    from paceline.contracts import Completion
    from paceline.layer_search.development import Trajectory
    from paceline.layer_search.settings import SearchSettings
    from paceline.models.language_model import LanguageModel

DRAFT: Final = "draft"
_PARTS: Final = ("base", "attention", "mlp")
_REPEATS: Final = 15
_CONTEXT: Final = 128
_ENGINE_TOKENS: Final = 24


class Prices:
    """Seconds of drafting and verifying, read from a table. Raises ArtefactError if it lacks any."""

    def __init__(self, table: CostTable, num_layers: int, most: int) -> None:
        self.table = table
        self._num_layers = num_layers
        self._base, self._attention, self._mlp = (table.seconds(DRAFT, part, 1) for part in _PARTS)
        self._verify = table.seconds(TARGET, FORWARD, 1 + np.arange(most + 1))  # [K + 1]
        self._round = table.seconds(ENGINE, ROUND, 0)

    def draft_token(self, subset: LayerSubset) -> float:
        """Seconds of one drafted token."""
        attentions = self._num_layers - len(subset.attention)
        mlps = self._num_layers - len(subset.mlp)
        return self._base + attentions * self._attention + mlps * self._mlp

    def plain(self) -> float:
        """Seconds of one token of the target alone."""
        return float(self._verify[0]) + self._round

    def per_token(self, rounds: Sequence[np.ndarray], subset: LayerSubset) -> float:
        """Seconds per emitted token of rounds [n, 2], drafted and accepted; prefill left out."""
        drafted, accepted = np.concatenate(rounds).T
        total = drafted.sum() * self.draft_token(subset)
        total += self._verify[drafted].sum() + self._round * len(drafted)
        return float(total / (accepted + 1).sum())


def measure_costs(
    parts: Parts, settings: SearchSettings, on_turn: Callable[[int, int], None]
) -> CostTable:
    """Time what `Prices` reads, everything in turn, medians kept. on_turn(done, total)."""
    target = parts.target
    every = frozenset(range(target.num_layers))
    subsets = {
        "all": LayerSubset(),
        "no attention": LayerSubset(attention=every),
        "no mlp": LayerSubset(mlp=every),
        "nothing": LayerSubset.everything(target.num_layers),
    }
    widths = sorted({1, 2, 3, 5, 9, 1 + settings.num_draft_tokens})
    context = max(1, min(_CONTEXT, target.context_length - max(widths) - 1))
    generator = torch.Generator().manual_seed(settings.seed)
    text = torch.randint(target.num_logits, (context + max(widths),), generator=generator)
    found: dict[str | int, list[float]] = defaultdict(list)
    slot = target.acquire()
    try:
        with torch.inference_mode():
            target.forward(text[:context], [Span(slot, 0, context)])
            for turn in range(_REPEATS + 1):
                for width in widths:
                    found[width].append(_forward(target, text, slot, context, width, None))
                for name, subset in subsets.items():
                    found[name].append(_forward(target, text, slot, context, 1, subset))
                found[ROUND].append(_host_seconds(parts, text[: min(16, context)].tolist()))
                on_turn(turn, _REPEATS)
    finally:
        target.release(slot)
    typical = {key: median(seconds[1:]) for key, seconds in found.items()}  # the first warms up
    return _table(target, typical, widths)


def _table(
    target: LanguageModel, typical: dict[str | int, float], widths: Sequence[int]
) -> CostTable:
    # each kind's share twice: what leaving it out of the whole saves, and what it alone adds
    alone, both = typical["nothing"], typical["all"]
    attention = (both - typical["no attention"] + typical["no mlp"] - alone) / 2
    mlp = (both - typical["no mlp"] + typical["no attention"] - alone) / 2
    parts = {"base": alone, "attention": attention, "mlp": mlp}
    per = {"base": 1, "attention": target.num_layers, "mlp": target.num_layers}
    cells = [Measurement(TARGET, FORWARD, width, 0, 1, typical[width]) for width in widths]
    cells += [
        Measurement(DRAFT, part, 1, 0, 1, max(0.0, parts[part]) / per[part]) for part in _PARTS
    ]
    cells.append(Measurement(ENGINE, ROUND, 0, 0, 1, typical[ROUND]))
    facts = {
        "target": target.fingerprint(),
        "dtype of target": str(target.dtype).removeprefix("torch."),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
    }
    return CostTable(facts, cells)


def _forward(
    target: LanguageModel,
    text: torch.Tensor,
    slot: int,
    context: int,
    width: int,
    subset: LayerSubset | None,
) -> float:
    """Seconds of a forward with its unembedding and the one copy off the device."""
    began = perf_counter()
    span = Span(slot, context, width)
    hidden = target.forward(text[context : context + width], [span], skip=subset)
    target.unembed(hidden).argmax(dim=-1).tolist()
    return perf_counter() - began


def _host_seconds(parts: Parts, prompt: Sequence[int]) -> float:
    """The engine's seconds a round outside its forwards."""
    driver = Driver(Engine(parts.target, {NONE: parts.drafters[NONE]}, decode=lambda tokens: ""))
    room = parts.target.context_length + 1 - len(prompt)
    request = Request("", tuple(prompt), min(_ENGINE_TOKENS, room), drafter=NONE)
    (done,) = driver.generate([request])
    spent = done.seconds
    return max(0.0, done.seconds_total - spent.prefill - spent.verify) / max(1, len(done.rounds))


def timed_per_token(
    parts: Parts,
    trajectories: Sequence[Trajectory],
    settings: SearchSettings,
    subset: LayerSubset | None,
) -> tuple[float, list[Completion]]:
    """Seconds per token by the clock, prefill left out, one request at a time; None: plain."""
    drafters = {NONE: parts.drafters[NONE]}
    arm = NONE
    if subset is not None:
        arm = "layer_skip"
        drafters[arm] = LayerSkip(arm, parts.target, subset, settings.of_drafter())
    driver = Driver(Engine(parts.target, drafters, decode=lambda tokens: "", max_rows=1))
    done = [
        next(driver.generate([Request(str(i), t.prompt, len(t.output), drafter=arm)]))
        for i, t in enumerate(trajectories)
    ]
    seconds = sum(c.seconds_total - c.seconds.prefill for c in done)
    return seconds / sum(len(c.token_ids) - 1 for c in done), done
