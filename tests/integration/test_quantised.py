"""A quantised target runs behind transformers' own forward, with unquantised drafters."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, QuantoConfig

import paceline
from paceline.models.lean import why_not_lean

ZOO = Path(__file__).parents[2] / "zoo"
PROMPT = [{"role": "user", "content": "Tom has 3 apples and buys 5 more. How many has he now?"}]


def test_an_int8_target_writes_what_transformers_writes_with_it() -> None:
    target = AutoModelForCausalLM.from_pretrained(
        ZOO / "target", dtype=torch.float32, quantization_config=QuantoConfig(weights="int8")
    )
    drafter = AutoModelForCausalLM.from_pretrained(ZOO / "draft-math", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(ZOO / "target")

    pace = paceline.load(target=target, tokenizer=tokenizer, drafters={"math": drafter})

    assert "QLinear stands where" in (why_not_lean(target) or "")
    assert pace.parts.target.forward_kind == "transformers"
    # one byte a weight, and four in the embedding, which stays as it is
    assert pace.parts.target.num_bytes() < 2 * sum(p.numel() for p in target.parameters())
    assert len(pace.parts.target.fingerprint()) == 16
    prompt = torch.tensor([pace.encode(PROMPT)])
    with torch.inference_mode():
        expected = target.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=32
        )[0, prompt.shape[1] :].tolist()
    for arm in pace.drafters:
        completion = pace.complete(PROMPT, drafter=arm, max_new_tokens=32)
        assert completion.token_ids == expected
    assert completion.block_efficiency > 1.5
