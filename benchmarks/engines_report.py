"""The page and the figure of versus_engines, from its facts alone. Knows no engine but by its name.

A method's seconds on a prompt are the median over turns; its speed is all tokens over all seconds.
Intervals of ratios resample prompts and turns together, the same for both methods: [P prompts, T turns].
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from engines_facts import DECODE, FORWARD, PREFILL, READ
from peers.catalog import LLAMA_CPP, LLAMA_CPP_NATIVE, PACELINE, PLAIN, VLLM_CPU
from result_pages import page, table

from paceline.contracts import NONE
from paceline.intervals import RESAMPLES, Interval
from paceline.learning.evaluation.bootstrap import interval
from paceline.plotting import import_figure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from engines_facts import Call

PEERS: Final = (PACELINE, LLAMA_CPP_NATIVE, LLAMA_CPP, VLLM_CPU)
YARDSTICKS: Final = PEERS[1:]
"""The first of these that ran a case in plain decoding is what its other methods are compared with."""
COLUMNS: Final = {
    "engine": "{peer}",
    "mode": "{mode}",
    "tokens/s": "{tokens_per_second:.0f}",
    "ms per call": "{ms_per_call:.1f}",
    "over the yardstick (95%)": "{over_yardstick}",
    "share of bandwidth": "{share}",
    "equal texts": "{equal_texts} of {texts}",
    "equal tokens": "{equal_tokens} of {reference_tokens}",
}


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """All calls of one method in one case."""

    kind: str
    case: str
    peer: str
    mode: str
    seconds: np.ndarray  # [P, T]
    tokens: np.ndarray  # [P]
    outputs: list[list[int]]

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return float(self.tokens.sum() / np.median(self.seconds, axis=1).sum())


def series_of(calls: Sequence[Call]) -> list[Series]:
    """Return the methods that have every prompt in every turn, by case, engine and mode."""
    grouped: dict[tuple[str, str, str], dict[str, list[Call]]] = {}
    for call in calls:
        if call.kind in (DECODE, PREFILL):
            prompts = grouped.setdefault((call.case, call.peer, call.mode), {})
            prompts.setdefault(call.prompt, []).append(call)
    sizes: dict[str, tuple[int, int]] = {}
    for (case, _, _), prompts in grouped.items():
        sizes[case] = max(sizes.get(case, (0, 0)), (len(prompts), min(map(len, prompts.values()))))
    cases = list(sizes)

    def place(method: tuple[str, str, str]) -> tuple[int, int, bool, str]:
        case, peer, mode = method
        return cases.index(case), PEERS.index(peer), mode not in (PLAIN, NONE), mode

    return [
        _series(*method, grouped[method])
        for method in sorted(grouped, key=place)
        if all(
            (len(grouped[method]), len(own)) == sizes[method[0]] for own in grouped[method].values()
        )
    ]


def _series(case: str, peer: str, mode: str, prompts: Mapping[str, list[Call]]) -> Series:
    ordered = [sorted(prompts[name], key=lambda call: call.turn) for name in sorted(prompts)]
    return Series(
        ordered[0][0].kind,
        case,
        peer,
        mode,
        np.array([[call.seconds for call in own] for own in ordered]),
        np.array([own[0].tokens for own in ordered]),
        [output for own in ordered for output in own[0].outputs or []],
    )


def ratio(a: Series, b: Series) -> Interval:
    """Return the speed of a over that of b."""
    P, T = a.seconds.shape
    rng = np.random.default_rng(0)
    draws = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        p, t = rng.integers(P, size=P), rng.integers(T, size=T)
        spent = [np.median(s.seconds[p][:, t], axis=1).sum() / s.tokens[p].sum() for s in (a, b)]
        draws[i] = spent[1] / spent[0]
    return interval(a.speed / b.speed, draws)


def find(series: Sequence[Series], peer: str, mode: str) -> Series | None:
    """Return an engine's series in a mode, if there is one."""
    return next((s for s in series if (s.peer, s.mode) == (peer, mode)), None)


def yardstick(series: Sequence[Series]) -> Series | None:
    """Return the plain decoding that a case's methods are compared with."""
    found = (find(series, peer, PLAIN) for peer in YARDSTICKS)
    return next((s for s in found if s is not None), None)


