"""A model that loads is right after its windows too, on one row and on several; others are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers as hf

from paceline.assembly import load
from paceline.errors import ModelError, RequestError
from paceline.models import visibility
from paceline.models.attention import RowBatch
from paceline.models.cache import RowCache
from paceline.models.language_model import LanguageModel
from paceline.models.self_checks import check_packed_forward
from paceline.models.self_checks.bounds import past_windows
from paceline.testing.tiny_models import tiny_model
from paceline.testing.tokenizers import NUM_TOKENS, byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from paceline.assembly import Pace

SHAPE: dict[str, Any] = {
    "vocab_size": NUM_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
NEW_TOKENS = 20


def random_model(config: Any) -> Any:
    """Return a float32 model with large weights, so that its texts vary."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(config).float().eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
    return model


def qwen2_moe(window: int = 24) -> Any:
    """Return a configuration with a window in some layers, which the attention does not receive."""
    return hf.Qwen2MoeConfig(
        **SHAPE,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        use_sliding_window=True,
        sliding_window=window,
        max_window_layers=2,
    )


def phimoe(window: int = 24) -> Any:
    """Return a configuration with a window in all layers, which the attention does not receive."""
    return hf.PhimoeConfig(**SHAPE, num_local_experts=4, sliding_window=window)


def afmoe() -> Any:
    """Return a configuration whose attention calls `view`, which a transposed output does not allow."""
    return hf.AfmoeConfig(
        **{**SHAPE, "num_hidden_layers": 2},
        head_dim=8,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    )


def prompt(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 250, (length,), generator=generator).tolist()


def generated(model: Any, tokens: list[int]) -> list[int]:
    ids = torch.tensor([tokens])
    mask = torch.ones_like(ids)
    whole = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
    return whole[0, len(tokens) :].tolist()


def loaded(model: Any) -> Pace:
    return load(target=model, tokenizer=byte_tokenizer(), drafters={}, with_policy=False)


@pytest.mark.parametrize("make", [qwen2_moe, phimoe, afmoe], ids=lambda f: f.__name__)
def test_text_past_the_windows_is_generates_own(make: Callable[[], Any]) -> None:
    model = random_model(make())
    pace = loaded(model)
    prompts = [prompt(40), prompt(3), prompt(21)]

    alone = pace.complete(
        prompts[0], drafter="none", max_new_tokens=NEW_TOKENS, ignore_eos=True
    ).token_ids
    together = pace.generate(prompts, drafter="none", max_new_tokens=NEW_TOKENS, ignore_eos=True)

    assert list(alone) == generated(model, prompts[0])
    assert [list(c.token_ids) for c in together] == [generated(model, p) for p in prompts]


# --- windows --------------------------------------------------------------------------------------


def test_windows_of_any_length_are_read_from_the_mask_code() -> None:
    config = qwen2_moe(window=4096)
    config.max_position_embeddings = 32768
    model = LanguageModel(random_model(config), "target")

    kinds = {"sliding_attention": 4096, "full_attention": None}
    assert set(config.layer_types) == set(kinds)
    assert model.visibility.windows == {i: kinds[k] for i, k in enumerate(config.layer_types)}
    assert model.visibility.reasons == []


def test_a_window_that_the_context_cannot_reach_is_none() -> None:
    model = LanguageModel(random_model(phimoe(window=256)), "target")

    assert set(model.visibility.windows.values()) == {None}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (lambda b, h, q, k: k <= q, None),
        (lambda b, h, q, k: (k <= q) & (k > q - 5), 5),
        (lambda b, h, q, k: (k <= q) & (k // 7 == q // 7), "chunks"),
        (lambda b, h, q, k: (k <= q) & (k % 2 == 0), "chunks"),
        (lambda b, h, q, k: k >= 0 * q, "later tokens"),
        (lambda b, h, q, k: (k <= q) | (k < 3), "later tokens"),
    ],
)
def test_a_mask_rule_is_a_window_or_a_reason(rule: Any, expected: object) -> None:
    found = visibility.window_of(rule, 100, torch.device("cpu"))

    assert found == expected or (isinstance(expected, str) and expected in str(found))


