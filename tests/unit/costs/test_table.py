"""The cost table: measured cells, interpolation, and the checks of its file."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.costs import CostTable, Measurement
from paceline.errors import ArtefactError

if TYPE_CHECKING:
    from pathlib import Path

FORWARD = ("target", "forward")
SECONDS = st.floats(1e-6, 10.0)


def table_of(cells: dict[tuple[int, int], float], rows: int = 1) -> CostTable:
    """Return a table of target forwards from (tokens, context) -> seconds."""
    return CostTable(
        {}, [Measurement(*FORWARD, t, c, rows, seconds) for (t, c), seconds in cells.items()]
    )


@st.composite
def grids(draw: st.DrawFn) -> dict[tuple[int, int], float]:
    """Draw contexts, each measured at tokens of its own."""
    contexts = draw(st.lists(st.integers(0, 2000), min_size=1, max_size=4, unique=True))
    cells = {}
    for context in contexts:
        for tokens in draw(st.lists(st.integers(0, 70), min_size=1, max_size=5, unique=True)):
            cells[tokens, context] = draw(SECONDS)
    return cells


FULL = {
    (1, 0): 1.0, (4, 0): 2.5, (8, 0): 3.0,
    (1, 100): 2.0, (4, 100): 3.5, (8, 100): 6.0,
}  # fmt: skip


@given(grids())
def test_measured_cells_are_returned_exactly(cells: dict[tuple[int, int], float]) -> None:
    table = table_of(cells)
    for (tokens, context), seconds in cells.items():
        assert table.seconds(*FORWARD, tokens, context) == seconds


@given(st.integers(0, 10), st.integers(-20, 130))
def test_seconds_rise_with_tokens_where_the_measured_ones_do(tokens: int, context: int) -> None:
    table = table_of(FULL)
    assert table.seconds(*FORWARD, tokens, context) <= table.seconds(*FORWARD, tokens + 1, context)


@given(grids(), st.integers(0, 70), st.integers(0, 2000))
def test_interpolated_seconds_stay_within_the_measured_range(
    cells: dict[tuple[int, int], float], tokens: int, context: int
) -> None:
    for c in {c for _, c in cells}:
        at = [t for t, other in cells if other == c]
        if not min(at) <= tokens <= max(at):
            return
    contexts = [c for _, c in cells]
    if min(contexts) <= context <= max(contexts):
        priced = table_of(cells).seconds(*FORWARD, tokens, context)
        assert min(cells.values()) * (1 - 1e-9) <= priced <= max(cells.values()) * (1 + 1e-9)


def test_interpolates_linearly_in_both_directions() -> None:
    table = table_of(FULL)
    assert table.seconds(*FORWARD, 2, 0) == pytest.approx(1.5)
    assert table.seconds(*FORWARD, 1, 50) == pytest.approx(1.5)
    assert table.seconds(*FORWARD, 2, 50) == pytest.approx(2.0)


def test_extends_the_last_segment_but_not_below_the_minimum() -> None:
    table = table_of(FULL)
    assert table.seconds(*FORWARD, 10, 0) == pytest.approx(3.25)
    assert table.seconds(*FORWARD, 1, 300) == pytest.approx(4.0)
    falling = table_of({(1, 0): 3.0, (2, 0): 2.0})
    assert falling.seconds(*FORWARD, 50, 0) == 2.0


def test_an_array_is_priced_like_its_members() -> None:
    table = table_of(FULL)
    tokens, contexts = np.array([1, 3, 9, 4]), np.array([0, 10, 120, 100])
    one_by_one = [
        table.seconds(*FORWARD, int(t), int(c)) for t, c in zip(tokens, contexts, strict=True)
    ]
    assert table.seconds(*FORWARD, tokens, contexts).tolist() == one_by_one
    assert table.seconds(*FORWARD, tokens, 100).shape == (4,)
    assert table.seconds(*FORWARD, np.zeros(0, int), np.zeros(0, int)).shape == (0,)


def test_interpolates_between_rows_and_extends_beyond_them() -> None:
    seconds = {1: 1.0, 4: 2.5, 8: 3.0}
    cells = [Measurement(*FORWARD, 1, 0, r, s) for r, s in seconds.items()]
    table = CostTable({}, reversed(cells))
    found = [table.seconds(*FORWARD, 1, 0, rows) for rows in (1, 2, 4, 6, 8, 16)]
    assert found == pytest.approx([1.0, 1.5, 2.5, 2.75, 3.0, 4.0])
    assert [table.seconds(*FORWARD, 1, 0, rows) for rows in seconds] == list(seconds.values())
    two = table.seconds(*FORWARD, np.array([1, 1]), 0, 2)
    assert two.tolist() == [1.5, 1.5]
    falling = CostTable({}, [Measurement(*FORWARD, 1, 0, r, 3.0 - r) for r in (1, 2)])
    assert falling.seconds(*FORWARD, 1, 0, 50) == 1.0


def test_work_without_a_measured_batch_is_priced_per_row() -> None:
    table = table_of({(1, 0): 0.5})
    assert [table.seconds(*FORWARD, 1, 0, rows) for rows in (1, 2, 8)] == [0.5, 1.0, 4.0]


def test_a_cell_measured_twice_is_refused() -> None:
    with pytest.raises(ArtefactError, match="twice"):
        CostTable({}, [Measurement(*FORWARD, 1, 0, 1, 1.0), Measurement(*FORWARD, 1, 0, 1, 2.0)])


def full_table(arms: list[str]) -> CostTable:
    operations = [("target", "prefill"), FORWARD, ("engine", "round")]
    operations += [(arm, operation) for arm in arms for operation in ("start", "propose")]
    fingerprint = {"cpu": "a cpu", **{f"arm {arm}": f"kind={arm}" for arm in arms}}
    return CostTable(fingerprint, [Measurement(s, o, 1, 0, 1, 0.5) for s, o in operations])


def test_missing_measurements_are_named() -> None:
    table = full_table(["math"])
    table.check(["none", "math"])
    with pytest.raises(ArtefactError, match=r"code, chat not measured; run `paceline profile`"):
        table.check(["none", "math", "code", "chat"])
    with pytest.raises(ArtefactError, match="target, engine not measured"):
        CostTable({}, []).check([])
    with pytest.raises(ArtefactError, match=r"'propose' of 'code'.*run `paceline profile`"):
        table.seconds("code", "propose", 1)


def test_an_arm_measured_as_another_one_is_refused() -> None:
    table = full_table(["math"])
    table.check(["math"], {"none": "kind=none", "math": "kind=math"})
    with pytest.raises(ArtefactError, match=r"\(kind=math\), it is now \(kind=other\)"):
        table.check(["math"], {"math": "kind=other"})


def test_a_model_measured_with_another_forward_is_refused() -> None:
    table = full_table(["math"])
    table.fingerprint |= {"forward of target": "lean", "forward of math": "compiled (amx)"}
    table.check(["math"], forwards={"target": "lean", "math": "compiled (amx)"})
    for name, now in (("target", "compiled (amx)"), ("math", "compiled (avx512)")):
        with pytest.raises(
            ArtefactError, match=rf"'{name}' was measured as .* now \({re.escape(now)}\)"
        ):
            table.check(["math"], forwards={name: now})


def test_a_saved_table_is_the_same_table(tmp_path: Path) -> None:
    path = tmp_path / "new" / "costs.json"
    table = CostTable({"cpu": "ß"}, table_of(FULL).measurements)
    table.save(path)
    again = CostTable.load(path)
    assert again.measurements == table.measurements
    assert again.fingerprint == table.fingerprint
    assert again.hash() == table.hash() != table_of(FULL).hash()
    assert [p.name for p in path.parent.iterdir()] == ["costs.json"]


def test_damaged_files_and_other_versions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    with pytest.raises(ArtefactError, match=r"no cost table here; run `paceline profile`"):
        CostTable.load(path)
    full_table(["math"]).save(path)
    good = json.loads(path.read_text())

    def refused(text: str, match: str) -> None:
        path.write_text(text)
        with pytest.raises(ArtefactError, match=match) as caught:
            CostTable.load(path)
        assert "\n" not in str(caught.value)

    refused(json.dumps(good)[:-20], "cannot be read")
    refused("[]", "not a cost table")
    refused(json.dumps({**good, "format_version": 99}), "format 99, this version")
    refused(json.dumps({**good, "measurements": [{"subject": "x"}]}), "damaged")
    refused(json.dumps({**good, "fingerprint": None}), "damaged")
    bad = {**good["measurements"][0], "seconds": -1.0}
    refused(json.dumps({**good, "measurements": [bad]}), "damaged")


def test_work_that_took_longer_than_more_of_it_is_doubted() -> None:
    def table(of_four: float) -> CostTable:
        seconds = {1: 5.0, 4: of_four, 8: 6.0}
        return CostTable(
            {}, [Measurement("target", "forward", n, 0, 1, s) for n, s in seconds.items()]
        )

    assert table(5.5).doubt() is table(11.0).doubt() is None
    doubt = table(55.0).doubt()
    assert doubt is not None
    assert "target forward of 4 tokens took 9.2 times as long as of 8; run" in doubt
