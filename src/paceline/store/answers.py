"""The answers of a collection as one text with the order of its contexts, for drafters that look there.

    <collection>/answers/index.json       the current folder, and what it was made with
                 answers/<content>/       named by its content:
        tokens.npy  [N] int32             answers one after the other, END after each
        order.npy   [N] int32             the places of tokens, see `contexts.sort_by_context`
        starts.npy  [D+1] int64           answer d is tokens[starts[d] : starts[d+1] - 1]
        groups.npy  [D] uint64            hash of the prompt's id
        prompts.npy [D] uint64            hash of the prompt's tokens
        trigrams.table                    see `drafting.trigram.answer_table`

A folder is written under another name first; the manifest is replaced last. The arrays are mapped, so
opening does not depend on their size, and processes share them. Knows no models. Symbols: N tokens, D
answers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from paceline.errors import StoreError
from paceline.files import write_atomically
from paceline.store.contexts import sort_by_context

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

END: Final = -1
"""The mark after an answer. It is no token, so no context crosses it."""

_FORMAT: Final = "paceline answers 1"
_MANIFEST: Final = "index.json"
_UNFINISHED: Final = ".part"
_ARRAYS: Final[dict[str, np.dtype[Any]]] = {
    "tokens": np.dtype("<i4"),
    "order": np.dtype("<i4"),
    "starts": np.dtype("<i8"),
    "groups": np.dtype("<u8"),
    "prompts": np.dtype("<u8"),
}


class Answer(NamedTuple):
    """The target's answer to a prompt.

    group: the prompt's id, which all its samplings share. prompt: its tokens; an empty one equals no
    other.
    """

    group: str
    tokens: Sequence[int]
    prompt: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class AnswerFacts:
    """The origin and the size of an index."""

    target: str  # fingerprint
    tokenizer: str  # hash of the token-to-id map
    content: str  # hash of the answers, the name of the folder
    num_tokens: int  # with the marks
    num_answers: int
    num_dropped: int  # of the oldest answers, beyond the maximum number of tokens


class AnswerIndex(NamedTuple):
    """The mapped arrays, read-only, and the folder that they are in."""

    folder: Path
    facts: AnswerFacts
    tokens: np.ndarray
    order: np.ndarray
    starts: np.ndarray
    groups: np.ndarray
    prompts: np.ndarray

    def num_bytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in _ARRAYS)

    def spans_of(self, group: str) -> list[tuple[int, int]]:
        """Return the first and last place (exclusive) of each answer to a prompt, with its mark.

        group: the prompt's id. The same prompt under other ids is the same prompt.
        """
        is_own = self.groups == _hash(group.encode())
        answers = np.flatnonzero(is_own | np.isin(self.prompts, self.prompts[is_own]))
        return list(
            zip(self.starts[answers].tolist(), self.starts[answers + 1].tolist(), strict=True)
        )


def _hash(data: bytes) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.sha256(data).digest()[:8], "little"))


def manifest_path(collection: Path) -> Path:
    """Return the file that changes whenever a collection's index is renewed."""
    return Path(collection) / "answers" / _MANIFEST


# --- reading --------------------------------------------------------------------------------------


def open_answers(collection: Path, tokenizer: str, target: str | None = None) -> AnswerIndex | None:
    """Map the index of a collection's answers; return None if there is none yet.

    Raises StoreError if it is damaged, or was made with another tokenizer or target (None: any).
    """
    facts = _read_facts(collection)
    while facts is not None:
        _check(collection, facts, tokenizer, target)
        try:
            return _map(collection, facts)
        except FileNotFoundError as error:
            # renewed since the manifest was read, if the manifest is another one now
            before, facts = facts, _read_facts(collection)
            if facts == before:
                raise _damaged(collection, f"{error.filename} is missing") from error
    return None


def _read_facts(collection: Path) -> AnswerFacts | None:
    path = manifest_path(collection)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw.pop("format") != _FORMAT:
            raise _damaged(collection, "it is of another format")
        facts = AnswerFacts(**raw)
        sizes = (facts.num_tokens, facts.num_answers)
        if not all(type(size) is int and size > 0 for size in sizes):
            raise _damaged(collection, f"it has {sizes[0]!r} tokens of {sizes[1]!r} answers")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(collection, f"{path.name} cannot be read ({error})") from error
    return facts


def _check(collection: Path, facts: AnswerFacts, tokenizer: str, target: str | None) -> None:
    for what, theirs, ours in (
        ("tokenizer", facts.tokenizer, tokenizer),
        ("target", facts.target, target),
    ):
        if ours is not None and theirs != ours:
            raise StoreError(
                f"{collection}: these answers are of another {what} ({theirs}) than the configured one "
                f"({ours}); name another collection as 'answers', or collect into a new folder"
            )


