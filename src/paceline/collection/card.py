"""The cards of a collection: card.json for programs, CARD.md for people.

Both are rewritten when a run begins and when it ends, from the run's settings and the stored rows. The
stores' manifests alone decide what exists: a lost card loses only the history of runs.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import torch

from paceline.contracts import identity_of_arms
from paceline.files import write_atomically
from paceline.store.records import sampling_label

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from paceline.assembly import Pace
    from paceline.selection.encoders import FeatureEncoder
    from paceline.store.layout import Trajectory

CARD_JSON: Final = "card.json"
CARD_MD: Final = "CARD.md"


class Card:
    """The cards of a collection while one run adds to it.

    The run is recorded when it begins, so that the rows of a killed run have a history.
    """

    def __init__(
        self, folder: Path, pace: Pace, encoder: FeatureEncoder, run: dict[str, Any]
    ) -> None:
        self._folder, self._run = folder, run
        self._earlier_runs = _read_runs(folder)
        parts = pace.parts
        self._facts = {
            "target": {
                "model": Path(parts.config.target.model).name,
                "fingerprint": parts.target.fingerprint(),
                "tokenizer": parts.vocabulary.hash(),
            },
            "drafters": identity_of_arms({n: d.identity() for n, d in parts.drafters.items()}),
            "encoders": encoder.identities(),
        }

    def write(
        self,
        rows: Sequence[Trajectory],
        finished: bool,
        trained_on: Mapping[str, Mapping[str, int] | None] = MappingProxyType({}),
    ) -> None:
        """Replace both files.

        trained_on: by drafter the number of prompts that it was trained on, and of those where that is
        known; None where it is known of none.
        """
        runs = [*self._earlier_runs, {**self._run, "finished": finished}]
        facts = {
            **self._facts,
            "rows": _count_rows(rows),
            "trained_on": dict(trained_on),
            "runs": runs,
        }
        as_json = json.dumps(facts, indent=1, ensure_ascii=False)
        write_atomically(self._folder / CARD_JSON, as_json.encode())
        write_atomically(self._folder / CARD_MD, _render_page(facts).encode())


def describe_run(pace: Pace, sources: Sequence[Path], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the run's date, command, circumstances, prompt files and settings."""
    target = pace.parts.target
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "dtype": str(target.dtype).removeprefix("torch."),
        "exact": target.exact,
        "device": str(target.device),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("paceline", "torch", "transformers")},
        },
        "prompt_files": [_describe_file(str(source)) for source in sources],
        **settings,
    }


def _describe_file(source: str) -> dict[str, str]:
    """Return name and hash; that of a folder (a saved dataset) is over its files' names and hashes."""
    folder, _, split = source.rpartition(":")
    path = Path(folder) if folder and not Path(source).exists() else Path(source)
    digest = hashlib.sha256()
    if path.is_file():
        digest.update(path.read_bytes())
    else:
        for inner in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(inner.relative_to(path).as_posix().encode())
            digest.update(hashlib.sha256(inner.read_bytes()).digest())
    return {
        "file": f"{path.name}:{split}" if str(path) != source else path.name,
        "sha256": digest.hexdigest(),
    }


def _count_rows(trajectories: Sequence[Trajectory]) -> list[dict[str, Any]]:
    counts: Counter[tuple[str, str]] = Counter()
    tokens: Counter[tuple[str, str]] = Counter()
    for trajectory in trajectories:
        key = trajectory.domain, sampling_label(trajectory.sampling)
        counts[key] += 1
        tokens[key] += len(trajectory.output_tokens)
    return [
        {"task": task, "sampling": label.removeprefix("@") or "greedy", "rows": count,
         "output_tokens": tokens[task, label]}
        for (task, label), count in sorted(counts.items())
    ]  # fmt: skip


def _read_runs(folder: Path) -> list[dict[str, Any]]:
    try:
        runs = json.loads((folder / CARD_JSON).read_text(encoding="utf-8"))["runs"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return list(runs) if isinstance(runs, list) else []


def _count_trained(counts: Mapping[str, int] | None) -> str:
    if counts is None:
        return "not known"
    return f"{counts['trained_on']:,} of {counts['known']:,}"


def _render_page(facts: dict[str, Any]) -> str:
    target = facts["target"]
    lines = [
        "# A collection of target outputs",
        "",
        f"Written by `{target['model']}` (weights {target['fingerprint']}, tokenizer "
        f"{target['tokenizer']}).",
        "",
        "| task | sampling | rows | output tokens |",
        "|---|---|---:|---:|",
    ]
    lines += [
        f"| {r['task']} | {r['sampling']} | {r['rows']:,} | {r['output_tokens']:,} |"
        for r in facts["rows"]
    ]
    for title in ("drafters", "encoders"):
        lines += ["", f"## {title.capitalize()}", ""]
        lines += [f"- `{name}`: {line}" for name, line in facts[title].items()]
    if facts["trained_on"]:  # known when the run has finished
        lines += ["", "## Prompts that drafters were trained on", ""]
    lines += [f"- `{name}`: {_count_trained(c)}" for name, c in facts["trained_on"].items()]
    lines += ["", "## Runs", ""]
    for run in facts["runs"]:
        files = ", ".join(f"{f['file']} (sha256 {f['sha256'][:12]})" for f in run["prompt_files"])
        versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
        lines += [
            f"- {run['date']}: `{run['command']}`{'' if run['finished'] else ' (did not finish)'}",
            f"  - prompts: {files or 'given in memory'}; {run['num_to_decode']} rows to decode, at "
            f"most {run['max_new_tokens']} tokens each, samplings {', '.join(run['samplings'])}",
            f"  - {run['dtype']}{', exact' if run['exact'] else ''} on {run['device']}, "
            f"{run['threads']} threads; {versions}",
        ]
    return "\n".join([*lines, ""])
