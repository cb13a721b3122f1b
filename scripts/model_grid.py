"""A check of a tiny version of every causal language model of transformers: exact, or refused.

Configurations are made small by the names of their fields, with windows shorter than the texts, so new
architectures of transformers are included automatically. Weights are random and large. `judge` loads a
model as a user would and compares greedy text with `generate`'s: several lengths in one batch, chains
and trees that are partly wrong. Used by `models_table.py` and the tests.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from paceline.assembly import load
from paceline.errors import ModelError
from paceline.models.loading import quiet_transformers
from paceline.testing.scripted import ScriptedDrafter, ScriptedTree
from paceline.testing.tokenizers import NUM_TOKENS, byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedConfig, PreTrainedModel

Result = Literal["compiled", "transformers", "refused", "not built", "wrong"]

CONTEXT: Final = 256
WINDOW: Final = 8
NUM_LAYERS: Final = 4
# lengths above every window, below every window, and above a block of the cache
PROMPTS: Final = (37, 5, 126)
NEW_TOKENS: Final = 14
_MOST_PARAMETERS: Final = 16_000_000
_STD: Final = 0.25

# Fields of configurations, grouped by meaning, with their size in a tiny model.
_FIELDS: Final[dict[str, Any]] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "n_words"), NUM_TOKENS),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim",
         "embedding_dim", "emb_dim", "cross_attention_hidden_size", "attn_hidden_size"), 32
    ),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim",
         "ffn_hidden_size", "feed_forward_size", "dim_ff", "dff", "d_inner",
         "dense_intermediate_size", "intermediate_size_mlp", "ffn_hidden_dim"), 64
    ),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
         "expert_ffn_hidden_size", "expert_ffn_size", "moe_shared_expert_intermediate_size"), 32
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers",
         "encoder_layers", "num_decoder_layers"), NUM_LAYERS
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
         "encoder_attention_heads", "num_decoder_attention_heads", "linear_num_key_heads",
         "linear_num_value_heads", "mamba_n_heads", "mamba_num_heads"), 4
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "kv_channels", "global_head_dim",
                     "swa_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len",
                     "seq_length", "max_target_positions", "max_seq_length"), CONTEXT),
    **dict.fromkeys(
        ("sliding_window", "sliding_window_size", "attention_window_size", "local_attention",
         "window_size", "attention_chunk_size", "index_topk", "keep_window_size", "block_size"),
        WINDOW,
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
                     "num_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk",
                     "moe_top_k", "num_selected_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "num_group", "topk_group", "n_groups", "mamba_n_groups"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "qk_head_dim": 16,
    "rotary_dim": 4,
    "use_sliding_window": True,
    "max_window_layers": 2,
    "query_pre_attn_scalar": 8,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "first_k_dense_replace": 1,
    "is_decoder": True,
    # not 1, so that a missing factor changes the text
    "logits_scaling": 3.0,
    "residual_multiplier": 0.5,
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.3,
}  # fmt: skip
_SPECIAL: Final = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

# Set even if the default is None.
_ALWAYS: Final = frozenset({*_SPECIAL, "sliding_window", "max_position_embeddings", "head_dim"})

# Other settings per model type.
_OVERRIDES: Final[dict[str, dict[str, Any]]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_d_head": 16},
    "cohere_compass_text": {"layer_types": None},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma4_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 4, "mamba_d_head": 16
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"head_dim": 16, "num_heads": 4},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [8, 24]},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layer_types": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def architectures() -> list[tuple[str, str]]:
    """Return (class name, model type) of every causal LM of the installed transformers.

    From names only; a model's code is imported when it is judged.
    """
    found: dict[str, str] = {}
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        found.setdefault(name, model_type)
    return sorted(found.items(), key=lambda item: item[0].lower())


def tiny_config(config_class: Any) -> PreTrainedConfig:
    """Return a configuration with the class's defaults, except the known fields, made small."""
    default = config_class()
    known = set(default.to_dict()) | set(default.__dict__)
    model_type = default.model_type
    small = {name: value for name, value in {**_FIELDS, **_SPECIAL}.items() if name in known}
    for name in list(small):
        # None turns a feature off, and the length of a list depends on other fields
        if name not in _ALWAYS and not isinstance(getattr(default, name, None), int | float):
            del small[name]
    if "layer_types" in known and isinstance(default.layer_types, list | tuple):
        kinds = list(dict.fromkeys(default.layer_types))
        if kinds == ["full_attention"] and "sliding_window" in known:
            kinds.insert(0, "sliding_attention")
        small["layer_types"] = [kinds[i % len(kinds)] for i in range(NUM_LAYERS)]
    for name in getattr(default, "sub_configs", {}):
        if hasattr(getattr(default, name, None), "model_type"):
            small[name] = tiny_config(type(getattr(default, name)))
    if "kv_lora_rank" in known:  # multi-head latent attention: head sizes have parts
        small.pop("head_dim", None)
        small["num_key_value_heads"] = 4
    small.update(_OVERRIDES.get(model_type, {}))
    config: PreTrainedConfig = config_class(**small)
    return config


def tiny_of(config_class: Any, seed: int = 0) -> PreTrainedModel:
    """Build a random model of a configuration class in float32, without special tokens.

    Raises any error of the model's code, and ValueError for a model that is not small.
    """
    auto: Any = AutoModelForCausalLM
    with quiet_transformers():
        config = tiny_config(config_class)
        with torch.device("meta"):
            outline = auto.from_config(config)
        size = sum(p.numel() for p in outline.parameters())
        if size > _MOST_PARAMETERS:
            raise ValueError(f"{size:,} parameters are too many for a tiny model")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: Any = auto.from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(std=_STD)
    for name in _SPECIAL:
        setattr(model.generation_config, name, None)
    tiny: PreTrainedModel = model.float().eval()
    return tiny


