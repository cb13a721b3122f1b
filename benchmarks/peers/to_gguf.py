"""A Llama folder of transformers as a GGUF file, with its byte-level BPE tokenizer.

    python to_gguf.py MODEL_FOLDER OUT f32|bf16|q8_0

Runs in the environment of the llama.cpp peer (gguf, safetensors). Reads one `model.safetensors` in
float32 or bfloat16. Vectors, the norms' weights, stay in float32.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors

KINDS = {
    "f32": gguf.GGMLQuantizationType.F32,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
WHOLE_MODEL = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
OF_A_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def read_tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the names and the float32 values of a safetensors file."""
    for name, raw in safetensors.deserialize(path.read_bytes()):
        if raw["dtype"] == "BF16":
            values = (np.frombuffer(raw["data"], np.uint16).astype(np.uint32) << 16).view(
                np.float32
            )
        elif raw["dtype"] == "F32":
            values = np.frombuffer(raw["data"], np.float32)
        else:
            raise SystemExit(f"{path}: {name} is {raw['dtype']}; convert it to BF16 or F32")
        yield name, values.reshape(raw["shape"])


def gguf_name(name: str) -> str:
    """Return GGUF's name of a weight."""
    module = name.removesuffix(".weight")
    if module in WHOLE_MODEL:
        return f"{WHOLE_MODEL[module]}.weight"
    layer, part = module.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{OF_A_LAYER[part]}.weight"


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return a projection [heads x size, D] with each head's halves interleaved, as GGUF rotates."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(weight.shape)


def add_sizes(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """Write the sizes of the model."""
    heads = config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])


def add_tokenizer(
    writer: gguf.GGUFWriter, config: dict[str, Any], tokenizer: dict[str, Any]
) -> None:
    """Write tokens and merges; ids without a token are unused."""
    names = {i: token for token, i in tokenizer["model"]["vocab"].items()}
    kinds = dict.fromkeys(names, gguf.TokenType.NORMAL)
    for token in tokenizer["added_tokens"]:
        names[token["id"]] = token["content"]
        kinds[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.NORMAL
    ids = range(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([names.get(i, f"<unused{i}>") for i in ids])
    writer.add_token_types([kinds.get(i, gguf.TokenType.UNUSED) for i in ids])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_add_bos_token(False)
    if config["eos_token_id"] is not None:
        writer.add_eos_token_id(config["eos_token_id"])


def add_weights(writer: gguf.GGUFWriter, config: dict[str, Any], path: Path, kind: str) -> None:
    """Write the weights; matrices in the kind of the file."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, weight in read_tensors(path):
        part = name.split(".")[-2]
        if part in heads:
            weight = interleave(weight, heads[part])
        stored = KINDS["f32" if weight.ndim == 1 else kind]
        writer.add_tensor(gguf_name(name), gguf.quantize(weight, stored), raw_dtype=stored)


def main() -> None:
    """Convert a folder."""
    folder, out, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    partial = out.with_name(out.name + ".part")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_name(folder.name)
    add_sizes(writer, config)
    add_tokenizer(writer, config, tokenizer)
    add_weights(writer, config, folder / "model.safetensors", kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(out)


if __name__ == "__main__":
    main()
