"""The strict schema: its defaults, its paths, and the remedy in the message of each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.config import Config, DrafterSection, ModelSection, load_config
from paceline.drafting.catalog import CATALOG, check_settings
from paceline.errors import ConfigError

MINIMAL = "target: {model: org/name}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "paceline.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def message_of(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_only_a_target_is_required(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))

    assert config.target.model == "org/name"
    assert config.drafters == {}
    assert config.engine.max_rows >= 1
    assert config.target.trust_remote_code is False


def test_relative_paths_are_relative_to_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "project"
    (folder / "models" / "big").mkdir(parents=True)
    (folder / "models" / "small").mkdir()
    path = write(
        folder,
        "target: {model: models/big}\n"
        "drafters:\n"
        "  near: {kind: draft_model, settings: {model: models/small}}\n"
        "  far: {kind: draft_model, settings: {model: org/small}}\n"
        "  suffix: {kind: suffix_lookup, settings: {answers: collected}}\n"
        "paths: {store: collected}\n",
    )
    monkeypatch.chdir(tmp_path)

    config = load_config(Path("project/paceline.yaml"))

    assert load_config(path) == config
    assert config.target.model == str(folder / "models" / "big")
    assert config.drafters["near"].settings["model"] == str(folder / "models" / "small")
    assert config.drafters["far"].settings["model"] == "org/small"  # a hub name is not a path
    assert config.drafters["suffix"].settings["answers"] == str(folder / "collected")
    assert config.paths.store == folder / "collected"
    assert config.paths.policy == folder / "runs" / "policy"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("targt: {model: a/b}\n", ["'targt'", "did you mean 'target'"]),
        (MINIMAL + "engin: {}\n", ["'engin'", "did you mean 'engine'"]),
        (MINIMAL + "zebra: 1\n", ["'zebra'", "valid: target, exact, generation_config"]),
        (MINIMAL + "engine: {maxrows: 3}\n", ["'engine.maxrows'", "'max_rows'"]),
        ("target: {modl: a/b}\n", ["'target.modl'", "'model'"]),
        (MINIMAL + "drafters: {x: {kynd: none}}\n", ["'drafters.x.kynd'", "'kind'"]),
        (MINIMAL + "learning: {alfa: 1}\n", ["'learning.alfa'", "'alpha'"]),
        ("engine: {max_rows: 2}\n", ["key 'target' is missing"]),
        ("target: {dtype: float32}\n", ["key 'target.model' is missing"]),
        (MINIMAL + "drafters: {x: {settings: {}}}\n", ["key 'drafters.x.kind' is missing"]),
        (MINIMAL + "engine: {max_rows: 0}\n", ["'engine.max_rows'", "got 0"]),
        (MINIMAL + "engine: {max_rows: many}\n", ["'engine.max_rows'", "integer", "'many'"]),
        ("target: {model: a/b, dtype: int8}\n", ["'target.dtype'", "float32", "'int8'"]),
        (MINIMAL + "learning: {alpha: 1.5}\n", ["'learning.alpha'", "1.5"]),
        (MINIMAL + "threads: 0\n", ["'threads'", "got 0"]),
        ("", ["expected a mapping"]),
        ("- target\n", ["expected a mapping"]),
        ("target: {model: a/b\n", ["not valid YAML", "line"]),
        ("target:\n\t- x\n", ["not valid YAML"]),
    ],
)
def test_a_mistake_names_the_file_the_key_and_the_remedy(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    message = message_of(tmp_path, text)

    assert "paceline.yaml" in message
    assert all(word in message for word in words), message


def test_the_message_of_a_missing_file_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file; .*--config"):
        load_config(tmp_path / "nowhere.yaml")


def test_a_file_that_is_not_text_is_a_config_error(tmp_path: Path) -> None:
    path = tmp_path / "paceline.yaml"
    path.write_bytes(b"\xff\xfe\x00target")

    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("draft_modle", {}, ["unknown kind 'draft_modle'", "did you mean 'draft_model'"]),
        ("zebra", {}, ["unknown kind 'zebra'", *CATALOG]),
        ("prompt_lookup", {"num_draft_token": 3}, ["'num_draft_token'", "'num_draft_tokens'"]),
        ("prompt_lookup", {"num_draft_tokens": 0}, ["'num_draft_tokens'", "got 0"]),
        ("prompt_lookup", {"min_ngram": 9, "max_ngram": 3}, ["min_ngram 9 is above max_ngram 3"]),
        ("draft_model", {}, ["key 'model' is missing"]),
        ("draft_model", {"model": "a/b", "num_draft_tokens": 65}, ["'num_draft_tokens'", "65"]),
        ("none", {"model": "a/b"}, ["unknown key 'model'"]),
    ],
)
def test_drafter_settings_are_checked_by_their_own_schema(
    kind: str, settings: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_settings("mine", DrafterSection(kind=kind, settings=settings))

    message = str(caught.value)
    assert message.startswith("drafter 'mine': ") and "\n" not in message
    assert all(word in message for word in words), message


def test_checked_settings_cannot_change() -> None:
    config = Config.model_validate({"target": {"model": "a/b"}})

    with pytest.raises(ValueError, match="frozen"):
        config.target.model = "c/d"  # type: ignore[misc]


@pytest.mark.parametrize("written", ["off", '"off"', "within_request"])
def test_adapt_may_be_a_bare_off(tmp_path: Path, written: str) -> None:
    """YAML reads a bare off as false."""
    path = tmp_path / "paceline.yaml"
    path.write_text(f"target: {{model: x}}\nselection: {{adapt: {written}, guard: true}}\n")

    section = load_config(path).selection

    assert section.adapt == written.strip('"')
    assert section.is_adaptive


def test_selection_is_not_adaptive_by_default() -> None:
    assert not Config(target=ModelSection(model="x")).selection.is_adaptive


def test_the_bundled_lookup_drafts_from_the_answers_that_collect_leaves() -> None:
    config = load_config(Path(__file__).parents[3] / "paceline.yaml")

    assert config.drafters["suffix"].settings["answers"] == str(config.paths.store)


def test_the_bound_of_the_index_of_answers_is_checked(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, MINIMAL)).collection.answer_tokens == 1 << 24
    message = message_of(tmp_path, MINIMAL + "collection: {answer_tokens: 10}\n")
    assert "'collection.answer_tokens'" in message and "got 10" in message
