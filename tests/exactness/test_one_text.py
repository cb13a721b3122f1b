"""On the compiled forward a text is the same for every drafter, batch and chunk, in bfloat16, too.

The bits of a token's logits depend on its own row alone, so the text does, greedy or drawn with a seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from paceline.assembly import Pace, Parts, build, build_from_objects
from paceline.config import Config, DrafterSection, EngineSection, ModelSection
from paceline.errors import ModelError
from paceline.models.compiled.forward import CompiledForward
from paceline.models.language_model import LanguageModel
from paceline.models.packing import Span
from paceline.testing.scripted import ScriptedDrafter, ScriptedTree, copying
from paceline.testing.tiny_models import LEAN_ARCHITECTURES, tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.contracts import PromptRecord

ZOO = Path(__file__).parents[2] / "zoo"
LENGTH = 48
HALF = torch.bfloat16


@pytest.fixture(scope="module")
def zoo() -> Parts:
    def drafter(name: str) -> DrafterSection:
        model = {"model": str(ZOO / f"draft-{name}"), "dtype": "float32"}
        return DrafterSection(kind="draft_model", settings=model)

    config = Config(
        target=ModelSection(model=str(ZOO / "target"), dtype="bfloat16", device="cpu"),
        drafters={
            "math": drafter("math"),
            "code": drafter("code"),
            "lookup": DrafterSection(kind="prompt_lookup"),
            "skip": DrafterSection(kind="layer_skip", settings={"skip_mlp": [4, 7]}),
        },
    )
    return build(config)


def pace_of(parts: Parts, extra: dict[str, Any] | None = None, **engine: Any) -> Pace:
    config = parts.config.model_copy(update={"engine": EngineSection(**engine)})
    drafters = {**parts.drafters, **(extra or {})}
    return Pace(Parts(config, parts.target, parts.tokenizer, parts.vocabulary, drafters))


def half_right(texts: Sequence[Sequence[int]]) -> ScriptedTree:
    """Trees of pairs: the true token and a wrong one, on three levels."""

    def grow(tokens: Sequence[int], limit: int) -> tuple[list[int], list[int]]:
        whole = next(t for t in texts if list(t[: len(tokens)]) == list(tokens))
        ahead = whole[len(tokens) : len(tokens) + min(3, limit)]
        drafted, parents, parent = [], [], -1
        for token in ahead:
            drafted += [(token + 1) % 8000, token]
            parents += [parent, parent]
            parent = len(drafted) - 1
        return drafted, parents

    return ScriptedTree("tree", grow)


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.8, "seed": 5}], ids=["greedy", "seeded"]
)
def test_texts_in_bfloat16_are_the_same_for_every_arm_batch_and_chunk(
    zoo: Parts, prompts: list[PromptRecord], sampling: dict[str, Any]
) -> None:
    assert zoo.target.forward_kind == "compiled" and zoo.target.exact
    settings = {"max_new_tokens": LENGTH, "logprobs": True, **sampling}
    alone = pace_of(zoo, max_rows=1, prefix_positions=0)
    ids = [alone.encode([{"role": "user", "content": p.prompt}]) for p in prompts]
    expected = [alone.complete(p, drafter="none", **settings) for p in ids]
    tree = half_right([[*p, *e.token_ids] for p, e in zip(ids, expected, strict=True)])
    accepted = 0
    for engine in ({"max_rows": 5, "prefill_chunk": 23}, {"max_rows": 3, "prefix_positions": 512}):
        pace = pace_of(zoo, {"tree": tree}, **engine)
        arms = pace.drafters
        requests = [
            pace.request(p, id=f"{i} {arm}", drafter=arm, **settings)
            for i, p in enumerate(ids)
            for arm in arms
        ]
        for completion in pace.stream(requests):
            plain = expected[int(completion.request_id.split()[0])]
            assert completion.token_ids == plain.token_ids, completion.request_id
            assert completion.logprobs == plain.logprobs, completion.request_id
            accepted += sum(r.accepted for r in completion.rounds)
    assert accepted > 10 * len(ids)


# --- the bits of logits ---------------------------------------------------------------------------


def decode(
    model: LanguageModel,
    prompt: list[int],
    text: list[int],
    widths: Sequence[int],
    neighbour: Sequence[int] = (),
    chunk: int = 512,
) -> torch.Tensor:
    """Return the logits after each token of `text`, fed `widths` at a time.

    neighbour: the prompt of another row in every forward. chunk: tokens of the prompt's pieces.
    """
    cache = model.cache.for_checks()
    row, other = cache.acquire(), cache.acquire()
    for at in range(0, len(prompt), chunk):
        piece = prompt[at : at + chunk]
        tokens, spans = list(piece), [Span(row, at, len(piece), prefill=True)]
        if neighbour and at == 0:
            tokens = [*neighbour, *piece]
            spans.insert(0, Span(other, 0, len(neighbour), prefill=True))
        model.forward(torch.tensor(tokens), spans, cache=cache)
    logits, at = [], 0
    for width in widths:
        tokens, spans = text[at : at + width], [Span(row, len(prompt) + at, width)]
        if neighbour:
            tokens = [text[0], *tokens]
            spans.insert(0, Span(other, len(neighbour) + at, 1))
        hidden = model.forward(torch.tensor(tokens), spans, cache=cache)
        logits.append(model.unembed(hidden[-width:]))
        at += width
    return torch.cat(logits)


def decode_trees(model: LanguageModel, prompt: list[int], text: list[int]) -> torch.Tensor:
    """Return the logits of `decode` from trees of five nodes, two of them wrong."""
    cache = model.cache.for_checks()
    row = cache.acquire()
    model.forward(torch.tensor(prompt), [Span(row, 0, len(prompt), prefill=True)], cache=cache)
    # of the wrong child, the right child, the wrong grandchild and the right grandchild
    parents = [-1, -1, 1, 1]
    logits = []
    for at in range(0, len(text), 3):
        right, start = text[at : at + 3], len(prompt) + at
        nodes = torch.tensor([right[i] for i in (0, 0, 1, 0, 2)])
        hidden = model.forward(nodes, [Span(row, start, 5)], [parents], cache=cache)
        logits.append(model.unembed(hidden)[[0, 2, 4]])
        cache.copy_positions(row, [start, start + 2, start + 4], start)
    return torch.cat(logits)


def differing(model: LanguageModel) -> list[str]:
    """Return the ways to decode one text whose logits differ from those of one token at a time."""
    generator = torch.Generator().manual_seed(0)
    prompt, other, text = (
        torch.randint(model.num_logits, (n,), generator=generator).tolist() for n in (66, 7, 12)
    )
    with torch.inference_mode():
        alone = decode(model, prompt, text, [1] * 12)
        found = {
            f"drafts of {widths} in chunks of {chunk}, next to {len(near)}": decode(
                model, prompt, text, widths, near, chunk
            )
            for widths in ([5, 4, 3], [1, 2, 9], [12])
            for near in ([], other)
            for chunk in (512, 19)
        }
        found["a tree"] = decode_trees(model, prompt, text)
    return [way for way, logits in found.items() if not torch.equal(alone, logits)]


@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
@pytest.mark.parametrize("architecture", LEAN_ARCHITECTURES)
def test_bits_depend_on_the_row_alone(architecture: str, dtype: torch.dtype) -> None:
    model = LanguageModel(tiny_model(architecture).to(dtype), "target", "compiled")

    assert differing(model) == []


@pytest.mark.parametrize(
    ("unlike", "ways"),
    [
        (lambda spans: spans[-1].width % 2, "drafts of [12] in chunks of 512, next to 0"),
        (lambda spans: spans[-1].width == 5, "a tree"),
        (lambda spans: len(spans) > 1, "drafts of [12] in chunks of 512, next to 7"),
        (lambda spans: spans[0].prefill and spans[0].width < 66, "next to 0"),
    ],
    ids=["draft", "tree", "neighbour", "chunk"],
)
def test_the_comparison_sees_a_last_bit(
    unlike: Any, ways: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = CompiledForward.hidden

    def wrong(self: Any, tokens: Any, spans: Any, *rest: Any) -> torch.Tensor:
        tokens = [t + 1 for t in tokens] if unlike(spans) and spans[0].prefill else tokens
        return hidden(self, tokens, spans, *rest) * (1 + 2**-7 * bool(unlike(spans)))

    monkeypatch.setattr(CompiledForward, "hidden", wrong)
    found = differing(LanguageModel(tiny_model("llama").bfloat16(), "target"))

    assert any(ways in way for way in found)


# --- shapes and refusals --------------------------------------------------------------------------


def wide_llama() -> LlamaForCausalLM:
    """A model with products over 1,376 inputs, which packed kernels have summed in several orders."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=8200,
        hidden_size=512,
        intermediate_size=1376,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.06)
    return model.to(HALF)


