"""A recipe: an experiment at a paper's scale as one YAML file, models described by their shapes.

`claims` are the paper's, each with its source; all the rest of a recipe is our choice, and `ours` says
so in words. A `shape` has the fields of the model's config.json: `model_type` and sizes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from paceline.config import DrafterSection, ModelSection, Section, parse
from paceline.errors import ConfigError
from paceline.experiments.findings import Claim


class DeviceShape(Section):
    """The devices: `count` of them, with weights and work divided evenly.

    gigabytes, gigabytes_per_second, teraflops: of one device, at the recipe's dtype. efficiency: the
    share of bandwidth and arithmetic that predictions assume.
    """

    name: str
    count: int = Field(default=1, ge=1)
    gigabytes: float = Field(gt=0)
    gigabytes_per_second: float = Field(gt=0)
    teraflops: float = Field(gt=0)
    efficiency: float = Field(gt=0, le=1)


class RecipeTarget(ModelSection):
    """The target; the shape must have `millions` of parameters, the size in its name or paper."""

    shape: dict[str, Any]
    millions: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _has_dtype(self) -> RecipeTarget:
        if self.dtype == "auto":
            raise ValueError("'target.dtype' must be float32, bfloat16 or float16 in a recipe")
        return self


class RecipeDrafter(DrafterSection):
    """A drafter as in paceline.yaml, with the shape of its model or the size of its table's text."""

    shape: dict[str, Any] | None = None
    millions: float | None = Field(default=None, gt=0)
    corpus_megabytes: float | None = Field(default=None, gt=0)


class Workload(Section):
    """The prompts, their files in the data folder, and the assumed lengths."""

    files: list[str] = Field(min_length=1)
    prompts: int = Field(ge=1)
    prompt_tokens: int = Field(ge=1)
    new_tokens: int = Field(ge=2)


class DrafterTraining(Section):
    """A drafter to train first: the number of tokens and of the recipe's devices."""

    drafter: str
    tokens: float = Field(gt=0)
    devices: int = Field(ge=1)


class Recipe(Section):
    """The whole file. rows: number of requests decoded together."""

    title: str
    paper: str
    claims: list[Claim] = Field(min_length=1)
    ours: list[str] = Field(min_length=1)
    device: DeviceShape
    target: RecipeTarget
    drafters: dict[str, RecipeDrafter] = Field(min_length=1)
    rows: int = Field(default=1, ge=1)
    workload: Workload
    training: DrafterTraining | None = None

    @model_validator(mode="after")
    def _training_names_a_drafter(self) -> Recipe:
        if self.training is not None and self.training.drafter not in self.drafters:
            raise ValueError(f"'training.drafter': there is no drafter '{self.training.drafter}'")
        return self


def load_recipe(path: Path | str) -> Recipe:
    """Read and validate a recipe. Raises ConfigError with the key to change."""
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such recipe") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping with 'title', 'target' and 'drafters'")
    return parse(Recipe, raw, str(path))
