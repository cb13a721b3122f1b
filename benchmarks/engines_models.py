"""The models of versus_engines: the bundled target with its learned policies, and a random Llama.

A model has one configuration of paceline per precision; they share the folder of the weights.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from peers.catalog import Weights
from timed_setup import SHAPE_03B, load_timed_config, random_llama, show_progress

from paceline.config import Config, EngineSection, ModelSection
from paceline.contracts import AUTO, NONE
from paceline.files import write_atomically
from paceline.selection import is_policy
from paceline.verbs.pipeline import in_folder, prepare

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from paceline.contracts import PromptRecord

DRAFTER: Final = "general"
TIMED_DRAFTERS: Final = ("math", DRAFTER)  # a specialist and the one for all tasks
ARMS: Final = (NONE, AUTO, "suffix", "lookup", f"{DRAFTER}@4")
PRECISIONS: Final = ("bfloat16", "int8")
VOCABULARY, CONTEXT = 8192, 2048  # of the random model; the tokenizer is the zoo's


def with_precision(config: Config, precision: str) -> Config:
    """Return the configuration with the target's weights in this precision."""
    if precision == "bfloat16":
        return config
    target = config.target.model_dump() | {"weights": precision}
    return config.model_copy(update={"target": ModelSection.model_validate(target)})


def write_config(config: Config, folder: Path) -> Path:
    """Write a configuration into its folder, as JSON, which is YAML."""
    path = folder / "paceline.yaml"
    write_atomically(path, config.model_dump_json(exclude_defaults=True, indent=1).encode())
    return path


def zoo_weights(
    folder: Path, options: argparse.Namespace, learned: Sequence[PromptRecord]
) -> Weights:
    """Return the bundled target; learn a policy for each precision, or resume with it."""
    config = load_timed_config(options, "bfloat16", with_answers=True)
    configs = {}
    for precision in PRECISIONS:
        own = in_folder(with_precision(config, precision), folder / precision)
        if not (options.resume and is_policy(own.paths.policy)):
            shutil.rmtree(folder / precision, ignore_errors=True)
            with show_progress() as report:
                prepare(own, learned, options.max_new_tokens, report)
        configs[precision] = write_config(own, folder / precision)
    drafter = Path(config.drafters[DRAFTER].settings["model"])
    return Weights("zoo", Path(config.target.model), drafter, ARMS, configs, ignore_eos=False)


def random_weights(folder: Path, options: argparse.Namespace) -> Weights:
    """Return the 0.3 B Llama with random weights and the zoo's tokenizer; save it if it is not there."""
    model = folder / "model"
    if not model.is_dir():
        save_random_llama(model, Path(load_timed_config(options, "bfloat16").target.model))
    config = Config(
        target=ModelSection(model=str(model.absolute()), dtype="bfloat16"),
        engine=EngineSection(prefix_positions=0),
        threads=options.threads,
    )
    configs = {
        precision: write_config(
            in_folder(with_precision(config, precision), folder / precision), folder / precision
        )
        for precision in PRECISIONS
    }
    return Weights("0.3b", model.absolute(), None, (NONE,), configs, ignore_eos=True)


def save_random_llama(folder: Path, tokenizer: Path) -> None:
    """Write the random model in bfloat16. tokenizer: folder of the model that lends its own."""
    partial = folder.with_name(folder.name + ".part")
    shape = {**SHAPE_03B, "vocab_size": VOCABULARY}
    random_llama(shape, CONTEXT, tied=True).to(torch.bfloat16).save_pretrained(partial)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / name, partial)
    partial.rename(folder)
