"""The tables of a finished comparison. Knows no model and no file format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.distillation.comparison import MEAN
from paceline.experiments.direct_alignment.outcome import LONGEST, signed
from paceline.experiments.direct_alignment.plan import (
    BASELINE,
    LENGTHS,
    SAMPLED,
    compared_on_answers,
    compared_without_task,
)
from paceline.experiments.findings import SPEED, Table, columns
from paceline.experiments.prompt_files import TASKS

if TYPE_CHECKING:
    from paceline.experiments.direct_alignment.outcome import Outcome
    from paceline.experiments.findings import Value

_RATE, _TAU = "{:.3f}", "{:.2f}"
_TAUS = tuple((f"tau, K = {k}", _TAU) for k in LENGTHS)


def tables(outcome: Outcome) -> list[Table]:
    """Return all tables; the first one answers the question."""
    found = [
        losses(outcome),
        by_task(outcome),
        sweep(outcome),
        answers(outcome),
        left_out(outcome),
        specialists(outcome),
        numbers(outcome),
    ]
    return [*found, *(one for one in (clocked(outcome), teachers(outcome), noise(outcome)) if one)]


def losses(outcome: Outcome) -> Table:
    """Return the losses at their rates, with their rise over cross-entropy."""
    tuned, budget = outcome.tuned, outcome.plan.budget
    base = outcome.of_loss(BASELINE)
    rows: list[list[Value]] = []
    for loss in budget.losses:
        runs = outcome.of_loss(loss)
        row: list[Value] = [loss, f"{tuned.rates[loss]:g}"]
        row += [outcome.mean(runs, "mean", name) for name in ("match_rate", "acceptance")]
        row += [outcome.tau(runs, length=k) for k in LENGTHS]
        row += [outcome.mean(runs, "mean", "mbsu", str(k)) for k in LENGTHS]
        row += [outcome.mean(runs, "mean", "predicted_speedup")]
        rise = None if loss == BASELINE else outcome.rise(base, runs)[MEAN]
        row += (
            ["–", "–"] if rise is None else [signed(rise.acceptance), signed(rise.block_efficiency)]
        )
        rows.append(row)
    heads = columns("loss", "rate", ("match rate", _RATE), ("acceptance", _RATE), *_TAUS)
    heads += columns(*((f"MBSU, K = {k}", _TAU) for k in LENGTHS), ("predicted speed-up", SPEED))
    heads += columns("rise of acceptance", f"rise of tau, K = {LONGEST}")
    return Table(
        "Losses",
        f"Each loss at the learning rate that is best on validation answers, {budget.tokens:,} "
        f"tokens per run, means over {budget.seeds} seeds and {len(TASKS)} tasks. Match rate: "
        "share of positions where the drafter's most likely token is the target's. Acceptance: "
        "mean of sum min(p, q). tau: tokens per target forward with drafts of K tokens, greedy. "
        f"MBSU: tau / (1 + c K), with c = {outcome.ratio:.3f} of the parameters. Rise: over "
        f"`{BASELINE}` with the same seeds and answers, 95% interval over seeds and answers.",
        heads,
        rows,
    )


def by_task(outcome: Outcome) -> Table:
    """Return the losses' block efficiency by task."""
    base = outcome.of_loss(BASELINE)
    rows: list[list[Value]] = []
    for loss in outcome.plan.budget.losses:
        runs = outcome.of_loss(loss)
        row: list[Value] = [loss]
        found = outcome.rise(base, runs)
        for task in TASKS:
            row.append(outcome.tau(runs, task))
            row.append(signed(None if loss == BASELINE else found[task].block_efficiency, 2))
        rows.append(row)
    heads = columns("loss", *(x for task in TASKS for x in ((task, _TAU), "rise")))
    return Table(
        "Losses by task",
        f"tau at K = {LONGEST} and its rise over `{BASELINE}` with the 95% interval.",
        heads,
        rows,
    )


def sweep(outcome: Outcome) -> Table:
    """Return the validation score of each loss by rate."""
    budget = outcome.plan.budget
    rows: list[list[Value]] = []
    for loss in budget.losses:
        lines = [outcome.results.find(outcome.plan.of_loss(loss, r, 0)) for r in budget.rates]
        rows.append([loss, *(None if line is None else line.get("validation") for line in lines)])
    return Table(
        "Learning rates",
        "Predicted speed-up on validation answers, one seed; a dash is a run that diverged. No judged "
        "answer takes part in the choice.",
        columns("loss", *((f"{rate:g}", SPEED) for rate in budget.rates)),
        rows,
    )


