"""The whole comparison on tiny models: runs are made once, and the page shows their results."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from paceline.cli import main
from paceline.errors import ConfigError
from paceline.experiments.direct_alignment import experiment, training
from paceline.experiments.direct_alignment.materials import load
from paceline.experiments.direct_alignment.outcome import Outcome
from paceline.experiments.direct_alignment.page import BEGIN, END, write_page
from paceline.experiments.direct_alignment.plan import SMOKE, Plan, Run
from paceline.experiments.direct_alignment.results import Results, read_lines
from paceline.experiments.direct_alignment.tables import sweep
from paceline.experiments.prompt_files import TASKS
from paceline.store import part_of

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.experiments.catalog import Finished

    from .conftest import Place

CLOCKED = ("seconds", "cpu_seconds", "date", "commit")  # what differs between equal runs


def runs_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the lines of runs by their configuration, without what a clock measured."""
    lines = [line for line in read_lines(folder / "results.jsonl") if line["kind"] == "run"]
    return {
        json.dumps(line["run"]): {k: v for k, v in line.items() if k not in CLOCKED}
        for line in lines
    }


def outcome_of(place: Place) -> Outcome:
    path = place.out / "results.jsonl"
    return Outcome(Plan(SMOKE), Results(path, read_lines(path)[0]["materials"]))


