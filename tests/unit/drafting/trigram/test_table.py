"""A table equals a plain count, within any bound on memory; damaged tables are refused."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from paceline.drafting.trigram import build as build_module
from paceline.drafting.trigram.build import BuildSettings, build_table
from paceline.drafting.trigram.corpora import TextFiles, TokenSequences
from paceline.drafting.trigram.drafter import TrigramTree
from paceline.drafting.trigram.settings import TrigramTreeSettings
from paceline.drafting.trigram.table import Table, load_table, read_facts
from paceline.errors import ArtefactError, ConfigError, VocabularyError
from paceline.models.vocabulary import Vocabulary
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
Plain = dict[tuple[int, int], list[tuple[int, float]]]


def plain_count(sequences: Sequence[Sequence[int]], kept: int = 12, min_count: int = 1) -> Plain:
    counts: dict[tuple[int, int], Counter[int]] = {}
    for text in sequences:
        for t1, t2, t3 in zip(text, text[1:], text[2:], strict=False):
            counts.setdefault((t1, t2), Counter())[t3] += 1
    found = {}
    for pair, of_pair in counts.items():
        ranked = sorted(of_pair.items(), key=lambda item: (-item[1], item[0]))[:kept]
        entries = [(t, float(np.float32(n / of_pair.total()))) for t, n in ranked if n >= min_count]
        if entries:
            found[pair] = entries
    return found


def as_plain(table: Table) -> Plain:
    found: Plain = {}
    for t1 in range(len(table.starts) - 1):
        for pair in range(table.starts[t1], table.starts[t1 + 1]):
            span = slice(int(table.offsets[pair]), int(table.offsets[pair + 1]))
            entries = zip(
                table.successors[span].tolist(), table.weights[span].tolist(), strict=True
            )
            found[t1, int(table.seconds[pair])] = list(entries)
    return found


def built(sequences: Sequence[Sequence[int]], out: Path, **given: Any) -> Plain:
    build_table([TokenSequences("test", sequences)], out, "hash", BuildSettings(**given))
    return as_plain(load_table(out)[0])


@QUICK
@given(
    st.lists(st.lists(st.integers(0, 6), max_size=30), max_size=8),
    st.integers(1, 16),
    st.integers(1, 3),
)
def test_a_table_is_a_plain_count(
    tmp_path_factory: pytest.TempPathFactory,
    sequences: list[list[int]],
    kept: int,
    min_count: int,
) -> None:
    out = tmp_path_factory.mktemp("t") / "table"

    table = built(sequences, out, max_successors=kept, min_count=min_count)

    assert table == plain_count(sequences, kept, min_count)
    assert [path.name for path in out.parent.iterdir()] == ["table"]


def long_text(num: int = 40_000) -> list[list[int]]:
    order = random.Random(2)
    return [[int(order.paretovariate(0.6)) % 500 for _ in range(100)] for _ in range(num // 100)]


@pytest.mark.parametrize("room", [997, 5_000])
def test_runs_merged_in_little_memory_are_the_same_table(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs and blocks are so small that levels are merged and pairs cross blocks."""
    sequences = long_text()
    monkeypatch.setattr(build_module, "_BATCH", 5)
    at_once = built(sequences, tmp_path / "a")
    merged = []
    original = build_module._Runs._merged
    monkeypatch.setattr(build_module, "_BYTES_PER_TRIGRAM", (1 << 20) // room)
    monkeypatch.setattr(
        build_module._Runs, "_merged", lambda *a: (merged.append(len(a[1])), original(*a))[1]
    )

    in_pieces = built(sequences, tmp_path / "b", memory_mb=1)

    assert in_pieces == at_once == plain_count(sequences)
    assert merged[:-1] == [build_module._FAN_IN] * len(merged[:-1])
    assert len(merged) > 1 if room < 1000 else merged[-1] > 1
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


class KilledError(Exception):
    pass


class Recorded(TokenSequences):
    """A tokenizer that counts its tokens and may fail on the way."""

    def __init__(self, sequences: Sequence[Sequence[int]], dies_at: int | None = None) -> None:
        super().__init__("recorded", sequences)
        self.seen = 0
        self._dies_at = dies_at

    def tokens(self, pieces: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        self.seen += len(pieces)
        if self._dies_at is not None and self.seen > self._dies_at:
            raise KilledError
        return pieces


def test_a_killed_build_continues_after_its_last_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = long_text()
    monkeypatch.setattr(build_module, "_BATCH", 5)
    monkeypatch.setattr(build_module, "_BYTES_PER_TRIGRAM", (1 << 20) // 2_000)
    small = BuildSettings(memory_mb=1)
    with pytest.raises(KilledError):
        build_table([Recorded(sequences, dies_at=300)], tmp_path / "t", "hash", small)
    assert not (tmp_path / "t").exists()

    again = Recorded(sequences)
    facts = build_table([again], tmp_path / "t", "hash", small)

    assert again.seen < 150  # of 400
    assert facts.num_tokens == 40_000
    assert as_plain(load_table(tmp_path / "t")[0]) == plain_count(sequences)


def test_a_build_does_not_continue_another_ones_work(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        build_table([Recorded([[1, 2, 3]] * 200, dies_at=100)], tmp_path / "t", "hash")

    assert built([[1, 2, 4]], tmp_path / "t") == {(1, 2): [(4, 1.0)]}


def test_text_files_are_read_in_pieces(tmp_path: Path) -> None:
    lines = [f"the {i}. line of the file, with ümläuts\n" for i in range(6000)]
    (tmp_path / "a.txt").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "b.txt").write_text("x" * 200_000)
    corpus = TextFiles([tmp_path / "a.txt", tmp_path / "b.txt"], byte_tokenizer())

    pieces = list(corpus.pieces())

    assert "".join(text for text, _ in pieces) == "".join(lines) + "x" * 200_000
    assert sum(size for _, size in pieces) == corpus.size
    assert max(len(text) for text, _ in pieces) < 70_000
    assert sum(text.endswith("\n") for text, _ in pieces) > 2
    assert corpus.tokens([pieces[0][0]])[0] == list(pieces[0][0].encode())


def test_other_programs_can_read_the_file(tmp_path: Path) -> None:
    built([[1, 2, 3, 1, 2, 4, 4, 4, 4]], tmp_path / "t.safetensors")
    table, facts = load_table(tmp_path / "t.safetensors")

    with safe_open(tmp_path / "t.safetensors", "np") as file:
        for name, array in table._asdict().items():
            assert np.array_equal(file.get_tensor(name), array)
        assert file.metadata()["sha256"] == facts.sha256
    assert facts.num_tokens == 9
    assert facts.num_trigrams == len(table.successors) == 6


def test_the_file_is_mapped_and_not_read(tmp_path: Path) -> None:
    built(long_text(), tmp_path / "t")
    table, _ = load_table(tmp_path / "t")

    for array in table:
        assert isinstance(array.base, np.memmap)
        assert not array.flags.writeable


def test_ids_that_do_not_fit_a_key_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="below 2097152"):
        built([[1, 2, 1 << 21]], tmp_path / "t")
    assert built([[1, 2, (1 << 21) - 1]], tmp_path / "t") == {(1, 2): [((1 << 21) - 1, 1.0)]}


# --- refusals -------------------------------------------------------------------------------------


@pytest.fixture
def table_file(tmp_path: Path) -> Path:
    built([[1, 2, 3, 1, 2, 4]], tmp_path / "t")
    return tmp_path / "t"


def test_a_table_of_another_tokenizer_is_refused(table_file: Path) -> None:
    vocabulary = Vocabulary.of(byte_tokenizer())

    with pytest.raises(VocabularyError, match=r"another tokenizer.*trigram build"):
        TrigramTree.check("tri", TrigramTreeSettings(table=table_file), vocabulary)


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none: no such .* trigram build FILE --out"):
        read_facts(tmp_path / "none")


def rewrite_header(path: Path, change: Any) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    fields = json.loads(data[8 : 8 + length])
    change(fields)
    text = json.dumps(fields).encode().ljust(length)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"a text, and no table at all"),
        lambda path: path.write_bytes(path.read_bytes()[:-4]),
        lambda path: path.write_bytes(path.read_bytes() + b"    "),
        lambda path: rewrite_header(path, lambda f: f["__metadata__"].update(format="other")),
        lambda path: rewrite_header(path, lambda f: f["__metadata__"].pop("num_pairs")),
        lambda path: rewrite_header(path, lambda f: f["__metadata__"].update(num_pairs="77")),
        lambda path: rewrite_header(path, lambda f: f.pop("weights")),
    ],
)
def test_a_damaged_table_is_refused(damage: Any, table_file: Path) -> None:
    damage(table_file)

    with pytest.raises(ArtefactError, match="trigram build"):
        load_table(table_file)


def test_a_folder_is_refused_as_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        built([[1, 2, 3]], tmp_path)
