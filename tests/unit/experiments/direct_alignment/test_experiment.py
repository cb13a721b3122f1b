"""The whole comparison on tiny models: runs are made once, and the page shows their results."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paceline.experiments.catalog import Finished

    from .conftest import Place


def test_smoke(place: Place, finished: Finished) -> None:
    print(finished.files)
    print(place.out.with_suffix(".md").read_text())