@dataclass(frozen=True, slots=True)
class Judgement:
    """The result of one architecture, a line of the table."""

    architecture: str
    result: Result
    reason: str = ""


def judge(name: str, model_type: str) -> Judgement:
    """Build the tiny model, load it and compare its texts with `generate`'s."""
    try:
        model = tiny_of(CONFIG_MAPPING[model_type])
        prompts = [_prompt(length, seed) for seed, length in enumerate(PROMPTS)]
        expected = [_generate(model, prompt) for prompt in prompts]
    except Exception as error:  # noqa: BLE001 - any failure of the model's code
        return Judgement(name, "not built", _first_line(error))
    texts = [[*p, *e] for p, e in zip(prompts, expected, strict=True)]
    drafters = {"chain": _chain(texts), "tree": _tree(texts)}
    try:
        pace = load(target=model, tokenizer=byte_tokenizer(), drafters=drafters)
    except ModelError as error:
        return Judgement(name, "refused", _reason(name, str(error)))
    except Exception as error:  # noqa: BLE001 - a refusal is a ModelError
        return Judgement(name, "wrong", f"load: {_first_line(error)}")
    for drafter in ("none", "chain", "tree"):
        for batch in (prompts, prompts[:1]):
            try:
                settings = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True}
                done = pace.generate(batch, drafter=drafter, **settings)
            except Exception as error:  # noqa: BLE001 - a model that loaded must not fail
                return Judgement(name, "wrong", f"{drafter}: {_first_line(error)}")
            for prompt, completion, tokens in zip(batch, done, expected, strict=False):
                if completion.token_ids != tokens:
                    where = f"{len(batch)} rows, a prompt of {len(prompt)} tokens"
                    return Judgement(name, "wrong", f"{drafter}, {where}: different text")
    return Judgement(name, pace.parts.target.forward_kind)  # type: ignore[arg-type]


_RESULTS: Final[dict[Result, str]] = {
    "compiled": "exact, compiled forward",
    "transformers": "exact, transformers' forward",
    "refused": "refused",
    "not built": "not tried: not built tiny",
    "wrong": "WRONG",
}


def table(judged: Sequence[Judgement]) -> str:
    """Return a Markdown table of all architectures, after a line of circumstances."""
    exact = [j for j in judged if j.result in ("compiled", "transformers")]
    counts = {result: sum(j.result == result for j in judged) for result in _RESULTS}
    lines = [
        f"transformers {transformers.__version__}, torch {torch.__version__}, float32 on a CPU: "
        f"{len(exact)} exact, {counts['refused']} refused, {counts['not built']} not tried, of "
        f"{len(judged)} classes.",
        "",
        "| architecture | result | why |",
        "|---|---|---|",
    ]
    for j in judged:
        reason = j.reason.replace("|", "/").replace("<", "&lt;")
        lines.append(f"| {j.architecture} | {_RESULTS[j.result]} | {reason} |")
    return "\n".join(lines)


def _prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, NUM_TOKENS - 3, (length,), generator=generator).tolist()


def _generate(model: Any, prompt: Sequence[int]) -> list[int]:
    ids = torch.tensor([list(prompt)])
    with quiet_transformers(), torch.inference_mode():
        whole = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
    tokens: list[int] = whole[0, len(prompt) :].tolist()
    return tokens


def _continuation(texts: Sequence[Sequence[int]], tokens: Sequence[int], n: int) -> list[int]:
    """Return the next n tokens of the text that begins with these tokens."""
    text = next((t for t in texts if list(t[: len(tokens)]) == list(tokens)), None)
    return [] if text is None else list(text[len(tokens) : len(tokens) + n])


def _chain(texts: Sequence[Sequence[int]]) -> ScriptedDrafter:
    """Return a drafter of chains with two right tokens and then wrong ones."""

    def function(tokens: Sequence[int], limit: int) -> list[int]:
        right = _continuation(texts, tokens, limit)
        return right[:2] + [token ^ 1 for token in right[2:]]

    return ScriptedDrafter("chain", function, num_draft_tokens=4)


def _tree(texts: Sequence[Sequence[int]]) -> ScriptedTree:
    """Return a drafter of trees: a wrong branch, and a right one whose third token is wrong."""

    def function(tokens: Sequence[int], limit: int) -> tuple[list[int], list[int]]:
        right = _continuation(texts, tokens, min(limit, 3))
        if len(right) < 3:
            return [], []
        a, b, c = right
        return [a ^ 1, a, b ^ 1, b, c ^ 1], [-1, -1, 0, 1, 3]

    return ScriptedTree("tree", function, num_draft_tokens=5)


def _reason(name: str, error: str) -> str:
    """Return the reason of a refusal, without the words that the table's line repeats."""
    reason = error.removeprefix("target: ")
    differs = re.fullmatch(
        r"the packed forward of \w+ differs .*?; this .*? supported(?:: (.*))?", reason
    )
    if differs is not None:
        return differs[1] or "its logits on packed rows differ from its own forward's"
    for prefix in (f"{name} is not supported: ", f"{name} cannot run the packed forward: "):
        reason = reason.removeprefix(prefix)
    return reason


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]
