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
from paceline.bench.timed import Method, TimedPrompt, Timing, time_interleaved
from paceline.cli.options import configured
from paceline.cli.progress import progress
from paceline.config import Config, EngineSection, ModelSection
from paceline.contracts import split_arm
from paceline.replay import max_output, replay, walk
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager

    import numpy as np

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
    options: argparse.Namespace, dtype: str | None, max_rows: int | None = None, **paths: Path
) -> Config:
    """Load --config with --threads, for timed runs."""
    config = configured(options.config, dtype=dtype, threads=options.threads, **paths)
    return without_prefixes(config, max_rows)


def without_prefixes(config: Config, max_rows: int | None = None) -> Config:
    """Keep prompts from reusing each other's prefill, so that each method pays for its own."""
    update = {"prefix_positions": 0, "max_rows": max_rows or config.engine.max_rows}
    return config.model_copy(update={"engine": config.engine.model_copy(update=update)})


def load_zoo(dtype: str, **settings: Any) -> Config:
    """Load the configuration of the bundled models, for timed runs."""
    return without_prefixes(configured(Path("paceline.yaml"), dtype, **settings))


def show_progress() -> AbstractContextManager[Progress]:
    """Return a context that shows progress on the terminal."""
    return progress(Console())


def messages(prompt: str) -> list[dict[str, str]]:
    """Return a prompt as a conversation of one message."""
    return [{"role": "user", "content": prompt}]


def encode_timed(pace: Pace, records: Iterable[PromptRecord]) -> list[TimedPrompt]:
    """Return prompts in the target's tokens."""
    return [TimedPrompt(r.id, r.domain, tuple(pace.encode(messages(r.prompt)))) for r in records]


def complete(
    pace: Pace, tokens: Sequence[int], arm: str, max_new_tokens: int, **settings: Any
) -> Completion:
    """Complete one prompt with one arm, without the model's own generation settings."""
    return pace.complete(
        list(tokens),
        drafter=arm,
        max_new_tokens=max_new_tokens,
        generation_config="none",
        **settings,
    )


def time_arms(
    pace: Pace,
    arms: Sequence[str],
    prompts: Sequence[TimedPrompt],
    new_tokens: int,
    repeats: int,
    on_run: Callable[[], None],
    **settings: Any,
) -> tuple[list[Timing], dict[str, dict[str, Completion]]]:
    """Time arms interleaved; return timings, and arm -> prompt id -> last completion."""
    completions: dict[tuple[str, tuple[int, ...]], Completion] = {}

    def method(arm: str) -> Method:
        def run(tokens: Sequence[int]) -> Sequence[int]:
            completion = complete(pace, tokens, arm, new_tokens, **settings)
            completions[arm, tuple(tokens)] = completion
            return completion.token_ids

        return run

    timings = time_interleaved({a: method(a) for a in arms}, prompts, repeats, on_run=on_run)
    return timings, {a: {p.id: completions[a, p.tokens] for p in prompts} for a in arms}


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


def replay_rounds(
    pace: Pace, arm: str, prompt: TimedPrompt, text: Sequence[int], new_tokens: int
) -> np.ndarray:
    """Return an arm's rounds along a text: drafted and accepted, [rounds, 2]."""
    name, length = split_arm(arm)
    limit = max_output(new_tokens, len(prompt.tokens), pace.parts.target.context_length)
    replayed = replay(pace.parts.drafters[name], prompt.tokens, text, limit)
    if length is None:
        return replayed.rounds
    assert replayed.ahead is not None  # arms with a length are made of drafters that nest
    return walk(replayed.ahead, length)


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
