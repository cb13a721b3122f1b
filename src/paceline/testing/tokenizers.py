"""A tokenizer in memory whose tokens are bytes; decoding returns the encoded text unchanged.

256 byte tokens, then the special tokens; built without a file or a download. A token may be less than
a character, as in every byte-level vocabulary, which tests stop strings.
"""

from __future__ import annotations

from typing import Final

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from paceline.models.translation import byte_characters

EOS: Final = "<|end|>"
ROLES: Final = ("<|user|>", "<|assistant|>")
NUM_TOKENS: Final = 256 + 1 + len(ROLES)

_CHAT_TEMPLATE: Final = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: ids 0 to 255 are bytes, 256 is `<|end|>` (eos), 257 and 258 chat roles."""
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS, *ROLES])
    fast: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token=EOS, extra_special_tokens=list(ROLES)
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast
