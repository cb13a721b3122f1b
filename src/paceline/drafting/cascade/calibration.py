"""The chances that a cascade's tokens are accepted, learned from replay.

A lookup has a chance per class of evidence, a model one per bin and place; see `kernels`. Before
anything is learned, a formula gives the lookups' chances (`evidence`) and every model has the same. The
module knows no drafter. Symbols: L lookups, M models, T output tokens, K nodes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from paceline.config import explain
from paceline.drafting.cascade.classes import NUM_BINS, NUM_SURE
from paceline.drafting.evidence import NUM_CLASSES, assumed_chances
from paceline.errors import ArtefactError
from paceline.files import write_atomically

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from paceline.store.records import DraftNodes

CALIBRATION_FILE: Final = "calibration.json"
# of a model's first token and of each further one, in every bin
_UNKNOWN_MODEL: Final = (0.5, 0.7)
# observations that the chances before any replay count as
_PRIOR_WEIGHT: Final = 4.0


@dataclass(frozen=True, slots=True)
class Chances:
    """A cascade's calibrated chances.

    tables: [L, NUM_CLASSES]; prospects: [M, NUM_BINS, 2]; if_sure: [M, NUM_SURE] by a model's own
    probability.
    """

    tables: NDArray[np.float64]
    prospects: NDArray[np.float64]
    if_sure: NDArray[np.float64]

    @classmethod
    def assumed(cls, num_lookups: int, num_models: int) -> Chances:
        tables = np.tile(assumed_chances(), (num_lookups, 1))
        prospects = np.tile(np.array(_UNKNOWN_MODEL), (num_models, NUM_BINS, 1))
        # a model's probability is its chance
        middles = (np.arange(NUM_SURE) + 0.5) / NUM_SURE
        return cls(tables, prospects, np.tile(middles, (num_models, 1)))


@dataclass(frozen=True, slots=True)
class PartReplays:
    """The replays of a cascade's parts along one output of T tokens.

    nodes: [L] the lookups' drafts at each position. accepted, drafted: [M, T - 1] of the models, at
    full length. sure: [M, T - 1] the models' probabilities along the output, below 0 if not known.
    weight: of the models' tokens, [M].
    """

    nodes: Sequence[DraftNodes]
    drafted: NDArray[np.int64]
    accepted: NDArray[np.int64]
    sure: NDArray[np.float64]
    weight: NDArray[np.float64]


def fit_chances(replays: Sequence[PartReplays], num_lookups: int, num_models: int) -> Chances:
    """Return the chances of tokens along outputs, weighed with those assumed before."""
    assumed = Chances.assumed(num_lookups, num_models)
    seen, right = np.zeros((2, num_lookups, NUM_CLASSES))
    for replay in replays:
        for lookup, nodes in enumerate(replay.nodes):
            tested = nodes.is_tested()
            np.add.at(seen[lookup], nodes.evidence[tested], 1.0)
            np.add.at(right[lookup], nodes.evidence[tested], nodes.kept[tested])
    tables = (right + _PRIOR_WEIGHT * assumed.tables) / (seen + _PRIOR_WEIGHT)
    tried, good = np.zeros((2, num_models, NUM_BINS, 2))
    for replay in replays if num_models else ():
        bins = bins_along(replay.nodes, tables, replay.accepted.shape[1])
        left = np.arange(len(bins), 0, -1)  # tokens of the output that a draft could still equal
        for model, accepted in enumerate(replay.accepted):
            drafts = replay.drafted[model] > 0
            accepted, longest = accepted[drafts], np.minimum(replay.drafted[model], left)[drafts]
            further = np.minimum(accepted + 1, longest) - 1
            for place, num_tried, num_right in (
                (0, np.ones(len(accepted)), accepted > 0),
                (1, further, np.maximum(accepted - 1, 0)),
            ):
                weight = replay.weight[model]
                np.add.at(tried[model, :, place], bins[drafts], weight * num_tried)
                np.add.at(good[model, :, place], bins[drafts], weight * num_right)
    # bins that were hardly seen have the chances of all bins together
    whole = good.sum(axis=1, keepdims=True) + _PRIOR_WEIGHT * assumed.prospects[:, :1]
    whole = whole / (tried.sum(axis=1, keepdims=True) + _PRIOR_WEIGHT)
    prospects = (good + _PRIOR_WEIGHT * whole) / (tried + _PRIOR_WEIGHT)
    return Chances(tables, prospects, _fit_if_sure(replays, assumed.if_sure))


def _fit_if_sure(
    replays: Sequence[PartReplays], assumed: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the share of right tokens by the model's probability for them, [M, NUM_SURE]."""
    seen, right = np.zeros((2, *assumed.shape))
    for replay in replays:
        for model, sure in enumerate(replay.sure):
            known = sure >= 0.0
            classes = np.minimum((sure[known] * NUM_SURE).astype(np.int64), NUM_SURE - 1)
            np.add.at(seen[model], classes, 1.0)
            np.add.at(right[model], classes, replay.accepted[model][known] > 0)
    fitted: NDArray[np.float64] = (right + _PRIOR_WEIGHT * assumed) / (seen + _PRIOR_WEIGHT)
    return fitted


