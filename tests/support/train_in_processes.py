"""Train a tiny student and save its weights; a program that several processes run.

Arguments: folder, batches per step of each process, number of texts.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))


def main(folder: Path, accumulate: int, num_texts: int) -> None:
    from paceline.distillation.train import Lesson, Trainer, start_accelerator
    from support.distillation import tiny_settings
    from support.training import SmoothedText, new_student, rule_texts, score_by_loss

    torch.set_num_threads(1)
    accelerator = start_accelerator(on_cpu=True)
    settings = tiny_settings(
        loss="kl",
        accumulate=accumulate,
        autocast=False,
        learning_rate=1e-3,
        max_gradient_norm=1e9,  # a clipped gradient would have the same length at any scale
    )
    student, lesson = new_student(), Lesson(rule_texts(num_texts), distributions=SmoothedText())
    trainer = Trainer(student, lesson, settings, folder / "checkpoint.pt", accelerator)
    losses: list[float] = []
    validate = score_by_loss(rule_texts(9, seed=1))
    result = trainer.run(validate, lambda progress: losses.append(progress.loss))
    if accelerator.is_main_process:
        facts = {"losses": losses, "tokens": result.tokens, "steps": result.step}
        facts |= {"processes": accelerator.num_processes, "best_step": result.best_step}
        moments = [state["exp_avg"] for state in trainer.optimizer.state.values()]
        facts["moments"] = float(torch.cat([m.flatten() for m in moments]).norm())
        facts["last_batches"] = len(trainer.plan[-1].batches)
        (folder / "facts.json").write_text(json.dumps(facts))
        torch.save(student.state_dict(), folder / "weights.pt")
    accelerator.wait_for_everyone()
    # gloo's threads may wait for a process that has ended, so the group is not taken down
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
