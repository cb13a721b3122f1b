"""Student shapes for a target, and the acceptance that each needs to pay on this machine.

Shapes are scaled to the target: its width per head, its share of key-value heads, its ratio of MLP to
hidden size. Needed acceptances assume that each position is accepted with the same probability a,
independently: tau(K) = (1 - a^(K+1)) / (1 - a). A round's cost is measured, see `prices`.
Symbols: K draft length, a greedy acceptance per position (match rate).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from paceline.distillation.facts import TRAINING
from paceline.distillation.settings import StudentShape
from paceline.errors import ArtefactError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from paceline.distillation.prices import Prices

SPEEDUPS: Final = (1.0, 1.5, 2.0)
"""Speed-ups over plain decoding whose acceptance is suggested; the first is break-even."""
CEILING: Final = 0.9
"""The acceptance at which a shape's speed-up is its ceiling: few drafters reach more."""
_SIZES: Final = (
    (1 / 6, (1, 2)),
    (1 / 4, (2,)),
    (1 / 3, (1, 2, 4)),
    (1 / 2, (2, 4)),
    (2 / 3, (2, 4)),
)
"""Shares of the target's hidden size, each with the numbers of layers to propose."""
_MLP_RATIO: Final = (
    8 / 3
)  # a gated MLP with the parameters of a plain one of 4 times the hidden size
_MLP_STEP: Final = 32
_LEAST_HEAD: Final = 16  # width of a head, unless the target's are narrower
_LEAST_HIDDEN: Final = 16
_TOLERANCE: Final = 0.1  # of a hidden size, relative to the wanted share of the target's
_BISECTIONS: Final = 40
_DISTURBED: Final = 1.5  # a shape that takes this many times as long as a larger one was disturbed


@dataclass(frozen=True, slots=True)
class NeededAcceptance:
    """The least acceptance per position that reaches a speed-up, and the draft length that does so."""

    rate: float
    num_draft_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class SuggestedShape:
    """A student's shape with its parameters and measured prices."""

    shape: StudentShape
    num_parameters: int
    prices: Prices

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights in bfloat16."""
        return 2 * self.num_parameters

    def needs(self, speedup: float) -> NeededAcceptance | None:
        """Return the acceptance at which the shape reaches a speed-up, None if no acceptance does."""
        return needed_acceptance(self.prices.round_costs, speedup)

    @property
    def ceiling(self) -> float:
        """The speed-up at acceptance `CEILING`."""
        return best_speedup(self.prices.round_costs, CEILING)[0]

    def times_slower(self, other: SuggestedShape) -> float:
        """Return seconds per drafted token over those of another shape, 0 if that is smaller."""
        mine, its = self.shape, other.shape
        if mine.num_layers > its.num_layers or mine.hidden_size > its.hidden_size:
            return 0.0
        return self.prices.step_share / other.prices.step_share


@dataclass(frozen=True, slots=True, eq=False)
class TrainedDrafter:
    """A distilled drafter of the configuration, with its measured prices.

    match_rate: mean over the tasks it was trained on, of their validation prompts.
    """

    name: str
    num_parameters: int
    match_rate: float
    prices: Prices

    @property
    def speedup(self) -> float:
        """The predicted speed-up at the best draft length, under the same assumption as the shapes'."""
        return best_speedup(self.prices.round_costs, self.match_rate)[0]

    @property
    def num_draft_tokens(self) -> int:
        """The best draft length."""
        return best_speedup(self.prices.round_costs, self.match_rate)[1]


@dataclass(frozen=True, slots=True, eq=False)
class Suggestions:
    """The suggested shapes, smallest first, and the trained drafters of the configuration.

    other_targets: trained drafters that are left out, since they were trained for another target.
    """

    shapes: tuple[SuggestedShape, ...]
    trained: tuple[TrainedDrafter, ...] = ()
    other_targets: tuple[str, ...] = ()

    def larger_than(self, drafter: TrainedDrafter) -> list[SuggestedShape]:
        """Return the shapes with more parameters than a trained drafter."""
        return [own for own in self.shapes if own.num_parameters > drafter.num_parameters]

    @property
    def doubts(self) -> list[str]:
        """The shapes whose figures other work on the machine has disturbed, a sentence per shape.

        They took clearly longer per token than a shape that is at least as wide and as deep.
        """
        return [
            f"the machine was busy while {own.shape.num_layers} x {own.shape.hidden_size} was "
            f"measured: a token took {slower:.1f} times as long as with a larger shape; run this again "
            "when it is not"
            for own in self.shapes
            if (slower := max(map(own.times_slower, self.shapes))) > _DISTURBED
        ]


# --- acceptance and speed -------------------------------------------------------------------------


