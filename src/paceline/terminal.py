"""Tables for a terminal of any width; names and numbers are never cut.

A table that is too wide is printed in bands of columns, each with the first column. Knows nothing
about the meaning of its cells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from rich.measure import Measurement
from rich.table import Table

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Column

PROSE: Final = "fold"
"""The `overflow` of a column of sentences."""
_MIN_PROSE: Final = 16  # minimum width of a column of longer sentences, in characters
_MIN_WIDTH: Final = 4  # minimum width if not even two columns fit, in characters


class BandedTable(Table):
    """A rich table that is printed in bands if its columns do not all fit.

    Cells are not wrapped; headers may be wrapped between words. Columns with `overflow=PROSE` contain
    sentences and may be wrapped.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = {"pad_edge": False, **settings}
        super().__init__(**self._settings)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.columns:
            return
        ranges = [_widths(console, options, column) for column in self.columns]
        bands = self._bands([least for least, _ in ranges], options.max_width)
        for band in bands:
            room = options.max_width - self._lines(len(band))
            part = Table(
                **{
                    **self._settings,
                    "title": self.title if band is bands[0] else None,
                    "caption": self.caption if band is bands[-1] else None,
                }
            )
            for place, width in zip(band, _share([ranges[i] for i in band], room), strict=True):
                column = self.columns[place]
                part.add_column(
                    column.header,
                    justify=column.justify,
                    style=column.style,
                    overflow=PROSE,
                    width=width,
                )
            cells = [list(self.columns[place].cells) for place in band]
            for i, row in enumerate(self.rows):
                part.add_row(
                    *(column[i] for column in cells), style=row.style, end_section=row.end_section
                )
            yield part

    def _bands(self, least: list[int], room: int) -> list[list[int]]:
        bands = [[0]]
        for place in range(1, len(least)):
            band = [*bands[-1], place]
            if len(bands[-1]) > 1 and sum(least[i] for i in band) + self._lines(len(band)) > room:
                bands.append([0, place])
            else:
                bands[-1] = band
        return bands

    def _lines(self, num_columns: int) -> int:
        around = 2 if self.pad_edge else 0
        lines = num_columns + 1 if self.box is not None else 0
        return 2 * num_columns - 2 + around + lines


def _widths(console: Console, options: ConsoleOptions, column: Column) -> tuple[int, int]:
    header = Measurement.get(console, options, column.header)
    cells = [Measurement.get(console, options, cell) for cell in column.cells]
    longest = max([header.maximum, *(cell.maximum for cell in cells)])
    if column.overflow == PROSE:
        words = max([header.minimum, *(cell.minimum for cell in cells)])
        return min(max(words, _MIN_PROSE), longest), longest
    return max([header.minimum, *(cell.maximum for cell in cells)]), longest


def _share(ranges: list[tuple[int, int]], room: int) -> list[int]:
    """Return a width per column: its minimum, and a share of the rest in proportion to its need."""
    least = [low for low, _ in ranges]
    wanted = [high - low for low, high in ranges]
    spare = room - sum(least)
    if spare < 0:  # the widest column is wrapped
        widest = least.index(max(least))
        least[widest] = max(_MIN_WIDTH, least[widest] + spare)
        return least
    total = max(1, sum(wanted))
    return [low + min(want, spare * want // total) for low, want in zip(least, wanted, strict=True)]
