"""The whole numbers of a cascade's row, in their order; see `entry.RowState`."""

from __future__ import annotations

# part and length of the last draft, whether it branches, the bin of its place, the row's tokens before
# it, and its tokens that are to be learned from
PART, LENGTH, BRANCHES, BIN, DRAFTED_AT, DRAFTED, NUM_FIELDS = range(7)
