"""The tri-gram table of a collection's answers, and the same without the answers to one prompt.

The table is built with the index of the answers and lies in its folder. The table without some answers
is exact, as if it had been built without them: the index gives the successors of each of their pairs.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from paceline.drafting.trigram.build import build_table
from paceline.drafting.trigram.corpora import TokenSequences
from paceline.drafting.trigram.table import Table, check_tokenizer, load_table
from paceline.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.drafting.answers import Answers
    from paceline.drafting.trigram.table import TableFacts
    from paceline.store.answers import AnswerIndex

_FILE: Final = "trigrams.table"


def write_answer_table(folder: Path, index: AnswerIndex) -> None:
    """Write the table of all answers of an index into a folder."""
    answers: list[Any] = [index.tokens[a : b - 1] for a, b in pairwise(index.starts.tolist())]
    build_table([TokenSequences("answers", answers)], folder / _FILE, index.facts.tokenizer)


def load_answer_table(name: str, answers: Answers) -> Table:
    """Return the table of the answers that are not left out. name: of the drafter.

    Raises StoreError if the file is missing or damaged.
    """
    assert answers.index is not None
    path = answers.index.folder / _FILE
    try:
        table, facts = load_table(path)
    except ConfigError as error:
        raise StoreError(
            f"{path}: cannot be read; delete {path.parent} and run `paceline collect PROMPTS` again"
        ) from error
    check_tokenizer(name, path, facts, answers.index.facts.tokenizer)
    pairs = _pairs(answers.left_out_answers())
    return _with_recounted(table, facts, answers, pairs) if len(pairs) else table


def _pairs(answers: list[np.ndarray]) -> np.ndarray:
    """Return the pairs [P, 2] int32 of neighbours that some token follows, each once."""
    pairs = [np.stack((tokens[:-2], tokens[1:-1]), axis=1) for tokens in answers if len(tokens) > 2]
    return np.unique(np.concatenate(pairs), axis=0) if pairs else np.empty((0, 2), dtype=np.int32)


def _with_recounted(table: Table, facts: TableFacts, answers: Answers, pairs: np.ndarray) -> Table:
    """Return the table with the successors of some pairs counted again, without left-out answers.

    A pair never has more successors than before, so each keeps its places and loses the last ones.
    """
    successors, weights = np.array(table.successors), np.array(table.weights)
    is_lost = np.zeros(len(successors), dtype=np.bool_)
    for first_token, second_token in pairs.tolist():
        begin, end = table.starts[first_token], table.starts[first_token + 1]
        pair = begin + np.searchsorted(table.seconds[begin:end], second_token)
        first, last = table.offsets[pair], table.offsets[pair + 1]
        kept, shares = _count_successors(answers, first_token, second_token)
        size = min(len(kept), facts.max_successors)
        successors[first : first + size] = kept[:size]
        weights[first : first + size] = shares[:size]
        is_lost[first + size : last] = True
    lost_before = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(is_lost)))
    offsets = table.offsets - lost_before[table.offsets]
    changed = Table(table.starts, offsets, table.seconds, successors[~is_lost], weights[~is_lost])
    for array in changed:
        array.setflags(write=False)  # as the mapped ones, for which the kernels are compiled
    return changed


def _count_successors(
    answers: Answers, first_token: int, second_token: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return a pair's successors in the answers that are not left out, the most frequent first, and
    their shares.
    """
    from paceline.drafting.answer_kernels import occurrences

    index = answers.index
    assert index is not None
    pair = np.array([first_token, second_token], dtype=np.int32)
    following = index.tokens[occurrences(index.tokens, index.order, answers.left_out, pair)]
    tokens, counts = np.unique(following[following >= 0], return_counts=True)
    order = np.lexsort((tokens, -counts))
    return tokens[order], (counts / counts.sum())[order]
