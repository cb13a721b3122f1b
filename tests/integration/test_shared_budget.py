"""`load` gives the engine this machine's prices if they fit, and says so where they do not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import paceline
from paceline.assembly import find_round_seconds
from paceline.config import load_config
from paceline.costs import CostTable, Measurement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.assembly import Parts
    from paceline.config import Config

ROOT = Path(__file__).parents[2]


def table(rows: Sequence[int] = (1, 8), **fingerprint: str) -> CostTable:
    cells = [Measurement("target", "prefill", 16, 0, 1, 0.01)]
    for n in rows:
        cells.append(Measurement("engine", "round", 0, 0, n, 1e-4))
        # as long as a draft of four tokens is never worth it
        cells += [Measurement("target", "forward", k, 0, n, 1e-3 * k) for k in (1, 200)]
    return CostTable(fingerprint, cells)


def config_with(costs: Path, max_rows: int = 4) -> Config:
    config = load_config(ROOT / "paceline.yaml")
    drafters = {name: config.drafters[name] for name in ("general", "lookup")}
    return config.model_copy(
        update={
            "drafters": drafters,
            "paths": config.paths.model_copy(update={"costs": costs, "policy": costs.parent / "p"}),
            "engine": config.engine.model_copy(update={"max_rows": max_rows}),
        }
    )


def test_the_drafts_of_several_rows_are_cut_by_the_costs_of_the_configuration(
    tmp_path: Path,
) -> None:
    costs = tmp_path / "costs.json"
    whole = paceline.load(config_with(costs))
    table().save(costs)
    cut = paceline.load(config_with(costs))
    prompts = ["def add(a, b):", "The capital of France is", "1 + 1 ="]
    settings = {"drafter": "general", "max_new_tokens": 12, "ignore_eos": True}

    expected = whole.generate(prompts, **settings)
    found = cut.generate(prompts, **settings)

    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    assert all(r.drafted > 1 for c in expected for r in c.rounds[:-2])
    assert all(r.drafted == 0 for c in found for r in c.rounds[:2])
    alone = cut.complete(prompts[0], **settings)
    assert alone.rounds[0].drafted > 1, "one row keeps its whole draft"
    assert whole.notes == cut.notes == []


def test_without_a_cost_table_nothing_is_cut_and_nothing_is_said(
    zoo_target: Parts, tmp_path: Path
) -> None:
    assert find_round_seconds(configured(zoo_target, tmp_path / "none.json")) == (None, [])


def configured(parts: Parts, costs: Path, max_rows: int = 4) -> Parts:
    """Return the parts of `zoo_target` under another configuration."""
    config = config_with(costs, max_rows)
    return type(parts)(config, parts.target, parts.tokenizer, parts.vocabulary, parts.drafters)


@pytest.mark.parametrize(
    ("costs", "words"),
    [
        (table(target="another"), "was measured with the target another"),
        (table(**{"forward of target": "abacus"}), "was measured as (abacus)"),
        (table(rows=[1]), "only forwards of one row were measured"),
    ],
)
def test_a_table_that_does_not_fit_is_named_in_the_notes(
    zoo_target: Parts, tmp_path: Path, costs: CostTable, words: str
) -> None:
    path = tmp_path / "costs.json"
    costs.save(path)

    prices, [note] = find_round_seconds(configured(zoo_target, path))

    assert prices is None
    assert note.startswith("drafts are verified whole while several rows are in flight: cost table")
    assert words in note and "run `paceline profile`" in note


def test_a_damaged_table_is_named_in_the_notes(zoo_target: Parts, tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text("{", encoding="utf-8")

    prices, [note] = find_round_seconds(configured(zoo_target, path))

    assert prices is None and "cannot be read" in note


def test_an_engine_of_one_row_needs_no_prices(zoo_target: Parts, tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    table(rows=[1]).save(path)

    assert find_round_seconds(configured(zoo_target, path, max_rows=1)) == (None, [])
    assert find_round_seconds(configured(zoo_target, path), table())[0] is not None
