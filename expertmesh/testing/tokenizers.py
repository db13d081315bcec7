"""Two small tokenizers made on the spot, one for each way in which vocabularies of language models fall back to bytes.

Deterministic, without a download. Both have a chat template of the common form.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

_CORPUS = (
    "The gate picks experts for each token, and the router sends the rows to the hosts that hold them. "
    "A host that dies loses nothing: its rows go to another replica, and the answer does not change. "
    "Les réponses ne changent pas. 答えは変わらない。 Ответ не меняется. "
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('unknown role ' + message.role) }}"
    "{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}"
    "{% if not (loop.last and continue_final_message) %}</s>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]


def byte_level_tokenizer(*, chat_template: str | None = _CHAT_TEMPLATE) -> Any:
    """As GPT-2, Llama 3, Qwen and OLMoE: every token is a string of bytes, parts of characters included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=_SPECIAL, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator([_CORPUS], trainer)
    return _with_template(tokenizer, chat_template)


def byte_fallback_tokenizer(*, chat_template: str | None = _CHAT_TEMPLATE) -> Any:
    """As Llama 2 and Mixtral: tokens are text with a mark for spaces; a character not among them is its bytes' tokens,
    and decoding strips the first space."""
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = [("<unk>", 0.0), *((piece, 0.0) for piece in _SPECIAL), *((piece, -20.0) for piece in byte_pieces)]
    words = {f"\u2581{word}" for word in _CORPUS.split() if word.isascii()}
    letters = {char for char in _CORPUS if char.isascii() and not char.isspace()} | {"\u2581"}
    vocabulary += [(piece, -4.0 if piece in words else -8.0) for piece in sorted(words | letters)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(_SPECIAL)
    return _with_template(tokenizer, chat_template)


def _with_template(tokenizer: Tokenizer, chat_template: str | None) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=chat_template
    )
