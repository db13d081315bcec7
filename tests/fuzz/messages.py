"""Strategies for the messages between routers and hosts: valid ones, and such with anything in their fields."""

from __future__ import annotations

import numpy as np
from google.protobuf.message import Message
from hypothesis import strategies as st

from expertmesh._proto import host_pb2 as pb
from expertmesh.ids import ExpertId
from expertmesh.kernels.spec import ExpertSpec
from expertmesh.testing.experts import SILU, Mixture
from tests.fuzz.fuzzing import edges, texts

HIDDEN, EXPERTS, LAYERS = 16, 4, 2
MIXTURE = Mixture(ExpertSpec(hidden=HIDDEN, intermediate=24, activation=SILU), LAYERS, EXPERTS)
HELD = [ExpertId(layer, index) for layer in range(LAYERS) for index in range(3)]
"""One expert of each layer is held elsewhere."""

UINT32, UINT64 = 2**32 - 1, 2**64 - 1


def good(request_id: int) -> pb.ExchangeRequest:
    """Two rows for experts 0 and 2 of layer 1, which are held."""
    rows = np.linspace(-1, 1, 2 * HIDDEN, dtype=np.float32)
    pair_rows = np.array([0, 1, 1], np.int32)
    return pb.ExchangeRequest(
        id=request_id, layer=1, dtype=pb.FLOAT32, num_rows=2, rows=rows.tobytes(), experts=[0, 2], counts=[2, 1],
        pair_rows=pair_rows.tobytes(),
    )  # fmt: skip


@st.composite
def requests(draw: st.DrawFn) -> pb.ExchangeRequest:
    """Valid but for a few fields, so that each check has its turn."""
    num_rows = draw(st.integers(1, 6))
    experts = draw(st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=EXPERTS, unique=True))
    counts = [draw(st.integers(1, 4)) for _ in experts]
    pair_rows = draw(st.lists(st.integers(0, num_rows - 1), min_size=sum(counts), max_size=sum(counts)))
    message = pb.ExchangeRequest(
        id=draw(st.integers(1, UINT64)),
        layer=draw(st.integers(0, LAYERS - 1)),
        dtype=pb.FLOAT32,
        num_rows=num_rows,
        rows=draw(st.binary(min_size=1, max_size=4)) * (num_rows * HIDDEN * 4),
        experts=experts,
        counts=counts,
        pair_rows=np.array(pair_rows, np.int32).tobytes(),
    )
    message.rows = message.rows[: num_rows * HIDDEN * 4]
    for field in draw(st.lists(st.sampled_from(list(_SPOIL)), max_size=3, unique=True)):
        setattr_(message, field, draw(_SPOIL[field]))
    return message


_SPOIL: dict[str, st.SearchStrategy[object]] = {
    "layer": edges(UINT32),
    "dtype": st.sampled_from([0, 1, 2, 3, 4, -1, 2**31 - 1]),
    "num_rows": edges(UINT32),
    "rows": st.binary(max_size=200),
    "experts": st.lists(edges(UINT32), max_size=6),
    "counts": st.lists(edges(UINT32), max_size=6),
    "pair_rows": st.binary(max_size=40) | st.lists(st.integers(-(2**31), 2**31 - 1), max_size=8).map(
        lambda numbers: np.array(numbers, np.int32).tobytes()
    ),
}  # fmt: skip


def setattr_(message: Message, field: str, value: object) -> None:
    """Also for repeated fields, which protobuf does not assign to."""
    message.ClearField(field)
    if isinstance(value, list):
        getattr(message, field).extend(value)
    else:
        setattr(message, field, value)


dtypes = st.sampled_from([0, 1, 2, 3, 77])
doubles = st.floats() | st.sampled_from([0.0, 1.0, 7.0])
specs = st.builds(
    pb.ExpertSpec,
    hidden=edges(UINT32),
    intermediate=edges(UINT32),
    gated=st.booleans(),
    bias=st.booleans(),
    activation=st.sampled_from(["silu", "relu2", "swiglu_oai", "swiglu_clamped", "", "no such"]) | texts,
    limit=doubles,
    alpha=doubles,
    dtype=dtypes,
)
configurations = st.builds(
    pb.ConfigureRequest,
    checkpoint=st.just("tiny") | texts,
    specs=st.lists(specs, max_size=3),
    layer_specs=st.lists(edges(UINT32), max_size=4),
    layer_experts=st.lists(edges(UINT32), max_size=4),
)
"""Nearly all of them make no sense."""

sources = st.builds(
    pb.TensorSource,
    file=st.just("model.safetensors") | texts,
    name=st.sampled_from(["model.embed_tokens.weight", "lm_head.weight"]) | texts,
    index=st.none() | edges(UINT32),
    parts=st.none() | edges(UINT32),
)
tensors = st.builds(
    pb.TensorRecipe,
    sources=st.lists(sources, max_size=3) | sources.map(lambda source: [source] * 40),
    transpose=st.booleans(),
    deinterleave=st.booleans(),
)
recipes = st.builds(
    pb.LoadRequest,
    layer=edges(UINT32),
    index=edges(UINT32),
    w_in=tensors,
    w_out=tensors,
    b_in=st.none() | tensors,
    b_out=st.none() | tensors,
)