def answers(outcome: Outcome) -> Table:
    """Return greedy against sampled answers."""
    plan, tuned = outcome.plan, outcome.tuned
    rows: list[list[Value]] = []
    for loss in compared_on_answers(tuned):
        base = [plan.on_answers(tuned, loss, "greedy", seed) for seed in plan.seeds]
        for kind in ("greedy", "sampled", "both"):
            runs = [plan.on_answers(tuned, loss, kind, seed) for seed in plan.seeds]
            rise = None if kind == "greedy" else outcome.rise(base, runs)[MEAN].block_efficiency
            row: list[Value] = [loss, kind, round(outcome.mean(runs, "num_answers"))]
            row += [outcome.mean(runs, "mean", "match_rate"), outcome.tau(runs), signed(rise)]
            row += [outcome.mean(runs, "mean", "acceptance")]
            row += [outcome.mean(runs, "sampled", name) for name in ("match_rate", "acceptance")]
            rows.append(row)
    heads = columns("loss", "trained on", ("answers", "{:,}"), ("match rate", _RATE))
    heads += columns(
        (f"tau, K = {LONGEST}", _TAU), "rise of tau over greedy", ("acceptance", _RATE)
    )
    heads += columns(("match rate, sampled", _RATE), ("acceptance, sampled", _RATE))
    return Table(
        "Greedy and sampled answers",
        f"Trained on the target's greedy answers to {plan.budget.sampled:,} prompts, on answers "
        f"to the same prompts sampled at temperature {SAMPLED}, or on both, with equally many "
        "tokens per run. Judged along greedy answers; the last two columns are along sampled "
        "answers to the same prompts. Acceptance is at temperature 1.",
        heads,
        rows,
    )


def left_out(outcome: Outcome) -> Table:
    """Return trainings without each task on that task, next to the pre-trained student."""
    plan, tuned = outcome.plan, outcome.tuned
    before = [plan.pretrained(seed) for seed in plan.seeds]
    rows: list[list[Value]] = []
    for loss in compared_without_task(tuned):
        every = [plan.without_task(tuned, loss, None, seed) for seed in plan.seeds]
        for task in TASKS:
            others = [plan.without_task(tuned, loss, task, seed) for seed in plan.seeds]
            row: list[Value] = [task, loss]
            row += [outcome.tau(runs, task) for runs in (before, others, every)]
            row += [signed(outcome.rise(before, others)[task].block_efficiency)]
            rows.append(row)
    heads = columns(
        "task left out", "loss", ("pre-trained only", _TAU), ("other three tasks", _TAU)
    )
    heads += columns(("all four tasks", _TAU), "rise from pre-trained to other three")
    return Table(
        "A task left out",
        f"tau at K = {LONGEST} on the task that is left out. The student is pre-trained on "
        f"{plan.budget.pretrain_tokens:,} tokens of the data's own prompts and references of all "
        "four tasks, which the target did not write, and then trained on the target's answers of "
        "three tasks, or of all four. 95% intervals over "
        + ("seeds and answers." if len(plan.seeds) > 1 else "answers; one seed."),
        heads,
        rows,
    )


def specialists(outcome: Outcome) -> Table:
    """Return a specialist of each task against the generalist."""
    plan, tuned = outcome.plan, outcome.tuned
    rate = tuned.rates[tuned.best]
    general = [plan.of_loss(tuned.best, rate, seed) for seed in plan.seeds]
    rows: list[list[Value]] = []
    for task in TASKS:
        own = [plan.specialist(tuned, task, seed) for seed in plan.seeds]
        row: list[Value] = [task, round(outcome.mean(own, "num_answers"))]
        row += [outcome.tau(general, task), outcome.tau(own, task)]
        row += [signed(outcome.rise(general, own)[task].block_efficiency)]
        others = [other for other in TASKS if other != task]
        row += [sum(outcome.tau(own, other) for other in others) / len(others)]
        rows.append(row)
    heads = columns("task", ("answers", "{:,}"), ("generalist", _TAU), ("specialist", _TAU))
    heads += columns("rise", ("specialist on the other tasks", _TAU))
    return Table(
        "Specialist and generalist",
        f"tau at K = {LONGEST}, loss `{tuned.best}`. Both have the same size and read as many "
        "tokens; the specialist reads the answers of one task, so it reads each more often.",
        heads,
        rows,
    )


