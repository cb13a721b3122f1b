"""Tri-gram trees on the bundled target: search, number of nodes, update rule, initial table.

    python benchmarks/aded.py --out DIR [--dtype float32] [--per-task 4] [--max-new-tokens 96]

Replay with a measured cost table for every arm, by the clock for some, at temperature 0 and 0.8.
Writes aded.json, aded.md and aded.png. A killed run continues from its collection.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from aded_experiment import AdedSizes, run
from aded_report import write_report
from rich.console import Console
from timed_setup import show_progress

from paceline.cli.options import configured


def main() -> None:
    """Run the ablation and write its report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder of tables and report")
    parser.add_argument("--config", type=Path, default=Path("paceline.yaml"))
    parser.add_argument("--dtype", default="float32", help="of the target")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--per-task", type=int, default=4, help="timed prompts of each task")
    parser.add_argument("--collect-per-task", type=int, default=40, help="answers in tables")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--text-mb", type=float, default=8.0, help="source of installed packages")
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    sizes = AdedSizes(
        timed_per_task=options.per_task,
        collect_per_task=options.collect_per_task,
        max_new_tokens=options.max_new_tokens,
        text_mb=options.text_mb,
        repeats=options.repeats,
    )
    config = configured(options.config, dtype=options.dtype, threads=options.threads)
    # what is collected depends on these, and a folder holds one collection
    made = f"{options.dtype}-{options.collect_per_task}-{options.max_new_tokens}"
    with show_progress() as report:
        result = run(config, options.out / made, sizes, report)
    page = write_report(result, options.out)
    Console().print(page, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