def _map(collection: Path, facts: AnswerFacts) -> AnswerIndex:
    folder = manifest_path(collection).parent / facts.content
    sizes = {
        "tokens": facts.num_tokens,
        "order": facts.num_tokens,
        "starts": facts.num_answers + 1,
        "groups": facts.num_answers,
        "prompts": facts.num_answers,
    }
    arrays = {}
    for name, dtype in _ARRAYS.items():
        try:
            mapped = np.load(folder / f"{name}.npy", mmap_mode="r")
        except FileNotFoundError:
            raise
        except (OSError, ValueError, EOFError) as error:
            raise _damaged(collection, f"{name}.npy cannot be read ({error})") from error
        if mapped.dtype != dtype or mapped.shape != (sizes[name],):
            raise _damaged(
                collection, f"{name}.npy has {mapped.shape} of {mapped.dtype}, not [{sizes[name]}]"
            )
        arrays[name] = np.asarray(mapped)
    if arrays["starts"][0] != 0 or arrays["starts"][-1] != facts.num_tokens:
        raise _damaged(collection, "its answers do not fit its tokens")
    return AnswerIndex(folder, facts, **arrays)


def _damaged(collection: Path, why: str) -> StoreError:
    folder = manifest_path(collection).parent
    return StoreError(
        f"{folder}: a damaged index of answers: {why}; delete this folder and run `paceline collect "
        "PROMPTS` again"
    )


# --- writing --------------------------------------------------------------------------------------


def write_answers(
    collection: Path,
    answers: Sequence[Answer],
    tokenizer: str,
    target: str,
    max_tokens: int,
    add_files: Callable[[Path, AnswerIndex], None] = lambda folder, index: None,
) -> bool:
    """Write the index of a collection's answers, the oldest first; return False if it is there already.

    max_tokens: the oldest answers beyond this number of tokens are dropped. add_files: writes further
    files into the folder. An index that open processes have mapped stays readable for them.
    """
    kept, num_tokens = len(answers), 0
    while kept and num_tokens + len(answers[kept - 1].tokens) + 1 <= max_tokens:
        kept -= 1
        num_tokens += len(answers[kept].tokens) + 1
    dropped, answers = kept, answers[kept:]
    if not answers:
        return False
    arrays = _concatenate(answers)
    digest = hashlib.sha256(f"{_FORMAT} {tokenizer} {target}".encode())
    for array in arrays.values():
        digest.update(array.tobytes())
    facts = AnswerFacts(
        target, tokenizer, digest.hexdigest()[:32], num_tokens, len(answers), dropped
    )
    manifest = manifest_path(collection)
    folder = manifest.parent / facts.content
    if _is_current(collection, facts):
        return False
    unfinished = folder.with_name(folder.name + _UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    arrays["order"] = sort_by_context(arrays["tokens"], arrays["starts"])
    for name, dtype in _ARRAYS.items():
        np.save(unfinished / f"{name}.npy", arrays[name].astype(dtype))
    add_files(unfinished, AnswerIndex(unfinished, facts, **arrays))
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped before the manifest
    unfinished.rename(folder)
    raw = {"format": _FORMAT, **asdict(facts)}
    write_atomically(manifest, (json.dumps(raw, indent=1) + "\n").encode())
    for other in manifest.parent.iterdir():
        if other.is_dir() and other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return True


def _is_current(collection: Path, facts: AnswerFacts) -> bool:
    """Return whether this index is there and can be read; a damaged one is written again."""
    try:
        index = open_answers(collection, facts.tokenizer, facts.target)
    except StoreError:
        return False
    return index is not None and index.facts == facts


def _concatenate(answers: Sequence[Answer]) -> dict[str, NDArray[Any]]:
    lengths = np.array([len(answer.tokens) + 1 for answer in answers], dtype=np.int64)
    starts = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(lengths)))
    tokens = np.full(int(starts[-1]), END, dtype=np.int32)
    for start, answer in zip(starts.tolist(), answers, strict=False):
        tokens[start : start + len(answer.tokens)] = answer.tokens
    groups = [_hash(answer.group.encode()) for answer in answers]
    prompts = [
        _hash(np.array(answer.prompt, dtype="<i4").tobytes()) if len(answer.prompt) else group
        for answer, group in zip(answers, groups, strict=True)
    ]
    return {
        "tokens": tokens,
        "starts": starts,
        "groups": np.array(groups, dtype=np.uint64),
        "prompts": np.array(prompts, dtype=np.uint64),
    }
