"""Every mistake of a caller ends in one line of the right kind that says what to change."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

import paceline
from paceline.assembly import Pace, build, build_from_objects
from paceline.config import Config
from paceline.errors import (
    ConfigError,
    ModelError,
    PacelineError,
    RequestError,
    VocabularyError,
)
from paceline.models import loading
from paceline.testing.tiny_models import tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CONTEXT = 32


def assert_one_clear_line(error: PacelineError, words: list[str]) -> None:
    message = str(error)
    assert message and "\n" not in message
    assert all(word in message for word in words), message


# --- requests -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pace() -> Pace:
    config = Config.model_validate({"target": {"model": "in memory"}})
    model = tiny_model("llama", context=CONTEXT)
    parts = build_from_objects(model, byte_tokenizer(), {"small": model}, config)
    return Pace(parts)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompt": ""}, ["prompt is empty"]),
        ({"prompt": []}, ["prompt is empty"]),
        ({"prompt": "x" * (CONTEXT + 1)}, ["33 tokens", "holds 32", "shorten"]),
        ({"prompt": [1, 2, 259]}, ["token id 259", "0 to 258"]),
        ({"prompt": [-1, 2]}, ["token id -1"]),
        ({"max_new_tokens": 0}, ["max_new_tokens", "at least 1", "got 0"]),
        ({"max_new_tokens": -3}, ["max_new_tokens", "got -3"]),
        ({"temperature": -0.5}, ["temperature", "-0.5"]),
        ({"temperature": float("nan")}, ["temperature", "nan"]),
        ({"temperature": float("inf")}, ["temperature", "inf"]),
        ({"temperature": 1.0, "top_k": -1}, ["top_k", "-1"]),
        ({"temperature": 1.0, "top_p": 0.0}, ["top_p", "(0, 1]"]),
        ({"temperature": 1.0, "top_p": 1.1}, ["top_p", "1.1"]),
        ({"temperature": 1.0, "min_p": 1.0}, ["min_p", "[0, 1)"]),
        ({"temperature": 1.0, "min_p": -0.1}, ["min_p", "-0.1"]),
        ({"top_k": 5}, ["top_k", "temperature 0", "set a temperature"]),
        ({"top_p": 0.9, "min_p": 0.1}, ["top_p, min_p", "temperature 0"]),
        ({"sampling": "residual"}, ["'residual'", "temperature 0"]),
        ({"sampling": "invariant", "seed": 3}, ["'invariant'", "temperature 0"]),
        (
            {"temperature": 1.0, "sampling": "beam"},
            ["auto, greedy, residual, block or invariant", "'beam'"],
        ),
        ({"stop": ["a", ""]}, ["stop string is empty"]),
        ({"stop": ""}, ["stop string is empty"]),
        ({"num_beams": 4}, ["'num_beams' is not supported", "max_new_tokens"]),
        ({"num_beams": 4}, ["'num_beams' is not supported"]),
        ({"drafter": "smal"}, ["unknown drafter 'smal'", "none, small"]),
        ({"drafter": "auto"}, ["'auto' needs a choice", "none, small"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_request_that_cannot_be_served_says_why(
    pace: Pace, settings: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(RequestError) as caught:
        pace.request(**{"prompt": "hello", "drafter": "small", **settings})

    assert_one_clear_line(caught.value, words)


def test_messages_without_a_chat_template_are_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    bare = paceline.load(target=tiny_model("llama"), tokenizer=tokenizer)

    with pytest.raises(RequestError) as caught:
        bare.request([{"role": "user", "content": "hi"}], drafter="none")

    assert_one_clear_line(caught.value, ["no chat template", "as a string"])


def test_one_prompt_given_for_a_list_of_prompts_is_refused(pace: Pace) -> None:
    message = {"role": "user", "content": "hi"}
    for prompt in ("hello", [message], (message,), message, b"hello", None, 5):
        with pytest.raises(RequestError) as caught:
            pace.generate(prompt, drafter="none")
        assert_one_clear_line(caught.value, ["list of prompts", "complete"])


def test_one_bad_prompt_among_many_stops_before_any_is_decoded(pace: Pace) -> None:
    calls: list[None] = []
    hook = pace.parts.target.model.register_forward_pre_hook(lambda *_: calls.append(None))
    with pytest.raises(RequestError, match="33 tokens"):
        pace.generate(["fine", "x" * (CONTEXT + 1)], drafter="none")
    hook.remove()

    assert calls == []


# --- what is loaded -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "good"
    tiny_model("llama", context=CONTEXT).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good_folder: Path, tmp_path: Path) -> Path:
    """Return a copy of a good model, to be damaged."""
    copied = tmp_path / "model"
    shutil.copytree(good_folder, copied)
    return copied


def change_json(path: Path, **changes: object) -> None:
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, **changes}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def drop_a_weight(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))


def poison_a_weight(folder: Path) -> None:
    change_weights(
        folder, lambda weights: weights["model.layers.1.mlp.up_proj.weight"].fill_(torch.nan)
    )


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


SPOILT: list[tuple[str, Callable[[Path], object], type[PacelineError], list[str]]] = [
    ("no folder", shutil.rmtree, ModelError, ["no such folder"]),
    ("no config", lambda f: (f / "config.json").unlink(), ModelError, ["no config.json"]),
    ("config is no JSON", lambda f: (f / "config.json").write_text("{"), ModelError, ["JSON"]),
    (
        "unknown architecture",
        lambda f: change_json(f / "config.json", model_type="zebra"),
        ModelError,
        ["zebra"],
    ),
    (
        "no weights",
        lambda f: (f / "model.safetensors").unlink(),
        ModelError,
        ["no usable weights", "safetensors"],
    ),
    ("only pickled weights", pickle_weights, ModelError, ["safetensors"]),
    ("truncated weights", truncate, ModelError, ["damaged or truncated", "again"]),
    ("empty weights", empty_weights, ModelError, ["damaged or truncated"]),
    ("a weight is missing", drop_a_weight, ModelError, ["1 weights are missing", "up_proj"]),
    ("a weight is NaN", poison_a_weight, ModelError, ["logits are not finite"]),
    (
        "weights of another shape",
        lambda f: change_json(f / "config.json", intermediate_size=48),
        ModelError,
        ["does not fit", "mlp.down_proj", "(32, 64)", "(32, 48)"],
    ),
    (
        "no tokenizer",
        lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")],
        ModelError,
        ["no usable tokenizer", "tokenizer.json"],
    ),
]


@pytest.mark.parametrize(
    ("spoil", "error", "words"), [s[1:] for s in SPOILT], ids=[s[0] for s in SPOILT]
)
@pytest.mark.parametrize("role", ["target", "drafter"])
def test_a_spoilt_model_is_named_with_what_is_wrong(
    good_folder: Path,
    folder: Path,
    spoil: Callable[[Path], object],
    error: type[PacelineError],
    words: list[str],
    role: str,
) -> None:
    spoil(folder)
    target, drafter = (folder, good_folder) if role == "target" else (good_folder, folder)
    config = {
        "target": {"model": str(target)},
        "drafters": {"small": {"kind": "draft_model", "settings": {"model": str(drafter)}}},
    }

    with pytest.raises(error) as caught:
        build(Config.model_validate(config))

    assert_one_clear_line(caught.value, words)
    if spoil is not poison_a_weight:  # found once it runs, under its name
        assert str(caught.value).startswith(str(folder))


def test_the_good_model_is_good(good_folder: Path) -> None:
    """Otherwise the damaged models might fail for another reason."""
    config = {
        "target": {"model": str(good_folder)},
        "drafters": {"small": {"kind": "draft_model", "settings": {"model": str(good_folder)}}},
    }
    built = Pace(build(Config.model_validate(config)))

    assert len(built.complete("hello", max_new_tokens=5, drafter="small").token_ids) == 5


def test_a_drafter_of_another_vocabulary_is_refused_before_weights_are_read(
    good_folder: Path, folder: Path
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder)
    truncate(folder)  # never comes to light
    config = {
        "target": {"model": str(good_folder)},
        "drafters": {"small": {"kind": "draft_model", "settings": {"model": str(folder)}}},
    }

    with pytest.raises(VocabularyError) as caught:
        build(Config.model_validate(config))

    assert_one_clear_line(caught.value, ["'small'", "259 against 260", "'zebra'", "use a drafter"])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"drafters": {"x": {"kind": "promt_lookup"}}}, ConfigError, ["'x'", "'prompt_lookup'"]),
        ({"drafters": {"auto": {"kind": "none"}}}, ConfigError, ["'auto'"]),
        ({"drafters": {"none": {"kind": "prompt_lookup"}}}, ConfigError, ["'none'"]),
        (
            {"drafters": {"x": {"kind": "prompt_lookup", "settings": {"modle": 1}}}},
            ConfigError,
            ["unknown key 'modle'"],
        ),
        ({"target": {"model": "/nowhere/model"}}, ModelError, ["/nowhere/model", "no such folder"]),
        ({"target": {"model": "./nowhere"}}, ModelError, ["./nowhere", "no such folder"]),
    ],
)
def test_a_configuration_that_cannot_be_built_says_why(
    good_folder: Path, changes: dict[str, object], error: type[PacelineError], words: list[str]
) -> None:
    raw = {"target": {"model": str(good_folder)}, **changes}

    with pytest.raises(error) as caught:
        build(Config.model_validate(raw))

    assert_one_clear_line(caught.value, words)


def test_a_device_that_is_not_there_is_named_with_those_that_are(
    good_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = {"target": {"model": str(good_folder), "device": "cuda"}}

    with pytest.raises(ModelError) as caught:
        build(Config.model_validate(config))

    assert_one_clear_line(caught.value, ["'cuda'", "cpu"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, ["load takes a configuration"]),
        ({"config": "paceline.yaml", "target": "model"}, ["load takes a configuration"]),
        ({"target": "model"}, ["tokenizer="]),
        ({"config": "nowhere.yaml"}, ["nowhere.yaml", "no such file"]),
        ({"target": "model", "tokenizer": "bytes", "drafters": {"auto": "model"}}, ["'auto'"]),
    ],
)
def test_load_says_what_it_was_not_given(arguments: dict[str, object], words: list[str]) -> None:
    objects = {"model": tiny_model("llama"), "bytes": byte_tokenizer()}
    given = {
        key: {k: objects[v] for k, v in value.items()}
        if isinstance(value, dict)
        else objects.get(value, value)
        for key, value in arguments.items()
    }

    with pytest.raises(ConfigError) as caught:
        paceline.load(**given)

    assert_one_clear_line(caught.value, words)


def test_a_hub_name_that_cannot_be_fetched_may_be_a_mistyped_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to the hub.\nTry again.")

    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", offline)

    with pytest.raises(ModelError) as caught:
        build(Config.model_validate({"target": {"model": "models/mistyped"}}))

    assert_one_clear_line(caught.value, ["models/mistyped", "couldn't connect", "no local folder"])
