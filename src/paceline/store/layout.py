"""The layout of a collection on disk: its kinds of rows, their columns, their folders.

    <collection>/trajectories             the target's output to every prompt under every sampling
                 features/<encoder>       the features that a policy may see
                 replays/<drafter>        the drafter's rounds along each trajectory
                 scores/<drafter>         closeness of its distributions to the target's
                 outputs/<name>           the text of a drafter, or of any other model, to each prompt
                 trained_on/<drafter>     whether the drafter was trained on each prompt

Rows are joined by id. Knows neither models nor costs. Symbols: T output tokens, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, unquote

import pyarrow as pa

from paceline.contracts import SamplingParams
from paceline.store.records import sampling_label

if TYPE_CHECKING:
    from collections.abc import Mapping

TRAJECTORIES: Final = "trajectories"
FEATURES: Final = "features"
REPLAYS: Final = "replays"
SCORES: Final = "scores"
OUTPUTS: Final = "outputs"
TRAINED_ON: Final = "trained_on"

_TOKENS: Final = pa.list_(pa.int32())
_NUMBERS: Final = pa.list_(pa.float32())
_SAMPLING: Final = {
    "temperature": pa.float64(),  # 0 is greedy; others are drawn by `invariant` sampling
    "top_k": pa.int32(),
    "top_p": pa.float64(),
    "min_p": pa.float64(),
    "seed": pa.int64(),
}
SCHEMAS: Final = {
    TRAJECTORIES: pa.schema(
        {
            "id": pa.string(),  # the prompt's id and the sampling's label, which is "" for greedy
            "prompt_id": pa.string(),
            "domain": pa.string(),
            "prompt_tokens": _TOKENS,
            "output_tokens": _TOKENS,
            "finish_reason": pa.string(),
            "max_new_tokens": pa.int32(),
            **_SAMPLING,
        }
    ),
    FEATURES: pa.schema({"id": pa.string(), "features": _NUMBERS}),
    REPLAYS: pa.schema(
        {
            "id": pa.string(),
            "everywhere": pa.bool_(),
            "drafted": pa.list_(pa.int16()),  # [T - 1] everywhere, else [rounds]
            "accepted": pa.list_(pa.int16()),
            "match": pa.list_(pa.bool_()),  # [T]; empty for drafters that are not chains
            "confidence": _NUMBERS,  # as `match`
            # of lookups: a value per drafted token, all positions after each other; see `DraftNodes`
            "evidence": pa.list_(pa.uint8()),
            "parents": pa.list_(pa.int16()),
            "kept": pa.list_(pa.bool_()),
        }
    ),
    SCORES: pa.schema({"id": pa.string(), "ratio": _NUMBERS, "overlap": _NUMBERS}),  # [T]
    OUTPUTS: pa.schema({"id": pa.string(), "output_tokens": _TOKENS}),  # id: the prompt's own
    TRAINED_ON: pa.schema({"id": pa.string(), "trained_on": pa.bool_()}),  # id: the prompt's own
}


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One prompt and the target's output to it under one sampling, as stored."""

    id: str
    domain: str
    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]
    finish_reason: str
    max_new_tokens: int
    sampling: SamplingParams

    @property
    def prompt_id(self) -> str:
        """The prompt's own id, which all its samplings share."""
        return self.id.removesuffix(sampling_label(self.sampling))

    def to_row(self) -> dict[str, Any]:
        """Return a value per column."""
        return {
            name: getattr(self.sampling if name in _SAMPLING else self, name)
            for name in SCHEMAS[TRAJECTORIES].names
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Trajectory:
        """Build a trajectory from a value per column; token lists are arrays."""
        sampling = SamplingParams(
            **{name: row[name] for name in _SAMPLING},
            method="invariant" if row["temperature"] else "greedy",
        )
        return cls(
            id=row["id"],
            domain=row["domain"],
            prompt_tokens=tuple(row["prompt_tokens"].tolist()),
            output_tokens=tuple(row["output_tokens"].tolist()),
            finish_reason=row["finish_reason"],
            max_new_tokens=row["max_new_tokens"],
            sampling=sampling,
        )


def store_folder(collection: Path, kind: str, name: str = "") -> Path:
    """Return the folder of one kind of rows. name: of the encoder, drafter or writer."""
    # a name may hold any character, a folder may not
    return Path(collection) / kind / quote(name, safe="").replace(".", "%2E")


def list_names(collection: Path, kind: str) -> list[str]:
    """Return the encoders, drafters or writers that have rows of one kind, sorted."""
    return sorted(unquote(path.name) for path in Path(collection).glob(f"{kind}/*"))
