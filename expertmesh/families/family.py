"""What there is to know of a family: which parameters of a module are its experts, and what the module does with them.

An *experts module* is the module of a transformers model that a family's experts are taken from; one per MoE layer.
Knows nothing of files or of hosts. Invariant: a layout can be read from a module whose experts were taken out.

Shapes: T tokens, K experts per token, H hidden, R rows, N = 2I with a gate, I without.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

if TYPE_CHECKING:
    from expertmesh.gates.choices import Choices

MoeLayerFn: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(x_TH, expert index_TK, gate weights_TK) -> y_TH, the weighted sum over K in the gate's order, in x's dtype.

An index may be `gates.choices.NO_EXPERT`: this choice leads nowhere, and adds nothing.

One that has a method `begin` of the same arguments, which returns a function that waits for y_TH, is called in these
two steps where a block has shared experts to compute meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One kind of parameter of all experts of a module."""

    name: str
    """As `get_parameter` takes it, from the experts module; with {} for the expert's number where `kept` is "each"."""
    kept: Literal["stacked", "flat", "each"] = "stacked"
    """All experts in one parameter [E, ...]; one after the other in its rows, [E * n, ...]; each in one of its own."""
    transposed: bool = False
    """Rows and columns are the other way round than in a slot."""
    interleaved: bool = False
    """Rows (after `transposed`) are g0, u0, g1, u1, ... of gate and up."""
    num_spare: int = 0
    """So many more may be stored after the last expert's, which nobody uses."""

    def names(self, num_experts: int) -> list[str]:
        return [self.name.format(index) for index in range(num_experts)] if self.kept == "each" else [self.name]

    @property
    def pattern(self) -> str:
        """A regular expression that every one of its names matches."""
        return r"\d+".join(re.escape(part) for part in self.name.split("{}"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The experts of one module: their number and shape, and where each slot tensor (`kernels.spec`) comes from."""

    num_experts: int
    hidden: int
    intermediate: int
    w_in: tuple[Parameter, ...]
    """Joined along the rows of the slot's tensor."""
    w_out: Parameter
    b_in: Parameter | None = None
    b_out: Parameter | None = None
    gated: bool = True
    activate: Callable[[torch.Tensor], torch.Tensor]
    """The module's own activation: h_RN in slot layout -> a_RI."""

    @property
    def parameters(self) -> list[Parameter]:
        """All, each once."""
        biases = (bias for bias in (self.b_in, self.b_out) if bias is not None)
        return [*self.w_in, self.w_out, *biases]

    @property
    def parameter_names(self) -> list[str]:
        return [name for parameter in self.parameters for name in parameter.names(self.num_experts)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one kind of experts module looks from outside."""

    layout: Callable[[Any], Layout]
    """Of a module. Raises CheckpointError if its config asks for what cannot be served."""
    choose: Callable[..., Choices]
    """(module, *what its forward is called with) -> what was chosen for each token."""
    forward: Callable[..., Any] | None = None
    """(module, layer: MoeLayerFn, *what its forward is called with) -> what its own forward would give.

    None where transformers' experts interface leads to `backbone.experts`."""


def rows_alone(layer: MoeLayerFn, rows_TKH: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
    """What each chosen expert makes of its own row, neither weighted nor summed: y_TKH.

    Each (token, expert) pair is asked for as a token of its own with weight 1.
    """
    alone_P1 = index_TK.reshape(-1, 1)
    ones_P1 = torch.ones_like(alone_P1, dtype=torch.float32)
    return layer(rows_TKH.flatten(0, 1), alone_P1, ones_P1).view(rows_TKH.shape)
