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
from paceline.store import TrainedOn, read_prompts, take_part_of_files
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
def test_a_bundled_drafter_has_a_record_of_all_its_training(name: str) -> None:
    facts = json.loads((ZOO / name / "training.json").read_text())
    found, general = TrainedOn.load(ZOO / name), TrainedOn.load(ZOO / "draft-general")
    assert found is not None
    assert general is not None
    if facts.get("earlier_domains"):  # it goes on from a generalist
        assert set(general.hashes) <= set(found.hashes)
        assert len(found) >= facts["examples"]
    else:
        assert len(found) == facts["examples"]


@pytest.mark.skipif(not (DATA / "code.jsonl").is_file(), reason="needs PACELINE_DATA")
@pytest.mark.parametrize("name", DRAFTERS)
def test_the_record_of_a_bundled_drafter_is_what_its_training_selects(name: str) -> None:
    facts = json.loads((ZOO / name / "training.json").read_text())
    settings = DistillSettings.model_validate(facts["settings"])
    files = [DATA / f"{file}.jsonl" for file in facts["data"]]
    others = [DATA / f"{task}.jsonl" for task in TASKS if task not in facts["data"]]
    chosen = choose_prompts(files, settings, others)
    selected = [record for file in chosen.files for record in file.training]
    found, general = TrainedOn.load(ZOO / name), TrainedOn.load(ZOO / "draft-general")

    assert len(selected) == facts["examples"]
    own = TrainedOn.of(record.prompt for record in selected)
    expected = join([own, general]) if facts.get("earlier_domains") else own
    assert found is not None
    assert expected is not None
    assert np.array_equal(found.hashes, expected.hashes)


@pytest.mark.skipif(not (DATA / "code.jsonl").is_file(), reason="needs PACELINE_DATA")
@pytest.mark.parametrize("name", DRAFTERS)
def test_no_bundled_drafter_was_trained_on_a_prompt_to_collect_or_to_judge(name: str) -> None:
    found = TrainedOn.load(ZOO / name)
    assert found is not None
    files = [read_prompts([DATA / f"{task}.jsonl"]) for task in TASKS]
    for part in ("collection", "judging"):
        kept = [record for own in take_part_of_files(files, part) for record in own]
        assert kept
        assert sum(record.prompt in found for record in kept) <= len(kept) // 1000  # equal hashes
