"""What replay predicts along plain decoding's text is what a real run does, round for round."""

from __future__ import annotations

import pytest

from paceline.assembly import Pace, Parts
from paceline.contracts import NONE
from paceline.experiments.demo_prompts import demo_prompts
from paceline.replay import max_output, replay
from paceline.testing.examples import add_examples

MAX_NEW_TOKENS = 48


@pytest.mark.parametrize(
    "per_task", [2, pytest.param(20, marks=[pytest.mark.wide, pytest.mark.timeout(1800)])]
)
def test_rounds_predicted_by_replay_are_those_of_a_real_run(
    zoo_target: Parts, per_task: int
) -> None:
    z = zoo_target
    drafters = dict(z.drafters)
    parts = add_examples(Parts(z.config, z.target, z.tokenizer, z.vocabulary, drafters))
    pace = Pace(parts)
    prompts, _ = demo_prompts(per_task, 1)
    accepted_somewhere = set()
    for record in prompts:
        tokens = pace.encode([{"role": "user", "content": record.prompt}])
        settings = {"max_new_tokens": MAX_NEW_TOKENS}
        plain = pace.complete(tokens, drafter=NONE, **settings)
        limit = max_output(MAX_NEW_TOKENS, len(tokens), parts.target.context_length)
        for name, drafter in drafters.items():
            real = pace.complete(tokens, drafter=name, **settings)
            assert real.token_ids == plain.token_ids
            predicted = replay(drafter, tokens, plain.token_ids, limit).rounds
            rounds = [[r.drafted, r.accepted] for r in real.rounds]
            assert predicted.tolist() == rounds, (record.id, name)
            if any(r.accepted for r in real.rounds):
                accepted_somewhere.add(name)
    assert accepted_somewhere == set(drafters) - {NONE}
