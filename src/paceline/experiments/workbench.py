"""Prompts, a collection and a cost table that experiments share, made at the first use.

All files are in one folder: a second experiment uses those of the first, and a stopped experiment
continues. Knows no question and no policy.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from paceline.assembly import Pace, build
from paceline.bench.circumstances import cpu_model
from paceline.collection import collect_trajectories
from paceline.config import Config, load_config
from paceline.contracts import NONE, PromptRecord, identity_of_arms, no_progress, split_arm
from paceline.costs.table import CostTable
from paceline.drafting.catalog import arms_of
from paceline.errors import ArtefactError, ConfigError
from paceline.experiments.by_clock import without_prefixes
from paceline.experiments.demo_prompts import demo_prompts
from paceline.experiments.prompt_files import PromptSets, read_spec_bench, read_tasks
from paceline.models.detokenizer import Detokenizer
from paceline.models.loading import load_tokenizer
from paceline.replay import price_rounds, stored_drafters
from paceline.store import take_by_hash
from paceline.store.collection import (
    LoadedCollection,
    load_collection,
    open_trajectories,
    read_trajectories,
)
from paceline.store.trained_on import join
from paceline.verbs.pipeline import in_folder, profile, with_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import TypeVar

    from paceline.config import DrafterSection
    from paceline.contracts import Progress
    from paceline.store import TrainedOn
    from paceline.store.records import CollectedPrompt

    T = TypeVar("T")

DEFAULT_PROMPTS: Final = 40
SPEC_BENCH: Final = "spec_bench.jsonl"
_LEFT_OUT: Final = "prompts left out because a drafter was trained on them"
_SMOKE_QUESTIONS: Final = 6  # of Spec-Bench, per category


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of prompts per task to collect (None: all of a given store) and others to time, and the
    seconds for measuring costs.
    """

    prompts: int | None = DEFAULT_PROMPTS
    timed: int = 8
    max_new_tokens: int = 96
    profile_seconds: float = 10.0

    @property
    def smoke(self) -> bool:
        """True if these sizes only show that an experiment works."""
        return self.profile_seconds == 0.0


SMOKE: Final = Sizes(prompts=8, timed=1, max_new_tokens=12, profile_seconds=0.0)


