"""A tiny target and prompt files with all parts, and one finished smoke run of the comparison."""

from __future__ import annotations

import json
from itertools import count, islice
from typing import TYPE_CHECKING, NamedTuple

import pytest
import yaml

import paceline
from paceline.experiments.prompt_files import TASKS
from paceline.store import is_validation, part_of
from paceline.testing.tiny_models import tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.experiments.catalog import Finished


class Place(NamedTuple):
    """The files and folders of a comparison."""

    config: Path
    data: Path
    work: Path
    out: Path

    def run(self, **changes: object) -> Finished:
        """Run the comparison at the size of a smoke run."""
        given = {
            "config": self.config, "data": self.data, "folder": self.work, "out": self.out,
            "smoke": True, **changes,
        }  # fmt: skip
        return paceline.experiment("direct-alignment", **given)  # type: ignore[arg-type]


def ids(task: str, num: int, part: str, validates: bool = False) -> list[str]:
    """Return the first ids of a part, of its validation share or not."""
    share = 0.04
    every = (f"{task}/{i}" for i in count())
    fits = (x for x in every if part_of(x) == part and is_validation(x, share) == validates)
    return list(islice(fits, num))


def write_data(folder: Path) -> Path:
    """Write the four tasks with prompts of every part, and return the folder."""
    folder.mkdir()
    for task in TASKS:
        names = ids(task, 6, "training") + ids(task, 2, "training", validates=True)
        names += ids(task, 3, "judging")
        lines = [
            json.dumps(
                {
                    "id": name,
                    "domain": task,
                    "prompt": f"{task} {i}: " + "ab " * i,
                    "reference": f"{task} is {i} " * 4,
                }
            )
            for i, name in enumerate(names)
        ]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("alignment")
    # weights so wide that the target is sure of its tokens, as a trained one is
    tiny_model(std=0.5, context=160).save_pretrained(root / "target")
    byte_tokenizer().save_pretrained(root / "target")
    target = {"model": str(root / "target"), "dtype": "float32", "device": "cpu"}
    raw = {"target": target, "threads": 1}
    (root / "paceline.yaml").write_text(yaml.safe_dump(raw))
    data = write_data(root / "data")
    return Place(root / "paceline.yaml", data, root / "work", root / "out")


@pytest.fixture(scope="session")
def finished(place: Place) -> Finished:
    """Return the outcome of a whole smoke run."""
    return place.run()