def bins_along(
    nodes: Sequence[DraftNodes], tables: NDArray[np.float64], num_positions: int
) -> NDArray[np.int64]:
    """Return the bin [T - 1] of every position, by the lookups' drafts there."""
    # imported here because numba takes a second to import
    from paceline.drafting.cascade.kernels import bins_of

    evidence, parents, _, lengths = stack_nodes(nodes, num_positions)
    return bins_of(evidence, parents, lengths, tables)


def stack_nodes(nodes: Sequence[DraftNodes], num_positions: int) -> tuple[NDArray[np.int64], ...]:
    """Return evidence, parents and kept, [L, T - 1, K], and lengths [L, T - 1], of the lookups."""
    width = max((int(own.lengths.max(initial=0)) for own in nodes), default=0)
    stacked = np.full((3, len(nodes), num_positions, max(width, 1)), -1, dtype=np.int64)
    lengths = np.zeros((len(nodes), num_positions), dtype=np.int64)
    for lookup, own in enumerate(nodes):
        lengths[lookup] = own.lengths
        filled = np.arange(stacked.shape[-1]) < own.lengths[:, None]
        for column, values in enumerate((own.evidence, own.parents, own.kept)):
            stacked[column, lookup][filled] = values
    return stacked[0], stacked[1], stacked[2], lengths


class _ArmChances(BaseModel):
    model_config = ConfigDict(extra="forbid")

    parts: tuple[str, ...]
    tables: list[list[float]]
    prospects: list[list[list[float]]]
    if_sure: list[list[float]]

    def as_chances(self) -> Chances:
        num_lookups = len(self.tables)
        num_models = len(self.parts) - num_lookups
        arrays = [np.array(own, np.float64) for own in (self.tables, self.prospects, self.if_sure)]
        shapes = [(num_lookups, NUM_CLASSES), (num_models, NUM_BINS, 2), (num_models, NUM_SURE)]
        if num_models == 0:  # lists without models have no shape
            arrays[1:] = [
                own.reshape(0, *shape[1:])
                for own, shape in zip(arrays[1:], shapes[1:], strict=True)
            ]
        if num_lookups < 1 or [own.shape for own in arrays] != shapes:
            raise ValueError(f"chances do not fit the {len(self.parts)} parts")
        for values in arrays:
            if not ((values > 0.0) & (values <= 1.0)).all():
                raise ValueError("a chance is not above 0 and at most 1")
        return Chances(*arrays)


class _CalibrationFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    cascades: dict[str, _ArmChances] = Field(default_factory=dict)


Calibration = Mapping[str, tuple[tuple[str, ...], Chances]]
"""By cascade: its parts, lookups before models, and their chances."""


def save_calibration(folder: Path, calibration: Calibration) -> None:
    """Write the chances into a policy's folder, atomically."""
    file = _CalibrationFile(
        cascades={
            arm: _ArmChances(
                parts=parts,
                tables=chances.tables.tolist(),
                prospects=chances.prospects.tolist(),
                if_sure=chances.if_sure.tolist(),
            )
            for arm, (parts, chances) in calibration.items()
        }
    )
    write_atomically(Path(folder) / CALIBRATION_FILE, file.model_dump_json().encode())


def load_calibration(folder: Path) -> dict[str, tuple[tuple[str, ...], Chances]]:
    """Read the chances from a policy's folder. Raises ArtefactError if they are missing or damaged."""
    path = Path(folder) / CALIBRATION_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        file = _CalibrationFile.model_validate(raw)
        return {arm: (own.parts, own.as_chances()) for arm, own in file.cascades.items()}
    except ValidationError as error:
        reason = explain(_CalibrationFile, error)
        raise ArtefactError(f"{path}: damaged ({reason}); run `paceline learn` again") from error
    except (OSError, ValueError) as error:
        raise ArtefactError(
            f"{path}: cannot be read ({error}); run `paceline learn` again"
        ) from error
