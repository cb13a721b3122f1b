"""Replay along the text of plain decoding predicts every round of a real run."""

from __future__ import annotations

from typing import Any

import pytest
from support.examples import add_examples

from paceline.assembly import Pace, Parts
from paceline.contracts import GREEDY, NONE, SamplingParams, join_arm
from paceline.experiments.demo_prompts import demo_prompts
from paceline.replay import max_output, replay, walk

MAX_NEW_TOKENS = 48
SAMPLED = SamplingParams(temperature=0.7, top_p=0.95, seed=11, method="invariant")
SETTINGS: dict[SamplingParams, dict[str, Any]] = {
    GREEDY: {},
    SAMPLED: {"temperature": 0.7, "top_p": 0.95, "seed": 11},
}


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("per_task", [1, pytest.param(20, marks=pytest.mark.wide)])
def test_rounds_predicted_by_replay_are_those_of_a_real_run(
    zoo_target: Parts, per_task: int, sampling: SamplingParams
) -> None:
    """At every drafter's own length, and where drafts nest at shorter ones."""
    z = zoo_target
    drafters = dict(z.drafters)
    parts = add_examples(Parts(z.config, z.target, z.tokenizer, z.vocabulary, drafters))
    pace = Pace(parts)
    prompts, _ = demo_prompts(per_task, 1)
    accepted_somewhere = set()
    settings = {"max_new_tokens": MAX_NEW_TOKENS, **SETTINGS[sampling]}
    for record in prompts:
        tokens = pace.encode([{"role": "user", "content": record.prompt}])
        plain = pace.complete(tokens, drafter=NONE, **settings)
        limit = max_output(MAX_NEW_TOKENS, len(tokens), parts.target.context_length)
        for name, drafter in drafters.items():
            result = replay(drafter, tokens, plain.token_ids, limit, sampling=sampling)
            predicted = {name: result.rounds}
            if drafter.nests and result.ahead is not None:
                predicted[join_arm(name, 2)] = walk(result.ahead, 2)
            for arm, expected in predicted.items():
                real = pace.complete(tokens, drafter=arm, **settings)
                assert real.token_ids == plain.token_ids
                assert real.drafter == name
                rounds = [[r.drafted, r.accepted] for r in real.rounds]
                assert expected.tolist() == rounds, (record.id, arm)
                if any(r.accepted for r in real.rounds):
                    accepted_somewhere.add(arm)
    nested = {join_arm(name, 2) for name, drafter in drafters.items() if drafter.nests}
    assert accepted_somewhere == set(drafters) - {NONE} | nested