def test_the_check_is_longer_than_every_window_that_can_be_afforded() -> None:
    short = LanguageModel(random_model(phimoe(window=100)), "target")
    # within reach of its size, beyond the longest text that is tried
    config = phimoe(window=4096)
    config.max_position_embeddings = 8192
    long = LanguageModel(random_model(config), "target")

    assert past_windows(short, 12, 7) > 100
    assert past_windows(long, 12, 7) == 12


def test_a_forward_that_drops_a_window_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(random_model(phimoe(window=100)), "target")
    forward: Any = model._forward
    forward._seen = replace(forward._seen, windows={})

    with pytest.raises(ModelError, match=r"PhimoeForCausalLM differs .* not supported"):
        check_packed_forward(model)


def mixtral() -> LanguageModel:
    config = hf.MixtralConfig(**{**SHAPE, "num_hidden_layers": 12}, num_local_experts=8)
    return LanguageModel(random_model(config).bfloat16(), "target")


def test_experts_that_rounding_exchanges_do_not_refuse_a_model() -> None:
    """In half precision a near tie of two experts may be decided either way, for a few tokens."""
    model = mixtral()
    for seed in range(3):
        check_packed_forward(model, seed)


def test_a_wrong_forward_is_refused_in_half_precision_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixtral()
    copy_positions = RowCache.copy_positions
    monkeypatch.setattr(
        RowCache,
        "copy_positions",
        lambda self, slot, source, start: copy_positions(
            self, slot, [at - 1 for at in source], start
        ),
    )
    with pytest.raises(ModelError, match=r"differs .* at chains of one length"):
        check_packed_forward(model)


def test_a_bound_that_neither_text_nor_mask_shows_is_refused() -> None:
    model = LanguageModel(tiny_model("llama", context=4096), "target")
    model.model.config.index_topk = 2048

    with pytest.raises(ModelError, match=r"'index_topk' of 2048 is beyond the \d+ tokens"):
        check_packed_forward(model)


def test_a_cache_that_forgets_what_the_mask_shows_is_refused() -> None:
    """Moshi's masks show all tokens and its cache keeps a window: `generate` contradicts the forward."""
    config = hf.MoshiConfig(
        **{**SHAPE, "pad_token_id": 0}, head_dim=8, ffn_dim=64, sliding_window=8
    )
    with pytest.raises(ModelError, match=r"cache keeps 8 of them, so its text .* differs"):
        loaded(random_model(config))


def test_a_window_of_one_which_transformers_cache_does_not_keep_is_refused() -> None:
    with pytest.raises(ModelError, match=r"layer 0 sees 1 earlier .* cache keeps all of them"):
        loaded(random_model(phimoe(window=1)))


# --- what cannot be checked -----------------------------------------------------------------------


def test_a_decoder_without_a_first_token_is_refused() -> None:
    config = hf.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ModelError, match="names no decoder_start_token_id"):
        LanguageModel(hf.T5ForConditionalGeneration(config), "target")


