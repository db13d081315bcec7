"""Text to token ids and back: the one place that knows a tokenizer.

Wraps transformers' tokenizers, as nothing lighter is right for every model; importing them costs seconds, so it is
done on loading only. Knows nothing of HTTP. Invariant: what a `TextStream` gave out never has to be taken back.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from expertmesh.errors import CheckpointError, InvalidRequestError, one_line

REPLACEMENT = "\ufffd"
"""What decoders write for bytes that are not, or not yet, a character."""

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


def load_codec(folder: Path) -> TextCodec | None:
    """The tokenizer in a checkpoint folder, or None where there is none. Raises CheckpointError for a broken one."""
    if not any((folder / name).is_file() for name in _FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return TextCodec(AutoTokenizer.from_pretrained(folder))
    except Exception as error:  # the library raises bare Exception for a file it cannot parse
        raise CheckpointError(f"cannot load the tokenizer in {folder}: {error}") from error


class TextCodec:
    """A tokenizer with its chat template. Thread-safe: it is never reconfigured."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # The Rust tokenizer within, where there is one, decodes the same in a fraction of the time.
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._decode = backend.decode if backend else partial(tokenizer.decode, clean_up_tokenization_spaces=False)
        self.special_ids = frozenset(tokenizer.all_special_ids)
        """Tokens that `skip_special_tokens` leaves out of a text."""
        self._byte_of = _byte_level_alphabet()
        self._anchor = self.encode("a", add_special_tokens=False)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Raises InvalidRequestError for text that is not Unicode (half of a surrogate pair)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(f"the text is not valid Unicode: {error.reason}") from error
        return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Ids that the tokenizer does not know (a padded vocabulary has some) are nothing."""
        text: str = self._decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """What one token adds within a text: with its leading space, which decoding it alone would lose."""
        before = self.decode(self._anchor, skip_special_tokens=False)
        return self.decode([*self._anchor, token_id], skip_special_tokens=False).removeprefix(before)

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """`token_text` of each."""
        known = {token_id: self.token_text(token_id) for token_id in set(ids)}
        return [known[token_id] for token_id in ids]

    def token_bytes(self, token_id: int) -> bytes:
        """The same in bytes, which is exact where a token holds but a part of a character."""
        text = self.token_text(token_id)
        if REPLACEMENT not in text:
            return text.encode()
        piece: str = self._tokenizer.convert_ids_to_tokens(token_id) or ""
        if match := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        if all(char in self._byte_of for char in piece):
            return bytes(self._byte_of[char] for char in piece)
        return text.encode()

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Put a conversation into text; `variables` are the client's own for the template.

        Raises InvalidRequestError when there is no template, or when it cannot take what was given.
        """
        if not self.has_chat_template:
            reason = "this model has no chat template; use /v1/completions"
            raise InvalidRequestError(reason, param="messages")
        variables = variables or {}
        render = self._tokenizer.apply_chat_template
        if reserved := variables.keys() & inspect.signature(render).parameters:
            reason = f"chat_template_kwargs may not set {min(reserved)}"
            raise InvalidRequestError(reason, param="chat_template_kwargs")
        try:
            text: str = render(
                list(messages),
                tools=list(tools) or None,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **variables,
            )
        except Exception as error:  # the template is a program, on what a client sent: it may raise anything
            cause = one_line(str(error)) or type(error).__name__
            reason = f"the chat template cannot take these messages: {cause}"
            raise InvalidRequestError(reason, param="messages") from error
        return text

    def describe(self) -> dict[str, Any]:
        """What a client needs to use the same tokenizer."""
        names = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")
        return {"tokenizer_class": type(self._tokenizer).__name__} | {
            name: getattr(self._tokenizer, name, None) for name in names
        }


class TextStream:
    """Decodes one sequence token by token; what it gives out joins to what decoding all of it at once would.

    It decodes a short window of the last tokens again and gives out what is new. Text at the window's end that may be
    an unfinished character is held back. The window reaches back past that, as decoders do not work token by token:
    some strip the first space, some judge a run of byte tokens as one.
    """

    _WINDOW = 32
    _KEEP = 16
    _LONGEST_CHARACTER = 4  # UTF-8 bytes, and so tokens

    def __init__(self, codec: TextCodec, *, skip_special_tokens: bool) -> None:
        self._codec = codec
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._shown = ""
        """The part of the window's text that was given out."""
        self._num_pending = 0
        """How many of the window's last tokens have text that is held back."""
        self.length = 0
        """Characters given out so far."""

    def prime(self, prompt_ids: Sequence[int]) -> None:
        """Start after a prompt, without giving it out. A character that it leaves unfinished is given out whole."""
        for pending in range(self._LONGEST_CHARACTER):
            window, text = self._end_of(prompt_ids[: len(prompt_ids) - pending])
            if not text.endswith(REPLACEMENT):
                break
        self._num_pending = pending
        self._window = [*window, *prompt_ids[len(prompt_ids) - pending :]]
        # A token may bring whole characters along with a part of one.
        settled = self._decode(self._window).rstrip(REPLACEMENT)
        self._shown = settled if settled.startswith(text) else text

    def push(self, token_id: int) -> str:
        """The text that has become certain with this token."""
        if self._skip and token_id in self._codec.special_ids:
            return ""
        self._window.append(token_id)
        self._num_pending += 1
        text = self._decode(self._window)
        if text == self._shown and text:
            self._window.pop()
            self._num_pending -= 1
            return ""
        if not text.startswith(self._shown):
            # The past was judged anew (a run of byte tokens is no longer whole characters): let go of it.
            self._window = self._window[-self._num_pending :]
            self._shown, text = "", self._decode(self._window)
        settled = text.rstrip(REPLACEMENT)
        if settled == text:
            self._num_pending = 0
        elif self._num_pending > self._KEEP:
            # Of so many bytes that make no character all but the last few never will.
            settled = text[: 1 - self._LONGEST_CHARACTER]
        new = self._give(settled)
        if len(self._window) > self._WINDOW and (settled == text or self._num_pending > self._KEEP):
            self._shorten(text)
        return new

    def flush(self) -> str:
        """The rest, complete or not."""
        return self._give(self._decode(self._window))

    def _decode(self, ids: Sequence[int]) -> str:
        return self._codec.decode(ids, skip_special_tokens=self._skip)

    def _give(self, text: str) -> str:
        new = text[len(self._shown) :]
        self._shown = text if new else self._shown
        self.length += len(new)
        return new

    def _shorten(self, text: str) -> None:
        """Drop the window's oldest tokens, at a place that does not change the text of the rest."""
        num_held = len(text) - len(self._shown)
        for keep in range(self._KEEP, self._KEEP + self._LONGEST_CHARACTER):
            rest = self._decode(self._window[-keep:])
            if text.endswith(rest):
                break
        self._window = self._window[-keep:]
        self._shown = rest[: len(rest) - num_held]

    def _end_of(self, ids: Sequence[int]) -> tuple[Sequence[int], str]:
        """The last few of some tokens, from the beginning of a character, and their text."""
        ends = [ids[-keep:] for keep in range(self._KEEP, self._KEEP + self._LONGEST_CHARACTER)]
        # Bytes cut from their character's beginning decode to replacements.
        return min(((end, self._decode(end)) for end in ends), key=lambda pair: pair[1].count(REPLACEMENT))


def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of GPT-2's byte-level vocabularies: printable bytes stand for themselves, the rest follow."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
