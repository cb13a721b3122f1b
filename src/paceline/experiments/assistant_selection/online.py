"""Choose before a request, learn while decoding, or both: on a steady stream and on one that shifts.

Held-out prompts are simulated round by round. On the shifting stream the policy is learned from the
tasks of the first half alone, and the second half has the other tasks. All ways have the same arms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from paceline.contracts import NONE, Decision
from paceline.experiments.assistant_selection.learned import Study, interval, of_tasks, tasks_of
from paceline.experiments.findings import SPEED, Findings, Panel, Series, Table, columns
from paceline.learning.evaluation.bootstrap import divide, resample
from paceline.learning.evaluation.bootstrap import interval as interval_of
from paceline.learning.streams import EXP3, UCB, Controlled, Fixed, Offline, Stream, StreamPrompt
from paceline.selection import AdaptiveController, Arm, Guard, TablePrices
from paceline.selection.choosers import PortableChooser
from paceline.selection.choosers.base import price_work

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from paceline.experiments.findings import Value
    from paceline.experiments.workbench import Workbench
    from paceline.intervals import Interval
    from paceline.learning.streams import StreamMethod, StreamOutcome
    from paceline.store.records import CollectedPrompt

LEARNER: Final = "acceptance"
STEADY: Final = "steady"
SHIFTING: Final = "shifting"
WINDOWS: Final = 8  # per stream, in the figure
ANEW: Final = ", anew each request"  # bandits that the figure leaves out
ORACLE: Final = "best arm of each request"
SINGLE: Final = "best single arm"
POLICY: Final = "policy"
BOTH: Final = "policy + Hedge"


@dataclass(frozen=True, slots=True)
class _Played:
    """A stream under one way: seconds of each request, in order, and those of plain decoding."""

    seconds: np.ndarray  # [N]
    plain: np.ndarray  # [N]
    switches: int

    @classmethod
    def of(cls, outcomes: Sequence[StreamOutcome]) -> _Played:
        return cls(
            np.array([one.seconds for one in outcomes]),
            np.array([one.plain_seconds for one in outcomes]),
            sum(one.switches for one in outcomes),
        )

    def speed(self, part: slice = slice(None)) -> Interval:
        """Return the speed-up over plain decoding on a part of the stream."""
        columns = np.column_stack([self.plain[part], self.seconds[part]])
        sampled = resample(columns, ["all"] * len(columns), seed=0)
        draws = divide(sampled.drawn[:, 0, 0], sampled.drawn[:, 0, 1])
        return interval_of(float(columns[:, 0].sum() / columns[:, 1].sum()), draws)


def run(bench: Workbench) -> Findings:
    prompts = bench.collection.prompts
    tasks = tasks_of(prompts)
    known, unseen = tasks[: (len(tasks) + 1) // 2], tasks[(len(tasks) + 1) // 2 :]
    drafters = [
        name
        for name in bench.config.drafters
        if all(prompt.replays[name].everywhere for prompt in prompts)
    ]
    arms = bench.arms(drafters, own_lengths=True)
    study = Study.of(bench, prompts, arms)
    narrow = Study.of(bench, of_tasks(prompts, known), arms)
    half = int(sum(domain in known for domain in study.held_out.domains))
    played = {
        STEADY: _play_all(bench, study, study, _order(study, [tasks])),
        SHIFTING: _play_all(bench, study, narrow, _order(study, [known, unseen])),
    }
    return Findings(
        tables=[_table(played, half)],
        panels=[_panel(stream, of) for stream, of in played.items()],
        settings=bench.settings() | {"requests a stream": len(study.held_out)},
        remarks=_remarks(played, half, known, unseen),
        facts=_facts(played, half),
    )


def _order(study: Study, parts: Sequence[Sequence[str]]) -> np.ndarray:
    """Return the [N] indices of the held-out prompts: each group of tasks shuffled, in turn."""
    rng = np.random.default_rng(0)
    domains = np.array(study.held_out.domains)
    return np.concatenate([rng.permutation(np.flatnonzero(np.isin(domains, p))) for p in parts])


def _play_all(
    bench: Workbench, study: Study, taught: Study, order: np.ndarray
) -> dict[str, _Played]:
    """Play every way on the held-out prompts in this order; the policy is learned from `taught`."""
    lengths = {name: d.num_draft_tokens for name, d in bench.pace.parts.drafters.items()}
    arms = [Arm(name, name, lengths[name]) for name in study.held_out.arms]
    prices = TablePrices(bench.costs, lengths)
    decisions = _decisions(study, taught)
    by_id = {prompt.id: prompt for prompt in bench.collection.prompts}
    stream = Stream(
        [_stream_prompt(by_id[study.held_out.ids[i]], decisions[i]) for i in order], arms, prices
    )
    names = [arm.name for arm in arms]
    fixed = {name: _Played.of(stream.play(Fixed(name))) for name in names}
    single = names[int(taught.train.seconds.sum(axis=0).argmin())]
    least = np.min([one.seconds for one in fixed.values()], axis=0)
    found = {SINGLE: fixed[single]}
    ways: dict[str, Callable[[], StreamMethod]] = {
        f"UCB{ANEW}": lambda: UCB("", names, prices, 0, forgets=True),
        f"EXP3{ANEW}": lambda: EXP3("", names, prices, 0, forgets=True),
        "UCB, over requests": lambda: UCB("", names, prices, 0, forgets=False),
        "EXP3, over requests": lambda: EXP3("", names, prices, 0, forgets=False),
        "Hedge": lambda: Controlled(
            "", AdaptiveController(arms, prices, adapt=True), with_policy=False
        ),
        POLICY: Offline,
        BOTH: lambda: Controlled("", AdaptiveController(arms, prices, adapt=True)),
        f"{BOTH} + guard": lambda: Controlled(
            "", AdaptiveController(arms, prices, adapt=True, guard=Guard())
        ),
    }
    for name in bench.track("play streams", list(ways)):
        found[name] = _Played.of(stream.play(ways[name]()))
    return found | {ORACLE: replace(fixed[NONE], seconds=least)}


def _stream_prompt(prompt: CollectedPrompt, decision: Decision) -> StreamPrompt:
    ahead = {name: replay.table for name, replay in prompt.replays.items()}
    return StreamPrompt(
        prompt.domain, len(prompt.prompt_tokens), len(prompt.output_tokens), ahead, decision
    )


def _decisions(study: Study, taught: Study) -> list[Decision]:
    (contender,) = taught.contenders([LEARNER])
    (chooser,) = contender.choosers
    assert isinstance(chooser, PortableChooser)
    data = study.held_out
    chooser.pricer = data.pricer()
    work = chooser.work(data.features, data.situation())
    seconds = price_work(chooser.pricer, work, data.situation())
    in_rounds = price_work(chooser.pricer, work, data.situation(), whole=False)
    return [
        Decision(
            data.arms[int(row.argmin())],
            policy=LEARNER,
            seconds_per_token=dict(zip(data.arms, row.tolist(), strict=True)),
            seconds_in_rounds=dict(zip(data.arms, own.tolist(), strict=True)),
        )
        for row, own in zip(seconds, in_rounds, strict=True)
    ]


def _table(played: Mapping[str, Mapping[str, _Played]], half: int) -> Table:
    heads = columns("way", "steady stream", ("switches per request", "{:.2f}"), "shifting stream")
    heads += columns("before the shift", "after it")
    rows: list[list[Value]] = []
    for way, steady in played[STEADY].items():
        shifting = played[SHIFTING][way]
        row: list[Value] = [way, interval(steady.speed()), steady.switches / len(steady.seconds)]
        row += [interval(shifting.speed())]
        row += [interval(shifting.speed(part)) for part in (slice(half), slice(half, None))]
        rows.append(row)
    explanation = (
        "Seconds of plain decoding over seconds of each way, from the first token to the last, "
        "predicted by replay and the cost table: rounds, text that drafters must still read, and shadow "
        "drafts. The best single arm is that of the prompts that the policy is learned from. Bandits "
        "observe the rounds of the arm in use, Hedge also makes shadow drafts. "
        f"`{ORACLE}` is chosen in hindsight. 95% bootstrap intervals over requests."
    )
    return Table("Streams", explanation, heads, rows)


def _panel(stream: str, played: Mapping[str, _Played]) -> Panel:
    num = len(next(iter(played.values())).seconds)
    edges = np.linspace(0, num, min(WINDOWS, max(num // 2, 1)) + 1).astype(int)
    windows = [slice(a, b) for a, b in pairwise(edges.tolist())]
    series = [
        Series(
            way,
            [float(window.stop) for window in windows],
            [float(one.plain[w].sum() / one.seconds[w].sum()) for w in windows],
        )
        for way, one in played.items()
        if not way.endswith(ANEW)
    ]
    return Panel(
        f"the {stream} stream", "speed-up over none", series, x_label="requests", baseline=1.0
    )


def _remarks(
    played: Mapping[str, Mapping[str, _Played]],
    half: int,
    known: Sequence[str],
    unseen: Sequence[str],
) -> list[str]:
    steady, shifting = played[STEADY], played[SHIFTING]
    after = {way: one.speed(slice(half, None)).value for way, one in shifting.items()}
    online = [way for way in steady if way not in (SINGLE, POLICY, ORACLE) and BOTH not in way]
    best = max(online, key=lambda way: steady[way].speed().value)
    shown = SPEED.format
    return [
        f"Steady: the policy reaches {shown(steady[POLICY].speed().value)}, the best that learns "
        f"while decoding ({best}) {shown(steady[best].speed().value)}, both together "
        f"{shown(steady[BOTH].speed().value)}; the best single arm "
        f"{shown(steady[SINGLE].speed().value)}, the best arm of each request "
        f"{shown(steady[ORACLE].speed().value)}.",
        f"Shifting from {' and '.join(known)} to {' and '.join(unseen)}, which the policy has not "
        f"seen: after the shift the policy alone is at {shown(after[POLICY])}, with Hedge at "
        f"{shown(after[BOTH])}, with the guard too at {shown(after[f'{BOTH} + guard'])}; Hedge alone "
        f"{shown(after['Hedge'])}, the best single arm from before {shown(after[SINGLE])}, the best arm "
        f"of each request {shown(after[ORACLE])}.",
    ]


def _facts(played: Mapping[str, Mapping[str, _Played]], half: int) -> dict[str, Any]:
    return {"requests before the shift": half} | {
        stream: {
            way: {"seconds": one.seconds.tolist(), "plain": one.plain.tolist()}
            for way, one in of.items()
        }
        for stream, of in played.items()
    }
