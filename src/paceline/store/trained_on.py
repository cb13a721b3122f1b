"""The prompts that a drafter was trained on, as a file of hashes next to its weights.

The file holds no text: it is a numpy array of the sorted hashes of the prompts' texts, 4 bytes each. Two
texts that differ only in white space or in the composition of characters have one hash. A text that is
not in the list has the hash of one that is with a probability of n / 2**32 for n prompts.
"""

from __future__ import annotations

import hashlib
import io
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.errors import ArtefactError
from paceline.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

TRAINED_ON: Final = "trained_on.npy"
_HASH: Final = np.dtype("<u4")


@dataclass(frozen=True, slots=True, eq=False)
class TrainedOn:
    """The prompts of a training. Without prompts: nothing was trained."""

    hashes: np.ndarray  # [n] uint32, ascending, without repetitions

    @classmethod
    def of(cls, prompts: Iterable[str]) -> TrainedOn:
        """Return the record of some prompts."""
        hashes = np.array([hash_prompt(prompt) for prompt in prompts], dtype=_HASH)
        return cls(np.unique(hashes))

    @classmethod
    def load(cls, folder: Path | str) -> TrainedOn | None:
        """Return the record in a drafter's folder, None without one.

        Raises ArtefactError if the file cannot be read.
        """
        path = Path(folder) / TRAINED_ON
        if not path.is_file():
            return None
        try:
            hashes = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ArtefactError(f"{path}: cannot be read ({error}); copy it again") from error
        if (
            hashes.dtype != _HASH
            or hashes.ndim != 1
            or (np.diff(hashes.astype(np.int64)) < 1).any()
        ):
            raise ArtefactError(f"{path}: not a sorted list of 4-byte hashes; copy it again")
        return cls(hashes)

    def save(self, folder: Path) -> None:
        """Write the record into a drafter's folder."""
        content = io.BytesIO()
        np.save(content, self.hashes, allow_pickle=False)
        write_atomically(folder / TRAINED_ON, content.getvalue())

    def __len__(self) -> int:
        return len(self.hashes)

    def __contains__(self, prompt: object) -> bool:
        if not isinstance(prompt, str):
            return False
        place = int(np.searchsorted(self.hashes, wanted := hash_prompt(prompt)))
        return place < len(self.hashes) and int(self.hashes[place]) == wanted

    def digest(self) -> str:
        """Return a hash of the whole record."""
        return hashlib.sha256(self.hashes.tobytes()).hexdigest()[:16]


NOTHING: Final = TrainedOn(np.zeros(0, dtype=_HASH))
"""The record of a drafter that learns nothing in advance."""


def join(records: Sequence[TrainedOn | None]) -> TrainedOn | None:
    """Return the prompts of several trainings together; None if one is unknown."""
    known = [record.hashes for record in records if record is not None]
    if len(known) < len(records):
        return None
    return TrainedOn(np.unique(np.concatenate([NOTHING.hashes, *known])))


def hash_prompt(prompt: str) -> int:
    """Return the 32-bit hash of a prompt's text, without regard to its white space."""
    text = " ".join(unicodedata.normalize("NFC", prompt).split())
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
