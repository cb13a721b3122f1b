"""An evaluation in sections: held-out prompts under several loads, other prompts, unseen tasks.

Each section has its own report. No prompt that a section tests on was trained on, in any wording: the
ids of prompts tell. Symbols: N prompts.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from paceline.contracts import NONE
from paceline.errors import StoreError
from paceline.learning.dataset import MIN_PROMPTS
from paceline.learning.evaluation.ceilings import CEILINGS, ceilings, left_out
from paceline.learning.evaluation.contenders import Contender
from paceline.learning.evaluation.exposure import trained_by_drafter
from paceline.learning.evaluation.report import SLOWEST, EvaluationReport, evaluate
from paceline.learning.evaluation.strategies import BEST_SINGLE, FIRST_LINE, POLICY, Outcomes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from paceline.intervals import Interval
    from paceline.learning.dataset import Dataset
    from paceline.selection.choosers import Chooser

    Decode = Callable[[list[int]], str]
    Train = Callable[[Dataset], Sequence[Contender]]

_LONGEST: Final = 256  # tokens of a line that are compared
HELD_OUT: Final = "held-out prompts"
TIE: Final = 0.005  # a smaller difference of speeds counts as none
MOSTLY: Final = (
    0.5  # share of prompts with a known first line from which the table is compared with
)


@dataclass(frozen=True, slots=True)
class Section:
    """Held-out prompts, prompts of another collection (`elsewhere`), or a task `left_out`."""

    kind: Literal["held_out", "elsewhere", "left_out"]
    title: str
    rows: int
    report: EvaluationReport
    task: str = ""  # that was left out

    def sentence(self, policy: str) -> str:
        """Compare a policy with the table of first lines, and name its slowest task, in one sentence."""
        slowest = self.report.slowest[policy]
        where = f"on {slowest.task} {_against_none(slowest.speedup)}"
        return f"{self.title}: {policy} {_against_table(policy, self.report)}; slowest {where}"


def _against_table(policy: str, report: EvaluationReport) -> str:
    known = report.known_first_lines or 0.0
    if FIRST_LINE not in report.over[policy] or known < MOSTLY:
        over = report.over[policy][BEST_SINGLE]
        return f"is {over} times as fast as the best single arm"
    over = report.over[policy][FIRST_LINE]
    if over.high < 1.0 - TIE or over.low > 1.0 + TIE:
        return f"is {over} times as fast as a table of first lines"
    return (
        f"ties with a table of first lines, {over} times as fast: nothing here shows that it learned "
        "more than the first line"
    )


def _against_none(speedup: Interval) -> str:
    if speedup.value < SLOWEST:
        return f"{speedup} times {NONE}, below {SLOWEST}"
    if speedup.low < SLOWEST:
        return f"{speedup} times {NONE}, above {SLOWEST}, but its interval begins below"
    return f"{speedup} times {NONE}"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All sections, and the circumstances of their figures."""

    sections: tuple[Section, ...]
    circumstances: dict[str, Any] = field(default_factory=dict)

    @property
    def report(self) -> EvaluationReport:
        """The report of the first section."""
        return self.sections[0].report

    def headline(self) -> dict[str, float]:
        """Return the first section's main figures."""
        return self.report.headline()

    def sentences(self) -> list[str]:
        """Return the findings in words, per section, and for all unseen tasks together."""
        unseen = [section for section in self.sections if section.kind == "left_out"]
        sentences = [
            section.sentence(policy)
            for section in self.sections
            if section.kind != "left_out"
            for policy in section.report.policies
        ]
        policies = unseen[0].report.policies if unseen else ()
        return sentences + [_on_unseen(policy, unseen) for policy in policies]

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "sentences": self.sentences()}, indent=1)


def _on_unseen(policy: str, sections: Sequence[Section]) -> str:
    speeds = {s.task: s.report.overall.strategies[policy].speedup for s in sections}
    shown = ", ".join(f"{task} {_against_none(speed)}" for task, speed in speeds.items())
    slow = [task for task, speed in speeds.items() if speed.value < SLOWEST]
    verdict = f"too slow on {', '.join(slow)}" if slow else f"nowhere below {SLOWEST}"
    return f"tasks never seen: {policy} is {verdict}: {shown}"


class FirstLines:
    """Reader of first lines, after the beginning that all prompts of a training part share.

    A policy that does not beat the strategy that picks an arm by them may have learned nothing but the
    line. The shared beginning may be a chat template's opening.
    """

    def __init__(self, train: Sequence[Sequence[int]], decode: Decode) -> None:
        """decode: tokens -> text."""
        ordered = sorted(map(tuple, train))  # the first and the last share the least
        pairs = zip(ordered[0], ordered[-1], strict=False)
        self._shared = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
        self._decode = decode

    def of(self, prompts: Sequence[Sequence[int]]) -> tuple[str, ...]:
        """Return the first line of each prompt."""
        return tuple(map(self._line, prompts))

    def _line(self, prompt: Sequence[int]) -> str:
        own, num = list(prompt), len(self._shared)
        start = num if own[:num] == self._shared else 0
        text = self._decode(own[start : start + _LONGEST]).lstrip()
        return text.split("\n", 1)[0].strip()


