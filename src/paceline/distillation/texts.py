"""Plain text that a student learns before and between the target's answers.

A .txt file is one text. Rows of .jsonl and .parquet files have a column `text`, or are prompts with
their references (`prompt`, `reference`), of which only those that may be trained on are read. A causal
student reads such a pair as one text; to one with an encoder the prompt is the source and the reference
is learned. The order of texts is a function of the seed. A larger number of tokens adds texts and
removes none. Knows no model.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from paceline.distillation.batches import Example
from paceline.errors import ConfigError
from paceline.store.prompts import read_json_lines

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator, Sequence

DOMAIN: Final = "text"
MAX_TOKENS: Final = 512  # per example
_TEXT, _PROMPT, _REFERENCE = "text", "prompt", "reference"
_NEEDED: Final = f"it needs '{_TEXT}', or '{_PROMPT}' and '{_REFERENCE}'"
_SUFFIXES: Final = (".txt", ".jsonl", ".parquet")


def read_texts(
    paths: Sequence[Path],
    encode: Callable[[str], Sequence[int]],
    context: int,
    max_tokens: int,
    seed: int,
    may_learn: Container[str],
) -> list[Example]:
    """Return examples whose tokens are all learned, at most `max_tokens` tokens in total.

    A text is cut into examples of at most `context` tokens and MAX_TOKENS. Each begins with the last
    token of the one before, so that every token of a text but its first is learned once. Equal texts
    are read once. encode: text -> token ids of the target. may_learn: the prompts that may be trained
    on; others are left out with their references.

    Raises ConfigError on a file that cannot be read, has no text, or has other columns, and if no text
    has a token to learn.
    """
    texts = _read_all(paths, may_learn)
    length = min(context, MAX_TOKENS)
    if length < 2:
        raise ConfigError(
            f"a context of {context} tokens has no room to learn a token of text; use a target with a "
            "longer context, or remove pretrain_text"
        )
    examples: list[Example] = []
    wants_text = max_tokens > 0
    order = np.random.default_rng(seed).permutation(len(texts))
    for i in order:
        if max_tokens < 1:
            break
        name = _name(texts[i])
        tokens = np.array(encode(texts[i]), dtype=np.int64)[: max_tokens + 1]
        for first in range(0, len(tokens) - 1, length - 1):
            piece = tokens[first : first + length]
            examples.append(Example(f"text/{name}/{first}", DOMAIN, piece, num_prompt=1))
            max_tokens -= len(piece) - 1
    if wants_text and not examples:
        raise ConfigError(
            "no text of pretrain_text has two tokens, so none can be learned; add others"
        )
    return examples


def read_pairs(
    paths: Sequence[Path],
    encode: Callable[[str, str], tuple[Sequence[int], Sequence[int]]],
    context: int,
    max_tokens: int,
    seed: int,
    may_learn: Container[str],
) -> list[Example]:
    """Return prompts with their references as answers, of about `max_tokens` tokens in total.

    encode: prompt, reference -> token ids of each, the reference's with the end of an answer. Pairs
    longer than `context` are left out; the rest is as in `read_texts`.
    """
    found: set[tuple[str, str]] = set()
    for path in map(Path, paths):
        if not is_prompt_file(path):
            raise ConfigError(
                f"{path}: has no prompts with references, of which a student with an encoder learns; "
                "remove it from pretrain_text, or train one without an encoder"
            )
        found |= {(row[_PROMPT], row[_REFERENCE]) for _, row in _read_rows(path)}
    pairs = sorted(pair for pair in found if pair[0] in may_learn)
    wants_pairs, examples = max_tokens > 0, []
    for i in np.random.default_rng(seed).permutation(len(pairs)):
        if max_tokens < 1:
            break
        prompt, reference = pairs[i]
        example = pair_example(_name(prompt + reference), DOMAIN, *encode(prompt, reference))
        if example.num_prompt > 0 and len(example.tokens) <= context:
            examples.append(example)
            max_tokens -= len(example.tokens)
    if wants_pairs and not examples:
        raise ConfigError(
            f"none of the {len(pairs)} prompts of pretrain_text that may be trained on is shorter, with "
            f"its reference, than {context} tokens; add others"
        )
    return examples


def pair_example(id: str, domain: str, prompt: Sequence[int], output: Sequence[int]) -> Example:
    """Return the training text of a prompt's and an answer's token ids."""
    return Example(id, domain, np.array([*prompt, *output], dtype=np.int64), len(prompt))


def read_references(path: Path) -> dict[str, str]:
    """Return prompt -> its first reference. Raises ConfigError on a row without one."""
    found: dict[str, str] = {}
    for where, row in _read_rows(Path(path)):
        if _REFERENCE not in row:
            raise ConfigError(
                f"{where}: a row without '{_REFERENCE}', which is what is learned; add it"
            )
        found.setdefault(row[_PROMPT], row[_REFERENCE])
    return found


def learned_prompts(paths: Sequence[Path], may_learn: Container[str]) -> list[str]:
    """Return the prompts whose references `read_texts` may return, for the record of the training.

    Those that its number of tokens leaves out count as well. Raises ConfigError as `read_texts` does.
    """
    return [
        row[_PROMPT]
        for path in map(Path, paths)
        if is_prompt_file(path)
        for _, row in _read_rows(path)
        if row[_PROMPT] in may_learn
    ]


def is_prompt_file(path: Path) -> bool:
    """Return whether a file holds prompts with references: it has no column `text`.

    An empty file has none. Raises ConfigError on a file that cannot be read or has other columns.
    """
    path = Path(path)
    if path.suffix == ".txt":
        return False
    first = next(_read_rows(path), None)
    return first is not None and _TEXT not in first[1]


def _name(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_all(paths: Sequence[Path], may_learn: Container[str]) -> list[str]:
    """Return the distinct texts of all files, sorted, so that the files' order is irrelevant."""
    found: set[str] = set()
    for path in map(Path, paths):
        of_file = set(_read_file(path))
        if not any(text.strip() for _, text in of_file):
            raise ConfigError(f"{path}: has no text; remove it from pretrain_text")
        found |= {text for prompt, text in of_file if prompt is None or prompt in may_learn}
    if paths and not found:
        raise ConfigError(
            f"{paths[0]}: none of the texts may be trained on, since their prompts are kept for "
            "validation, collecting or judging; add others to pretrain_text"
        )
    return sorted(text for text in found if text.strip())


