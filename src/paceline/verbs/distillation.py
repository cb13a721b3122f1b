"""Train drafters, and suggest shapes for them, at prices that are measured on this machine.

A student's speed does not depend on its weights' values, so it is timed before it is trained, with the
workloads of the cost table on a reduced grid.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch

from paceline.assembly import Pace, Parts, build
from paceline.bench.cost_measurement import (
    ROUNDS_PER_LENGTH,
    plain_driver,
    time_drafts,
    time_forwards,
    time_rounds,
)
from paceline.bench.measured_rows import cached_rows
from paceline.bench.profile import measure_cells, with_slower_verification
from paceline.config import parse
from paceline.contracts import NONE, no_progress
from paceline.costs.table import CostTable
from paceline.distillation.measures import LONGEST
from paceline.distillation.outputs import open_target
from paceline.distillation.prices import CONTEXT, Prices
from paceline.distillation.prompts import check_prompts
from paceline.distillation.run import check_paths
from paceline.distillation.run import distill as run_distill
from paceline.distillation.settings import DistillationSection
from paceline.distillation.student import (
    build_student,
    check_tokenizer,
    make_student,
    num_parameters,
)
from paceline.distillation.suggest import (
    SuggestedShape,
    Suggestions,
    TrainedDrafter,
    check_vocabulary,
    read_quality,
    shapes_for,
)
from paceline.distillation.train import TrainingProgress
from paceline.drafting.draft_length import StopSettings
from paceline.drafting.draft_model import DraftModel
from paceline.drafting.none import NoneDrafter
from paceline.errors import ConfigError
from paceline.models.language_model import LanguageModel
from paceline.models.loading import DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from paceline.config import Config, DrafterSection
    from paceline.contracts import Progress
    from paceline.distillation.facts import DistillReport
    from paceline.distillation.settings import DistillSettings, StudentShape
    from paceline.distillation.suggest import RecordedQuality

_STUDENT: Final = "student"
_DRAFTS: Final = (1, 4, 16)  # drafted tokens to measure; a proposal is nearly linear between them
_WIDTHS: Final = (1, 2, 3, 5, 9, 17)
_REPEATS: Final = 5  # of every workload: single proposals of small models are noisy


def distill(
    source: Config | Pace,
    data: Sequence[Path] = (),
    out: Path | None = None,
    settings: DistillSettings | None = None,
    on_progress: Callable[[TrainingProgress], None] = lambda progress: None,
    also_measure: Sequence[Path] = (),
) -> DistillReport:
    """Train a drafter for the target, and keep the weights that are fastest at this machine's prices.

    What is not given is read from the configuration's section `distillation`. The same call continues a
    killed run. `distillation.run.distill` lists the errors and what is written; it also runs alone,
    without prices.
    """
    config = source.parts.config if isinstance(source, Pace) else source
    section = parse(DistillationSection, config.distillation, "distillation")
    settings = settings or section.settings()
    data, also_measure = data or section.data, also_measure or section.measure
    out = out or section.out
    if not data or out is None:
        raise ConfigError(
            "distillation needs prompt files and a folder to write; name them as arguments or as 'data' "
            "and 'out' of the section 'distillation'"
        )
    check_paths(data, also_measure, out)
    check_prompts(data, settings, also_measure)
    pace = source if isinstance(source, Pace) else open_target(source, settings.answers_drafter)

    def report(stage: str, done: int, total: int) -> None:
        on_progress(TrainingProgress(stage, done, total))

    check_tokenizer(settings.start_from, pace.parts.vocabulary)
    prices = measure_prices(pace, settings, report)
    return run_distill(pace, data, out, settings, on_progress, also_measure, prices)


def measure_prices(
    source: Config | Pace | Parts, settings: DistillSettings, on_progress: Progress = no_progress
) -> Prices:
    """Return the prices of the student that these settings make, measured in a few seconds.

    Raises ConfigError for settings that make no student, or a target without room for a draft.
    """
    parts = _parts_of(source)
    student = _placed(parts, make_student(parts.target, settings), settings.dtype)
    return _measure(parts, _STUDENT, student, partial(on_progress, "measure student"))


def suggest_shapes(config: Config, on_progress: Progress = no_progress) -> Suggestions:
    """Return student shapes for the configuration's target, with measured prices.

    Draft models of the configuration that `distill` has trained for this target are measured, too;
    other drafters need not exist. Raises ConfigError for a target that has no smaller student, or whose
    vocabulary a student cannot have.
    """
    recorded = {name: _quality_of(own) for name, own in config.drafters.items()}
    distilled = {name: quality for name, quality in recorded.items() if quality is not None}
    named = {name: config.drafters[name] for name in distilled}
    parts = build(config.model_copy(update={"drafters": named}))
    written_by = parts.target.fingerprint()
    others = [n for n, q in distilled.items() if q.target not in ("", written_by)]
    rates = {n: q.match_rate for n, q in distilled.items() if n not in others}
    target: PreTrainedModel = parts.target.model
    if parts.target.encoder is not None:
        raise ConfigError(
            f"{type(target).__name__} has an encoder, and shapes of students with one are not proposed "
            "yet, since no rule says how deep their encoders should be; set 'shape' yourself"
        )
    check_vocabulary(target.config, parts.target.num_logits, parts.vocabulary.num_tokens)
    shapes = shapes_for(target.config)
    total = len(rates) + len(shapes)
    trained, suggested = [], []
    for name, rate in rates.items():
        model: Any = parts.drafters[name]
        prices = _measure(parts, name, model.model)
        trained.append(TrainedDrafter(name, num_parameters(model.model.model), rate, prices))
        on_progress("measure shapes", len(trained), total)
    for shape in shapes:
        student = _new_student(parts, shape, "bfloat16")
        prices = _measure(parts, _STUDENT, student)
        suggested.append(SuggestedShape(shape, num_parameters(student.model), prices))
        on_progress("measure shapes", len(trained) + len(suggested), total)
    suggested.sort(key=lambda own: own.num_parameters)
    return Suggestions(tuple(suggested), tuple(trained), tuple(others))


def _quality_of(section: DrafterSection) -> RecordedQuality | None:
    model = section.settings.get("model")
    if section.kind != DraftModel.kind or not isinstance(model, str):
        return None
    return read_quality(model)


def _parts_of(source: Config | Pace | Parts) -> Parts:
    if isinstance(source, Pace):
        return source.parts
    # the drafters of the configuration need not exist
    return (
        source if isinstance(source, Parts) else build(source.model_copy(update={"drafters": {}}))
    )


def _new_student(parts: Parts, shape: StudentShape, dtype: str) -> LanguageModel:
    return _placed(parts, build_student(parts.target.model, shape, "random", seed=0), dtype)


def _placed(parts: Parts, student: PreTrainedModel, dtype: str) -> LanguageModel:
    placed: Any = student.to(DTYPES[dtype])  # type: ignore[arg-type]
    return LanguageModel(placed.to(parts.target.device), _STUDENT)


def _measure(
    parts: Parts,
    arm: str,
    model: LanguageModel,
    on_run: Callable[[int, int], None] = lambda done, total: None,
) -> Prices:
    """Return the prices of a model that drafts for the target."""
    longest = min(LONGEST, parts.target.context_length // 4, model.context_length // 4)
    lengths = sorted({length for length in _DRAFTS if length < longest} | {longest})
    widths = sorted({width for width in _WIDTHS if width <= longest} | {1 + longest})
    # a workload's text grows by a token per round
    growth = ROUNDS_PER_LENGTH * (1 + len(lengths)) + longest + 2
    context = min(CONTEXT, parts.target.context_length - growth, model.context_length - growth)
    if longest < 1 or context < 1:
        raise ConfigError(
            f"the target's context of {parts.target.context_length} tokens has no room to measure a "
            f"draft, which takes {growth + 1}; use a target with a longer context"
        )
    stop = StopSettings(num_draft_tokens=longest)
    drafter = DraftModel.from_model(arm, model, parts.build_context(), stop)
    own = replace(parts, drafters={NONE: NoneDrafter(), arm: drafter})
    driver = plain_driver(own, max_rows=1)
    with torch.inference_mode(), cached_rows(own, [context]) as rows:
        workloads = [
            partial(time_forwards, own, rows, context, [[width - 1] for width in widths]),
            partial(time_drafts, own, arm, lengths, [1], rows, context),
            partial(time_rounds, own, driver, NONE, 1),
        ]
        cells = measure_cells(workloads, on_run, fewest=_REPEATS)
    table = CostTable({}, with_slower_verification(cells))
    return Prices.from_table(table, arm, longest, context)