def num_equal(output: Sequence[int], reference: Sequence[int]) -> int:
    """Return the number of tokens before the first difference."""
    pairs = zip(output, reference, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(output), len(reference)))


def bandwidths(calls: Sequence[Call]) -> dict[str, float]:
    """Return the median bytes per second of the reads between each model's calls."""
    reads: dict[str, list[float]] = {}
    for call in calls:
        if call.kind == READ:
            reads.setdefault(call.case.partition(",")[0], []).append(call.tokens / call.seconds)
    return {model: median(speeds) for model, speeds in reads.items()}


# --- figures by case ------------------------------------------------------------------------------


def summarise(calls: Sequence[Call], weight_bytes: Mapping[str, float]) -> dict[str, Any]:
    """Return the rows of all tables. weight_bytes: by model and precision, as in "zoo int8"."""
    series, read = series_of(calls), bandwidths(calls)
    cases = {s.case: [other for other in series if other.case == s.case] for s in series}
    return {
        "bandwidth_gb_s": {model: speed / 1e9 for model, speed in read.items()},
        "methods": [
            _method_row(s, own, weight_bytes[case.partition(",")[0]] / read[case.split()[0]])
            for case, own in cases.items()
            for s in own
        ],
        "ratios": [row for own in cases.values() for row in _ratio_rows(own)],
        "forwards": _forward_rows(calls, weight_bytes, read),
    }


def _method_row(s: Series, own: Sequence[Series], least: float) -> dict[str, Any]:
    """own: all series of the case. least: seconds to read the weights once."""
    plain, reference = yardstick(own), find(own, PACELINE, NONE)
    truth = reference.outputs if reference else []
    pairs = list(zip(s.outputs, truth, strict=False))
    is_one_row = s.kind == DECODE and s.case.endswith(", 1 row") and s.mode in (PLAIN, NONE)
    return {
        "kind": s.kind,
        "case": s.case,
        "peer": s.peer,
        "mode": s.mode,
        "tokens_per_second": s.speed,
        "ms_per_call": 1e3 * float(np.median(s.seconds, axis=1).mean()),
        "over_yardstick": asdict(ratio(s, plain)) if plain else None,
        "share_of_bandwidth": s.speed * least if is_one_row else None,
        "equal_texts": sum(output == text for output, text in pairs),
        "texts": len(truth),
        "equal_tokens": sum(num_equal(*pair) for pair in pairs),
        "reference_tokens": sum(map(len, truth)),
    }


def _ratio_rows(own: Sequence[Series]) -> list[dict[str, Any]]:
    """Return the speeds of paceline's plain and best mode over each other engine's."""
    peers = dict.fromkeys(s.peer for s in own if s.peer != PACELINE)
    ours = [s for s in own if s.peer == PACELINE]
    rows = []
    for peer in peers:
        best = max((s for s in own if s.peer == peer), key=lambda s: s.speed)
        pairs = [(find(ours, PACELINE, NONE), find(own, peer, PLAIN))]
        pairs.append((max(ours, key=lambda s: s.speed, default=None), best))
        rows += [
            {"case": a.case, "ours": a.mode, "theirs": f"{peer} {b.mode}", **asdict(ratio(a, b))}
            for a, b in dict.fromkeys(pairs)
            if a and b
        ]
    return rows


