"""What kinds of drafter there are, which of them a configuration uses, and what its arms hold.

All of a kind is read from its class: the first line of its module, its needs, its settings' schema.
Whether an arm can be used is the doctor's judgement. Only `memory` loads models.
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
class Arm:
    """One configured drafter. Bytes are None unless asked for."""

    name: str
    problem: str | None = None
    weight_bytes: int | None = None  # held before any request
    row_bytes: int | None = None  # what one request of `DrafterList.row_tokens` tokens adds


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of drafter: what it is, what it must be given, which arms are of it."""

    kind: str
    summary: str
    needs: list[str]
    settings: dict[str, str]  # name -> default, or "required"
    arms: list[Arm] = field(default_factory=list)

    @property
    def required(self) -> list[str]:
        """Settings without which it cannot be configured."""
        return [name for name, default in self.settings.items() if default == "required"]


@dataclass(frozen=True, slots=True)
class DrafterList:
    """What `paceline drafters` prints."""

    kinds: list[Kind]
    target: str | None  # of the configuration, where one was given
    row_tokens: int | None = None

    @property
    def problems(self) -> list[str]:
        arms = [arm for kind in self.kinds for arm in kind.arms]
        return [f"drafter '{arm.name}': {arm.problem}" for arm in arms if arm.problem]


def drafters(config: Config | None = None, memory: bool = False) -> DrafterList:
    """Every kind of the catalogue and of the configuration, with the configuration's arms.

    memory: load the models and decode a few tokens with each arm, to see what it holds.
    """
    classes = dict(CATALOG)
    arms: dict[str, list[Arm]] = {NONE: [Arm(NONE)]}
    row_tokens = None
    if config is not None:
        problems = {check.name: check.problem for check in doctor(config).drafters}
        held: dict[str, tuple[int, int]] = {}
        if memory and not any(problems.values()):
            held, row_tokens = _measure(config)
            arms[NONE] = [Arm(NONE, None, *held[NONE])]
        for name, section in config.drafters.items():
            arm = Arm(name, problems[name], *held.get(name, (None, None)))
            arms.setdefault(section.kind, []).append(arm)
            if section.kind not in classes and (found := _own(name, section.kind)) is not None:
                classes[section.kind] = found
    kinds = [describe(name, found, arms.get(name, [])) for name, found in classes.items()]
    unknown = [Kind(name, "", [], {}, of_it) for name, of_it in arms.items() if name not in classes]
    return DrafterList([*kinds, *unknown], config.target.model if config else None, row_tokens)


def _own(name: str, kind: str) -> type[Drafter] | None:
    """The class of a kind from outside the catalogue; None where the doctor has said why not."""
    try:
        return find_kind(name, kind)
    except PacelineError:
        return None


def describe(name: str, kind: type[Drafter], arms: list[Arm]) -> Kind:
    """A kind, named as a configuration names it, from what its class says."""
    text = vars(kind).get("__doc__") or sys.modules[kind.__module__].__doc__ or ""
    needs = [f.name.replace("_", " ") for f in fields(Needs) if getattr(kind.needs, f.name)]
    settings = {
        key: "required"
        if info.is_required()
        else _plain(info.get_default(call_default_factory=True))
        for key, info in kind.Settings.model_fields.items()
    }
    return Kind(name, text.strip().split("\n\n")[0].replace("\n", " "), needs, settings, arms)


def _plain(default: Any) -> str:
    return "none" if default is None else str(default)


def _measure(config: Config) -> tuple[dict[str, tuple[int, int]], int]:
    """({arm: (bytes when loaded, bytes that one row adds)}, the row's tokens)."""
    parts = build(config)
    num_prompt = max(1, min(_PROMPT_TOKENS, parts.target.context_length - _NEW_TOKENS))
    prompt = tuple(i % parts.vocabulary.num_tokens for i in range(num_prompt))
    pace = Pace(parts)
    held = {}
    for name, drafter in parts.drafters.items():
        at_load = drafter.num_bytes()
        most = _most_bytes(pace.driver, Request(name, prompt, _NEW_TOKENS, drafter=name), drafter)
        held[name] = (at_load, max(at_load, most) - at_load)
    return held, num_prompt + _NEW_TOKENS


def _most_bytes(driver: Driver, request: Request, drafter: Drafter) -> int:
    """Return the most bytes that a drafter holds after any round of a request."""
    sizes: list[int] = []
    ended: SimpleQueue[RequestUpdate] = SimpleQueue()

    def look(progress: RequestUpdate) -> None:  # between two steps
        sizes.append(drafter.num_bytes())
        if progress.completion is not None:
            ended.put(progress)

    driver.submit(request, look)
    raise_failure(ended.get())
    return max(sizes)
