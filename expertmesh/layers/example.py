"""An MoE layer trained as a service beside the same one in one process: `python -m expertmesh.layers.example`.

The task is a mixture of linear regressions: rows come from clusters, and each cluster has a linear map of its own from
row to target. No map serves two of them, so the gate must learn to tell clusters apart, and experts to be unlike.

For each seed the model is trained twice: with experts in this process, and with experts on hosts, one of which is
killed with SIGKILL on the way, replaced, and filled from the last checkpoint. Batches are a function of seed and step,
so that steps done again are done alike.

Shapes: B rows of a batch, F features of a row, H hidden.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from expertmesh.checkpoint.layer_folder import layer_config, new_folder
from expertmesh.errors import TrainingLostError
from expertmesh.gates.spec import GateSpec
from expertmesh.hosts.process import HostProcess
from expertmesh.layers.local import LocalExperts
from expertmesh.layers.module import MoELayer
from expertmesh.layers.trained import TrainedExperts
from expertmesh.optimizer import Optimizer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from expertmesh.layers.experts import Experts

CLUSTERS, FEATURES, HIDDEN, BATCH = 4, 8, 16, 64
RATE = 0.01
LAYER = layer_config(hidden=HIDDEN, intermediate=32, num_experts=CLUSTERS, activation="gelu", gated=False, bias=True)
GATE = GateSpec(strategy="softmax-topk", num_experts=CLUSTERS, k=2, normalize=True)


def batch(seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x_BF and its targets y_BF; the maps and the clusters' middles are the seed's."""
    fixed = torch.Generator().manual_seed(seed)
    maps_CFF = torch.randn(CLUSTERS, FEATURES, FEATURES, generator=fixed) / FEATURES**0.5
    middles_CF = 2 * torch.randn(CLUSTERS, FEATURES, generator=fixed)
    drawn = torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)
    cluster_B = torch.randint(CLUSTERS, (BATCH,), generator=drawn)
    noise_BF = torch.randn(BATCH, FEATURES, generator=drawn)
    return middles_CF[cluster_B] + noise_BF, torch.einsum("bfg,bg->bf", maps_CFF[cluster_B], noise_BF)


class Model(nn.Module):
    """A small model around a layer, as a vision or a recommendation model would have it."""

    def __init__(self, experts: Experts, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.encode = nn.Linear(FEATURES, HIDDEN)
            self.moe = MoELayer(experts, GATE)
            self.decode = nn.Linear(HIDDEN, FEATURES)

    def forward(self, x_BF: torch.Tensor) -> torch.Tensor:
        h_BH = self.encode(x_BF)
        y_BF: torch.Tensor = self.decode(h_BH + self.moe(h_BH))
        return y_BF


def train(
    experts: Experts,
    seed: int,
    steps: int,
    *,
    folder: Path | None = None,
    save_every: int = 10,
    before: Callable[[int], None] = lambda _: None,
    replace: Callable[[], Sequence[str]] | None = None,
) -> list[float]:
    """The loss of every step. `before` is called ahead of each, with its number.

    Trained experts are saved in `folder` every so many steps; when a host is lost, `replace` says which hosts there are
    then, and what was done since the last checkpoint is done again.
    """
    model = Model(experts, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    losses: list[float] = []
    saved: tuple[Path, dict[str, Any], dict[str, Any]] | None = None
    while (step := len(losses)) < steps:
        try:
            here = folder / f"step-{step}" if folder is not None else None
            if (
                isinstance(experts, TrainedExperts)
                and here
                and step % save_every == 0
                and (not saved or saved[0] != here)
            ):
                experts.save(here)
                saved = here, copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
            before(step)
            x_BF, y_BF = batch(seed, step)
            optimizer.zero_grad()
            loss = (model(x_BF) - y_BF).square().mean()
            loss.backward()
            optimizer.step()
            if isinstance(experts, TrainedExperts):
                experts.step(RATE)
        except TrainingLostError:
            if saved is None or replace is None or not isinstance(experts, TrainedExperts):
                raise
            experts.restore(saved[0], replace())
            model.load_state_dict(saved[1])
            optimizer.load_state_dict(saved[2])
            del losses[experts.steps :]
        else:
            losses.append(loss.item())
    return losses


class Fleet:
    """Host processes on this machine. A context manager, which ends them."""

    def __init__(self, folder: Path, token: str, size: int = 2) -> None:
        """`folder`: where they may save."""
        self._folder = folder
        self._token = token
        self._stack = ExitStack()
        self._hosts: list[HostProcess] = []
        for _ in range(size):
            self._hosts.append(self._start())

    def _start(self) -> HostProcess:
        return self._stack.enter_context(HostProcess(self._token, memory="64MiB", train=self._folder))

    @property
    def addresses(self) -> list[str]:
        return [host.address for host in self._hosts]

    def kill(self, number: int) -> None:
        """SIGKILL one."""
        self._hosts[number].kill()

    def replace(self) -> list[str]:
        """Start another host for each that is dead: all addresses."""
        self._hosts = [host if host.is_alive else self._start() for host in self._hosts]
        return self.addresses

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def main() -> None:
    """Train, and print each seed's losses."""
    parser = argparse.ArgumentParser(prog="python -m expertmesh.layers.example", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=25, help="steps between checkpoints")
    parser.add_argument("--kill-at", type=int, default=110, help="the step before which a host is killed; -1: none is")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        _say(f"{'seed':>4} {'first loss':>11} {'local':>9} {'on hosts':>9}   {given.steps} steps, AdamW {RATE:g}")
        with Fleet(root, "example") as fleet:
            for seed in given.seeds:
                _say(_compare(root / str(seed), seed, fleet, given))


def _compare(root: Path, seed: int, fleet: Fleet, given: argparse.Namespace) -> str:
    new_folder(root / "new", LAYER, seed)
    local = train(LocalExperts(root / "new"), seed, given.steps)
    killed: list[int] = []

    def before(step: int) -> None:
        if step == given.kill_at and not killed:
            fleet.kill(0)
            killed.append(step)

    options: dict[str, Any] = {
        "folder": root,
        "save_every": given.save_every,
        "before": before,
        "replace": fleet.replace,
    }
    with TrainedExperts(root / "new", fleet.addresses, Optimizer(), token="example", timeout_s=300) as experts:
        remote = train(experts, seed, given.steps, **options)
    last = max(1, given.steps // 10)
    means = [sum(losses[-last:]) / last for losses in (local, remote)]
    told = f", a host killed before step {killed[0]}" if killed else ""
    return f"{seed:>4} {local[0]:>11.4f} {means[0]:>9.4f} {means[1]:>9.4f}   (mean of the last {last} steps{told})"


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
