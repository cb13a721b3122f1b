"""A model and tokenizer with other ids for the same tokens, for drafters of other vocabularies."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def relabelled(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return copies of a model and its BPE tokenizer with the ids of ordinary tokens permuted."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    fixed = {token["id"] for token in description["added_tokens"]}
    vocabulary: dict[str, int] = description["model"]["vocab"]
    ids = torch.tensor(sorted(i for i in vocabulary.values() if i not in fixed))
    shuffled = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
    new = dict(zip(ids.tolist(), shuffled.tolist(), strict=True))
    description["model"]["vocab"] = {token: new.get(i, i) for token, i in vocabulary.items()}
    fast: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_str(json.dumps(description)),
        **{name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    )
    model = copy.deepcopy(model)
    any_model: Any = model
    ends = [any_model.get_input_embeddings(), any_model.get_output_embeddings()]
    tables = [table for end in ends for table in (end.weight, getattr(end, "bias", None))]
    with torch.no_grad():
        for table in {id(t): t for t in tables if t is not None}.values():  # tied ones once
            table[shuffled] = table[ids].clone()
    return model, fast
