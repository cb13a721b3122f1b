"""A skip set: the sub-layers that a target leaves out when it drafts for itself, as a small file.

`paceline layer-search` writes it, and the drafter `layer_skip` reads it. It names the fingerprint of
the target it was made for. `facts` describes the search.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from paceline.errors import ArtefactError
from paceline.files import write_atomically
from paceline.models.sublayers import LayerSubset

if TYPE_CHECKING:
    from paceline.models.language_model import LanguageModel

FORMAT_VERSION: Final = 1
_HOW: Final = "run `paceline layer-search PROMPTS`"


@dataclass(frozen=True, slots=True)
class SkipSet:
    """Sub-layers by decoder layer, and the target they were found for."""

    subset: LayerSubset
    num_layers: int
    target: str  # fingerprint
    facts: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the set as JSON, atomically. Raises ArtefactError if the file cannot be written."""
        content = {
            "format_version": FORMAT_VERSION,
            "target": self.target,
            "num_layers": self.num_layers,
            "skip_attention": sorted(self.subset.attention),
            "skip_mlp": sorted(self.subset.mlp),
            **self.facts,
        }
        try:
            write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
        except OSError as error:
            raise ArtefactError(f"{path}: cannot be written ({error})") from error

    @classmethod
    def load(cls, path: Path) -> SkipSet:
        """Read a saved set. Raises ArtefactError if it is missing, damaged or of another version."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ArtefactError(f"{path}: no skip set here; {_HOW}") from error
        except (OSError, ValueError) as error:
            raise ArtefactError(f"{path}: cannot be read ({error}); {_HOW} again") from error
        if not isinstance(raw, dict) or raw.get("format_version") != FORMAT_VERSION:
            raise ArtefactError(f"{path}: not a skip set of this version; {_HOW} again")
        try:
            return cls(
                LayerSubset(
                    frozenset(int(i) for i in raw.pop("skip_attention")),
                    frozenset(int(i) for i in raw.pop("skip_mlp")),
                ),
                int(raw.pop("num_layers")),
                str(raw.pop("target")),
                {key: value for key, value in raw.items() if key != "format_version"},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArtefactError(f"{path}: damaged skip set ({error}); {_HOW} again") from error

    def check(self, target: LanguageModel, where: str) -> None:
        """Raise ArtefactError unless the set was made for this target."""
        if self.target != target.fingerprint():
            raise ArtefactError(f"{where}: the skip set was made for another target; {_HOW}")