def begin_again(place: Place, folder: Path) -> Place:
    """Return a place with the same answers and prices, and no run."""
    out, work = folder / "out", folder / "work"
    out.mkdir()
    shutil.copytree(
        place.work / "direct-alignment" / "answers", work / "direct-alignment" / "answers"
    )
    lines = (place.out / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").write_text("".join(lines[:1]))
    return place._replace(work=work, out=out)


# --- results --------------------------------------------------------------------------------------


def test_every_run_of_the_plan_has_one_line(place: Place, finished: Finished) -> None:
    outcome = outcome_of(place)
    plan, tuned = outcome.plan, outcome.tuned
    planned = {*plan.pretrainings(), *plan.sweep(), *plan.of_losses(tuned), *plan.of_data(tuned)}
    lines = [line for line in outcome.results.lines if line["kind"] == "run"]

    assert len(lines) == len(planned) == len(runs_of(place.out))
    assert {Run.model_validate(line["run"]) for line in lines} == planned
    for line in lines:
        assert set(line["tasks"]) == set(TASKS)
        trained = line["settings"]
        for name in ("loss", "learning_rate", "seed"):
            assert trained[name] == line["run"][name] or line["run"]["phase"] == "pretrain"
        assert line["processor"] and line["commit"] and line["threads"] == 1
        # a run reads its tokens up to a part of a batch
        assert abs(line["tokens"] - line["run"]["tokens"]) <= 2 * SMOKE.batch_tokens


def test_the_figures_of_a_line_follow_from_its_matches(place: Place, finished: Finished) -> None:
    """Intervals come from the packed matches, figures from the run: both must be of the same answers."""
    outcome = outcome_of(place)
    for line in outcome.results.lines:
        if line["kind"] != "run":
            continue
        matches = outcome.results.matches(line)
        for task in TASKS:
            own = [i for i, name in enumerate(matches.tasks) if name == task]
            places = np.concatenate(
                [np.arange(matches.starts[i], matches.starts[i + 1]) for i in own]
            )
            figures = line["tasks"][task]
            assert np.mean(matches.match[places]) == pytest.approx(figures["match_rate"], abs=1e-5)
            assert matches.overlap is not None
            assert matches.overlap[places].mean() == pytest.approx(figures["acceptance"], abs=1e-4)


def test_runs_learn_and_differ(place: Place, finished: Finished) -> None:
    """A comparison of equal students would show no difference between losses either."""
    accepted = {str(line["accepted"]) for line in runs_of(place.out).values()}
    assert len(accepted) > 0.8 * len(runs_of(place.out))


def test_cross_entropy_learns_the_text_and_kl_the_distributions(
    place: Place, finished: Finished
) -> None:
    """Given the distributions, cross-entropy would be the divergence under another name."""
    outcome = outcome_of(place)
    found = [
        outcome.results.of(outcome.plan.of_loss(loss, rate, 0))["accepted"]
        for loss in ("cross_entropy", "kl")
        for rate in SMOKE.rates
    ]
    assert all(a != b for i, a in enumerate(found) for b in found[:i])


def test_judged_prompts_are_learned_by_no_run(place: Place, finished: Finished) -> None:
    outcome = outcome_of(place)
    materials = load(place.work / "direct-alignment" / "texts.pt")
    judged = {example.id for example in (*materials.judging, *materials.judging_sampled)}
    validation = {example.id for example in materials.validation}
    assert judged and all(part_of(id.split("@")[0]) == "judging" for id in judged)
    plan = outcome.plan
    for run in {*plan.of_losses(outcome.tuned), *plan.of_data(outcome.tuned)}:
        learned = materials.training(run)
        assert learned
        assert {example.domain for example in learned} == set(run.tasks)
        assert not {example.id for example in learned} & (judged | validation)
    texts = b"".join(example.tokens.tobytes() for example in materials.plain)
    for example in (*materials.judging, *materials.validation):
        words = example.tokens[1 : example.num_prompt - 1].tobytes()
        assert words not in texts


def test_answers_of_a_smaller_number_are_among_those_of_a_larger_one(
    place: Place, finished: Finished
) -> None:
    outcome = outcome_of(place)
    materials = load(place.work / "direct-alignment" / "texts.pt")
    plan, tuned = outcome.plan, outcome.tuned
    few, many = (
        {e.id for e in materials.training(plan.with_answers(tuned, num, 0))}
        for num in SMOKE.answers
    )
    assert few < many and (len(few), len(many)) == SMOKE.answers
    kinds = {
        kind: [
            e.tokens.tobytes() for e in materials.training(plan.on_answers(tuned, "kl", kind, 0))
        ]
        for kind in ("greedy", "sampled", "both")
    }
    assert len(set(kinds["both"])) == len(kinds["both"])
    assert set(kinds["both"]) == {*kinds["greedy"], *kinds["sampled"]}


# --- resumption -----------------------------------------------------------------------------------


def test_a_second_call_trains_nothing_and_writes_the_same_page(
    place: Place, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = place.out.with_suffix(".md")
    before, lines = page.read_text(), (place.out / "results.jsonl").read_text()

    def fail(*args: object) -> None:
        raise AssertionError("a finished run was made again")

    monkeypatch.setattr(training, "train", fail)
    monkeypatch.setattr(experiment, "time_students", fail)
    monkeypatch.setattr(experiment, "measure_prices", fail)
    monkeypatch.setattr(experiment, "measure_noise", fail)
    monkeypatch.setattr(experiment, "time_teachers", fail)
    place.run()
    assert page.read_text() == before
    assert (place.out / "results.jsonl").read_text() == lines


def test_a_killed_program_continues_to_the_same_results(
    place: Place, finished: Finished, tmp_path: Path
) -> None:
    again = begin_again(place, tmp_path)
    command = [
        sys.executable,
        "-c",
        "from paceline.cli import main; main()",
        "experiment",
        "direct-alignment",
        "--smoke",
    ]
    for flag in ("config", "data", "out"):
        command += [f"--{flag}", str(getattr(again, flag))]
    running = subprocess.Popen([*command, "--folder", str(again.work)], stdout=subprocess.DEVNULL)
    try:
        while running.poll() is None and len(runs_of(again.out)) < 4:
            time.sleep(0.05)
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    done = len(runs_of(again.out))
    assert 4 <= done < len(runs_of(place.out))

    again.run()
    assert runs_of(again.out) == runs_of(place.out)


def test_two_workers_find_the_same(place: Place, finished: Finished, tmp_path: Path) -> None:
    """Workers read the texts from a file and the untrained students from folders."""
    again = begin_again(place, tmp_path)
    shutil.copytree(place.work, again.work, dirs_exist_ok=True)
    lines = (place.out / "results.jsonl").read_text().splitlines(keepends=True)
    lacking = [line for line in lines if '"kind":"run"' in line][-3:]
    (again.out / "results.jsonl").write_text("".join(x for x in lines if x not in lacking))
    again.run(workers=2)
    assert runs_of(again.out) == runs_of(place.out)


def test_a_rate_that_diverges_is_not_chosen(
    place: Place, finished: Finished, tmp_path: Path
) -> None:
    outcome = outcome_of(place)
    best = outcome.tuned.rates["kl"]
    path = tmp_path / "results.jsonl"
    lines = []
    for line in read_lines(place.out / "results.jsonl"):
        run = line.get("run", {})
        if run.get("phase") == "align" and run["loss"] == "kl" and run["learning_rate"] == best:
            line = {key: line[key] for key in ("kind", "materials", "run")} | {"diverged": True}
        lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines))
    changed = Outcome(outcome.plan, Results(path, outcome.results.materials))
    with pytest.raises(ConfigError, match="is missing"):
        _ = changed.tuned  # the other rate has one seed so far
    row = next(row for row in sweep(changed).rows if row[0] == "kl")
    assert row[1 + SMOKE.rates.index(best)] is None and None in row and row.count(None) == 1
    rates = experiment.tune(outcome.plan, changed.results)
    assert rates["kl"] != best and rates["cross_entropy"] == outcome.tuned.rates["cross_entropy"]


