"""When should a drafter stop? Fixed lengths against the stop rules, by replay on the bundled models.

    python benchmarks/stop_rules.py [--per-task 20] [--drafters general,general-4m,code]

The target decodes each prompt once (greedy), each drafter scores each output in one pass and is timed
for the cost table; from these every rule's rounds and its predicted speed follow, without decoding
again. What is accepted is exact. How much a rule drafts behind a first wrong token is estimated from
the confidences along the text (paceline.drafting.draft_replay). The best fixed length and the best
threshold are chosen on the same prompts that they are shown on, which flatters both; the expected-gain
rule has nothing to choose.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from paceline.assembly import Pace, build
from paceline.bench.circumstances import circumstances, headline
from paceline.bench.profile import measure_cost_table
from paceline.cli.options import configured
from paceline.cli.progress import progress
from paceline.contracts import NONE, CollectedPrompt
from paceline.drafting.draft_length import FIXED_LENGTH, ConfidenceStop, ExpectedGainStop
from paceline.drafting.draft_model import DraftModel
from paceline.experiments.demo_prompts import demo_prompts
from paceline.files import write_atomically
from paceline.replay import max_output, replay, walk
from paceline.replay.priced import stopped_ahead
from paceline.rewards import request_seconds

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
    """Each prompt's output and, by arm, what its drafter thought of it."""
    pace = Pace(parts)
    prompts, _ = demo_prompts(per_task, 1)
    found = []
    for number, record in enumerate(prompts, start=1):
        tokens = pace.encode([{"role": "user", "content": record.prompt}])
        plain = pace.complete(
            tokens, drafter=NONE, max_new_tokens=max_new_tokens, generation_config="none"
        )
        limit = max_output(max_new_tokens, len(tokens), parts.target.context_length)
        replays = {arm: replay(parts.drafters[arm], tokens, plain.token_ids, limit) for arm in arms}
        scores = {
            arm: (r.scores.match, r.scores.confidence) for arm, r in replays.items() if r.scores
        }
        found.append(
            CollectedPrompt(
                id=record.id,
                domain=record.domain,
                prompt_tokens=tuple(tokens),
                output_tokens=tuple(plain.token_ids),
                max_new_tokens=max_new_tokens,
                features=np.zeros(0, dtype=np.float32),  # nothing here looks at them
                rounds={},
                draft_outputs={},
                scores=scores,
            )
        )
        report("decode and score", number, len(prompts))
    return found


def with_long_drafts(config: Config, arms: list[str], longest: int) -> Config:
    """The configuration with these drafters alone, each at its longest and without a rule."""
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
    """(family, name, rule, length) of everything that is compared."""
    rules: list[tuple[str, str, StopRule, int]] = [
        ("fixed", f"fixed {k}", FIXED_LENGTH, k) for k in FIXED_LENGTHS if k <= longest
    ]
    rules += [("confidence", f"confidence {t}", ConfidenceStop(t), longest) for t in THRESHOLDS]
    return [*rules, ("expected", "expected", ExpectedGainStop(costs, arm, longest), longest)]


def measure(
    prompts: list[CollectedPrompt], arm: str, rule: StopRule, length: int, costs: CostTable
) -> dict[str, Any]:
    """Totals of one rule over all prompts, and predicted speed by domain."""
    seconds: dict[str, list[float]] = {}
    drafted = accepted = rounds = 0
    for prompt in prompts:
        found = walk(stopped_ahead(prompt, arm, rule, length))
        plain = np.zeros((len(prompt.output_tokens) - 1, 2), dtype=np.int64)
        num_prompt = len(prompt.prompt_tokens)
        spent = [
            request_seconds(costs.seconds, NONE, num_prompt, plain),
            request_seconds(costs.seconds, arm, num_prompt, found),
        ]
        total = seconds.setdefault(prompt.domain, [0.0, 0.0])
        total[0], total[1] = total[0] + spent[0], total[1] + spent[1]
        drafted += int(found[:, 0].sum())
        accepted += int(found[:, 1].sum())
        rounds += len(found)
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
    rows = []
    scored = [p for p in prompts if len(p.output_tokens) > 1]
    for arm in arms:
        for family, name, rule, length in rules_of(arm, costs, longest):
            figures = measure(scored, arm, rule, length, costs)
            rows.append({"drafter": arm, "family": family, "rule": name, **figures})
    return rows


def markdown(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    domains = list(rows[0]["predicted_speed_by_task"])
    lines = [
        "# When to stop drafting",
        "",
        f"{headline(facts)} {facts['setting']}",
        "",
        "Of each drafter the best fixed length, the best threshold and the expected-gain rule; all "
        "rows are in the JSON file.",
        "",
        "| drafter | rule | predicted over `none` | "
        + " | ".join(domains)
        + " | tokens a round | drafted a round | accepted |",
        "|---|---|---|" + "---|" * (len(domains) + 3),
    ]
    for arm in dict.fromkeys(r["drafter"] for r in rows):
        for family in ("fixed", "confidence", "expected"):
            r = max(
                (r for r in rows if (r["drafter"], r["family"]) == (arm, family)),
                key=lambda r: r["predicted_speed"],
            )
            by_task = " | ".join(f"{r['predicted_speed_by_task'][d]:.2f}" for d in domains)
            lines.append(
                f"| {arm} | {r['rule']} | {r['predicted_speed']:.3f} | {by_task} | "
                f"{r['tokens_per_round']:.2f} | {r['drafted_per_round']:.2f} | "
                f"{r['acceptance']:.0%} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", type=Path, default=Path("paceline.yaml"))
    parser.add_argument("--drafters", default="general,general-4m,code", help="arms, by comma")
    parser.add_argument("--longest", type=int, default=16, help="most tokens of a draft")
    parser.add_argument("--per-task", type=int, default=20)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--profile-seconds", type=float, default=30.0)
    parser.add_argument("--dtype", default=None, help="of the target")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    console = Console()
    arms = options.drafters.split(",")
    config = configured(options.config, dtype=options.dtype, threads=options.threads)
    parts = build(with_long_drafts(config, arms, options.longest))
    with progress(console) as report:
        costs = measure_cost_table(parts, report, budget=options.profile_seconds)
        prompts = collect(parts, arms, options.per_task, options.max_new_tokens, report)
    rows = compare(prompts, arms, costs, options.longest)
    facts: dict[str, Any] = circumstances()
    dtype = str(parts.target.dtype).removeprefix("torch.")
    facts["setting"] = (
        f"Target in {dtype}, greedy, batch 1, {options.per_task} prompts of each task, at most "
        f"{options.max_new_tokens} new tokens; seconds predicted from the cost table of this run, "
        "prefill included."
    )
    text = markdown(rows, facts)
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out / "stop_rules.md", text.encode())
    result = {"circumstances": facts, "rules": rows}
    write_atomically(
        options.out / "stop_rules.json", (json.dumps(result, indent=1) + "\n").encode()
    )
    console.print(text, markup=False, highlight=False)


if __name__ == "__main__":
    main()
