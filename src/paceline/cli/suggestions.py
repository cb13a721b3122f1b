"""The tables of `paceline distill --suggest`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.cli.next_steps import say

if TYPE_CHECKING:
    from rich.console import Console

    from paceline.distillation.suggest import NeededAcceptance, Suggestions
    from paceline.terminal import BandedTable

_NEVER = "-"


def print_suggestions(found: Suggestions, console: Console) -> None:
    """Print the shapes, the acceptance that each needs, and a comparison with trained drafters."""
    console.print(_shapes(found))
    console.print(_needs(found))
    if found.trained:
        console.print(_trained(found))
        console.print(_larger(found))
    if found.other_targets:
        names = ", ".join(found.other_targets)
        say(console, f"note: left out, since trained for another target: {names}")
    for doubt in found.doubts:
        say(console, f"note: {doubt}")
    say(
        console,
        "a: greedy acceptance per position (match rate), assumed equal and independent at every "
        f"position. @K: at the best draft length K. {_NEVER}: at no acceptance. Step: seconds per "
        "drafted token over those of the target's forward of one token, measured here.",
    )


def _shapes(found: Suggestions) -> BandedTable:
    table = _table("student shapes for this target", "layers x hidden")
    for column in ("heads / kv", "MLP", "parameters", "MB in bfloat16", "step"):
        table.add_column(column, justify="right")
    for own in found.shapes:
        shape = own.shape
        table.add_row(
            f"{shape.num_layers} x {shape.hidden_size}",
            f"{shape.num_heads} / {shape.num_kv_heads}",
            str(shape.mlp_size),
            f"{own.num_parameters / 1e6:.2f} M",
            f"{own.num_bytes / 1e6:.1f}",
            f"{own.prices.step_share:.1%}",
        )
    return table


def _needs(found: Suggestions) -> BandedTable:
    from paceline.distillation.suggest import CEILING, SPEEDUPS

    table = _table("acceptance a that a shape needs", "layers x hidden")
    for speedup in SPEEDUPS:
        table.add_column("to break even" if speedup == 1 else f"for {speedup:g}x", justify="right")
    table.add_column(f"speed-up at a = {CEILING:g}", justify="right")
    for own in found.shapes:
        needs = (_cell(own.needs(speedup)) for speedup in SPEEDUPS)
        name = f"{own.shape.num_layers} x {own.shape.hidden_size}"
        table.add_row(name, *needs, f"{own.ceiling:.2f}x")
    return table


def _trained(found: Suggestions) -> BandedTable:
    table = _table("trained drafters of this configuration", "drafter")
    for column in ("parameters", "step", "a on its tasks", "predicted speed-up"):
        table.add_column(column, justify="right")
    for own in found.trained:
        table.add_row(
            own.name,
            f"{own.num_parameters / 1e6:.2f} M",
            f"{own.prices.step_share:.1%}",
            f"{own.match_rate:.3f}",
            f"{own.speedup:.2f}x@{own.num_draft_tokens}",
        )
    return table


def _larger(found: Suggestions) -> BandedTable:
    table = _table("a that a larger shape must reach to be faster", "layers x hidden")
    for drafter in found.trained:
        table.add_column(f"than {drafter.name}", justify="right")
    larger = {drafter.name: found.larger_than(drafter) for drafter in found.trained}
    for own in found.shapes:
        if any(own in shapes for shapes in larger.values()):
            cells = (
                _cell(own.needs(drafter.speedup)) if own in larger[drafter.name] else ""
                for drafter in found.trained
            )
            table.add_row(f"{own.shape.num_layers} x {own.shape.hidden_size}", *cells)
    return table


def _cell(needed: NeededAcceptance | None) -> str:
    return _NEVER if needed is None else f"{needed.rate:.3f}@{needed.num_draft_tokens}"


def _table(title: str, first: str) -> BandedTable:
    from paceline.terminal import BandedTable

    table = BandedTable(title=title)
    table.add_column(first)
    return table
