"""How a collection lies on disk: its kinds of rows, their columns, their folders.

    <collection>/trajectories             the target's output of every prompt under every sampling
                 features/<encoder>       what a policy may see of it
                 replays/<drafter>        the rounds that drafter would have had
                 scores/<drafter>         how close its distributions are to the target's
                 outputs/<name>           what a drafter, or any other model, wrote to the prompt itself

Rows meet by id. Knows neither models nor costs. Symbols: T output tokens, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, unquote

import pyarrow as pa

from paceline.contracts import SamplingParams, sampling_label

if TYPE_CHECKING:
    from collections.abc import Mapping

TRAJECTORIES: Final = "trajectories"
FEATURES: Final = "features"
REPLAYS: Final = "replays"
SCORES: Final = "scores"
OUTPUTS: Final = "outputs"

_TOKENS: Final = pa.list_(pa.int32())
_NUMBERS: Final = pa.list_(pa.float32())
SCHEMAS: Final = {
    TRAJECTORIES: pa.schema(
        [
            (
                "id",
                pa.string(),
            ),  # the prompt's id and the sampling's label, which greedy has none of
            ("prompt_id", pa.string()),
            ("domain", pa.string()),
            ("prompt_tokens", _TOKENS),
            ("output_tokens", _TOKENS),
            ("finish_reason", pa.string()),
            ("max_new_tokens", pa.int32()),
            ("temperature", pa.float64()),  # 0 is greedy, else drawn by `invariant` sampling
            ("top_k", pa.int32()),
            ("top_p", pa.float64()),
            ("min_p", pa.float64()),
            ("seed", pa.int64()),
        ]
    ),
    FEATURES: pa.schema([("id", pa.string()), ("features", _NUMBERS)]),
    REPLAYS: pa.schema(
        [
            ("id", pa.string()),
            ("everywhere", pa.bool_()),
            ("drafted", pa.list_(pa.int16())),  # [T - 1] everywhere, else [rounds]
            ("accepted", pa.list_(pa.int16())),
            ("match", pa.list_(pa.bool_())),  # [T], empty for drafters that are no chain, as below
            ("confidence", _NUMBERS),
        ]
    ),
    SCORES: pa.schema([("id", pa.string()), ("ratio", _NUMBERS), ("overlap", _NUMBERS)]),  # [T]
    OUTPUTS: pa.schema([("id", pa.string()), ("output_tokens", _TOKENS)]),  # id: the prompt's own
}


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One prompt and what the target wrote under one sampling, as it is kept."""

    id: str
    domain: str
    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]
    finish_reason: str
    max_new_tokens: int
    sampling: SamplingParams

    @property
    def prompt_id(self) -> str:
        return self.id.removesuffix(sampling_label(self.sampling))

    def row(self) -> dict[str, Any]:
        """Its columns."""
        sampling = self.sampling
        return {
            "id": self.id,
            "prompt_id": self.prompt_id,
            "domain": self.domain,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "finish_reason": self.finish_reason,
            "max_new_tokens": self.max_new_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "seed": sampling.seed,
        }

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Trajectory:
        """From its columns, lists as arrays."""
        temperature = row["temperature"]
        return cls(
            id=row["id"],
            domain=row["domain"],
            prompt_tokens=tuple(row["prompt_tokens"].tolist()),
            output_tokens=tuple(row["output_tokens"].tolist()),
            finish_reason=row["finish_reason"],
            max_new_tokens=row["max_new_tokens"],
            sampling=SamplingParams(
                temperature=temperature,
                top_k=row["top_k"],
                top_p=row["top_p"],
                min_p=row["min_p"],
                seed=row["seed"],
                method="invariant" if temperature else "greedy",
            ),
        )


def folder_of(collection: Path, kind: str, name: str = "") -> Path:
    """Where the rows of a kind lie. name: of the encoder, drafter or writer, where there are several."""
    # it may be called anything, a folder not
    return Path(collection) / kind / quote(name, safe="").replace(".", "%2E")


def names_of(collection: Path, kind: str) -> list[str]:
    """Whose rows of a kind there are."""
    return sorted(unquote(path.name) for path in Path(collection).glob(f"{kind}/*"))
