"""The measured table prices every arm, and measuring leaves no trace."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from paceline.assembly import Pace, build_from_objects
from paceline.bench.cost_measurement import SLOWDOWN
from paceline.bench.profile import measure_cost_table, with_slower_verification
from paceline.config import Config, ModelSection
from paceline.contracts import identity_of_arms
from paceline.costs import CostTable
from paceline.drafting.prompt_lookup import PromptLookup, PromptLookupSettings
from paceline.errors import ArtefactError
from paceline.rewards import request_seconds
from paceline.testing.scripted import ScriptedDrafter
from paceline.testing.tiny_models import perturbed, tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from paceline.bench.cost_measurement import Cell
    from paceline.contracts import Drafts, RowView

CONTEXT = 256
SHORT_CONTEXT = 64


class CountingLookup(PromptLookup):
    """A lookup that records the numbers of rows per proposal."""

    def __init__(self, name: str, settings: PromptLookupSettings) -> None:
        super().__init__(name, settings)
        self.asked: set[int] = set()

    def propose(self, rows: Sequence[RowView], limits: Sequence[int]) -> Drafts:
        self.asked.add(len(rows))
        return super().propose(rows, limits)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: a second one slows models this small down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pace() -> Pace:
    target = tiny_model(context=CONTEXT)
    short = perturbed(target, 0.1)
    short.config.max_position_embeddings = SHORT_CONTEXT
    drafters = {
        "near": perturbed(target, 0.1),
        "short": short,
        "lookup": CountingLookup("lookup", PromptLookupSettings(num_draft_tokens=6)),
        "silent": ScriptedDrafter("silent", lambda tokens, limit: []),
    }
    config = Config(target=ModelSection(model="in memory"))
    return Pace(build_from_objects(target, byte_tokenizer(), drafters, config))


@pytest.fixture(scope="module")
def table(pace: Pace) -> CostTable:
    seen = []
    table = measure_cost_table(
        pace, lambda stage, done, total: seen.append((stage, done, total)), budget=0.0
    )
    assert {stage for stage, _, _ in seen} == {"profile"}
    assert [done for _, done, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[-1][2] == len(seen)
    return table


def cells(table: CostTable, subject: str, operation: str) -> set[tuple[int, int, int]]:
    """Return the measured (tokens, context, rows)."""
    return {
        (m.tokens, m.context, m.rows)
        for m in table.measurements
        if (m.subject, m.operation) == (subject, operation)
    }


def test_every_arm_is_priced_as_itself(pace: Pace, table: CostTable, tmp_path: Path) -> None:
    drafters = pace.parts.drafters
    lines = identity_of_arms({name: d.identity() for name, d in drafters.items()})
    table.save(tmp_path / "costs.json")
    again = CostTable.load(tmp_path / "costs.json")
    again.check(drafters, lines, forwards=pace.parts.forwards())
    with pytest.raises(ArtefactError, match=r"'target' was measured as .*it is now \(lean\)"):
        again.check(drafters, lines, forwards={"target": "lean"})
    assert again.fingerprint["dtype of target"] == "float32"
    assert all(m.seconds >= 0 for m in again.measurements)
    rounds = torch.tensor([[4, 2], [4, 4], [0, 0]]).numpy()
    for arm in drafters:
        for rows in (1, 3, 8):
            for objective in ("latency", "throughput"):
                assert request_seconds(again.seconds, arm, 50, rounds, rows, objective) > 0


def test_widths_contexts_and_rows_cover_the_arms(table: CostTable) -> None:
    """K is 4, 6 and 8, 256 positions hold contexts up to 128, and 8 rows may be in flight."""
    single = {(w, c, 1) for w in (1, 2, 3, 4, 5, 6, 7, 8, 9) for c in (32, 128)}
    # none drafts, one drafts 8, all draft 1, 4 or 8
    batched = {
        (1 + drafted, c, r)
        for r in (2, 4, 8)
        for c in (32, 128)
        for drafted in (0, 8, r, 4 * r, 8 * r)
    }
    assert cells(table, "target", "forward") == single | batched
    assert cells(table, "target", "prefill") == {(n, 0, 1) for n in (16, 64, 128, 256)}
    alone = {(k, c, 1) for k in (0, 1, 2, 4) for c in (32, 128)}
    assert cells(table, "near", "propose") == alone | {
        (k, 32, r) for k in (1, 4) for r in (2, 4, 8)
    }
    assert cells(table, "near", "start") == {(n, 0, 1) for n in (32, 128)}
    assert cells(table, "engine", "round") == {(0, 0, r) for r in (1, 2, 4, 8)}


def test_lookup_is_measured_on_texts_with_repetitions(table: CostTable) -> None:
    """On random text alone it would propose nothing."""
    drafted = {tokens for tokens, _, _ in cells(table, "lookup", "propose")}
    assert drafted == {0, 1, 2, 4, 6}


def test_proposals_are_made_for_every_number_of_rows(pace: Pace, table: CostTable) -> None:
    asked = {rows for _, _, rows in cells(table, "lookup", "propose")}
    assert pace.parts.drafters["lookup"].asked == asked == {1, 2, 4, 8}


def test_a_context_beyond_the_drafters_own_is_not_priced(table: CostTable) -> None:
    assert {context for _, context, _ in cells(table, "short", "propose")} == {32}
    silent = {(0, 32, 1), (0, 128, 1), *((0, 32, rows) for rows in (2, 4, 8))}
    assert cells(table, "silent", "propose") == silent


def test_a_proposal_costs_what_it_adds_to_verification() -> None:
    """A median of 10% with a draft, whatever an interrupted cell says, and nothing without a draft."""
    lengths = (0, 1, 2, 4)
    forwards: dict[Cell, float] = {("target", "forward", 1 + k, 32, 1): 1.0 + k for k in lengths}
    drafts: dict[Cell, float] = {("near", "propose", k, 32, 1): 0.5 for k in lengths}
    ratios: dict[Cell, float] = {
        ("near", SLOWDOWN, k, 32, 1): ratio
        for k, ratio in zip(lengths, (0.9, 1.1, 9.0, 1.05), strict=True)
    }

    table = CostTable({}, with_slower_verification(forwards | drafts | ratios))

    prices = [table.seconds("near", "propose", k, 32) for k in lengths]
    assert prices == pytest.approx([0.5, 0.7, 0.8, 1.0])
    assert {m.operation for m in table.measurements} == {"forward", "propose"}


def test_measuring_leaves_no_trace(pace: Pace, table: CostTable) -> None:
    for model in (pace.parts.target, pace.parts.drafters["near"].model):
        slot = model.acquire()
        assert slot == 0
        model.release(slot)
    plain, near = (
        pace.generate(["abc"], drafter=d, max_new_tokens=20)[0] for d in ("none", "near")
    )
    assert plain.token_ids == near.token_ids
