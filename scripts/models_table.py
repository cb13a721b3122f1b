"""Write the table of docs/models.md: every causal LM of the installed transformers, exact or refused.

Usage: python scripts/models_table.py [NAME ...]; with names, only those are judged and printed.
Exit code 1 if a model loads and its text differs from that of `generate`.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from model_grid import Judgement, architectures, judge, table

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN = "<!-- table of architectures: begin (make models) -->"
END = "<!-- table of architectures: end -->"


def main(names: list[str]) -> int:
    """Judge the named architectures and print them; if none is named, judge all and write the page."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    judged: list[Judgement] = []
    for name, model_type in architectures():
        if names and name not in names:
            continue
        judgement = judge(name, model_type)
        judged.append(judgement)
        print(f"{judgement.result:13s} {judgement.architecture}  {judgement.reason}", flush=True)
    wrong = [j.architecture for j in judged if j.result == "wrong"]
    if wrong:
        print(f"\nloaded and wrong: {', '.join(wrong)}", file=sys.stderr)
        return 1
    if not names:
        page = PAGE.read_text()
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n{table(judged)}\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
