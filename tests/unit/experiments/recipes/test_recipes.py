"""Every recipe of the repository fits, planted mistakes do not, and a small recipe runs."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml

from paceline.contracts import split_arm
from paceline.errors import ConfigError, ModelError, PacelineError
from paceline.experiments.recipes import dry_run, load_recipe, run_recipe
from paceline.experiments.recipes.dry_run import Roofline
from paceline.experiments.recipes.shapes import model_of_shape, num_multiplied

if TYPE_CHECKING:
    from paceline.experiments.recipes import DryRun

ROOT = Path(__file__).parents[4]
RECIPES = sorted((ROOT / "experiments" / "recipes").glob("*.yaml"))
PAGE = (ROOT / "docs" / "experiments" / "assistant-selection.md").read_text(encoding="utf-8")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 256,
}
SMALL: dict[str, Any] = {
    "title": "small",
    "paper": "none",
    "claims": [{"text": "something", "source": "abstract"}],
    "ours": ["all of it"],
    "device": {
        "name": "toy",
        "gigabytes": 0.01,
        "gigabytes_per_second": 1,
        "teraflops": 0.004,
        "efficiency": 0.5,
    },
    "target": {"model": "absent/target", "dtype": "float32", "shape": LLAMA},
    "drafters": {
        "tiny": {
            "kind": "draft_model",
            "settings": {"model": "absent/tiny", "num_draft_tokens": 3},
            "shape": LLAMA | {"hidden_size": 32, "num_hidden_layers": 1},
        },
        "own": {"kind": "layer_skip", "settings": {"skip_attention": [1], "skip_mlp": [1, 2]}},
        "table": {
            "kind": "trigram_tree",
            "settings": {"table": "text.table"},
            "corpus_megabytes": 4,
        },
    },
    "rows": 2,
    "workload": {
        "files": ["spec_bench.jsonl"],
        "prompts": 4,
        "prompt_tokens": 20,
        "new_tokens": 10,
    },
}


def planned(raw: dict[str, Any], folder: Path) -> DryRun:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return dry_run(load_recipe(path))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_fits_and_the_page_says_so(path: Path) -> None:
    found = dry_run(load_recipe(path))
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| [{path.stem}]"))
    hours = found.seconds["decode with the target"] / 3600
    assert f"| {found.needed_bytes / 1e9:.1f} GB |" in line
    assert f"| {hours:.1f} h |" in line or f"| {60 * hours:.0f} min |" in line
    assert found.needed_bytes < found.device_bytes
    assert all(plan.break_even >= 1 for plan in found.models[1:])
    assert found.seconds["decode with the target"] > 60


def test_the_repository_has_a_recipe_for_every_paper() -> None:
    papers = {load_recipe(path).paper for path in RECIPES}
    assert papers == {
        f"arXiv {id}" for id in ("2408.08470", "2407.12021", "2309.08168", "2403.00858")
    }


def test_a_skip_set_is_as_large_as_the_paper_says() -> None:
    recipe = next(load_recipe(path) for path in RECIPES if "verify" in path.stem)
    settings = recipe.drafters["adaptive"].settings
    skipped = settings["skip_attention"], settings["skip_mlp"]
    assert [len(set(layers)) for layers in skipped] == [24, 10]
    assert "24 attention and 10 MLP" in recipe.claims[0].text


def test_sizes_and_seconds_are_those_computed_by_hand(tmp_path: Path) -> None:
    found = planned(SMALL, tmp_path)
    target, tiny, own, table = found.models

    def parameters(hidden: int, layers: int) -> int:
        head = hidden // 4
        attention = hidden * (hidden + 2 * 2 * head + hidden)
        return 2 * 300 * hidden + layers * (attention + 3 * hidden * 128 + 2 * hidden) + hidden

    assert target.parameters == parameters(64, 4)
    assert tiny.parameters == parameters(32, 1)
    assert target.cache_bytes == 2 * 30 * (2 * 4 * 2 * 16 * 4)  # rows, positions, keys and values
    assert own.weight_bytes == own.cache_bytes == 0
    assert table.host_bytes == 8 * 300 + 20 * 1_000_000
    assert found.notes == [
        "the drafting time of table on the host is not predicted, nor included in 'pays above'"
    ]
    # two tokens a step are bound by bandwidth: weights but for the embedding, cache of two rows at 25
    multiplied = target.parameters - 300 * 64
    read = 4 * multiplied + 2 * 25 * 1024
    assert target.step_seconds == pytest.approx(read / 0.5e9)
    skipped = 64 * (64 + 2 * 2 * 16 + 64) + 2 * 3 * 64 * 128
    assert own.step_seconds / target.step_seconds == pytest.approx(1 - skipped / multiplied)
    # eight tokens, where arithmetic takes over
    work = 2 * multiplied * 8 + 4 * 4 * 64 * 25 * 8
    verify = max(read / 0.5e9, work / 2e9)
    assert tiny.break_even == pytest.approx((verify + 3 * tiny.step_seconds) / target.step_seconds)


def test_more_devices_are_faster_and_hold_more(tmp_path: Path) -> None:
    two = deepcopy(SMALL)
    two["device"]["count"] = 2
    one, other = planned(SMALL, tmp_path), planned(two, tmp_path)
    assert other.models[0].step_seconds == pytest.approx(one.models[0].step_seconds / 2)
    assert other.device_bytes == 2 * one.device_bytes


def test_training_takes_six_operations_per_parameter_and_token(tmp_path: Path) -> None:
    """The training's own number of devices counts, not that of decoding."""
    trained = SMALL | {"training": {"drafter": "tiny", "tokens": 1e6, "devices": 4}}
    trained["device"] = SMALL["device"] | {"count": 2}
    found = planned(trained, tmp_path)
    expected = 6 * found.models[1].parameters * 1e6 / (4 * 2e9)
    assert found.seconds["train tiny"] == pytest.approx(expected)