@pytest.mark.parametrize("kind", ["fsmt", "prophetnet"])
def test_a_decoder_with_attention_of_its_own_is_refused(kind: str) -> None:
    small: dict[str, Any] = {
        "decoder_start_token_id": 0,
        "decoder_ffn_dim": 32,
        "encoder_ffn_dim": 32,
    }
    if kind == "fsmt":
        small |= {"langs": ["a", "b"], "src_vocab_size": 64, "tgt_vocab_size": 64, "d_model": 16}
        small |= {"encoder_layers": 1, "decoder_layers": 1}
        small |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    else:
        small |= {"vocab_size": 64, "hidden_size": 16, "max_position_embeddings": 64}
        small |= {"num_encoder_layers": 1, "num_decoder_layers": 1}
        small |= {"num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2}
    config = hf.CONFIG_MAPPING[kind](**small)
    build: Any = hf.AutoModelForSeq2SeqLM.from_config
    with pytest.raises(ModelError, match="is not supported: its decoder has attention code of its"):
        LanguageModel(build(config), "target")


def test_a_row_that_attends_to_another_rows_source_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = LanguageModel(tiny_model("bart"), "target")
    check_packed_forward(model)
    attend = RowBatch.attend_to_source

    def attend_to_first(self: RowBatch, layer: int, query: Tensor, scale: float) -> Tensor:
        for run in self.runs:
            run.slots = range(len(run.slots))
        return attend(self, layer, query, scale)

    monkeypatch.setattr(RowBatch, "attend_to_source", attend_to_first)
    with pytest.raises(ModelError, match=r"BartForConditionalGeneration differs .* not supported"):
        check_packed_forward(model)


@pytest.mark.parametrize(
    "config",
    [
        hf.RecurrentGemmaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
            num_attention_heads=2, attention_window_size=8,
        ),
        hf.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1),
        hf.Lfm2Config(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, layer_types=["conv", "full_attention"],
        ),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_recurrent_models_are_refused_as_such(config: Any) -> None:
    with pytest.raises(ModelError, match="not supported: it keeps a recurrent state"):
        LanguageModel(hf.AutoModelForCausalLM.from_config(config), "target")


def test_models_that_see_later_tokens_are_refused_as_such() -> None:
    config = hf.BertConfig(**{**SHAPE, "pad_token_id": 0}, is_decoder=False, type_vocab_size=1)
    with pytest.raises(ModelError, match="its attention sees later tokens"):
        loaded(random_model(config))


# --- longrope -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def longrope() -> Pace:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = hf.Phi3Config(**SHAPE, original_max_position_embeddings=64, rope_parameters=rope)
    return loaded(random_model(config))


def test_a_context_that_is_cut_is_noted(longrope: Pace) -> None:
    [note] = longrope.notes
    assert "cut from 256 to 64 tokens" in note
    assert "longrope" in note


def test_the_error_of_a_prompt_beyond_the_cut_gives_the_reason(longrope: Pace) -> None:
    with pytest.raises(RequestError, match=r"100 tokens, .* holds 64 \(its context is cut .*longr"):
        longrope.complete(prompt(100), drafter="none")


def test_an_answer_that_may_reach_the_cut_is_warned_of(longrope: Pace) -> None:
    settings: dict[str, Any] = {"drafter": "none", "ignore_eos": True}
    with pytest.warns(UserWarning, match=r"after 25 of max_new_tokens = 40 .*cut from 256 to 64"):
        cut = longrope.complete(prompt(40), max_new_tokens=40, **settings)
    assert (len(cut.token_ids), cut.finish_reason) == (25, "length")

    whole = longrope.complete(prompt(40), max_new_tokens=NEW_TOKENS, **settings)
    assert list(whole.token_ids) == generated(longrope.parts.target.model, prompt(40))


# --- dynamic --------------------------------------------------------------------------------------


def test_angles_of_an_earlier_longer_text_reach_no_row() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = random_model(
        hf.LlamaConfig(**{**SHAPE, "max_position_embeddings": 64}, rope_parameters=rope)
    )
    pace = loaded(model)
    assert "cut from 64 to 63 tokens" in pace.notes[0]
    short, full = prompt(3), prompt(pace.parts.target.context_length)
    expected = generated(model, short)

    generated(model, prompt(60))  # past the original length
    with pytest.warns(UserWarning, match="cut from 64 to 63"):
        pair = pace.generate([short, full], drafter="none", max_new_tokens=20, ignore_eos=True)

    assert list(pair[0].token_ids) == expected
