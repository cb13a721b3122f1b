"""Exact mode: in bfloat16, too, a greedy text is the same for every drafter, batch and chunk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from paceline.assembly import Pace, Parts, build, build_from_objects
from paceline.config import Config, DrafterSection, EngineSection, ModelSection
from paceline.errors import ConfigError, ModelError
from paceline.models import attention, cache, exact, products
from paceline.models.exact import find_rows
from paceline.models.language_model import LanguageModel
from paceline.models.self_checks import check_exact
from paceline.testing.scripted import ScriptedDrafter, ScriptedTree, copying
from paceline.testing.tiny_models import LEAN_ARCHITECTURES, tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from paceline.contracts import PromptRecord

ZOO = Path(__file__).parents[2] / "zoo"
LENGTH = 48
# Exact mode refuses bfloat16 on a CPU that does not multiply it, see the last test.
HALF = torch.bfloat16 if products.packs(torch.zeros(1, 1).bfloat16()) else torch.float32


@pytest.fixture(scope="module")
def zoo() -> Parts:
    def drafter(name: str) -> DrafterSection:
        model = {"model": str(ZOO / f"draft-{name}"), "dtype": "float32"}
        return DrafterSection(kind="draft_model", settings=model)

    config = Config(
        target=ModelSection(
            model=str(ZOO / "target"),
            dtype="bfloat16" if HALF is torch.bfloat16 else "float32",
            device="cpu",
        ),
        drafters={
            "math": drafter("math"),
            "code": drafter("code"),
            "lookup": DrafterSection(kind="prompt_lookup"),
            "skip": DrafterSection(kind="layer_skip", settings={"skip_mlp": [4, 7]}),
        },
        exact=True,
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


def test_texts_in_bfloat16_are_the_same_for_every_arm_batch_and_chunk(
    zoo: Parts, prompts: list[PromptRecord]
) -> None:
    alone = pace_of(zoo, max_rows=1, prefix_positions=0)
    ids = [alone.encode([{"role": "user", "content": p.prompt}]) for p in prompts]
    expected = [alone.complete(p, drafter="none", max_new_tokens=LENGTH).token_ids for p in ids]
    tree = half_right([[*p, *e] for p, e in zip(ids, expected, strict=True)])
    accepted = 0
    for engine in ({"max_rows": 5, "prefill_chunk": 64}, {"max_rows": 3, "prefix_positions": 512}):
        pace = pace_of(zoo, {"tree": tree}, **engine)
        arms = pace.drafters
        requests = [
            pace.request(p, id=f"{i} {arm}", drafter=arm, max_new_tokens=LENGTH)
            for i, p in enumerate(ids)
            for arm in arms
        ]
        for completion in pace.stream(requests):
            prompt = int(completion.request_id.split()[0])
            assert completion.token_ids == expected[prompt], completion.request_id
            accepted += sum(r.accepted for r in completion.rounds)
    assert accepted > 10 * len(ids)


@pytest.mark.parametrize("dtype", sorted({HALF, torch.float32}, key=str))
@pytest.mark.parametrize("architecture", LEAN_ARCHITECTURES)
def test_the_check_holds_for_every_lean_architecture(architecture: str, dtype: torch.dtype) -> None:
    model = tiny_model(architecture).to(dtype)

    check_exact(LanguageModel(model, "target", exact=True))


def attention_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    class Usual(attention.RowBatch):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given[:5], **named)

    monkeypatch.setattr(cache, "RowBatch", Usual)


def trees_as_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "_tree", exact._chain)


def products_that_look_around(monkeypatch: pytest.MonkeyPatch) -> None:
    call = products.Product.__call__
    monkeypatch.setattr(
        products.Product, "__call__", lambda self, x: call(self, x) * (1 + len(x) % 2 * 2**-7)
    )
    monkeypatch.setattr(products, "find_rows", lambda *_: (1, False))
    monkeypatch.setattr(products, "_FOUND_ROWS", {})


@pytest.mark.parametrize(
    "plant", [attention_as_usual, trees_as_they_lie, products_that_look_around]
)
def test_the_check_refuses_what_is_not_exact(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    model = LanguageModel(tiny_model("llama"), "target", exact=True)

    with pytest.raises(ModelError, match="exact mode cannot be had on this machine: the logits"):
        check_exact(model)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_probe_finds_from_how_many_rows_on_the_bits_are_the_same(rows: int) -> None:
    def product(x: torch.Tensor) -> torch.Tensor:
        return x * (1.0 if len(x) >= rows else 1.001)

    assert rows_of(product) == (rows, False)


def rows_of(
    product: Callable[[torch.Tensor], torch.Tensor], add_to: Any = None, dtype: Any = torch.float32
) -> tuple[int, bool]:
    usual = lambda residual, x: residual + product(x)  # noqa: E731
    return find_rows(product, add_to or usual, 4, torch.zeros(1, dtype=dtype))


def test_the_probe_looks_at_every_row_of_a_call() -> None:
    """A kernel may sum the rows that fill no tile of its own in another order."""

    def last_differ(x: torch.Tensor) -> torch.Tensor:
        ends = (torch.arange(len(x)) >= len(x) // 3 * 3)[:, None]
        return x * torch.where(ends, 1.001, 1.0)

    assert rows_of(last_differ) == (2, True)  # the largest tile in which all rows are alike


def test_the_probe_sees_bits_that_rounding_hides() -> None:
    """Differences in the last bits of a sum seldom reach bfloat16, and then they change a text."""

    def sums(x: torch.Tensor) -> torch.Tensor:
        return x.float() * (1.0 if len(x) > 1 else 1.0 + 2**-15)

    def add_to(residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (residual.float() + sums(x)).bfloat16()

    plain = lambda x: sums(x).bfloat16()  # noqa: E731
    assert rows_of(plain, lambda residual, x: residual + plain(x), torch.bfloat16) == (1, False)
    assert rows_of(plain, add_to, torch.bfloat16) == (2, False)


def test_a_shape_whose_single_row_is_summed_otherwise_keeps_one_text() -> None:
    """1,376 inputs: kernels have been seen to sum one row in another order than several."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=8200,
        hidden_size=512,
        intermediate_size=1376,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.06)
    exactly = Config(target=ModelSection(model="in memory"), exact=True)
    parts = build_from_objects(model.to(HALF), byte_tokenizer(), {}, exactly)
    settings: dict[str, Any] = {"max_new_tokens": 24, "ignore_eos": True, "logprobs": True}
    for prompt in ([5], [*range(40, 58)]):
        plain = pace_of(parts).complete(prompt, drafter="none", **settings)
        for right in (2, 9):
            known = ScriptedDrafter("known", copying([*prompt, *plain.token_ids], right), 12)
            pace = pace_of(parts, {"known": known})
            drafted = pace.complete(prompt, drafter="known", **settings)

            assert drafted.token_ids == plain.token_ids and drafted.logprobs == plain.logprobs
            assert len(drafted.rounds) < len(plain.rounds)