def test_an_embedding_that_is_tied_is_multiplied_with() -> None:
    shape = LLAMA | {"tie_word_embeddings": True}
    tied = model_of_shape("tied", shape, torch.float32)
    loose = model_of_shape("loose", LLAMA, torch.float32)
    assert num_multiplied(tied) == num_multiplied(loose)


def change(path: str, value: Any) -> dict[str, Any]:
    """Return the small recipe with one entry replaced, or removed if the value is None."""
    raw = deepcopy(SMALL)
    *above, last = path.split(".")
    place = raw
    for key in above:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return raw


BAD = {
    "vocabulary": ("drafters.tiny.shape.vocab_size", 301, "of 301 tokens, the target's has 300"),
    "too big": ("device.gigabytes", 0.001, r"does not fit: weights .* toy 0\.0 GB can be used"),
    "unknown key": ("drafters.tiny.shap", {}, "unknown key 'drafters.tiny.shap'; did you mean"),
    "unknown size": ("target.shape.hiden_size", 64, "a llama has no 'hiden_size'"),
    "no such model": ("target.shape.model_type", "lama", "'target': not the shape of a language model"),
    "no model type": ("target.shape.model_type", None, "names no model_type"),
    "not a number": ("target.shape.hidden_size", "big", "'target': not the shape of a language model"),
    "odd heads": ("target.shape.num_attention_heads", 7, "'target': not the shape of a language model"),
    "layer beyond": ("drafters.own.settings.skip_mlp", [1, 4], "no layer 4 to skip"),
    "size of a name": ("target.millions", 7000, "million parameters, the recipe says 7,000"),
    "context": ("workload.new_tokens", 400, "do not fit the target's context of 256"),
    "no shape": ("drafters.tiny.shape", None, "drafter 'tiny': needs the 'shape' of its model"),
    "shape of nothing": ("drafters.own.shape", LLAMA, "has no model; remove 'shape'"),
    "table of nothing": ("drafters.table.corpus_megabytes", None, "give both 'table' and"),
    "kind": ("drafters.own.kind", "layer_skp", "unknown kind 'layer_skp'"),
    "setting": ("drafters.own.settings.skip_atention", [2], "did you mean 'skip_attention'"),
    "dtype": ("target.dtype", "auto", "'target.dtype' must be float32, bfloat16 or float16"),
    "source": ("claims", [{"text": "x", "source": "rumour"}], "'claims.0.source'"),
    "no claims": ("claims", [], "'claims'"),
    "training": ("training", {"drafter": "x", "tokens": 1, "devices": 1}, "there is no drafter 'x'"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_mistake_is_one_line_that_says_what_to_change(what: str, tmp_path: Path) -> None:
    path, value, message = BAD[what]
    with pytest.raises(PacelineError, match=message) as caught:
        planned(change(path, value), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["- a list", "title: [", "title: small"])
def test_a_file_that_is_no_recipe_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"recipe\.yaml: "):
        load_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(ConfigError, match="no such recipe"):
        load_recipe(tmp_path / "absent.yaml")


# --- with weights ---------------------------------------------------------------------------------


def tiny_recipe(models: Path) -> dict[str, Any]:
    """Return a recipe with the shapes of the tiny models on the disk."""
    raw = deepcopy(SMALL)
    shape = {key: json.loads((models / "target" / "config.json").read_text())[key] for key in LLAMA}
    raw["target"] = {"model": str(models / "target"), "dtype": "float32", "device": "cpu"}
    raw["target"]["shape"] = shape
    near = {"model": str(models / "near"), "dtype": "float32", "device": "cpu"}
    raw["drafters"] = {
        "near": {"kind": "draft_model", "settings": near, "shape": dict(shape)},
        "lookup": {"kind": "prompt_lookup"},
    }
    raw["workload"] |= {"prompts": 20, "files": ["spec_bench.jsonl", "math.jsonl"]}
    return raw


def test_missing_weights_are_named_before_anything_is_done(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(SMALL, sort_keys=False))
    with pytest.raises(ModelError, match="weights of absent/target, absent/tiny are missing; name"):
        run_recipe(load_recipe(path), tmp_path / "work", data)
    assert not (tmp_path / "work").exists()


def test_a_recipe_whose_weights_are_here_runs(models: Path, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(models), sort_keys=False))
    report = run_recipe(load_recipe(path), tmp_path / "work", data).report
    assert {split_arm(arm)[0] for arm in report.overall.arms} == {"none", "near", "lookup"}
    assert (tmp_path / "work" / "policy").is_dir()


def test_a_model_of_another_shape_is_refused(models: Path, data: Path, tmp_path: Path) -> None:
    raw = tiny_recipe(models)
    raw["drafters"]["near"]["shape"]["intermediate_size"] += 32
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    with pytest.raises(
        ConfigError, match=r"near: its intermediate_size is \d+, the recipe's shape"
    ):
        run_recipe(load_recipe(path), tmp_path / "work", data)


def test_a_missing_prompt_file_is_named(models: Path, data: Path, tmp_path: Path) -> None:
    raw = tiny_recipe(models)
    raw["workload"]["files"] = ["cnn_dm.jsonl"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    with pytest.raises(ConfigError, match=r"no cnn_dm\.jsonl in this data folder"):
        run_recipe(load_recipe(path), tmp_path / "work", data)


def test_the_roofline_turns_from_bandwidth_to_arithmetic(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(SMALL, sort_keys=False))
    roofline = Roofline(load_recipe(path))
    model = model_of_shape("target", LLAMA, torch.float32)
    one, two, many = (roofline.seconds(model, n, 10) for n in (1, 2, 200))
    assert one == two
    assert many > 10 * one
