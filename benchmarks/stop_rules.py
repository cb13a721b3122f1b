"""When should a drafter stop? Fixed lengths against the stop rules, by replay on the bundled models.

    python benchmarks/stop_rules.py [--per-task 20] [--drafters general,code]

The target decodes each prompt once (greedy); each drafter scores each output in one pass and is timed
for the cost table. Every rule's rounds and predicted speed follow from these without decoding again.
Acceptance is exact. The number of tokens that a rule drafts after a first wrong token is estimated from
the confidences along the text (paceline.drafting.chain_replay). The best fixed length and the best
threshold are chosen on the prompts that they are reported on, which favours both; the expected-gain
rule has nothing to choose.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from result_pages import by_task, describe_run, page, save, table
from timed_setup import (
    complete,
    load_timed_config,
    make_parser,
    messages,
    parse,
    show_progress,
)

from paceline.assembly import Pace, build
from paceline.bench.profile import measure_cost_table
from paceline.contracts import NONE
from paceline.drafting.draft_length import FIXED_LENGTH, ConfidenceStop, ExpectedGainStop
from paceline.drafting.draft_model import DraftModel
from paceline.experiments.demo_prompts import demo_prompts
from paceline.replay import max_output, replay, walk
from paceline.replay.priced import stopped_ahead
from paceline.rewards import request_seconds
from paceline.store.records import CollectedPrompt

if TYPE_CHECKING:
    from paceline.assembly import Parts
    from paceline.config import Config
    from paceline.contracts import Progress
    from paceline.costs import CostTable
    from paceline.drafting.draft_length import StopRule

FIXED_LENGTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def collect(
    parts: Parts, arms: list[str], per_task: int, max_new_tokens: int, report: Progress
) -> list[CollectedPrompt]:
    """Return each prompt with its output and every drafter's scores of it."""
    pace = Pace(parts)
    prompts, _ = demo_prompts(per_task, 1)
    collected = []
    for number, record in enumerate(prompts, start=1):
        tokens = pace.encode(messages(record.prompt))
        plain = complete(pace, tokens, NONE, max_new_tokens)
        limit = max_output(max_new_tokens, len(tokens), parts.target.context_length)
        replays = {arm: replay(parts.drafters[arm], tokens, plain.token_ids, limit) for arm in arms}
        scores = {
            arm: (r.scores.match, r.scores.confidence) for arm, r in replays.items() if r.scores
        }
        collected.append(
            CollectedPrompt(
                id=record.id,
                domain=record.domain,
                prompt_tokens=tuple(tokens),
                output_tokens=tuple(plain.token_ids),
                max_new_tokens=max_new_tokens,
                features=np.zeros(0, dtype=np.float32),  # unused here
                replays={},
                draft_outputs={},
                scores=scores,
            )
        )
        report("decode and score", number, len(prompts))
    return collected


def with_long_drafts(config: Config, arms: list[str], longest: int) -> Config:
    """Return the configuration with only these drafters, each at its longest and without a rule."""
    unknown = [arm for arm in arms if arm not in config.drafters]
    if unknown or any(config.drafters[arm].kind != DraftModel.kind for arm in arms):
        there = [arm for arm, d in config.drafters.items() if d.kind == DraftModel.kind]
        raise SystemExit(f"--drafters takes draft models of the configuration: {', '.join(there)}")
    drafters = {}
    for arm in arms:
        section = config.drafters[arm]
        settings = {k: v for k, v in section.settings.items() if k not in ("stop", "threshold")}
        settings["num_draft_tokens"] = longest
        drafters[arm] = section.model_copy(update={"settings": settings})
    return config.model_copy(update={"drafters": drafters})


def rules_of(arm: str, costs: CostTable, longest: int) -> list[tuple[str, str, StopRule, int]]:
    """Return (family, name, rule, length) of everything that is compared."""
    rules: list[tuple[str, str, StopRule, int]] = [
        ("fixed", f"fixed {k}", FIXED_LENGTH, k) for k in FIXED_LENGTHS if k <= longest
    ]
    rules += [("confidence", f"confidence {t}", ConfidenceStop(t), longest) for t in THRESHOLDS]
    return [*rules, ("expected", "expected", ExpectedGainStop(costs, arm, longest), longest)]


