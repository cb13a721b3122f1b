"""Models that cannot be used are refused in one line that says why."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from paceline.assembly import build, load
from paceline.config import Config, DrafterSection, ModelSection
from paceline.errors import ArtefactError, ConfigError, ModelError, RequestError, VocabularyError
from paceline.testing.tokenizers import byte_tokenizer

ZOO = Path(__file__).parents[2] / "zoo"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a small bundled model, to be damaged."""
    return Path(shutil.copytree(ZOO / "draft-math", tmp_path / "model"))


def target(folder: Path) -> Config:
    return Config(target=ModelSection(model=str(folder), dtype="float32"))


def test_a_truncated_weight_file_is_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(ModelError, match="damaged or truncated"):
        build(target(folder))


def test_a_missing_weight_is_named_instead_of_being_filled_with_noise(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = next(n for n in weights if "mlp" in n)
    del weights[name]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 weights are missing"):
        build(target(folder))


def test_a_folder_that_is_no_model_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        build(target(folder))


def test_a_drafter_with_another_vocabulary_is_refused_and_told_how_it_differs(
    folder: Path,
) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    byte_tokenizer().save_pretrained(folder)
    config = target(ZOO / "target").model_copy(
        update={
            "drafters": {
                "other": DrafterSection(kind="draft_model", settings={"model": str(folder)})
            }
        }
    )
    with pytest.raises(VocabularyError, match=r"drafter 'other' .* against .* tokens"):
        build(config)


def test_a_drafter_may_not_take_a_name_with_a_meaning() -> None:
    config = target(ZOO / "draft-math").model_copy(
        update={"drafters": {"auto": DrafterSection(kind="prompt_lookup")}}
    )
    with pytest.raises(ConfigError, match="cannot be called 'auto'"):
        build(config)


def test_a_named_policy_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="paceline learn"):
        load(target(ZOO / "draft-math"), policy=tmp_path / "nothing")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_beams": 4}, "'num_beams' is not supported"),
        ({"num_return_sequences": 2}, "'num_return_sequences' is not supported"),
        ({"drafter": "nobody"}, "unknown drafter 'nobody'"),
        ({"stop": [""]}, "stop string is empty"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be"),
        ({"temperature": 1.0, "min_p": 1.0}, "min_p must be"),
        ({"temperature": 1.0, "top_k": -1}, "top_k must be"),
        ({"min_p": 0.1}, "min_p given with temperature 0"),
    ],
)
def test_a_setting_that_cannot_be_honoured_is_refused_by_name(
    settings: dict[str, object], expected: str
) -> None:
    pace = load(target(ZOO / "draft-math"))
    with pytest.raises(RequestError, match=expected):
        pace.complete("hello", **{"drafter": "none", **settings})
