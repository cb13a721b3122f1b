"""The folder of an improved drafter: made as a copy, then put in the place of the old weights.

The weights are one file, so a process that loads the drafter gets the old ones or the new ones. The old
folder is kept under another name. Knows no training.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from paceline.distillation.model_folders import load_model, save_model
from paceline.errors import ArtefactError, ConfigError
from paceline.files import write_atomically
from paceline.intervals import Interval
from paceline.store.trained_on import TRAINED_ON

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedModel

    from paceline.store import TrainedOn

WEIGHTS: Final = "model.safetensors"
IMPROVEMENTS: Final = "improvements.json"
CARD: Final = "README.md"
HEADING: Final = "## Improved on logged requests"

_WEIGHT_FILES: Final = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*")
_ONE_FILE: Final = "100000GB"  # a shard that no drafter fills
# the record of prompts first: after a kill it may list too many, never too few
_IN_ORDER: Final = (TRAINED_ON, WEIGHTS, IMPROVEMENTS, CARD)


def weight_files(folder: Path) -> list[Path]:
    """Return a model's weight files and their index."""
    return sorted(path for pattern in _WEIGHT_FILES for path in folder.glob(pattern))


def make_candidate(folder: Path, student: PreTrainedModel, made: Path) -> None:
    """Write a copy of a drafter's folder with other weights, in the dtype of its own.

    The student is converted to that dtype.
    """
    shutil.rmtree(made, ignore_errors=True)
    weights = made.with_name(made.name + "-weights")
    shutil.copytree(folder, made, ignore=shutil.ignore_patterns(*_WEIGHT_FILES))
    stored = load_model(folder, "auto").dtype
    save_model(student.to(stored), weights, max_shard_size=_ONE_FILE)  # type: ignore[arg-type]
    (weights / WEIGHTS).replace(made / WEIGHTS)
    shutil.rmtree(weights)


def describe(made: Path, entry: Mapping[str, Any], trained_on: TrainedOn | None) -> None:
    """Add an improvement to a folder's records: its list, its card and its prompts."""
    entries = [*read_improvements(made), dict(entry)]
    write_atomically(made / IMPROVEMENTS, (json.dumps(entries, indent=1) + "\n").encode())
    card = made / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {entry['name']}: a drafter\n"
    write_atomically(card, with_section(text, entries).encode())
    if trained_on is not None:
        trained_on.save(made)


def read_improvements(folder: Path) -> list[dict[str, Any]]:
    """Return the improvements of a drafter so far. Raises ArtefactError if the file is damaged."""
    path = folder / IMPROVEMENTS
    if not path.is_file():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path}: cannot be read ({error}); copy it again") from error
    if not isinstance(entries, list):
        raise ArtefactError(f"{path}: not a list of improvements; copy it again")
    return entries


def with_section(card: str, entries: Sequence[Mapping[str, Any]]) -> str:
    """Return a card with the section of the improvements, which replaces an earlier one."""
    section = "\n\n".join(
        [
            HEADING,
            "Trained further on requests that the target served: their prompts and the target's\n"
            "answers, as token ids from a decision log. This folder holds none of them as text, but\n"
            "weights can repeat what they were trained on. Other sections are of the weights before.",
            _table(entries),
            "Held-out requests: one per conversation, whose prompts were not trained on. Block\n"
            "efficiency tau: tokens per target forward with drafts of K tokens, of a drafter that\n"
            "proposes its most likely token. Acceptance: the mean of sum min(p, q). Rises are paired,\n"
            "with 95% intervals.",
        ]
    )
    own = re.compile(rf"^{re.escape(HEADING)}$.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    kept = own.sub("", card).rstrip("\n")
    return f"{kept}\n\n{section}\n"


def _table(entries: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| | trained on | held out | K | tau before | tau after | rise | rise of match rate | "
        "rise of acceptance |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for i, entry in enumerate(entries, start=1):
        counts, rise = entry["counts"], entry["rise"]
        before, after = (entry[when]["block_efficiency"]["value"] for when in ("before", "after"))
        rises = " | ".join(
            "-" if rise[name] is None else Interval(**rise[name]).signed()
            for name in ("block_efficiency", "match_rate", "acceptance")
        )
        lines.append(
            f"| {i} | {counts['training']:,} answers | {counts['held_out']:,} | "
            f"{entry['num_draft_tokens']} | {before:.3f} | {after:.3f} | {rises} |"
        )
    return "\n".join(lines)


# --- publishing -----------------------------------------------------------------------------------


def free_name(folder: Path) -> Path:
    """Return the first of `<folder>.before`, `<folder>.before-2` and so on that does not exist."""
    number, path = 1, folder.with_name(f"{folder.name}.before")
    while path.exists():
        number += 1
        path = folder.with_name(f"{folder.name}.before-{number}")
    return path


def publish(adopted: Path, folder: Path, kept: Path) -> None:
    """Put an adopted copy's records and weights in the place of a folder's, which is kept as `kept`.

    A call after a kill finishes the work. Raises ConfigError if the folder cannot be written.
    """
    try:
        if not kept.exists():
            part = kept.with_name(kept.name + ".part")
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(folder, part)
            part.replace(kept)
        for name in _IN_ORDER:
            if (adopted / name).is_file():
                write_atomically(folder / name, (adopted / name).read_bytes())
        for path in weight_files(folder):
            if path.name != WEIGHTS:
                path.unlink()
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written ({error.strerror}); make it writable and run the same "
            f"command, or name another folder as 'out'; the new weights are in {adopted}"
        ) from error
