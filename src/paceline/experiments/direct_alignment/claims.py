"""The paper's claims next to the findings, and the limits of these. Knows no model and no format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.distillation.comparison import MEAN
from paceline.experiments.direct_alignment.outcome import LONGEST, signed
from paceline.experiments.direct_alignment.plan import BASELINE, PAPER, compared_without_task
from paceline.experiments.findings import SOURCES, Table, columns
from paceline.experiments.prompt_files import TASKS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from paceline.distillation.settings import LossName
    from paceline.experiments.direct_alignment.outcome import Outcome
    from paceline.experiments.findings import Source, Value
    from paceline.intervals import Interval

_PLAIN_LOSS = "tvd"
_APART = 0.15  # of a prediction from the clock, relative


def claims(outcome: Outcome) -> Table:
    """Return each claim, where it was read, and what was found."""
    found: list[tuple[str, Source, str]] = [
        (
            "a training that reduces the variance of the TVD's policy gradient (TVD++) aligns a "
            "drafter with its target",
            "abstract",
            _variance(outcome),
        ),
        ("up to 2.3 tokens per target forward at K = 3", "abstract", _block_efficiency(outcome)),
        ("up to 2.4 times the speed of plain decoding", "abstract", _speed(outcome)),
        (
            "a drafter of 115 M, 1.64% of its target",
            "abstract",
            f"{outcome.ratio:.1%} of the target's parameters here: a draft costs relatively more",
        ),
        (
            "on translation, which was not trained on, every fine-tuned drafter was worse than the "
            "merely pre-trained one",
            "notes",
            _out_of_distribution(outcome),
        ),
        (
            "FastDraft (arXiv 2411.11055): losses on the target's distributions bring no clear "
            "gain over cross-entropy on its answers",
            "notes",
            _over_cross_entropy(outcome),
        ),
    ]
    rows: list[list[Value]] = [[text, SOURCES[source], own] for text, source, own in found]
    return Table(
        "Claims and findings",
        "arXiv 2403.00858, and FastDraft where it is named. Figures of the paper are those of "
        "its target (Llama 2 Chat 7B) and its data; only directions can be compared.",
        columns("claim", "read in", "found here"),
        rows,
    )


def remarks(outcome: Outcome) -> list[str]:
    """Return the findings, a line each: the main result, then the limits."""
    tuned = outcome.tuned
    base, best = outcome.of_loss(BASELINE), outcome.of_loss(tuned.best)
    losses = [loss for loss in outcome.plan.budget.losses if loss != BASELINE]
    rises = {loss: outcome.rise(base, outcome.of_loss(loss))[MEAN] for loss in losses}
    rise = rises[tuned.best].block_efficiency
    greedy = {loss: own.block_efficiency for loss, own in rises.items()}
    sampled = {loss: own.acceptance for loss, own in rises.items() if own.acceptance is not None}
    first = (
        f"`{tuned.best}`, the best other loss on validation answers, has tau "
        f"{outcome.tau(best):.2f} at K = {LONGEST} against {outcome.tau(base):.2f} of "
        f"`{BASELINE}`: {signed(rise)}."
    )
    return [
        first,
        f"Against `{BASELINE}`, tau on greedy answers {_gains_and_losses(greedy)}.",
        f"Against `{BASELINE}`, acceptance under sampling {_gains_and_losses(sampled)}.",
        *limits(outcome),
    ]


def _gains_and_losses(rises: Mapping[LossName, Interval]) -> str:
    """Return which losses change a figure clearly, with their intervals on one side of 0."""
    higher = [f"`{loss}`" for loss, own in rises.items() if own.is_gain]
    lower = [f"`{loss}`" for loss, own in rises.items() if own.is_clear and not own.is_gain]
    return (
        f"is clearly higher with {', '.join(higher) or 'no loss'} and clearly lower with "
        f"{', '.join(lower) or 'none'}"
    )


def limits(outcome: Outcome) -> list[str]:
    """Return the limits of the comparison, a sentence or two each."""
    plan, tuned = outcome.plan, outcome.tuned
    budget = plan.budget
    at_edge = [
        f"`{loss}` ({rate:g})"
        for loss, rate in tuned.rates.items()
        if rate in (min(budget.rates), max(budget.rates))
    ]
    found = [
        f"Short trainings: {budget.tokens:,} tokens per run, and {budget.pretrain_tokens:,} of "
        "pre-training, where third parties report 600 B for the paper's; the order of losses may "
        "differ in longer ones. A run may end before it has read all of its answers once; the passes "
        "are in the table of the numbers of answers.",
        "The students are pre-trained on text of the four tasks, not on general text, so "
        "`pre-trained only` knows the task that is left out. Where a task falls with all four tasks, "
        "too, its fall without it is not the omission's alone.",
    ]
    if at_edge:
        found.append(
            f"The chosen rate of {', '.join(at_edge)} is at an end of the sweep; a better one may "
            "be beyond it."
        )
    if len(plan.seeds) == 1:
        found.append("The parts on data have one seed: their intervals are over answers alone.")
    found += _doubts(outcome)
    commits = sorted({str(line["commit"]) for line in _runs(outcome)})
    processors = sorted({str(line["processor"]) for line in _runs(outcome)})
    if len(commits) > 1 or len(processors) > 1:
        found.append(
            f"The runs were made with {len(commits)} commits ({', '.join(commits)}) on "
            f"{len(processors)} kinds of processor."
        )
    return found


def _doubts(outcome: Outcome) -> list[str]:
    """Return a doubt about the predicted speed-ups where the clock disagrees."""
    line = outcome.results.of_kind("clock")
    students = {} if line is None else line["students"]
    apart = {
        loss: own["predicted"] / own["speedup"][0]
        for loss, own in students.items()
        if abs(own["predicted"] / own["speedup"][0] - 1) > _APART
    }
    if not apart:
        return []
    ratios = f"{min(apart.values()):.2f} to {max(apart.values()):.2f}"
    return [
        f"The predicted speed-ups are {ratios} times those by the clock, which count the prefill, and "
        "their prices may have been measured while other work ran; trust tau and the clock."
    ]


def _runs(outcome: Outcome) -> list[dict[str, object]]:
    return [line for line in outcome.results.lines if line["kind"] == "run" and "commit" in line]


# --- single findings ------------------------------------------------------------------------------


def _word(own: Interval) -> str:
    if not own.is_clear:
        return "no clear difference"
    return "clearly better" if own.is_gain else "clearly worse"


def _variance(outcome: Outcome) -> str:
    losses = outcome.plan.budget.losses
    found = []
    line = outcome.results.of_kind("gradients")
    if line is not None:
        ratios = [own["tvd"]["noise"] / max(own["tvd++"]["noise"], 1e-9) for own in line["rows"]]
        found.append(
            f"sampled, the noise of TVD is {min(ratios):.1f} to {max(ratios):.1f} times that of "
            "TVD++; summed over the vocabulary, as in these trainings, neither has any"
        )
    other = _PLAIN_LOSS if _PLAIN_LOSS in losses else BASELINE
    if PAPER in losses:
        rise = outcome.rise(outcome.of_loss(other), outcome.of_loss(PAPER))[MEAN].block_efficiency
        found.append(f"rise of tau from `{other}` to `{PAPER}`: {signed(rise)}, {_word(rise)}")
    return "; ".join(found)


def _block_efficiency(outcome: Outcome) -> str:
    runs = outcome.of_loss(outcome.tuned.best)
    taus = {task: outcome.tau(runs, task, 3) for task in TASKS}
    least, most = min(taus, key=taus.__getitem__), max(taus, key=taus.__getitem__)
    return (
        f"`{outcome.tuned.best}`: {taus[least]:.2f} ({least}) to {taus[most]:.2f} ({most}) at K = 3"
    )


def _speed(outcome: Outcome) -> str:
    line = outcome.results.of_kind("clock")
    if line is None:
        return "not timed"
    best = max(line["students"], key=lambda name: line["students"][name]["speedup"][0])
    value, low, high = line["students"][best]["speedup"]
    return f"`{best}`: {value:.2f}x ({low:.2f} to {high:.2f}) by the clock, over all tasks"


def _out_of_distribution(outcome: Outcome) -> str:
    plan, tuned = outcome.plan, outcome.tuned
    loss = compared_without_task(tuned)[0]
    before = [plan.pretrained(seed) for seed in plan.seeds]
    found = []
    for task in TASKS:
        others = [plan.without_task(tuned, loss, task, seed) for seed in plan.seeds]
        own = outcome.rise(before, others)[task].block_efficiency
        found.append(f"{task} {_word(own)} ({own.value:+.2f})")
    return f"after `{loss}` on the other three tasks: {', '.join(found)}"


def _over_cross_entropy(outcome: Outcome) -> str:
    best = outcome.tuned.best
    rise = outcome.rise(outcome.of_loss(BASELINE), outcome.of_loss(best))[MEAN]
    return (
        f"rise from `{BASELINE}` to `{best}`: tau {signed(rise.block_efficiency)}, "
        f"{_word(rise.block_efficiency)}; acceptance under sampling {signed(rise.acceptance)}"
    )
