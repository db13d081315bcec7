"""The model's own byte-level BPE, with the template that turns a chat into text for a base model.

Owns the vocabulary and the special token. Does not know the domains. Invariant: decoding what was encoded gives back
any text, since every byte has a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from collections.abc import Iterable

END_OF_TEXT = "<|endoftext|>"

# The model only continues text. So a chat is its messages one after another, and the assistant's part goes on where
# the user's stopped: no marks that the model has never seen, and nothing to add before the answer.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if not loop.first and message.role != 'assistant' -%}
        {{- '\\n' -}}
    {%- endif -%}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {{- message.content | map(attribute='text') | join -}}
    {%- endif -%}
{%- endfor -%}
"""


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE of exactly `vocab_size` tokens; END_OF_TEXT is token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def as_transformers(tokenizer: Tokenizer, *, max_length: int) -> PreTrainedTokenizerFast:
    """Wrap a tokenizer so that it saves as files which AutoTokenizer loads."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
