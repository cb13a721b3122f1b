"""The one import of matplotlib, which is optional."""

from __future__ import annotations

from typing import Any

from paceline.errors import ConfigError


def import_figure(extra: str = "bench") -> Any:
    """Return matplotlib's class of figures.

    Raises ConfigError with the line that installs it. extra: the caller's extra of paceline.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"the plot needs matplotlib; install it with: pip install 'paceline[{extra}]'"
        ) from error
    return Figure
