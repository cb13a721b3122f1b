"""The prompts of the four tasks with other instructions, or with none.

The demo's prompts of a task all begin with the same line, so a policy could learn that line alone.
Here the line is removed and, unless the prompt is to stay bare, one of several other instructions is
put before or after the text. The instructions for training and for testing are disjoint. A variant
keeps the id of its original, so that a prompt seen in training is recognised in any wording.
Knows no model and no tokens.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import yaml

from paceline.errors import ConfigError
from paceline.experiments.demo_prompts import PREFIXES
from paceline.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.contracts import PromptRecord

Kind = Literal["paraphrased", "bare"]
Use = Literal["train", "test"]

_TEXT: Final = "{text}"
_PATH: Final = files("paceline.experiments") / "prompts" / "instructions.yaml"
TEMPLATES: Final[dict[Use, dict[str, list[str]]]] = yaml.safe_load(_PATH.read_text("utf-8"))
"""By use and task; `{text}` is the place of the text."""


def paraphrased(records: Sequence[PromptRecord], use: Use = "test") -> list[PromptRecord]:
    """Return the records with other instructions, selected by the hash of the id.

    Raises ConfigError for a task without templates, or a prompt without its task's first line.
    """
    return [replace(record, prompt=_worded(record, use)) for record in records]


def bare(records: Sequence[PromptRecord]) -> list[PromptRecord]:
    """Return the records without instructions. Raises ConfigError as `paraphrased` does."""
    return [replace(record, prompt=_text_of(record)) for record in records]


def rewrite(
    records: Sequence[PromptRecord], out: Path | str, kind: Kind, use: Use = "test"
) -> list[PromptRecord]:
    """Write one kind of variant as JSONL with id, domain and prompt, and return the records."""
    variants = bare(records) if kind == "bare" else paraphrased(records, use)
    rows = [{"id": r.id, "domain": r.domain, "prompt": r.prompt} for r in variants]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        write_atomically(Path(out), lines.encode())
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error})") from error
    return variants


def _worded(record: PromptRecord, use: Use) -> str:
    text = _text_of(record)
    templates = TEMPLATES[use][record.domain]
    digest = hashlib.sha256(f"{use}:{record.id}".encode()).digest()
    template = templates[int.from_bytes(digest[:8], "big") % len(templates)]
    return template.replace(_TEXT, text)  # not format(): the text may hold braces


def _text_of(record: PromptRecord) -> str:
    """Return a prompt without its task's first line."""
    prefix = PREFIXES.get(record.domain)
    if prefix is None:
        raise ConfigError(
            f"prompt '{record.id}': there are no other instructions for the task '{record.domain}'; "
            f"tasks with instructions: {', '.join(PREFIXES)}"
        )
    text = record.prompt.removeprefix(prefix)
    if text == record.prompt or not text.strip():
        raise ConfigError(
            f"prompt '{record.id}' has no instruction to change: its first line must be "
            f"'{prefix.strip()}', followed by a text"
        )
    return text
