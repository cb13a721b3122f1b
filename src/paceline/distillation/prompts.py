"""The prompts of a distillation: which are trained on, and which validate.

The prompt files of the data, of the other tasks that are measured and of the pre-training text are
split together, so that no text is both trained on and judged, whatever file it is in. Knows no target.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from paceline.distillation.texts import is_prompt_file
from paceline.errors import ConfigError, shorten, suggest_name
from paceline.store import (
    TrainedOn,
    is_validation,
    read_prompts,
    take_by_hash,
    take_part_of_files,
)
from paceline.store.trained_on import hash_prompt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.contracts import PromptRecord
    from paceline.distillation.settings import DistillSettings


class PromptFile(NamedTuple):
    """The prompts of one file, up to its cap."""

    name: str  # the file's, without suffix
    path: Path
    training: list[PromptRecord]  # none if the file is only measured
    validation: list[PromptRecord]


class PromptChoice(NamedTuple):
    """The prompts of all files of a distillation.

    may_learn: the prompts whose references pre-training may read. They are those of the part, beyond
    the caps as well, that do not validate.
    """

    files: list[PromptFile]
    measured: list[PromptFile]
    may_learn: TrainedOn


def choose_prompts(
    data: Sequence[Path], settings: DistillSettings, also_measure: Sequence[Path] = ()
) -> PromptChoice:
    """Return the prompts of the files to train on and of the other files to measure on.

    Each file has the prompts of `settings.part` with the lowest hashes up to its cap; validation takes
    its share of them. Raises ConfigError on a file that cannot be read, on a cap of no file, or if one
    id belongs to the prompts of two files.
    """
    named = [Path(path) for path in data]
    others = [path for path in map(Path, also_measure) if path not in named]
    # a file that is also trained or measured on is there already
    texts = [
        path
        for path in settings.pretrain_text
        if path not in (*named, *others) and is_prompt_file(path)
    ]
    paths = [*named, *others, *texts]
    _check_caps(paths, settings)
    parts = take_part_of_files([read_prompts([path]) for path in paths], settings.part)
    share = settings.validation_share
    if settings.part == "all":  # other parts have every text once
        parts = _without_twins(parts, share)
    chosen = [
        _split(path, records, settings, is_measured=i >= len(named))
        for i, (path, records) in enumerate(zip(paths, parts, strict=True))
    ]
    held_out = TrainedOn.of(r.prompt for part in parts for r in part if is_validation(r.id, share))
    may_learn = TrainedOn.of(r.prompt for part in parts for r in part if r.prompt not in held_out)
    end = len(named) + len(others)
    _check_ids(chosen[:end])
    return PromptChoice(chosen[: len(named)], chosen[len(named) : end], may_learn)


def check_prompts(
    data: Sequence[Path], settings: DistillSettings, also_measure: Sequence[Path] = ()
) -> None:
    """Raise ConfigError unless there are prompts to train on and to validate on.

    A caller reads the files twice by it, but before anything is loaded or measured.
    """
    files = choose_prompts(data, settings, also_measure).files
    training = sum(len(file.training) for file in files)
    validation = sum(len(file.validation) for file in files)
    if not training or not validation:
        raise ConfigError(
            f"the files have {training} prompts to train on and {validation} to validate on in the "
            f"part '{settings.part}': both are needed; give more prompts, --set part=all, or "
            f"--set validation_share=0.2 (now {settings.validation_share:g})"
        )


def _without_twins(
    files: Sequence[Sequence[PromptRecord]], share: float
) -> list[list[PromptRecord]]:
    """Return the prompts of each file without those to train on whose text also validates."""
    held_out = {hash_prompt(r.prompt) for own in files for r in own if is_validation(r.id, share)}
    return [
        [r for r in own if is_validation(r.id, share) or hash_prompt(r.prompt) not in held_out]
        for own in files
    ]


def _check_caps(paths: Sequence[Path], settings: DistillSettings) -> None:
    """Raise ConfigError if `max_prompts` names no file: a misspelt name would cap nothing."""
    names = [path.stem for path in paths]
    caps = settings.max_prompts if isinstance(settings.max_prompts, dict) else {}
    for name in caps:
        if name not in names:
            raise ConfigError(
                f"max_prompts names {shorten(name)}, which is none of the files"
                f"{suggest_name(name, names)}; give the name of a file without its suffix"
            )


def _check_ids(files: Sequence[PromptFile]) -> None:
    """Raise ConfigError if two prompts have one id, by which the texts of a training are told apart."""
    seen: dict[str, tuple[str, Path]] = {}
    for file in files:
        for record in (*file.training, *file.validation):
            prompt, path = seen.setdefault(record.id, (record.prompt, file.path))
            if prompt != record.prompt:
                raise ConfigError(
                    f"the id {shorten(record.id)} belongs to two prompts, of {path} and {file.path}; "
                    "rename one of them"
                )


def _split(
    path: Path, records: Sequence[PromptRecord], settings: DistillSettings, is_measured: bool
) -> PromptFile:
    capped = take_by_hash(records, settings.cap_of(path.stem))
    validation = [r for r in capped if is_validation(r.id, settings.validation_share)]
    kept = {r.id for r in validation}
    training = [] if is_measured else [r for r in capped if r.id not in kept]
    return PromptFile(path.stem, path, training, validation)