class Workbench:
    """A configuration's models and their files in one folder. Models are loaded at the first use."""

    def __init__(
        self,
        config: Config | Path | str,
        folder: Path,
        data: Path | None = None,
        sizes: Sizes = Sizes(),
        on_progress: Progress = no_progress,
        store: Path | None = None,
    ) -> None:
        """config: read at the first use. data: folder of the prompt files; without one the demo's
        prompts are used. store: an existing collection to use instead of the folder's own; missing
        drafters are replayed into it.
        """
        self._source = config
        self.folder = folder
        self.data = data
        self.sizes = sizes
        self.on_progress = on_progress
        self.store = store

    def data_file(self, name: str) -> Path:
        """Return a file of the data folder. Raises ConfigError if the folder or the file is missing."""
        if self.data is None:
            raise ConfigError(f"{name} is needed; name its folder with --data or PACELINE_DATA")
        path = self.data / name
        if not path.is_file():
            raise ConfigError(f"{self.data}: no {name} in this data folder")
        return path

    @cached_property
    def config(self) -> Config:
        """The configuration with all paths in the folder and without shared prompt beginnings."""
        read = self._source if isinstance(self._source, Config) else load_config(self._source)
        config = without_prefixes(in_folder(read, self.folder))
        return config if self.store is None else with_store(config, self.store)

    def with_drafters(
        self, name: str, drafters: Mapping[str, DrafterSection], most: int | None = None
    ) -> Workbench:
        """Return a workbench with other drafters, at most this number of prompts per task, and files
        of its own in a sub-folder.
        """
        config = self.config.model_copy(update={"drafters": dict(drafters)})
        num_prompts = self.sizes.prompts or DEFAULT_PROMPTS
        sizes = replace(self.sizes, prompts=min(num_prompts, most or num_prompts))
        return Workbench(config, self.folder / name, self.data, sizes, self.on_progress)

    @cached_property
    def prompts(self) -> PromptSets:
        """A number of prompts per task, by hash of id, so that more prompts include the fewer.

        Of a data folder, only prompts that no drafter was trained on. With a given store there is none
        to collect, and those to time are not among its own.
        """
        in_store: set[str] = set()
        num_collected = self.sizes.prompts or 0
        if self.store is not None:
            in_store = {row.prompt_id for row in read_trajectories(open_trajectories(self.store))}
            num_collected = 0
        if self.data is not None:
            return read_tasks(self.data, num_collected, self.sizes.timed, in_store, self.trained_on)
        try:
            collected, timed = demo_prompts(num_collected, self.sizes.timed)
        except ValueError as error:
            raise ConfigError(f"{error}; name a folder with more prompts with --data") from error
        return PromptSets(collected, [prompt for prompt in timed if prompt.id not in in_store])

    @cached_property
    def trained_on(self) -> TrainedOn:
        """The prompts that a drafter is known to have been trained on."""
        records = [drafter.trained_on() for drafter in self.pace.parts.drafters.values()]
        found = join([record for record in records if record is not None])
        assert found is not None  # no record is unknown
        return found

    @cached_property
    def spec_bench(self) -> list[PromptRecord]:
        """First turns of the Spec-Bench questions, by category."""
        questions = read_spec_bench(self.data_file(SPEC_BENCH))
        return _of_each(questions, _SMOKE_QUESTIONS) if self.sizes.smoke else questions

    @cached_property
    def pace(self) -> Pace:
        """The models and drafters, without a policy."""
        return Pace(build(self.config))

    @cached_property
    def decode(self) -> Callable[[list[int]], str]:
        """The function from tokens to text, without a model."""
        return Detokenizer.of(load_tokenizer(self.config.target))

    @cached_property
    def collection(self) -> LoadedCollection:
        """The collected prompts and every drafter's replay of them."""
        return self.collect(self.prompts.collected)

    @cached_property
    def aligned(self) -> LoadedCollection:
        """The same with each draft model's own outputs; a given store must have them."""
        return self.collect(self.prompts.collected, alignment=self.store is None)

    def collect(
        self, prompts: Sequence[PromptRecord], into: Path | None = None, alignment: bool = False
    ) -> LoadedCollection:
        """Return these prompts of the collection; missing ones are decoded.

        Without prompts, return those of a given store, at most `sizes.prompts` per task. into: another
        folder than the workbench's own.
        """
        store = into or self.config.paths.store
        collect_trajectories(
            self.pace,
            prompts,
            store,
            self.sizes.max_new_tokens,
            alignment=alignment,
            on_progress=self.on_progress,
        )
        loaded = load_collection(store, stored_drafters(self.config))
        if prompts:
            wanted = {prompt.id for prompt in prompts}
        else:
            wanted = {p.prompt_id for p in _of_each_task(loaded.prompts, self.sizes.prompts)}
        return loaded._replace(prompts=[p for p in loaded.prompts if p.prompt_id in wanted])

    def arms(self, drafters: Sequence[str], own_lengths: bool = False) -> list[str]:
        """Return `none` and these drafters at every draft length, or at their own lengths alone."""
        lacking = [name for name in drafters if name not in self.config.drafters]
        if lacking:
            raise ConfigError(
                f"this experiment needs a drafter '{lacking[0]}', and the configuration has "
                f"{', '.join(self.config.drafters) or 'none'}"
            )
        among = [NONE, *drafters]
        if own_lengths:
            return among
        return [arm for arm in arms_of(self.config) if split_arm(arm)[0] in among]

    def priced(
        self, prompts: Sequence[CollectedPrompt], costs: CostTable | None = None
    ) -> list[CollectedPrompt]:
        """Return prompts with the rounds of drafters whose rounds depend on prices."""
        return price_rounds(prompts, self.config, costs or self.costs)

    @cached_property
    def costs(self) -> CostTable:
        """This machine's cost table; the folder's, if it was measured on the same machine."""
        path = self.config.paths.costs
        parts = self.pace.parts
        try:
            table = CostTable.load(path)
            identities = {name: drafter.identity() for name, drafter in parts.drafters.items()}
            table.check(parts.drafters, identity_of_arms(identities))
            fits = self._same_machine(table)
        except ArtefactError:  # there is none yet, or one of other drafters
            fits = False
        if not fits:
            return profile(self.pace, self.on_progress, self.sizes.profile_seconds)
        for drafter in parts.drafters.values():
            drafter.price(table)
        return table

    def track(self, stage: str, items: Sequence[T]) -> Iterator[T]:
        """Yield the items and report how many of them are done."""
        for done, item in enumerate(items):
            self.on_progress(stage, done, len(items))
            yield item
        self.on_progress(stage, len(items), len(items))

    def doubt(self) -> str | None:
        """Return the doubt about the cost table, if one was used."""
        return self.costs.doubt() if "costs" in self.__dict__ else None

    def _same_machine(self, table: CostTable) -> bool:
        now = {
            "cpu": cpu_model(),
            "threads": str(torch.get_num_threads()),
            "target": self.pace.parts.target.fingerprint(),
            "dtype of target": str(self.pace.parts.target.dtype).removeprefix("torch."),
        }
        return all(table.fingerprint.get(key) == value for key, value in now.items())

    def settings(self, prompts: Sequence[CollectedPrompt] | None = None) -> dict[str, str | int]:
        """Return the conditions of this run, for the findings.

        prompts: the used prompts, if they are not a number per task.
        """
        used: dict[str, str | int]
        if prompts is None:
            used = {"prompts per task": self._prompts_per_task()}
            used |= {"timed prompts per task": self.sizes.timed}
            if self.data is not None and self.store is None:
                used |= {_LEFT_OUT: self.prompts.num_left_out}
        else:
            used = {"prompts": len(prompts)}
        return {
            "dtype": str(self.pace.parts.target.dtype).removeprefix("torch."),
            **used,
            "maximum new tokens": self.sizes.max_new_tokens,
            "prompts from": "the demo" if self.data is None else "the data folder",
            **({"smoke run": "its figures mean nothing"} if self.sizes.smoke else {}),
        }

    def _prompts_per_task(self) -> str | int:
        """Return the number of collected prompts per task, by task where some have fewer."""
        if self.sizes.prompts is None:
            return "all of the store"
        counts = Counter(prompt.domain for prompt in self.prompts.collected)
        if all(count == self.sizes.prompts for count in counts.values()):
            return self.sizes.prompts
        return ", ".join(f"{task} {count}" for task, count in counts.items())


def _of_each(prompts: Sequence[PromptRecord], num: int) -> list[PromptRecord]:
    """Return a number of prompts per domain, by hash of id."""
    return [
        prompt
        for domain in dict.fromkeys(p.domain for p in prompts)
        for prompt in take_by_hash([p for p in prompts if p.domain == domain], num)
    ]


def _of_each_task(prompts: Sequence[CollectedPrompt], num: int | None) -> list[CollectedPrompt]:
    if num is None:
        return list(prompts)
    named = [PromptRecord(p.prompt_id, p.domain, "") for p in prompts]
    kept = {record.id for record in _of_each(list(dict.fromkeys(named)), num)}
    return [p for p in prompts if p.prompt_id in kept]
