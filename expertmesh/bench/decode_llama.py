"""llama.cpp as a side of `expertmesh bench decode`, where llama-cpp-python and gguf are installed.

Owns the GGUF file of the bench's checkpoints, and the batched loop over llama.cpp's own calls. Invariant: its weights
are the checkpoint's, number for number (bfloat16 where those are matrices).

Shapes: R streams, V vocabulary, E experts.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from expertmesh.bench.decode_sides import MAX_BATCH_TOKENS, MAX_CONTEXT, MAX_REQUESTS, NUM_THREADS, Decode, pace

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

_ARCHITECTURES = {"olmoe": "olmoe", "qwen3_moe": "qwen3moe"}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
}


def why_not() -> str | None:
    """Why this side cannot take part, or None if it can."""
    missing = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
    return f"needs {' and '.join(missing)}: pip install llama-cpp-python gguf" if missing else None


@contextlib.contextmanager
def llama_cpp(folder: Path) -> Iterator[Decode]:
    """All streams in one batch of llama.cpp, one token each per call."""
    path = folder / "model.gguf"
    if not path.exists():
        write_gguf(folder, path)
    llama = Llama(path)

    def decode(prompts: list[list[int]], num_tokens: int) -> float:
        generator, stamps = np.random.default_rng(0), []
        llama.clear()
        next_tokens = prompts
        for _ in range(num_tokens):
            logits_RV = llama.forward(next_tokens)
            next_tokens = (logits_RV + generator.gumbel(size=logits_RV.shape)).argmax(-1, keepdims=True).tolist()
            stamps.append(time.perf_counter())
        return pace([stamps] * len(prompts))

    yield decode
    llama.close()


class Llama:
    """A model and a context of llama.cpp, with a sequence for each stream."""

    def __init__(self, path: Path) -> None:
        import llama_cpp

        self._lib = llama_cpp
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)  # llama.cpp keeps the pointer
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = MAX_REQUESTS * MAX_CONTEXT, MAX_REQUESTS
        params.n_batch = params.n_ubatch = MAX_BATCH_TOKENS
        params.n_threads = params.n_threads_batch = NUM_THREADS
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._batch = llama_cpp.llama_batch_init(MAX_BATCH_TOKENS, 0, 1)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._num_cached = 0

    def clear(self) -> None:
        """Forget all sequences."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._num_cached = 0

    def forward(self, tokens: list[list[int]]) -> NDArray[np.float32]:
        """Append equally many tokens to every sequence: the logits_RV after the last of each."""
        batch, length = self._batch, len(tokens[0])
        batch.n_tokens = len(tokens) * length
        for stream, of in enumerate(tokens):
            for offset, token in enumerate(of):
                i = stream * length + offset
                batch.token[i], batch.pos[i] = token, self._num_cached + offset
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, stream
                batch.logits[i] = offset == length - 1
        status = self._lib.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode failed with {status}")
        self._num_cached += length
        rows = [self._lib.llama_get_logits_ith(self._context, (i + 1) * length - 1) for i in range(len(tokens))]
        return np.stack([np.ctypeslib.as_array(row, (self._vocabulary,)) for row in rows])

    def close(self) -> None:
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)


def write_gguf(folder: Path, path: Path) -> None:
    """Write the checkpoint in `folder` as a GGUF file without a tokenizer."""
    import gguf
    from safetensors.torch import load_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    architecture = _ARCHITECTURES[config.model_type]
    expert_size = getattr(config, "moe_intermediate_size", config.intermediate_size)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(expert_size)
    writer.add_expert_feed_forward_length(expert_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)

    stored: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
    for layer in range(config.num_hidden_layers):
        for part in ("gate", "up", "down"):
            names = [f"model.layers.{layer}.mlp.experts.{e}.{part}_proj.weight" for e in range(config.num_experts)]
            stacked = torch.stack([stored.pop(name) for name in names])
            _add(writer, f"blk.{layer}.ffn_{part}_exps.weight", stacked)
    for name, tensor in stored.items():
        _add(writer, _gguf_name(name), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{_NAMES[stem]}.weight"
    layer, _, rest = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_NAMES[rest]}.weight"


def _add(writer: Any, name: str, tensor: torch.Tensor) -> None:
    """Matrices stay bfloat16; vectors and gates are float32 in every GGUF file."""
    import gguf

    if tensor.dim() == 1 or "ffn_gate_inp" in name:
        writer.add_tensor(name, tensor.float().numpy())
    else:
        bf16 = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, tensor.contiguous().view(torch.uint8).numpy(), raw_dtype=bf16)
