"""The set-up that the benchmark programs share: options, models, prompts, requests, progress."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from paceline.assembly import Pace, build_from_objects
from paceline.cli.options import configured
from paceline.cli.progress import progress
from paceline.config import Config, EngineSection, ModelSection
from paceline.experiments.by_clock import without_prefixes
from paceline.experiments.demo_prompts import demo_prompts
from paceline.experiments.prompt_files import TASKS
from paceline.store import read_prompts, take_part_of_files
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from paceline.contracts import Completion, Progress, PromptRecord


def llama_shape(
    hidden_size: int, intermediate_size: int, layers: int, heads: int, key_value_heads: int
) -> dict[str, int]:
    """Return the sizes of a Llama by the names of its configuration."""
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
    }


SHAPE_03B = llama_shape(1024, 2816, 24, 16, 8)


def make_parser(
    doc: str | None,
    per_task: int | None = None,
    max_new_tokens: int = 96,
    config: Path = Path("paceline.yaml"),
) -> argparse.ArgumentParser:
    """Return a parser, described by the first line of `doc`, with --out and --threads.

    per_task: add the options of programs that time the demo's prompts, with these defaults.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0] if doc else None)
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results, help="folder of tables and figures")
    parser.add_argument("--threads", type=int, default=2)
    if per_task is not None:
        parser.add_argument("--config", type=Path, default=config)
        parser.add_argument("--per-task", type=int, default=per_task, help="timed prompts per task")
        parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, set torch's threads, and show only transformers' errors."""
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return options


def load_timed_config(
    options: argparse.Namespace, dtype: str | None, with_answers: bool = False
) -> Config:
    """Load --config with --threads, for timed runs.

    with_answers: drafters may use collected answers; for programs that collect other prompts themselves.
    """
    config = without_prefixes(configured(options.config, dtype, threads=options.threads))
    return config if with_answers else without_answers(config)


def load_zoo(dtype: str, **settings: Any) -> Config:
    """Load the configuration of the bundled models, for timed runs."""
    return without_answers(without_prefixes(configured(Path("paceline.yaml"), dtype, **settings)))


def without_answers(config: Config) -> Config:
    """Return the configuration with drafters that use no collected answers, which may be to the
    prompts of a benchmark.
    """
    drafters = {
        name: section.model_copy(
            update={"settings": {k: v for k, v in section.settings.items() if k != "answers"}}
        )
        for name, section in config.drafters.items()
    }
    return config.model_copy(update={"drafters": drafters})


def show_progress() -> AbstractContextManager[Progress]:
    """Return a context that shows progress on the terminal."""
    return progress(Console())


def load_prompts(
    num_collected: int, num_timed: int, data: Path | None
) -> tuple[list[PromptRecord], list[PromptRecord]]:
    """Return prompts to learn from and prompts to time, per task; none is in both.

    data: folder of JSONL files, one per task; None takes the demo's prompts.
    """
    if data is None:
        # only 72 of math and of translation are bundled
        return demo_prompts(num_collected, min(num_timed, 72 - num_collected))
    files = [read_prompts([data / f"{task}.jsonl"]) for task in TASKS]
    to_collect, to_time = (take_part_of_files(files, part) for part in ("collection", "judging"))
    collected = [record for of_task in to_collect for record in of_task[:num_collected]]
    timed = [record for of_task in to_time for record in of_task[:num_timed]]
    return collected, timed


def messages(prompt: str) -> list[dict[str, str]]:
    """Return a prompt as a conversation of one message."""
    return [{"role": "user", "content": prompt}]


def complete(pace: Pace, tokens: Sequence[int], arm: str, max_new_tokens: int) -> Completion:
    """Complete one prompt with one arm, without the model's own generation settings."""
    return pace.complete(
        list(tokens), drafter=arm, max_new_tokens=max_new_tokens, generation_config="none"
    )


@torch.inference_mode()
def generate(model: Any, tokens: Sequence[int], max_new_tokens: int, **extra: Any) -> list[int]:
    """Return the output of transformers' own greedy `generate`."""
    ids = torch.tensor([list(tokens)], device=model.device)
    mask = torch.ones_like(ids)
    limits = {"max_new_tokens": max_new_tokens, "do_sample": False}
    output = model.generate(ids, attention_mask=mask, **limits, **extra)
    answer: list[int] = output[0, ids.shape[1] :].tolist()
    return answer


def fix_draft_length(assistant: Any, num_draft_tokens: int) -> None:
    """Make transformers' assistant model draft exactly this many tokens."""
    assistant.generation_config.num_assistant_tokens = num_draft_tokens
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0


def count_steps(report: Progress, stage: str, total: int) -> Callable[[], None]:
    """Return a function that reports one more step of a stage."""
    done = 0

    def on_step() -> None:
        nonlocal done
        done += 1
        report(stage, done, total)

    return on_step


def random_llama(shape: Mapping[str, int], context: int, tied: bool, device: str = "cpu") -> Any:
    """Return a Llama with random weights that never ends a text, in float32."""
    config = LlamaConfig(
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        **shape,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = None
    return model


def pace_in_memory(model: Any, drafters: Mapping[str, Any]) -> Pace:
    """Return a pace of models that exist only in memory."""
    engine = EngineSection(prefix_positions=0)
    config = Config(target=ModelSection(model="in memory"), engine=engine)
    return Pace(build_from_objects(model, byte_tokenizer(), dict(drafters), config))