def test_products_over_many_inputs_keep_one_text_at_every_width_of_drafts() -> None:
    config = Config(target=ModelSection(model="in memory"), exact=True)
    parts = build_from_objects(wide_llama(), byte_tokenizer(), {}, config)
    settings: dict[str, Any] = {"max_new_tokens": 40, "ignore_eos": True, "logprobs": True}
    generator = torch.Generator().manual_seed(2)
    for k in range(0, 12, 2):
        prompt = torch.randint(0, 8200, (1 + 9 * k,), generator=generator).tolist()
        plain = pace_of(parts).complete(prompt, drafter="none", **settings)
        for right in (4, 8, 12, 40):
            known = ScriptedDrafter("known", copying([*prompt, *plain.token_ids], right), 16)
            pace = pace_of(parts, {"known": known})
            drafted = pace.complete(prompt, drafter="known", **settings)

            assert drafted.token_ids == plain.token_ids and drafted.logprobs == plain.logprobs
            assert len(drafted.rounds) < len(plain.rounds)


@pytest.mark.parametrize(
    ("architecture", "dtype", "forward", "reason"),
    [
        ("gpt2", torch.float32, "auto", "compiled code does not know GPT2LMHeadModel"),
        ("llama", torch.float16, "auto", "its weights are float16"),
        ("llama", HALF, "lean", "the configuration asks for 'forward: lean'"),
        ("llama", HALF, "transformers", "the configuration asks for 'forward: transformers'"),
    ],
)
def test_exact_is_refused_on_another_forward(
    architecture: str, dtype: torch.dtype, forward: Any, reason: str
) -> None:
    section = ModelSection(model="in memory", forward=forward)
    model = tiny_model(architecture).to(dtype)
    with pytest.raises(
        ModelError, match=rf"target: 'exact' needs the compiled .*: {reason}; remove"
    ):
        build_from_objects(model, byte_tokenizer(), {}, Config(target=section, exact=True))

    parts = build_from_objects(model, byte_tokenizer(), {}, Config(target=section))
    assert not parts.target.exact and parts.target.why_not_compiled
