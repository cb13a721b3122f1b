"""The option `--part` of the commands that read prompt files."""

from __future__ import annotations

import pytest
from support.prompt_files import ids_of_part

from paceline.cli.options import taken_part
from paceline.contracts import PromptRecord
from paceline.errors import ConfigError


def test_the_option_takes_a_part_and_refuses_other_names_and_empty_parts() -> None:
    judging, training = (
        [PromptRecord(id, "", f"text {id}") for id in ids_of_part(part, 3, "p")]
        for part in ("judging", "training")
    )
    given = [*training, *judging]
    assert {r.id for r in taken_part(given, "judging")} == {r.id for r in judging}
    assert taken_part(given, "all") == given
    with pytest.raises(ConfigError, match=r"--part 'test': must be one of training, .* all"):
        taken_part(given, "test")
    with pytest.raises(ConfigError, match=r"--part collection: none of the 6 prompts is in it"):
        taken_part(given, "collection")
