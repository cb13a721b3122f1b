"""No model of transformers loads and writes another text; the page's table is in form."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from model_grid import architectures, judge
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
RESULT = re.compile(
    r"exact, compiled forward|exact, transformers' forward|refused|not tried: not built tiny"
)


@pytest.mark.wide
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("name", "model_type"), architectures())
def test_a_model_that_loads_is_right(name: str, model_type: str) -> None:
    judgement = judge(name, model_type)

    assert judgement.result != "wrong", judgement.reason


@pytest.mark.parametrize("name", ["Qwen2MoeForCausalLM", "PhimoeForCausalLM", "AfmoeForCausalLM"])
def test_models_that_were_wrong_are_exact(name: str) -> None:
    assert judge(name, dict(architectures())[name]).result == "transformers"


def test_the_table_of_the_page_is_whole() -> None:
    text = PAGE.read_text()
    table = text.split("(make models) -->")[1].split("<!--")[0]
    rows = re.findall(r"^\| (\w+) \| ([^|]+) \| ([^|]*) \|$", table, re.MULTILINE)
    names = [name for name, _, _ in rows if name != "architecture"]

    assert re.search(r"transformers 5\.\d+\.\d+, torch 2\.\d+", table)
    counts = re.search(r"(\d+) exact, (\d+) refused, (\d+) not tried, of (\d+) classes", table)
    assert counts is not None
    exact, refused, not_tried, total = map(int, counts.groups())
    assert len(names) == len(set(names)) == exact + refused + not_tried == total
    for name, result, reason in rows[1:]:
        assert RESULT.fullmatch(result), name
        assert bool(reason.strip()) == (not result.startswith("exact")), name
    # of another version of transformers there may be more; of this page's there are none without
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    assert len(known & set(names)) > 0.8 * len(names)
