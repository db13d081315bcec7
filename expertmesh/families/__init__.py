"""Families: how transformers writes experts. The one place to teach expertmesh a new way; see `family.py`.

Most models use transformers' experts interface (`decorated.py`). The others are told by the name of the class that
holds their experts (`plain.py`): to add one, write its layout and its forward there and name it in the table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from expertmesh.families.decorated import DECORATED, is_decorated
from expertmesh.families.family import Family, Layout, Parameter
from expertmesh.families.plain import PLAIN

if TYPE_CHECKING:
    import torch

__all__ = ["DECORATED", "PLAIN", "Family", "Layout", "Parameter", "family_of", "find_experts"]


def family_of(module: torch.nn.Module) -> Family | None:
    """The family whose experts module this is; None for every other module."""
    return DECORATED if is_decorated(module) else PLAIN.get(type(module).__name__)


def find_experts(model: torch.nn.Module) -> dict[str, tuple[Any, Family]]:
    """The experts modules by name, each with its family. Their order is that of the MoE layers: the n-th is layer n."""
    found = ((name, module, family_of(module)) for name, module in model.named_modules())
    return {name: (module, family) for name, module, family in found if family is not None}
