"""expertmesh serves Mixture-of-Experts language models with their experts as elastic services on a Ray cluster.

To read how a token is made, follow the token plane, from the request inwards:

    serve/gateway.py      HTTP, text and chat templates       -> serve/openai_api.py and its endpoints
    serve/resume.py       requests outlive their routers      -> serve/admission.py, those that there is no place for
    serve/router.py       one copy of the dense model         -> engine/ (which requests run, which token comes next)
    backbone/             transformers' model, experts taken out    -> families/, how each model has its experts
    moe/layer.py          exchange, then the weighted sum     -> moe/dispatch.py, moe/exchange.py,
                                                                 moe/health.py (whom a router trusts), moe/checks.py
    transport/network.py  rows to a host and back: grpc_link, or socket_link within a machine
    hosts/rows.py         what a host answers                 -> hosts/host.py, hosts/slots.py
    kernels/              the expert's feed-forward network

To read how experts come to be where they are, follow the control plane:

    app.py                a config becomes a Ray Serve application
    control/controller.py brings a mesh up                    -> control/keeper.py, the loop that keeps it:
    control/load.py       what hosts' counters say of load    -> control/speed.py, of how fast they are
    control/planner/      where each expert should be, and how many replicas it has
    control/ledger.py     what is the case                    -> control/reconciler.py, the next steps
    control/doubts.py     replicas that a router doubts       -> control/trust.py, whom to believe
    control/scaling.py    how many hosts there should be      -> control/growth.py, which starts and drains them
    checkpoint/           which tensors make an expert, and reading one

The planes meet in `placement.py` (down) and in what hosts report (up). Words are defined in README.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from expertmesh.attachment import attach

__all__ = ["attach"]


def __getattr__(name: str) -> Any:
    """Import on first use: `expertmesh --help` and hosts need no transformers."""
    if name == "attach":
        from expertmesh.attachment import attach

        return attach
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