# --- page -----------------------------------------------------------------------------------------


def test_the_page_is_written_from_the_results_alone(
    place: Place, finished: Finished, tmp_path: Path
) -> None:
    folder = tmp_path / "moved"
    folder.mkdir()
    shutil.copy(place.out / "results.jsonl", folder)
    (tmp_path / "moved.md").write_text(f"# Mine\n\n{BEGIN}\nold 9.99\n{END}\n\nTail.\n")
    found, _ = write_page(folder, SMOKE)

    text = (tmp_path / "moved.md").read_text()
    assert text.startswith("# Mine\n") and text.endswith(f"{END}\n\nTail.\n") and "9.99" not in text
    body = text.partition(BEGIN)[2].partition(END)[0]
    theirs = place.out.with_suffix(".md").read_text().partition(BEGIN)[2].partition(END)[0]
    assert body == theirs.replace("(out/", "(moved/")
    assert (folder / "direct-alignment.png").stat().st_size > 10_000
    outcome = outcome_of(place)
    shown = found.tables[0].rows
    assert [row[0] for row in shown] == list(SMOKE.losses)
    for row in shown:
        runs = outcome.of_loss(row[0])  # type: ignore[arg-type]
        own = [outcome.results.of(run)["mean"]["block_efficiency"]["5"] for run in runs]
        assert row[5] == pytest.approx(np.mean(own))


def test_results_without_a_run_make_no_page(
    place: Place, finished: Finished, tmp_path: Path
) -> None:
    folder = tmp_path / "part"
    folder.mkdir()
    lines = (place.out / "results.jsonl").read_text().splitlines(keepends=True)
    (folder / "results.jsonl").write_text("".join(lines[:9]))
    with pytest.raises(ConfigError, match="run the experiment again, which continues"):
        write_page(folder, SMOKE)
    (folder / "results.jsonl").write_text("".join(lines[:3]) + '{"kind": "run"')
    with pytest.raises(ConfigError, match=r"results\.jsonl:4: not a line of results"):
        write_page(folder, SMOKE)


# --- mistakes -------------------------------------------------------------------------------------


def test_mistakes_end_in_one_line(
    place: Place,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PACELINE_DATA", raising=False)
    lacking = tmp_path / "data"
    shutil.copytree(place.data, lacking)
    (lacking / "math.jsonl").unlink()
    given = ["experiment", "direct-alignment", "--config", str(place.config)]
    given += ["--folder", str(tmp_path / "w"), "--out", str(tmp_path / "o")]
    cases = [
        ([*given], "this experiment needs a folder with translation.jsonl, math.jsonl"),
        ([*given, "--data", str(lacking)], "no math.jsonl in this data folder"),
        ([*given, "--budget", "smal"], "there is no budget 'smal'"),
        ([*given, "--budget", "full", "--smoke"], "a smoke run has its own budget"),
        ([*given, "--prompts", "4"], "has its prompts from its budget"),
        (["experiment", "online", "--workers", "2"], "'online' has no budget and no workers"),
        (
            [*given[:2], "--collect-docs", "--out", str(tmp_path)],
            "no results of the budget 'small'",
        ),
    ]
    for arguments, message in cases:
        monkeypatch.setattr(sys, "argv", ["paceline", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = " ".join(capsys.readouterr().err.split())
        assert ended.value.code == 2 and message in shown, (arguments, shown)


def test_a_task_without_prompts_of_a_part_is_refused(place: Place, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(place.data, data)
    lines = (data / "code.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if part_of(json.loads(line)["id"]) != "judging"]
    (data / "code.jsonl").write_text("".join(kept))
    with pytest.raises(
        ConfigError, match=r"code\.jsonl: none of its prompts is in the part for judg"
    ):
        place.run(data=data, folder=tmp_path / "w", out=tmp_path / "o")


def test_it_is_listed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["paceline", "experiment", "--list"])
    with pytest.raises(SystemExit):
        main()
    assert "direct-alignment" in capsys.readouterr().out
