"""Arms: a drafter at a draft length, by name."""

from __future__ import annotations

import pytest

from paceline.config import Config, DrafterSection, LearningSection, ModelSection
from paceline.contracts import Decision, join_arm, split_arm
from paceline.drafting.catalog import arms_of


def test_a_name_says_drafter_and_length() -> None:
    assert split_arm("math") == ("math", None)
    assert split_arm("math@3") == ("math", 3)
    assert split_arm(join_arm("a b", 12)) == ("a b", 12)
    decision = Decision("math@3")
    assert (decision.drafter, decision.num_draft_tokens) == ("math", 3)
    for wrong in ("math@", "math@0", "math@-1", "math@1.5", "math@3@4", "math@²"):
        with pytest.raises(ValueError, match="a draft length must be a whole number"):
            split_arm(wrong)


def test_shorter_lengths_are_arms_where_drafts_nest() -> None:
    drafters = {
        "small": DrafterSection(kind="draft_model", settings={"model": "m", "num_draft_tokens": 4}),
        "copy": DrafterSection(kind="prompt_lookup", settings={"num_draft_tokens": 2}),
        "tree": DrafterSection(kind="trigram_tree", settings={"num_draft_tokens": 8}),
    }
    config = Config(
        target=ModelSection(model="t"),
        drafters=drafters,
        learning=LearningSection(draft_lengths=(1, 2, 4, 6)),
    )

    assert arms_of(config) == ["none", "small@1", "small@2", "small", "copy@1", "copy", "tree"]
