"""Rewording: the text stays, the instruction changes, and training and testing are disjoint."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from pathlib import Path

import pytest

from paceline.contracts import PromptRecord
from paceline.errors import ConfigError
from paceline.experiments.demo_prompts import PREFIXES, demo_prompts
from paceline.experiments.paraphrases import TEMPLATES, bare, paraphrased, rewrite
from paceline.store import read_prompts


@pytest.fixture(scope="module")
def records() -> list[PromptRecord]:
    return demo_prompts(20, 0)[0]


def test_templates_cover_every_task_hold_the_text_once_and_are_used_once() -> None:
    every = list(chain.from_iterable(chain(*(t.values() for t in TEMPLATES.values()))))
    assert all(list(TEMPLATES[use]) == list(TEMPLATES["train"]) for use in TEMPLATES)
    assert set(TEMPLATES["train"]) == set(PREFIXES)
    assert all(template.count("{text}") == 1 for template in every)
    assert len(set(every)) == len(every)
    # not even a line of an instruction is shared between uses, or with the fixed first lines
    train, test = (
        {
            line.replace("{text}", "").strip()
            for templates in TEMPLATES[use].values()
            for template in templates
            for line in template.split("\n")
        }
        - {""}
        for use in ("train", "test")
    )
    assert not train & test
    assert not (train | test) & {prefix.strip() for prefix in PREFIXES.values()}


@pytest.mark.parametrize("use", ["train", "test"])
def test_a_paraphrase_keeps_id_task_and_text_and_drops_the_first_line(
    records: list[PromptRecord], use: str
) -> None:
    variants = paraphrased(records, use)  # type: ignore[arg-type]
    for before, after in zip(records, variants, strict=True):
        text = before.prompt.removeprefix(PREFIXES[before.domain])
        assert (after.id, after.domain) == (before.id, before.domain)
        assert text in after.prompt
        assert len(after.prompt) > len(text)
        assert PREFIXES[before.domain].strip() not in after.prompt
    assert variants == paraphrased(records, use)  # type: ignore[arg-type]


@pytest.mark.parametrize("use", ["train", "test"])
def test_every_instruction_comes_up_about_as_often(use: str) -> None:
    """A single instruction for all prompts would be another first line that a policy can learn."""
    records = [PromptRecord(f"p{i}", "math", PREFIXES["math"] + "Text.") for i in range(400)]
    counts = Counter(r.prompt for r in paraphrased(records, use))  # type: ignore[arg-type]
    templates = TEMPLATES[use]["math"]  # type: ignore[index]
    assert set(counts) == {template.replace("{text}", "Text.") for template in templates}
    assert min(counts.values()) > 0.6 * 400 / len(templates)


def test_bare_prompts_are_the_text_alone(records: list[PromptRecord]) -> None:
    for before, after in zip(records, bare(records), strict=True):
        assert before.prompt == PREFIXES[before.domain] + after.prompt


def test_a_text_with_braces_stays_as_it_is() -> None:
    text = 'def f(x):\n    """Return {text} of {x}."""'
    (after,) = paraphrased([PromptRecord("a", "code", PREFIXES["code"] + text)])
    assert text in after.prompt


def test_variants_are_a_prompt_file(records: list[PromptRecord], tmp_path: Path) -> None:
    for kind, expected in (("bare", bare(records)), ("paraphrased", paraphrased(records))):
        path = tmp_path / f"{kind}.jsonl"
        assert rewrite(records, path, kind) == expected  # type: ignore[arg-type]
        assert read_prompts([path]) == expected


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            PromptRecord("a", "poetry", "Write a poem."),
            "no other instructions for the task 'poetry'",
        ),
        (PromptRecord("a", "math", "What is 1 + 1?"), "first line must be 'Solve the problem step"),
        (PromptRecord("a", "math", PREFIXES["math"] + " "), "no instruction to change"),
    ],
)
def test_a_prompt_without_an_instruction_is_named(record: PromptRecord, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        paraphrased([record])
    with pytest.raises(ConfigError, match=expected):
        bare([record])
