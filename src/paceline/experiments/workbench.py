"""What experiments share: prompts, one collection and one cost table, made when first asked for.

All of it lies in one folder: a second experiment finds what the first one made, and a killed one goes
on where it was. Knows no question and no policy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from paceline.assembly import Pace, build
from paceline.bench.circumstances import cpu_model
from paceline.bench.profile import profile
from paceline.collection import collect
from paceline.config import Config, PathsSection, load_config
from paceline.contracts import identity_of_arms
from paceline.costs.table import CostTable
from paceline.errors import ArtefactError, ConfigError
from paceline.experiments.demo_prompts import demo_prompts
from paceline.experiments.prompt_files import read_spec_bench, read_tasks
from paceline.store.collection import LoadedCollection, load_collection

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.contracts import PromptRecord

    OnProgress = Callable[[str, int, int], None]

SPEC_BENCH: Final = "spec_bench.jsonl"


def quiet(stage: str, done: int, total: int) -> None:
    """No progress."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything: prompts of each task to collect, others of each task to time, and
    seconds for measuring costs.
    """

    prompts: int = 40
    timed: int = 8
    max_new_tokens: int = 96
    profile_seconds: float = 10.0

    @property
    def smoke(self) -> bool:
        """Whether they only show that an experiment works."""
        return self.profile_seconds == 0.0

    def with_prompts(self, prompts: int) -> Sizes:
        return replace(self, prompts=prompts)


SMOKE: Final = Sizes(prompts=4, timed=1, max_new_tokens=12, profile_seconds=0.0)


class PromptSets(NamedTuple):
    """Prompts to collect and learn from, and others, which no policy has seen, to time."""

    collected: list[PromptRecord]
    timed: list[PromptRecord]


class Workbench:
    """A configuration's models at work in one folder. Models are loaded when first needed."""

    def __init__(
        self,
        config: Config | Path | str,
        folder: Path,
        data: Path | None = None,
        sizes: Sizes = Sizes(),
        on_progress: OnProgress = quiet,
    ) -> None:
        """config: read when it is needed, which not every experiment does. data: folder of the
        prompt files; without one the demo's prompts are used.
        """
        self._source = config
        self.folder = folder
        self.data = data
        self.sizes = sizes
        self.on_progress = on_progress

    def data_file(self, name: str) -> Path:
        """A file of the data folder. Raises ConfigError that names the folder it should be in."""
        if self.data is None:
            raise ConfigError(
                f"{name} is needed; name the folder it lies in with --data or PACELINE_DATA"
            )
        path = self.data / name
        if not path.is_file():
            raise ConfigError(f"{self.data}: no {name} in this data folder")
        return path

    @cached_property
    def config(self) -> Config:
        """With everything written into the folder, and no prefill spared by an earlier request."""
        read = self._source if isinstance(self._source, Config) else load_config(self._source)
        paths = PathsSection(
            store=self.folder / "collection",
            costs=self.folder / "costs.json",
            policy=self.folder / "policy",
        )
        engine = read.engine.model_copy(update={"prefix_positions": 0})
        return read.model_copy(update={"paths": paths, "engine": engine})

    @cached_property
    def prompts(self) -> PromptSets:
        """So many of each task, by hash of id, so that a larger number has the smaller one's in it."""
        if self.data is not None:
            return PromptSets(*read_tasks(self.data, self.sizes.prompts, self.sizes.timed))
        try:
            return PromptSets(*demo_prompts(self.sizes.prompts, self.sizes.timed))
        except ValueError as error:
            raise ConfigError(f"{error}; name a folder with more of them with --data") from error

    @cached_property
    def spec_bench(self) -> list[PromptRecord]:
        """First turns of the Spec-Bench questions, by category."""
        return read_spec_bench(self.data_file(SPEC_BENCH))

    @cached_property
    def pace(self) -> Pace:
        """The models and drafters, without a policy."""
        return Pace(build(self.config))

    @cached_property
    def collection(self) -> LoadedCollection:
        """The collected prompts and every drafter's replay of them."""
        return self.collect(self.prompts.collected)

    def collect(self, prompts: list[PromptRecord]) -> LoadedCollection:
        """Of these prompts only, whatever else the folder holds; those it lacks are decoded."""
        store = self.config.paths.store
        collect(self.pace, prompts, store, self.sizes.max_new_tokens, on_progress=self.on_progress)
        found = load_collection(store, list(self.config.drafters))
        wanted = {prompt.id for prompt in prompts}
        return found._replace(prompts=[p for p in found.prompts if p.id in wanted])

    @cached_property
    def costs(self) -> CostTable:
        """This machine's cost table, the folder's where it was measured on the same."""
        path = self.config.paths.costs
        parts = self.pace.parts
        try:
            table = CostTable.load(path)
            identities = {name: drafter.identity() for name, drafter in parts.drafters.items()}
            table.check(parts.drafters, identity_of_arms(identities))
            fits = self._same_machine(table)
        except ArtefactError:  # none yet, or of other drafters
            fits = False
        if not fits:
            table = profile(parts, self.on_progress, self.sizes.profile_seconds)
            table.save(path)
        for drafter in parts.drafters.values():
            drafter.price(table)
        return table

    def _same_machine(self, table: CostTable) -> bool:
        now = {
            "cpu": cpu_model(),
            "threads": str(torch.get_num_threads()),
            "target": self.pace.parts.target.fingerprint(),
            "dtype of target": str(self.pace.parts.target.dtype).removeprefix("torch."),
        }
        return all(table.fingerprint.get(key) == value for key, value in now.items())

    def settings(self) -> dict[str, str | int]:
        """What was asked of this run, for the findings of an experiment that decodes."""
        return {
            "dtype": str(self.pace.parts.target.dtype).removeprefix("torch."),
            "prompts a task": self.sizes.prompts,
            "timed prompts a task": self.sizes.timed,
            "most new tokens": self.sizes.max_new_tokens,
            "prompts from": "the demo" if self.data is None else "the data folder",
            **({"smoke run": "its figures mean nothing"} if self.sizes.smoke else {}),
        }
