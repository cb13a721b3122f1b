"""Where an answer ends. Every rule looks at one emitted token after the other.

A stop string ends the answer at the token that completes it. Only the tail that can hold the string
is decoded; a token may be less than a character, so the tail is counted generously.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from paceline.contracts import FinishReason
    from paceline.engine.rows import Row

    Decode = Callable[[Sequence[int]], str]

_BYTES_PER_CHARACTER = 4


def append_until_stop(row: Row, emitted: Sequence[int], decode: Decode) -> int:
    """Append emitted tokens up to and including the one that ends the answer; return how many."""
    for count, token in enumerate(emitted, start=1):
        row.tokens.append(token)
        row.finish_reason = _finish_reason(row, token, decode)
        if row.finish_reason is not None:
            return count
    return len(emitted)


def _finish_reason(row: Row, token: int, decode: Decode) -> FinishReason | None:
    request = row.request
    if token in request.stop_token_ids:
        return "stop"
    if request.stop_strings:
        longest = max(len(s) for s in request.stop_strings)
        tail = row.output[-(_BYTES_PER_CHARACTER * longest + 1) :]
        text = decode(tail)
        if any(s in text for s in request.stop_strings):
            return "stop"
    return "length" if len(row.tokens) >= row.max_total else None


def final_text(row: Row, decode: Decode) -> str:
    """The answer without its stop token and before the first stop string."""
    output = row.output
    if output and output[-1] in row.request.stop_token_ids:
        output = output[:-1]
    text = decode(output)
    cuts = [i for s in row.request.stop_strings if (i := text.find(s)) >= 0]
    return text[: min(cuts)] if cuts else text
