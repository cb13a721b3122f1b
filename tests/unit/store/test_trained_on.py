"""The record of the prompts that a drafter was trained on, and those of the bundled drafters."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from paceline.distillation import DistillSettings
from paceline.distillation.prompts import choose_prompts
from paceline.errors import ArtefactError
from paceline.experiments.prompt_files import TASKS
from paceline.store import TrainedOn, part_of, read_prompts, take_by_hash
from paceline.store.trained_on import NOTHING, TRAINED_ON, join

ZOO = Path(__file__).parents[3] / "zoo"
DRAFTERS = sorted(path.name for path in ZOO.glob("draft-*"))
DATA = Path(os.environ.get("PACELINE_DATA", "nowhere"))


def test_a_record_knows_its_prompts_in_any_spacing_and_no_others(tmp_path: Path) -> None:
    prompts = [f"Solve:\nWhat is {i} plus {i}?" for i in range(500)]
    TrainedOn.of([*prompts, *prompts[:9]]).save(tmp_path)
    found = TrainedOn.load(tmp_path)

    assert found is not None
    assert len(found) == 500
    assert all(prompt in found for prompt in prompts)
    assert "  Solve: What is 7  plus\t7?\n" in found
    assert "Caf\u00e9" in TrainedOn.of(["Cafe\u0301"])
    assert not any(f"Solve:\nWhat is {i} plus {i + 1}?" in found for i in range(500))
    assert "solve:\nWhat is 7 plus 7?" not in found
    assert found.digest() == TrainedOn.of(reversed(prompts)).digest()
    assert found.digest() != TrainedOn.of(prompts[1:]).digest()
    assert (tmp_path / TRAINED_ON).stat().st_size < 4 * 500 + 200


def test_prompts_of_parts_are_known_only_if_those_of_all_parts_are() -> None:
    one, two = TrainedOn.of(["a", "b"]), TrainedOn.of(["b", "c"])
    both = join([one, NOTHING, two])
    assert both is not None
    assert len(both) == 3
    assert join([one, None]) is None
    assert "a" not in NOTHING
    nothing = join([NOTHING])
    assert nothing is not None
    assert len(nothing) == 0


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    assert TrainedOn.load(tmp_path) is None
    path = tmp_path / TRAINED_ON
    path.write_bytes(b"not an array")
    with pytest.raises(ArtefactError, match=r"trained_on.npy: cannot be read"):
        TrainedOn.load(tmp_path)
    for wrong in (np.array([2, 1], np.uint32), np.array([1.0]), np.zeros((1, 1), np.uint32)):
        np.save(path, wrong)
        with pytest.raises(ArtefactError, match="not a sorted list of 4-byte hashes"):
            TrainedOn.load(tmp_path)


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_bundled_drafter_has_a_record_no_longer_than_its_training(name: str) -> None:
    found = TrainedOn.load(ZOO / name)
    examples = json.loads((ZOO / name / "training.json").read_text())["examples"]
    assert found is not None
    assert 0.8 * examples < len(found) <= examples  # some functions of the library are equal


@pytest.mark.skipif(not (DATA / "code.jsonl").is_file(), reason="needs PACELINE_DATA")
@pytest.mark.parametrize("name", DRAFTERS)
def test_the_record_of_a_bundled_drafter_is_what_its_training_selects(name: str) -> None:
    facts = json.loads((ZOO / name / "training.json").read_text())
    settings = DistillSettings.model_validate(facts["settings"])
    files = [DATA / f"{file}.jsonl" for file in facts["data"]]
    others = [DATA / f"{task}.jsonl" for task in TASKS if task not in facts["data"]]
    if "part" in facts["settings"]:
        chosen = choose_prompts(files, settings, others)
        selected = [record for file in chosen.files for record in file.training]
    else:  # trained before prompts were split into parts
        selected = [
            record
            for path in files
            for record in take_by_hash(read_prompts([path]), settings.cap_of(path.stem))
            if part_of(record.id) != "judging"  # these validated the training
        ]
    found = TrainedOn.load(ZOO / name)

    assert len(selected) == facts["examples"]
    assert found is not None
    assert np.array_equal(found.hashes, TrainedOn.of(r.prompt for r in selected).hashes)
