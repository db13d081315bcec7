"""What a kernel must know of an expert: its shape, its activation and the layout of its weights in a slot.

Values only. Knows nothing of checkpoints or of transformers. The one layout that every architecture is read into:

    h  = x @ w_in.T + b_in          w_in  [2I, H], gate rows first, then up rows   ([I, H] without a gate)
    a  = activation(h)              [I]
    y  = a @ w_out.T + b_out        w_out [H, I]

Where the two weights are quantized, a slot has their codes in their place, and scales s_in and s_out (`formats.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from expertmesh.kernels.formats import FORMATS

if TYPE_CHECKING:
    import torch

    from expertmesh.kernels.formats import WeightFormat

DTYPES = ("float32", "bfloat16", "float16")
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "uint8": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """An activation by name (one of `kernels.activation.ACTIVATIONS`) with its constants.

    `limit` clamps (meaning per name), `alpha` scales inside the sigmoid. Both are ignored by names without them.
    """

    name: str
    limit: float = 0.0
    alpha: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSpec:
    """The shape shared by all experts of a slot pool. H = hidden, I = intermediate."""

    hidden: int
    intermediate: int
    gated: bool = True
    bias: bool = False
    activation: Activation
    dtype: str = "float32"
    """Of dense weights, of biases, and of the rows in and out: one of `DTYPES`."""
    weight_format: str = "dense"
    """How the two weights are stored in the slot: one of `formats.FORMATS`."""
    portable: bool = False
    """Whether CPU cores of any make must compute the same bits. Else they compute as is fastest on them, so that only
    like ones agree to the last bit."""

    @property
    def format(self) -> WeightFormat:
        return FORMATS[self.weight_format]

    @property
    def dense(self) -> ExpertSpec:
        """The same expert, not quantized."""
        return replace(self, weight_format="dense")

    @property
    def rows_in(self) -> int:
        """Rows of `w_in`: 2I with a gate, I without."""
        return self.intermediate * (2 if self.gated else 1)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of a dense expert's `ExpertWeights` that is not None."""
        weights: dict[str, tuple[int, ...]] = {
            "w_in": (self.rows_in, self.hidden),
            "w_out": (self.hidden, self.intermediate),
        }
        return weights | {"b_in": (self.rows_in,), "b_out": (self.hidden,)} if self.bias else weights

    @property
    def stored(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The dtype and shape of each tensor of `ExpertWeights` in the spec's format that is not None."""
        dense = {name: (self.dtype, shape) for name, shape in self.shapes.items()}
        form = self.format
        if form.is_dense:
            return dense
        for name in ("in", "out"):
            rows, columns = self.shapes[f"w_{name}"]
            dense[f"w_{name}"] = form.code_dtype, (rows, form.stored_columns(columns))
            dense[f"s_{name}"] = form.scale_dtype, (form.num_groups(columns), rows)
        return dense

    @property
    def itemsize(self) -> int:
        """Bytes of one element of a row."""
        return _BYTES[self.dtype]

    @property
    def num_parameters(self) -> int:
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of one expert's weights in the spec's format. What its slot takes on a device is `slot_bytes`."""
        return sum(_BYTES[dtype] * prod(shape) for dtype, shape in self.stored.values())


class ExpertWeights(NamedTuple):
    """One expert's tensors in slot layout, on CPU, in the spec's format. Biases are None when the spec has none, and
    scales when it is dense."""

    w_in: torch.Tensor
    w_out: torch.Tensor
    b_in: torch.Tensor | None = None
    b_out: torch.Tensor | None = None
    s_in: torch.Tensor | None = None
    s_out: torch.Tensor | None = None

    def check(self, spec: ExpertSpec) -> None:
        """Assert that every tensor has the spec's shape and dtype: a copy into a slot would broadcast a wrong one."""
        have = {name: (str(t.dtype), tuple(t.shape)) for name, t in self._asdict().items() if t is not None}
        want = {name: (f"torch.{dtype}", shape) for name, (dtype, shape) in spec.stored.items()}
        assert have == want, f"expert weights are {have}, the spec wants {want}"