def measure(
    prompts: list[CollectedPrompt], arm: str, rule: StopRule, length: int, costs: CostTable
) -> dict[str, Any]:
    """Return one rule's totals over all prompts, and its predicted speed by domain."""
    seconds: dict[str, list[float]] = {}
    drafted = accepted = rounds = 0
    for prompt in prompts:
        stopped = walk(stopped_ahead(prompt, arm, rule, length))
        plain = np.zeros((len(prompt.output_tokens) - 1, 2), dtype=np.int64)
        num_prompt = len(prompt.prompt_tokens)
        total = seconds.setdefault(prompt.domain, [0.0, 0.0])
        total[0] += request_seconds(costs.seconds, NONE, num_prompt, plain)
        total[1] += request_seconds(costs.seconds, arm, num_prompt, stopped)
        drafted += int(stopped[:, 0].sum())
        accepted += int(stopped[:, 1].sum())
        rounds += len(stopped)
    plain_total, own_total = (sum(pair[i] for pair in seconds.values()) for i in (0, 1))
    return {
        "predicted_speed": plain_total / own_total,
        "predicted_speed_by_task": {d: plain / own for d, (plain, own) in seconds.items()},
        "tokens_per_round": 1 + accepted / rounds,
        "drafted_per_round": drafted / rounds,
        "acceptance": accepted / drafted,
    }


def compare(
    prompts: list[CollectedPrompt], arms: list[str], costs: CostTable, longest: int
) -> list[Any]:
    """Return a row per drafter and rule."""
    rows = []
    scored = [p for p in prompts if len(p.output_tokens) > 1]
    for arm in arms:
        for family, name, rule, length in rules_of(arm, costs, longest):
            figures = measure(scored, arm, rule, length, costs)
            rows.append({"drafter": arm, "family": family, "rule": name, **figures})
    return rows


def markdown(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Return the page."""
    best = [
        max(
            (r for r in rows if (r["drafter"], r["family"]) == (arm, family)),
            key=lambda r: r["predicted_speed"],
        )
        for arm in dict.fromkeys(r["drafter"] for r in rows)
        for family in ("fixed", "confidence", "expected")
    ]
    lines = page("When to stop drafting", facts)
    lines += [
        "Of each drafter the best fixed length, the best threshold and the expected-gain rule; all "
        "rows are in the JSON file.",
        "",
    ]
    lines += table(
        best,
        {
            "drafter": "{drafter}",
            "rule": "{rule}",
            "predicted over `none`": "{predicted_speed:.3f}",
            **by_task(rows[0], "predicted_speed_by_task"),
            "tokens per round": "{tokens_per_round:.2f}",
            "drafted per round": "{drafted_per_round:.2f}",
            "accepted": "{acceptance:.0%}",
        },
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compare the stop rules of every drafter."""
    parser = make_parser(__doc__, per_task=20, max_new_tokens=128)
    parser.add_argument("--drafters", default="general,code", help="arms, by comma")
    parser.add_argument("--longest", type=int, default=16, help="maximum draft length in tokens")
    parser.add_argument("--profile-seconds", type=float, default=30.0)
    parser.add_argument("--dtype", default=None, help="of the target")
    options = parse(parser)
    arms = options.drafters.split(",")
    config = load_timed_config(options, options.dtype)
    parts = build(with_long_drafts(config, arms, options.longest))
    with show_progress() as report:
        costs = measure_cost_table(parts, report, budget=options.profile_seconds)
        prompts = collect(parts, arms, options.per_task, options.max_new_tokens, report)
    rows = compare(prompts, arms, costs, options.longest)
    dtype = str(parts.target.dtype).removeprefix("torch.")
    facts = describe_run(
        f"Target in {dtype}, greedy, batch 1, {options.per_task} prompts of each task, at most "
        f"{options.max_new_tokens} new tokens; seconds predicted from the cost table of this run, "
        "prefill included."
    )
    result = {"circumstances": facts, "rules": rows}
    save(options.out, "stop_rules", markdown(rows, facts), result)


if __name__ == "__main__":
    main()
