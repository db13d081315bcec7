"""What a replica is, in few bytes. A value, for those who compare replicas without having the expert."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaDigest:
    """Two loads of one expert must agree on it, or one of them would change answers."""

    weights: bytes
    """Of the expert's tensors as read and quantized; equal on every host. b"" when the host never read them."""
    answer: bytes
    """Of what its kernel computes for the known rows (hosts/selftest.py); equal on hosts of one kind of device."""
