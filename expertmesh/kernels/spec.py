"""What a kernel must know of an expert: its shape, its activation and the layout of its weights in a slot.

Values only. Knows nothing of checkpoints or of transformers. The one layout that every architecture is read into:

    h  = x @ w_in.T + b_in          w_in  [2I, H], gate rows first, then up rows   ([I, H] without a gate)
    a  = activation(h)              [I]
    y  = a @ w_out.T + b_out        w_out [H, I]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


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
    """Of the weights in the slot and of the rows in and out: one of `DTYPES`."""

    @property
    def rows_in(self) -> int:
        """Rows of `w_in`: 2I with a gate, I without."""
        return self.intermediate * (2 if self.gated else 1)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of `ExpertWeights` that is not None."""
        weights: dict[str, tuple[int, ...]] = {
            "w_in": (self.rows_in, self.hidden),
            "w_out": (self.hidden, self.intermediate),
        }
        return weights | {"b_in": (self.rows_in,), "b_out": (self.hidden,)} if self.bias else weights

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return 4 if self.dtype == "float32" else 2

    @property
    def num_parameters(self) -> int:
        weights = self.hidden * (self.rows_in + self.intermediate)
        return weights + (self.rows_in + self.hidden if self.bias else 0)

    @property
    def num_bytes(self) -> int:
        """Bytes of one expert's weights in the spec's dtype. What its slot takes on a device is `slot_bytes`."""
        return self.num_parameters * self.itemsize


class ExpertWeights(NamedTuple):
    """One expert's tensors in slot layout, on CPU, in the spec's dtype. Biases are None when the spec has none."""

    w_in: torch.Tensor
    w_out: torch.Tensor
    b_in: torch.Tensor | None = None
    b_out: torch.Tensor | None = None

    def check(self, spec: ExpertSpec) -> None:
        """Assert that every tensor has the spec's shape and dtype: a copy into a slot would broadcast a wrong one."""
        have = {name: (str(t.dtype), tuple(t.shape)) for name, t in self._asdict().items() if t is not None}
        want = {name: (f"torch.{spec.dtype}", shape) for name, shape in spec.shapes.items()}
        assert have == want, f"expert weights are {have}, the spec wants {want}"
