"""The four tasks' prompts asked otherwise: with other instructions, or with none.

The demo's prompts of one task all open with the same line, so a policy could learn that line by
heart. Here the line is taken off and, unless the prompt is to stay bare, one of several others is
put before or after the text. Those meant for training and those meant for testing share nothing.
A variant keeps the id of its original, so that what was trained on can be told by id in any wording.
Knows no model and no tokens.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from paceline.errors import ConfigError
from paceline.experiments.demo_prompts import PREFIXES
from paceline.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.contracts import PromptRecord

Kind = Literal["paraphrased", "bare"]
Use = Literal["train", "test"]

_TEXT: Final = "{text}"
TEMPLATES: Final[dict[Use, dict[str, tuple[str, ...]]]] = {
    "train": {
        "math": (
            "Work out the answer and show your reasoning.\n{text}",
            "Here is an arithmetic question. Explain each step before you answer.\n\n{text}",
            "{text}\n\nExplain how you get the answer.",
            "Question: {text}\nReasoning:",
            "A pupil asks: {text} Show the whole calculation.",
        ),
        "translation": (
            "Give the French version of this sentence.\n{text}",
            "What follows is English. Say it in French.\n\n{text}",
            "{text}\n\nWrite the above in French.",
            "English: {text}\nFrench:",
            "You are a translator from English into French. Your next text: {text}",
        ),
        "code": (
            "Write the body of this function.\n{text}",
            "Below is a Python signature. Implement it.\n\n{text}",
            "{text}\n\nFill in the missing code.",
            "# python 3\n# finish what is begun here\n{text}",
            "Continue this source file: {text}",
        ),
        "summary": (
            "Say in a sentence what this code does.\n{text}",
            "Write a docstring for the function below.\n\n{text}",
            "{text}\n\nWhat does this function do?",
            "Code:\n{text}\nDescription:",
            "Explain to a colleague the purpose of the following. {text}",
        ),
    },
    "test": {
        "math": (
            "How would you solve this? Go slowly.\n{text}",
            "{text}\nThink it through and give the result.",
            "Problem\n-------\n{text}\n\nSolution\n--------",
            "Please help me with my homework: {text}",
        ),
        "translation": (
            "How do you say this in French?\n{text}",
            "{text}\nTranslate the text above for readers in Paris.",
            "Source (en)\n-----------\n{text}\n\nTarget (fr)\n-----------",
            "Please put this into good French for me: {text}",
        ),
        "code": (
            "Can you code this up?\n{text}",
            "{text}\n    # TODO: the implementation goes here",
            "File: module.py\n---------------\n{text}",
            "Please program the rest of this for me: {text}",
        ),
        "summary": (
            "What is the point of this code?\n{text}",
            "{text}\nDescribe the above briefly.",
            "Function\n--------\n{text}\n\nIn short\n--------",
            "Please tell me what I am looking at: {text}",
        ),
    },
}
"""By use and task. Where an instruction stands after the text, the first line is the text's own."""


def paraphrased(records: Sequence[PromptRecord], use: Use = "test") -> list[PromptRecord]:
    """The records with another instruction each, taken by hash of the id.

    Raises ConfigError for a task without templates, or a prompt without its task's first line.
    """
    return [replace(record, prompt=_worded(record, use)) for record in records]


def bare(records: Sequence[PromptRecord]) -> list[PromptRecord]:
    """The records without an instruction. Raises ConfigError as `paraphrased` does."""
    return [replace(record, prompt=_text_of(record)) for record in records]


def rewrite(
    records: Sequence[PromptRecord], out: Path | str, kind: Kind, use: Use = "test"
) -> list[PromptRecord]:
    """Write one kind of variants as JSONL with id, domain and prompt, and return them."""
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
    """What remains of a prompt without its task's first line."""
    prefix = PREFIXES.get(record.domain)
    if prefix is None:
        raise ConfigError(
            f"prompt '{record.id}' is of the task '{record.domain}', for which no other wording is "
            f"known; known: {', '.join(PREFIXES)}"
        )
    text = record.prompt.removeprefix(prefix)
    if text == record.prompt or not text.strip():
        raise ConfigError(
            f"prompt '{record.id}' has no '{prefix.strip()}' as its first line with a text after "
            "it, so there is no instruction to change"
        )
    return text
