"""Policies are learned here to be saved, served and compared, not to choose well."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def _short_trainings(short_trainings: None) -> None:
    """For every test of this folder."""
