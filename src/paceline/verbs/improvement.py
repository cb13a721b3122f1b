"""Train a drafter of the configuration further on the requests of a decision log."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.config import parse
from paceline.contracts import NONE
from paceline.distillation.improve import DrafterFolder, improve
from paceline.distillation.improve_settings import (
    OF_A_NEW_DRAFTER,
    OF_THE_COURSE,
    ImproveSettings,
)
from paceline.distillation.outputs import open_target
from paceline.distillation.settings import DistillSettings
from paceline.drafting.catalog import check_settings
from paceline.drafting.draft_model import DraftModel, DraftModelSettings
from paceline.errors import ConfigError, suggest_name
from paceline.models.loading import load_config
from paceline.selection import is_policy
from paceline.store import is_collection, read_decisions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from paceline.config import Config
    from paceline.distillation.improve_report import ImproveReport
    from paceline.distillation.train import TrainingProgress


def improve_drafter(
    config: Config,
    drafter: str,
    log: Path | None = None,
    out: Path | None = None,
    settings: ImproveSettings | None = None,
    data: Sequence[Path] = (),
    on_progress: Callable[[TrainingProgress], None] = lambda progress: None,
) -> ImproveReport:
    """Train a drafter further on logged requests, and adopt it if held-out acceptance rises.

    drafter: its name in the configuration, of kind `draft_model`. log: a decision log with token ids,
    by default the configuration's. settings: by default `improve_settings`. `out`, `data` and what is
    written: see `distillation.improve.improve`. What must be measured or learned again is in the
    report's notes.

    Raises ConfigError for a drafter that is no draft model in a folder, without a log and for a log with
    too few requests of this target; StoreError for a log that cannot be read.
    """
    section, folder = _find(config, drafter)
    log = log or config.log.folder
    if log is None:
        raise ConfigError("there is no log to learn from; set log.folder in the configuration")
    settings = settings or improve_settings(config)
    decisions, notes = read_decisions(log)
    pace = open_target(config, settings.answers_drafter if data else NONE)
    DraftModel.check(drafter, section, pace.parts.vocabulary)
    found = DrafterFolder(drafter, folder, section.num_draft_tokens)
    report = improve(pace, found, decisions, settings, on_progress, out, data)
    if report.is_adopted:
        notes += [*report.notes, *_next_steps(config, drafter, out)]
    return replace(report, notes=notes)


def improve_settings(
    config: Config, changes: Mapping[str, Any] | None = None, where: str = "improve"
) -> ImproveSettings:
    """Return the settings of an improvement: those of the section `distillation`, with changes.

    The section's learning rate, epochs and shape are of a new drafter and do not apply. where: names
    the source of the changes in errors.
    """
    left_out = {*OF_A_NEW_DRAFTER, *OF_THE_COURSE}
    own = {
        name: value
        for name, value in config.distillation.items()
        if name in DistillSettings.model_fields and name not in left_out
    }
    return parse(ImproveSettings, own | dict(changes or {}), where)


def _find(config: Config, drafter: str) -> tuple[DraftModelSettings, Path]:
    """Return a drafter's settings and folder. Raises ConfigError if it cannot be trained."""
    if drafter not in config.drafters:
        hint = suggest_name(drafter, config.drafters)
        raise ConfigError(f"there is no drafter '{drafter}' in the configuration{hint}")
    kind = config.drafters[drafter].kind
    if kind != DraftModel.kind:
        raise ConfigError(
            f"drafter '{drafter}' is a {kind}, which has no weights of its own to train; name one of "
            f"kind {DraftModel.kind}"
        )
    section: Any = check_settings(drafter, config.drafters[drafter])
    folder = Path(section.model)
    if not folder.is_dir():
        raise ConfigError(
            f"drafter '{drafter}': {section.model} is no local folder, and its weights would be "
            "changed; save the model in a folder and name that as 'model'"
        )
    if section.adapter is not None:
        raise ConfigError(
            f"drafter '{drafter}' has the adapter {section.adapter}; merge it into the weights, save "
            "them in a folder and name that as 'model'"
        )
    if getattr(load_config(section), "quantization_config", None) is not None:
        raise ConfigError(
            f"drafter '{drafter}': the weights in {folder} are quantised; train unquantised ones"
        )
    return section, folder


def _next_steps(config: Config, drafter: str, out: Path | None) -> list[str]:
    """Return the steps that remain until the new weights are used fully."""
    notes = []
    if out is not None:
        notes.append(f"to use the new weights, set drafters.{drafter}.settings.model to {out}")
    else:
        notes.append("a running server keeps the weights that it loaded until it is started again")
    paths = config.paths
    made = []
    if is_collection(paths.store):
        made.append("`paceline collect PROMPTS`")
    if paths.costs.is_file():
        made.append("`paceline profile`")
    if is_policy(paths.policy):
        made.append("`paceline learn`")
    if made:
        notes.append(
            "what was collected, measured and learned with the weights before is refused for the new "
            f"ones: run {', then '.join(made)}; until then drafter 'auto' is a lookup"
        )
    return notes