def _forward_rows(
    calls: Sequence[Call], weight_bytes: Mapping[str, float], read: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return paceline's milliseconds of a forward by model and width."""
    spent: dict[str, dict[str, list[float]]] = {}
    for call in calls:
        if call.kind == FORWARD:
            spent.setdefault(call.case, {}).setdefault(call.mode, []).append(call.seconds)
    rows = []
    for case, by_mode in spent.items():
        model = case.partition(",")[0]
        milliseconds = {mode: 1e3 * median(values) for mode, values in by_mode.items()}
        least = weight_bytes[model] / read[model.split()[0]]
        share = 1e3 * least / milliseconds["target, 1"]
        rows.append({"model": model, "milliseconds": milliseconds, "share_of_bandwidth": share})
    return rows


# --- page and figure ------------------------------------------------------------------------------


def markdown(
    tables: Mapping[str, Any], not_run: Mapping[str, str], facts: Mapping[str, Any]
) -> str:
    """Return the page."""
    lines = page("paceline against llama.cpp and vLLM", facts)
    peers = ", ".join(YARDSTICKS)
    read = ", ".join(f"{gb:.1f} ({model})" for model, gb in tables["bandwidth_gb_s"].items())
    lines += [
        f"Read bandwidth in GB/s: {read}, the median of sums over 1 GiB between a model's turns. The",
        f"yardstick of a case is the first engine of {peers} that ran it, in plain decoding. Intervals",
        "resample prompts and turns. Texts are compared with paceline's `none`; equal tokens are those",
        "before the first difference. The share of bandwidth counts 2 bytes per parameter and token in",
        "bfloat16, 1 in int8 (q8_0 in llama.cpp; native without its layout for AMX, which crashes it).",
        "Tokens of a prefill are those of the prompt.",
    ]
    for case in dict.fromkeys(row["case"] for row in tables["methods"]):
        rows = [_cells(row) for row in tables["methods"] if row["case"] == case]
        lines += ["", f"## {case}", "", *table(rows, COLUMNS)]
    lines += ["", "## paceline over each engine", ""]
    lines += ["Plain against plain, then the best mode of each side, chosen on these calls.", ""]
    columns = {"case": "{case}", "paceline": "{ours}", "engine": "{theirs}"}
    columns["ratio of tokens/s (95%)"] = "{value:.2f} ({low:.2f} to {high:.2f})"
    lines += table(tables["ratios"], columns)
    for row in tables["forwards"]:
        lines += ["", *_forward_lines(row)]
    lines += [f"\nNot run: {name}: {reason}." for name, reason in not_run.items()]
    return "\n".join(lines) + "\n"


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    over, share = row["over_yardstick"], row["share_of_bandwidth"]
    shown = "{value:.2f} ({low:.2f} to {high:.2f})".format(**over) if over else "-"
    return {**row, "over_yardstick": shown, "share": "-" if share is None else f"{share:.2f}"}


def _forward_lines(row: Mapping[str, Any]) -> list[str]:
    """Return a table of one forward's times by number of tokens, and a sentence on T(1)."""
    milliseconds = row["milliseconds"]
    widths = {mode.split(", ")[1]: ms for mode, ms in milliseconds.items() if mode[:6] == "target"}
    [*drafters] = ((mode, ms) for mode, ms in milliseconds.items() if mode[:6] != "target")
    single = widths["1"]
    text = f"T(1) reads weights at {row['share_of_bandwidth']:.2f} of the bandwidth."
    for mode, ms in drafters:
        name = mode.split(",")[0]
        text += f" A step of the drafter `{name}` takes {ms:.3f} ms, {ms / single:.2f} of T(1)."
    cells = {f"T({width})": f"{ms:.2f} ({ms / single:.2f})" for width, ms in widths.items()}
    columns = {heading: f"{{{heading}}}" for heading in cells}
    heading = f"## {row['model']}: milliseconds of paceline's forward (over T(1))"
    return [heading, "", *table([cells], columns), "", text]


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw tokens per second by case, a colour per engine."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    columns = min(3, len(cases))
    height = -(-len(cases) // columns)
    figure = import_figure()(figsize=(5 * columns, 3.4 * height), layout="constrained")
    grid = figure.subplots(height, columns, squeeze=False).flat
    for case, axes in zip(cases, grid, strict=False):
        own = [row for row in rows if row["case"] == case][::-1]
        names = [f"{row['peer']}: {row['mode']}" for row in own]
        speeds = [row["tokens_per_second"] for row in own]
        colours = [f"C{PEERS.index(row['peer'])}" for row in own]
        axes.bar_label(axes.barh(names, speeds, color=colours), fmt="%.0f", fontsize=7, padding=2)
        axes.margins(x=0.15)  # room for the labels
        axes.set_title(case, fontsize=9)
        axes.set_xlabel("tokens/s", fontsize=8)
        axes.tick_params(labelsize=7)
    for axes in list(figure.axes)[len(cases) :]:
        axes.remove()
    figure.savefig(path, dpi=120)
