"""The index of a collection's answers, with the tri-gram table of the same answers.

It is built when all prompts are decoded, and again when prompts were added. Knows no file format.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.contracts import no_progress
from paceline.drafting.trigram.answer_table import write_answer_table
from paceline.store.answers import Answer, write_answers

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from paceline.assembly import Parts
    from paceline.contracts import Progress
    from paceline.store.answers import AnswerIndex
    from paceline.store.layout import Trajectory


def build_answers(
    parts: Parts,
    folder: Path,
    rows: Sequence[Trajectory],
    on_progress: Progress = no_progress,
) -> bool:
    """Write the index of a collection's answers; return False if it is there already.

    rows: the trajectories, the oldest first. At most the configured number of tokens is kept.
    """
    answers = [Answer(row.prompt_id, row.output_tokens, row.prompt_tokens) for row in rows]

    def add_table(unfinished: Path, index: AnswerIndex) -> None:
        write_answer_table(unfinished, index)
        on_progress("answers", len(rows), len(rows))

    return write_answers(
        folder,
        answers,
        parts.vocabulary.hash(),
        parts.target.fingerprint(),
        parts.config.collection.answer_tokens,
        add_table,
    )
