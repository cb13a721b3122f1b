"""`--set KEY=VALUE` reads values as YAML, and a value that is none is a mistake of the user's."""

from __future__ import annotations

import pytest

from paceline.cli.options import assigned
from paceline.errors import ConfigError


def test_values_are_yaml() -> None:
    given = ["epochs=2", "loss=kl", "samplings=[{temperature: 0.7}]"]
    expected = {"epochs": 2, "loss": "kl", "samplings": [{"temperature": 0.7}]}
    assert assigned(given) == expected


@pytest.mark.parametrize("value", ["{", "[1", "'a", "2020-13-45", "a: b: c", "\x00"])
def test_a_value_that_is_not_yaml_is_named(value: str) -> None:
    with pytest.raises(ConfigError, match=r"--set epochs: .* is not YAML"):
        assigned([f"epochs={value}"])