def _read_file(path: Path) -> Iterator[tuple[str | None, str]]:
    """Yield (the prompt that a text contains, if any; the text)."""
    if path.suffix == ".txt":
        yield None, _read_txt(path)
        return
    for _, row in _read_rows(path):
        if _TEXT in row:
            yield None, row[_TEXT]
        else:
            yield row[_PROMPT], f"{row[_PROMPT]}\n{row[_REFERENCE]}"


def _read_txt(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise _unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error}); convert the file to UTF-8") from error


def _read_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (FILE:NUMBER, the columns that are read) per row."""
    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"{path}: a file of text ends in {', '.join(_SUFFIXES)}; rename it")
    try:
        rows = _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path)
        for where, row in rows:
            yield where, _check_row(where, row)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    if path.stat().st_size > 0:
        yield from read_json_lines(path)


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        columns = [name for name in (_TEXT, _PROMPT, _REFERENCE) if name in names]
        for batch in file.iter_batches(columns=columns) if columns else ():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row
        if not columns:
            raise ConfigError(f"{path}: has the columns {', '.join(names)[:80]}; {_NEEDED}")


def _check_row(where: str, row: Any) -> dict[str, str]:
    """Return the columns that are read. Raises ConfigError if they are not texts."""
    if isinstance(row, ValueError):
        raise ConfigError(f"{where}: {row}; correct the line") from row
    keys = (_TEXT,) if isinstance(row, dict) and _TEXT in row else (_PROMPT, _REFERENCE)
    if not isinstance(row, dict) or any(key not in row for key in keys):
        raise ConfigError(f"{where}: a row without text; {_NEEDED}")
    for key in keys:
        if not isinstance(row[key], str):
            raise ConfigError(f"{where}: '{key}' is not a text ({type(row[key]).__name__})")
        try:
            row[key].encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{where}: '{key}' holds half of a surrogate pair") from error
    return {key: row[key] for key in keys}


def _unreadable(path: Path, error: Exception) -> ConfigError:
    if isinstance(error, FileNotFoundError):
        return ConfigError(f"{path}: no such file of text; correct the path in pretrain_text")
    return ConfigError(f"{path}: cannot be read ({error}); correct or remove it in pretrain_text")
