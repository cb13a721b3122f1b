"""The sources of prompts that a drafter's card names."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from paceline.distillation.card import PromptSource, read_sources

if TYPE_CHECKING:
    from pathlib import Path

ROWS = [
    {"prompt": "a", "source": "library", "license": "PSF-2.0"},
    {"prompt": "b", "source": "library", "license": "PSF-2.0"},
    {"prompt": "c", "source": "mine", "license": None},
    {"prompt": "d\u2028e", "source": None, "license": None},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_sources_are_read_from_every_kind_of_prompt_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"prompts{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS]
        path.write_text("".join(lines), encoding="utf-8")

    found = read_sources(path)

    assert found == [PromptSource("library", "PSF-2.0"), PromptSource("mine", "not stated")]


def test_a_prompt_file_may_have_no_source(tmp_path: Path) -> None:
    empty, plain = tmp_path / "empty.jsonl", tmp_path / "plain.parquet"
    empty.write_text("")
    pq.write_table(pa.table({"prompt": ["a"]}), plain)

    assert read_sources(empty) == []
    assert read_sources(plain) == []