class Evaluator:
    """Builder of sections for one training part."""

    def __init__(
        self, train: Dataset, decode: Decode, seed: int, notes: Sequence[str] = ()
    ) -> None:
        """decode: tokens -> text, for first lines. seed: of the bootstrap."""
        self._train = train
        self._decode = decode
        self._seed = seed
        self._notes = tuple(notes)

    def held_out(
        self, data: Dataset, contenders: Sequence[Contender], loads: Sequence[int]
    ) -> list[Section]:
        """Return one section per number of rows in flight."""
        return [
            Section(
                "held_out",
                HELD_OUT if rows == 1 else f"{HELD_OUT}, {rows} rows",
                rows,
                self._report(self._train, data, contenders, rows),
            )
            for rows in loads
        ]

    def elsewhere(self, name: str, data: Dataset, contenders: Sequence[Contender]) -> Section:
        """Return the section of another collection's prompts, without those that were trained on.

        Raises StoreError if no prompt is left.
        """
        trained = set(self._train.groups)
        unseen = data.rows(np.array([group not in trained for group in data.groups]))
        if not len(unseen):
            raise StoreError(
                f"'{name}': every prompt has the id of one that was trained on; collect others"
            )
        notes = [f"{len(data) - len(unseen)} of '{name}' left out: they were trained on"]
        notes = notes if len(unseen) < len(data) else []
        return Section(
            "elsewhere", name, 1, self._report(self._train, unseen, contenders, 1, notes)
        )

    def left_out(self, data: Dataset, train: Train) -> list[Section]:
        """Return one section per task: trained on the other tasks' prompts, tested on its own.

        Raises StoreError for a single task, or if too few prompts are left to learn from.
        """
        domains = np.array(data.domains, dtype=str)
        tasks = np.unique(domains)
        if len(tasks) < 2:
            raise StoreError(
                "all prompts are of one task, so none can be left out; collect prompts whose "
                "`domain` differs"
            )
        sections = []
        for task in map(str, tasks):
            own = domains == task
            if (~own).sum() < MIN_PROMPTS:
                raise StoreError(
                    f"without the task '{task}' {int((~own).sum())} prompts are left, at least "
                    f"{MIN_PROMPTS} are needed to learn from; collect more"
                )
            rest, test = data.part(~own), data.part(own)
            report = self._report(rest, test, train(rest), 1)
            sections.append(Section("left_out", f"{task}, never seen", 1, report, task))
        return sections

    def _report(
        self,
        train: Dataset,
        test: Dataset,
        contenders: Sequence[Contender],
        rows: int,
        notes: Sequence[str] = (),
    ) -> EvaluationReport:
        lines = FirstLines(train.prompts, self._decode)
        return evaluate(
            _outcomes(train, rows, lines),
            _outcomes(test, rows, lines, judged=True),
            {contender.name: contender.distributions(test, rows) for contender in contenders},
            choose_seconds={c.name: c.choose_seconds(test) for c in contenders},
            seed=self._seed,
            notes=[*self._notes, *notes, *_ceiling_notes(test)],
        )


def evaluate_chooser(
    train: Dataset, held_out: Dataset, chooser: Chooser, seed: int = 0, notes: Sequence[str] = ()
) -> EvaluationReport:
    """Evaluate one chooser on the held-out part, under the name `POLICY`; see `evaluate`."""
    policy = Contender(POLICY, (chooser,))
    return evaluate(
        _outcomes(train, 1),
        _outcomes(held_out, 1, judged=True),
        {POLICY: policy.distributions(held_out)},
        choose_seconds={POLICY: policy.choose_seconds(held_out)},
        seed=seed,
        notes=[*notes, *_ceiling_notes(held_out)],
    )


def _ceiling_notes(data: Dataset) -> list[str]:
    names = left_out(data)
    if not names:
        return []
    return [
        f"the {' and the '.join(CEILINGS)} do not choose {', '.join(names)}: replay knows the rounds of "
        "these drafters only in order"
    ]


def _outcomes(
    data: Dataset, rows: int, lines: FirstLines | None = None, judged: bool = False
) -> Outcomes:
    """Return the outcomes of a part. judged: with the ceilings, which nothing is fitted to."""
    return Outcomes(
        arms=data.arms,
        domains=data.domains,
        seconds=data.seconds if rows == 1 else data.seconds_for(rows),
        rewards=data.rewards_for(rows),
        num_tokens=data.num_tokens,
        first_lines=lines.of(data.prompts) if lines is not None else (),
        ceilings=ceilings(data, rows) if judged else {},
        trained=trained_by_drafter(data),
    )