def numbers(outcome: Outcome) -> Table:
    """Return the measures by number of answers."""
    plan, tuned = outcome.plan, outcome.tuned
    every = [plan.with_answers(tuned, plan.budget.answers[-1], seed) for seed in plan.seeds]
    rows: list[list[Value]] = []
    for num in plan.budget.answers:
        runs = [plan.with_answers(tuned, num, seed) for seed in plan.seeds]
        row: list[Value] = [round(outcome.mean(runs, "num_answers"))]
        row += [outcome.mean(runs, "settings", "epochs")]
        row += [outcome.mean(runs, "mean", name) for name in ("match_rate", "acceptance")]
        row += [outcome.tau(runs, length=k) for k in LENGTHS]
        row += [outcome.mean(runs, "mean", "predicted_speedup")]
        rise = None if runs == every else outcome.rise(every, runs)[MEAN].block_efficiency
        rows.append([*row, signed(rise)])
    heads = columns(("answers", "{:,}"), ("passes", "{:.1f}"), ("match rate", _RATE))
    heads += columns(("acceptance", _RATE), *_TAUS, ("predicted speed-up", SPEED))
    heads += columns("against all answers")
    return Table(
        "Number of answers",
        f"Loss `{tuned.best}`, equally many tokens per run: fewer answers are read more often, "
        "and a run of less than one pass has read only that share of its answers. "
        f"Last column: the difference of tau at K = {LONGEST} to the run on all answers.",
        heads,
        rows,
    )


def clocked(outcome: Outcome) -> Table | None:
    """Return the students that were decoded by the clock."""
    line = outcome.results.of_kind("clock")
    if line is None:
        return None
    rows: list[list[Value]] = []
    for name, own in line["students"].items():
        value, low, high = own["speedup"]
        row: list[Value] = [
            name,
            own["num_draft_tokens"],
            f"{value:.2f}x ({low:.2f} to {high:.2f})",
        ]
        row += [own["tasks"][task] for task in TASKS]
        rows.append([*row, own["predicted"], f"{own['equal_texts']} of {line['prompts']}"])
    heads = columns("student", "K", "speed over none", *((task, SPEED) for task in TASKS))
    heads += columns(("predicted", SPEED), "texts equal to none's")
    return Table(
        "By the clock",
        f"Students of one seed decode {line['prompts']} judging prompts, interleaved with plain "
        "decoding (`none`) in one process: greedy, one request at a time, at most "
        f"{line['max_new_tokens']} tokens, prefill included, 95% interval over prompts. "
        "Predicted: from the judged answers and the measured prices of rounds, without the "
        "prefill.",
        heads,
        rows,
    )


def teachers(outcome: Outcome) -> Table | None:
    """Return the cost of live and cached target distributions."""
    line = outcome.results.of_kind("teachers")
    if line is None:
        return None
    rows: list[list[Value]] = [
        [name, line["tokens_per_second"][name], line["tokens_per_cpu_second"][name]]
        for name in ("cached", "live")
    ]
    return Table(
        "Stored and live target distributions",
        f"Tokens per second of training with `{line['loss']}`, one thread, {line['tokens']:,} "
        f"tokens. `cached` reads the target's {line['top_k']} most probable tokens per position, "
        "`live` runs the target on each batch and uses all probabilities. Storing them once runs "
        f"at {line['storing']:,.0f} tokens per second and takes {line['bytes_per_token']:,.0f} "
        "bytes per token.",
        columns("teacher", ("tokens per second", "{:,.0f}"), ("per CPU second", "{:,.0f}")),
        rows,
    )


def noise(outcome: Outcome) -> Table | None:
    """Return the noise of sampled gradients."""
    line = outcome.results.of_kind("gradients")
    if line is None:
        return None
    rows: list[list[Value]] = []
    for own in line["rows"]:
        plain, standardised = own["tvd"], own["tvd++"]
        row: list[Value] = [own["samples"], plain["noise"], standardised["noise"]]
        ratio = plain["noise"] / standardised["noise"] if standardised["noise"] else None
        rows.append([*row, ratio, plain["cosine"], standardised["cosine"]])
    heads = columns("samples per position", ("TVD, noise", "{:.3g}"), ("TVD++, noise", "{:.3g}"))
    heads += columns(("TVD over TVD++", SPEED), ("TVD, cosine", _RATE), ("TVD++, cosine", _RATE))
    return Table(
        "Noise of sampled gradients",
        f"The gradient of the output head from tokens drawn from q, on {line['positions']} "
        f"positions with the p and q of a trained student and its target, {line['draws']} draws; "
        f"the mean reward is {line['mean_reward']:.2f}. Noise: variance over the squared norm of "
        "the exact gradient. Cosine: of a draw with the exact gradient. The trainings above sum "
        "over the vocabulary and have none of this noise.",
        heads,
        rows,
    )
