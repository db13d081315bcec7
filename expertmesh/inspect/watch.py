"""A model that reads text in this process, and what its gates choose meanwhile.

Watches the one call that all architectures of transformers' experts interface make alike, that of the experts with the
gate's choices. Knows neither files nor figures. Invariant: a reading has one row of choices for each of its tokens, in
their order, in every layer that it has.

Shapes: T tokens, H hidden, K choices of a token.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers

from expertmesh.checkpoint.architecture import blame_checkpoint, read_architecture
from expertmesh.errors import CheckpointError, ConfigError
from expertmesh.families import find_experts
from expertmesh.gates.choices import NO_EXPERT, Choices
from expertmesh.serve.text import load_codec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from expertmesh.inspect.texts import Domain
    from expertmesh.serve.text import TextCodec

WINDOW = 512
"""Tokens that the model reads at once, if it can take as many. Each window begins without knowing the one before."""

_MOST_CHARS_PER_TOKEN = 32
"""How much of a long document is tokenized for each token wanted. Only a text of blanks could need more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What the gates chose for one domain's tokens."""

    domain: str
    ids_T: torch.Tensor
    layers: dict[int, Choices]
    """By MoE layer. One that does not work on the text's own tokens, as in a vision tower, is not there."""


class Reader:
    """A model and its tokenizer, ready to read."""

    def __init__(self, model: Any, codec: TextCodec) -> None:
        self._model = model
        self._codec = codec
        self._experts = tuple(find_experts(model).values())
        self.num_experts = tuple(family.layout(module).num_experts for module, family in self._experts)
        """Per MoE layer."""
        self._prefix = _prefix(codec)
        trained_for = getattr(model.config.get_text_config(), "max_position_embeddings", None) or WINDOW
        self._window = max(1, min(WINDOW, trained_for) - len(self._prefix))

    @property
    def codec(self) -> TextCodec:
        return self._codec

    def read(self, domain: Domain, max_tokens: int, report: Callable[[int, int], object]) -> Reading:
        """Read a domain's first `max_tokens` tokens; `report` is told how many are read, of how many.

        Raises ConfigError where the tokenizer makes nothing of the text, and CheckpointError where the model fails.
        """
        windows = self._windows(domain, max_tokens)
        total = sum(map(len, windows))
        if total == 0:
            raise ConfigError(f"--text: the model's tokenizer finds no token in {domain.name}")
        noted: dict[int, list[Choices]] = {}
        done = 0
        report(0, total)
        for ids in windows:
            for layer, choices in self._watch(ids).items():
                noted.setdefault(layer, []).append(choices)
            done += len(ids)
            report(done, total)
        return Reading(
            domain=domain.name,
            ids_T=torch.tensor([token for ids in windows for token in ids]),
            layers={layer: _concatenate(parts) for layer, parts in sorted(noted.items()) if len(parts) == len(windows)},
        )

    def _windows(self, domain: Domain, max_tokens: int) -> list[Sequence[int]]:
        windows: list[Sequence[int]] = []
        left = max_tokens
        for document in domain.documents:
            ids = self._codec.encode(document[: left * _MOST_CHARS_PER_TOKEN], add_special_tokens=False)[:left]
            windows += [ids[start : start + self._window] for start in range(0, len(ids), self._window)]
            left -= len(ids)
            if left == 0:
                break
        return windows

    @torch.no_grad()
    def _watch(self, ids: Sequence[int]) -> dict[int, Choices]:
        """What the gates choose for one window, without the tokens that are put before every text."""
        noted: dict[int, Choices] = {}
        with self._noting(noted), blame_checkpoint("run this model on text"):
            ids_1T = torch.tensor([[*self._prefix, *ids]], device=self._model.device)
            if self._model.config.is_encoder_decoder:
                self._model.get_encoder()(input_ids=ids_1T)  # it is what reads
            else:
                self._model(input_ids=ids_1T, use_cache=False)
        start = len(self._prefix)
        return {
            layer: Choices(index_TK=choices.index_TK[start:], weights_TK=choices.weights_TK[start:])
            for layer, choices in noted.items()
            if len(choices.index_TK) == start + len(ids)
        }

    @contextlib.contextmanager
    def _noting(self, noted: dict[int, Choices]) -> Iterator[None]:
        def note(layer: int, choices: Choices) -> None:
            # A choice that weighs nothing leads nowhere: so do models write that a token skips its expert.
            weights_TK = choices.weights_TK.float().cpu()
            index_TK = choices.index_TK.cpu().long().masked_fill(weights_TK == 0, NO_EXPERT)
            noted[layer] = Choices(index_TK=index_TK, weights_TK=weights_TK)

        with contextlib.ExitStack() as hooks:
            for layer, (module, family) in enumerate(self._experts):
                hook = module.register_forward_pre_hook(
                    lambda module, args, kwargs, layer=layer, choose=family.choose: note(
                        layer, choose(module, *args, **kwargs)
                    ),
                    with_kwargs=True,
                )
                hooks.callback(hook.remove)
            yield


def load_reader(folder: Path, *, dtype: str | None = None, device: str = "cpu") -> Reader:
    """Load a whole checkpoint with its tokenizer. `dtype` None takes the checkpoint's own.

    Raises CheckpointError if it has no tokenizer or no experts, or cannot be loaded; ConfigError for a device or dtype
    that there is not.
    """
    place = _device(device)
    architecture = read_architecture(folder, dtype=dtype)
    architecture.build_skeleton()  # tells a model without experts before its weights are read
    codec = load_codec(folder)
    if codec is None:
        raise CheckpointError(
            f"{folder} has no tokenizer, without which it reads no text: put its tokenizer files there"
        )
    with _quietly(), blame_checkpoint(f"load {folder}"):
        model, info = architecture.model_class.from_pretrained(
            folder,
            config=architecture.config,
            dtype=getattr(torch, architecture.dtype),
            output_loading_info=True,
            use_safetensors=True,
            local_files_only=True,
        )
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"{folder} has no weight for {missing[0]} ({len(missing)} are missing in all)")
    return Reader(model.eval().requires_grad_(False).to(place), codec)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without a backend
        reason = str(error).split("\n", 1)[0]
        raise ConfigError(f"--device {name!r} cannot be used: {reason}") from error
    return device


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' own progress bar: there is one here."""
    was_shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            transformers.utils.logging.enable_progress_bar()


def _prefix(codec: TextCodec) -> tuple[int, ...]:
    """The tokens that this tokenizer puts before every text."""
    plain, dressed = codec.encode("a", add_special_tokens=False), codec.encode("a", add_special_tokens=True)
    return dressed[: dressed.index(plain[0])] if plain and plain[0] in dressed else ()


def _concatenate(parts: list[Choices]) -> Choices:
    return Choices(
        index_TK=torch.cat([part.index_TK for part in parts]), weights_TK=torch.cat([part.weights_TK for part in parts])
    )
