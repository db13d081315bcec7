"""Shared experts are computed while the routed ones are away.

transformers' MoE blocks compute their shared experts right before or right after they call the routed ones. Whichever
comes first gives back a tensor that is computed when something is first done with it, so that hosts compute the one
while the router computes the other. Nothing is assumed of what a block does with it: whatever function of torch gets
one, and is not a mere view, gets its true value. So values, and the order of each sum, are those of the model as it is.

Owns both halves of one block. Knows nothing of hosts. Invariant: at most one exchange of a block is under way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

_SHARED = ("shared_expert", "shared_experts", "shared_mlp")
"""What transformers' blocks call them."""
_VIEWS = frozenset({torch.Tensor.view, torch.Tensor.reshape})
"""What a block may do to a result before it turns to its other experts."""


class Later(torch.Tensor):
    """Stands for the tensor that a function returns, which is called once, when the value is needed."""

    _compute: Callable[[], torch.Tensor] | None
    _value: torch.Tensor

    @staticmethod
    def of(compute: Callable[[], torch.Tensor]) -> Later:
        later: Later = torch.Tensor._make_subclass(Later, torch.empty(0))
        later._compute = compute
        return later

    def now(self) -> torch.Tensor:
        """The value. Raises what the function raises."""
        if self._compute is not None:
            self._value = self._compute()
            self._compute = None
        return self._value

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _VIEWS and isinstance(args[0], Later):
            later, *shape = args
            return Later.of(lambda: function(later.now(), *shape, **kwargs))
        return function(*_now(args), **_now(kwargs))


def _now(value: Any) -> Any:
    """The same with the values of all that it holds."""
    if isinstance(value, Later):
        return value.now()
    if isinstance(value, tuple | list):
        return type(value)(map(_now, value))
    if isinstance(value, dict):
        return {key: _now(of) for key, of in value.items()}
    return value


class Overlap:
    """The two halves of one block. Its shared experts must not change what they are given, nor the block until it has
    called both."""

    def __init__(self, shared: torch.nn.Module) -> None:
        self._is_away = False
        self._shared: Later | None = None
        """What has been asked for and not computed."""
        self._compute_shared: Callable[..., torch.Tensor] = shared.forward
        shared.forward = self._shared_forward

    @staticmethod
    def of(block: torch.nn.Module) -> Overlap | None:
        """From now on for a block, if it has shared experts."""
        shared = next((of for name in _SHARED if isinstance(of := getattr(block, name, None), torch.nn.Module)), None)
        return None if shared is None else Overlap(shared)

    def routed(self, begin: Callable[[], Callable[[], torch.Tensor]]) -> torch.Tensor:
        """What `begin` sends away and what it returns waits for, with the shared experts computed in between."""
        finish = begin()
        if self._shared is not None:
            self._shared.now()
            return finish()

        def wait() -> torch.Tensor:
            self._is_away = False
            return finish()

        self._is_away = True
        return Later.of(wait)

    def _shared_forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._is_away:
            return self._compute_shared(*args, **kwargs)

        def compute() -> torch.Tensor:
            self._shared = None
            return self._compute_shared(*args, **kwargs)

        later = self._shared = Later.of(compute)
        return later
