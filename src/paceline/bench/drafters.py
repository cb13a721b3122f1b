"""The kinds of drafters, the arms of a configuration, and the memory that they need.

A kind's facts come from its class: the first line of its module, its needs, the schema of its
settings. The doctor decides whether an arm can be used. Only `memory` loads models.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final

from paceline.assembly import Pace, build
from paceline.bench.doctor import doctor
from paceline.contracts import NONE, Request
from paceline.drafting.base import Needs
from paceline.drafting.catalog import CATALOG, find_kind
from paceline.engine import raise_failure
from paceline.errors import PacelineError

if TYPE_CHECKING:
    from paceline.config import Config
    from paceline.drafting.base import Drafter
    from paceline.engine import Driver, RequestUpdate

_PROMPT_TOKENS: Final = 512
_NEW_TOKENS: Final = 8


@dataclass(frozen=True, slots=True)
class ConfiguredDrafter:
    """A drafter of a configuration. Bytes are None unless they were measured."""

    name: str
    problem: str | None = None
    weight_bytes: int | None = None  # before any request
    row_bytes: int | None = None  # added by one request of `DrafterList.row_tokens` tokens


@dataclass(frozen=True, slots=True)
class DrafterKind:
    """One kind of drafter: a summary, its needs and settings, and its configured arms."""

    kind: str
    summary: str
    needs: list[str]
    settings: dict[str, str]  # name -> default, or "required"
    arms: list[ConfiguredDrafter] = field(default_factory=list)

    @property
    def required(self) -> list[str]:
        """Settings without a default."""
        return [name for name, default in self.settings.items() if default == "required"]


@dataclass(frozen=True, slots=True)
class DrafterList:
    """The output of `paceline drafters`."""

    kinds: list[DrafterKind]
    target: str | None  # None without a configuration
    row_tokens: int | None = None

    @property
    def problems(self) -> list[str]:
        arms = [arm for kind in self.kinds for arm in kind.arms]
        return [f"drafter '{arm.name}': {arm.problem}" for arm in arms if arm.problem]


def drafters(config: Config | None = None, memory: bool = False) -> DrafterList:
    """Return every kind of the catalogue and of the configuration, with the configured arms.

    memory: load the models and decode a few tokens with each arm, to measure its memory.
    """
    classes = dict(CATALOG)
    arms: dict[str, list[ConfiguredDrafter]] = {NONE: [ConfiguredDrafter(NONE)]}
    row_tokens = None
    if config is not None:
        problems = {check.name: check.problem for check in doctor(config).drafters}
        held: dict[str, tuple[int, int]] = {}
        if memory and not any(problems.values()):
            held, row_tokens = _measure_memory(config)
            arms[NONE] = [ConfiguredDrafter(NONE, None, *held[NONE])]
        for name, section in config.drafters.items():
            arm = ConfiguredDrafter(name, problems[name], *held.get(name, (None, None)))
            arms.setdefault(section.kind, []).append(arm)
            if section.kind not in classes and (own := _find_own(name, section.kind)) is not None:
                classes[section.kind] = own
    kinds = [describe(name, kind, arms.get(name, [])) for name, kind in classes.items()]
    unknown = [
        DrafterKind(name, "", [], {}, of_it) for name, of_it in arms.items() if name not in classes
    ]
    return DrafterList([*kinds, *unknown], config.target.model if config else None, row_tokens)


def _find_own(name: str, kind: str) -> type[Drafter] | None:
    """Return the class of a kind outside the catalogue, None if the doctor reports a problem."""
    try:
        return find_kind(name, kind)
    except PacelineError:
        return None


def describe(name: str, kind: type[Drafter], arms: list[ConfiguredDrafter]) -> DrafterKind:
    """Return a kind's facts from its class. name: as in a configuration."""
    text = vars(kind).get("__doc__") or sys.modules[kind.__module__].__doc__ or ""
    needs = [f.name.replace("_", " ") for f in fields(Needs) if getattr(kind.needs, f.name)]
    settings = {
        key: "required"
        if info.is_required()
        else _plain(info.get_default(call_default_factory=True))
        for key, info in kind.Settings.model_fields.items()
    }
    return DrafterKind(
        name, text.strip().split("\n\n")[0].replace("\n", " "), needs, settings, arms
    )


def _plain(default: Any) -> str:
    return "none" if default is None else str(default)


def _measure_memory(config: Config) -> tuple[dict[str, tuple[int, int]], int]:
    """Return {arm: (bytes when loaded, bytes that one row adds)} and the row's tokens."""
    parts = build(config)
    num_prompt = max(1, min(_PROMPT_TOKENS, parts.target.context_length - _NEW_TOKENS))
    prompt = tuple(i % parts.vocabulary.num_tokens for i in range(num_prompt))
    pace = Pace(parts)
    held = {}
    for name, drafter in parts.drafters.items():
        at_load = drafter.num_bytes()
        peak = _peak_bytes(pace.driver, Request(name, prompt, _NEW_TOKENS, drafter=name), drafter)
        held[name] = (at_load, max(at_load, peak) - at_load)
    return held, num_prompt + _NEW_TOKENS


def _peak_bytes(driver: Driver, request: Request, drafter: Drafter) -> int:
    """Return the largest memory of a drafter after any round of a request."""
    sizes: list[int] = []
    ended: SimpleQueue[RequestUpdate] = SimpleQueue()

    def record(update: RequestUpdate) -> None:  # between two steps
        sizes.append(drafter.num_bytes())
        if update.completion is not None:
            ended.put(update)

    driver.submit(request, record)
    raise_failure(ended.get())
    return max(sizes)