def test_a_product_that_never_settles_runs_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows_of(lambda x: x * (1 + len(x) / 1000)) == (8, True)
    layers = [nn.Linear(6, n, bias=True) for n in (4, 7)]
    product = products.Product(layers, exact=True)
    product.rows, product.fixed = 8, True
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(19, n, generator=generator) for n in (6, 11))
    sizes: list[int] = []
    plain = products._plain
    monkeypatch.setattr(
        products, "_plain", lambda part, *rest: sizes.append(len(part)) or plain(part, *rest)
    )
    with torch.inference_mode():
        expected = torch.cat([layer(x) for layer in layers], dim=-1)
        for rows in (1, 8, 19):
            torch.testing.assert_close(product(x[:rows]), expected[:rows])
            torch.testing.assert_close(
                product.add_to(residual[:rows], x[:rows]), expected[:rows] + residual[:rows]
            )
    assert set(sizes) == {8}


def test_where_it_cannot_be_it_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(target=ModelSection(model="in memory"), exact=True)
    tokenizer = byte_tokenizer()
    with pytest.raises(ModelError, match=r"cannot run exact mode, because GPT2LMHeadModel"):
        build_from_objects(tiny_model("gpt2"), tokenizer, {}, config)
    with pytest.raises(ModelError, match=r"packed products, which torch.float16 on cpu"):
        build_from_objects(tiny_model("llama").half(), tokenizer, {}, config)
    small = config.model_copy(update={"engine": EngineSection(prefill_chunk=32)})
    with pytest.raises(ConfigError, match="prefill_chunk at 64 or more: 32"):
        Pace(build_from_objects(tiny_model("llama"), tokenizer, {}, small))
    monkeypatch.setattr(products._mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(ModelError, match=r"torch.bfloat16 on cpu does not.*use float32"):
        build_from_objects(tiny_model("llama").bfloat16(), tokenizer, {}, config)