def independent_efficiency(acceptance: float, longest: int) -> NDArray[np.float64]:
    """Return tau for every K from 0 [K + 1], if positions are accepted independently."""
    tau: NDArray[np.float64] = np.cumsum(acceptance ** np.arange(longest + 1))
    return tau


def best_speedup(round_costs: NDArray[np.float64], acceptance: float) -> tuple[float, int]:
    """Return the largest speed-up over draft lengths from 1, and its length.

    round_costs: [K + 1], see `Prices.round_costs`.
    """
    speedups = independent_efficiency(acceptance, len(round_costs) - 1) / round_costs
    length = 1 + int(speedups[1:].argmax())
    return float(speedups[length]), length


def needed_acceptance(round_costs: NDArray[np.float64], speedup: float) -> NeededAcceptance | None:
    """Return the least acceptance whose best speed-up is `speedup`, None if even 1 does not reach it."""
    if best_speedup(round_costs, 1.0)[0] < speedup:
        return None
    low, high = 0.0, 1.0
    # the best speed-up rises with the acceptance
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if best_speedup(round_costs, middle)[0] < speedup:
            low = middle
        else:
            high = middle
    return NeededAcceptance(high, best_speedup(round_costs, high)[1])


# --- shapes ---------------------------------------------------------------------------------------


def shapes_for(target: Any) -> list[StudentShape]:
    """Return the shapes to try, narrowest first. target: the target's transformers configuration.

    Raises ConfigError if the target is too small for a smaller student.
    """
    text = target.get_text_config()
    hidden = text.hidden_size
    shapes: list[StudentShape] = []
    for share, depths in _SIZES:
        heads, width = _heads(text, share * hidden)
        if not _LEAST_HIDDEN <= heads * width < hidden:
            continue
        for depth in depths:
            shape = _shape(text, depth, heads, width)
            if depth <= text.num_hidden_layers and shape not in shapes:
                shapes.append(shape)
    if not shapes:
        raise ConfigError(
            f"the target's hidden size {hidden} leaves no smaller student of {_LEAST_HIDDEN} or more; "
            "a drafter pays for a larger target only"
        )
    return shapes


def check_vocabulary(target: Any, num_logits: int, num_tokens: int) -> None:
    """Raise ConfigError unless a student with the target's vocabulary has all tokens of the tokenizer.

    target: the target's transformers configuration. num_logits: the target's output tokens. num_tokens:
    those of its tokenizer.
    """
    size = getattr(target.get_text_config(), "vocab_size", None) or 0
    if min(size, num_logits) < num_tokens:
        raise ConfigError(
            f"the target has {min(size, num_logits)} output tokens and its tokenizer {num_tokens}, so a "
            "student with the target's vocabulary cannot draft them all; use the tokenizer that the "
            "target was trained with"
        )


def _heads(text: Any, hidden: float) -> tuple[int, int]:
    """Return (heads, width per head) whose product is close to a hidden size.

    Heads have the target's width, halved as often as needed.
    """
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    width -= width % 2
    while True:
        heads = max(1, round(hidden / width))
        is_close = abs(heads * width - hidden) <= _TOLERANCE * hidden
        if is_close or width % 4 or width // 2 < _LEAST_HEAD:
            return heads, width
        width //= 2


def _shape(text: Any, depth: int, heads: int, width: int) -> StudentShape:
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    wanted = heads * kv_heads / text.num_attention_heads
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    hidden = heads * width
    mlp = getattr(text, "intermediate_size", None)
    ratio = mlp / text.hidden_size if mlp else _MLP_RATIO
    return StudentShape(
        num_layers=depth,
        hidden_size=hidden,
        mlp_size=max(1, round(ratio * hidden / _MLP_STEP)) * _MLP_STEP,
        num_heads=heads,
        num_kv_heads=min(divisors, key=lambda n: abs(n - wanted)),
    )


# --- trained drafters -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RecordedQuality:
    """The figures that a distilled drafter's folder records of its validation.

    match_rate: mean over the tasks it was trained on. target: the fingerprint of the target that wrote
    the answers, empty if it is not recorded.
    """

    match_rate: float
    target: str


def read_quality(folder: Path | str) -> RecordedQuality | None:
    """Return the recorded figures of a drafter's validation, None without a `training.json`.

    Raises ArtefactError if the file is damaged.
    """
    path = Path(folder) / TRAINING
    if not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        # "quality" in the records of earlier versions
        quality = facts.get("measures", {}).get("domains") or facts.get("quality") or {}
        tasks: Sequence[str] = [t for t in facts.get("trained_domains", quality) if t in quality]
        rates = [float(quality[task]["match_rate"]) for task in tasks]
        target = str(facts.get("target", ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(f"{path}: cannot be read ({error}); copy it again") from error
    return RecordedQuality(sum(rates) / len(rates), target) if rates else None
