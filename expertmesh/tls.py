"""Mutual TLS within a mesh: what a node proves itself with, and what it trusts. Needs no gRPC.

Owns the reading and the checking of three files; knows nothing of who calls whom. Invariant: what is given out is
complete, and its certificate and key belong together, also while somebody replaces the files.

Hosts come and go, and are reached by addresses that nobody knows beforehand. So no certificate names an address: all of
them name `HOST_NAME`, and who connects looks for that name whatever the address. One certificate will do for a whole
mesh. What this gives up is telling one node from another: who has a node's key can pass for any host or router of the
mesh. Who has none cannot connect to a host, cannot pass for one, and cannot read what they say to each other.
"""

from __future__ import annotations

import datetime
import functools
import logging
import os
import stat
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from expertmesh.clock import SYSTEM_CLOCK, Clock
from expertmesh.errors import ConfigError

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

logger = logging.getLogger(__name__)

HOST_NAME = "host.expertmesh"
"""The name that every node's certificate carries, among its subject alternative names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """Where the files are, in PEM: at the same paths on every node. `~` is the home of whoever reads them."""

    ca: str
    """Certificates of the authorities that are trusted, one or more."""
    certificate: str
    """This node's, followed by those between it and an authority, if any."""
    key: str
    """Of the certificate; unencrypted, and for its owner's eyes only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What the files hold."""

    ca: bytes
    certificate: bytes
    key: bytes = field(repr=False)


def read_identity(files: TlsFiles, clock: Clock = SYSTEM_CLOCK) -> Identity:
    """Read and check the files. Raises ConfigError naming the one that will not do, and why."""
    from cryptography import x509  # takes a while: only for those who use it
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    ca, certificate, key = _read("ca", files.ca), _read("certificate", files.certificate), _read("key", files.key)
    try:
        x509.load_pem_x509_certificates(ca)
    except ValueError as error:
        raise ConfigError(f"network.tls.ca: {files.ca} holds no certificate in PEM") from error
    try:
        own = x509.load_pem_x509_certificates(certificate)[0]
    except ValueError as error:
        raise ConfigError(f"network.tls.certificate: {files.certificate} holds no certificate in PEM") from error
    try:
        private_key = load_pem_private_key(key, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"network.tls.key: {files.key} holds no unencrypted private key in PEM") from error
    if own.public_key() != private_key.public_key():
        raise ConfigError(f"network.tls.key: {files.key} is not the key of {files.certificate}")
    if HOST_NAME not in _names(own):
        raise ConfigError(
            f"network.tls.certificate: {files.certificate} does not carry the name {HOST_NAME}; "
            "`expertmesh certs` makes one that does"
        )
    if own.not_valid_after_utc <= datetime.datetime.fromtimestamp(clock.wall(), datetime.UTC):
        raise ConfigError(
            f"network.tls.certificate: {files.certificate} expired on {own.not_valid_after_utc:%Y-%m-%d}; "
            "`expertmesh certs --renew` makes another"
        )
    return Identity(ca=ca, certificate=certificate, key=key)


def _names(certificate: Certificate) -> list[str]:
    from cryptography import x509

    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return names.get_values_for_type(x509.DNSName)


def _read(what: str, path: str) -> bytes:
    try:
        with Path(path).expanduser().open("rb") as file:
            if what == "key" and stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise ConfigError(
                    f"network.tls.key: others can read {path}; if nobody did, `chmod 600` it, else make another"
                )
            return file.read()
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no such home
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"network.tls.{what}: {path}: {reason}; every node needs it there") from error


class LiveIdentity:
    """The files' contents as of now. What is replaced by something of no use is not taken up: the last good stays."""

    def __init__(self, files: TlsFiles) -> None:
        """Raises ConfigError as `read_identity` does."""
        self._files = files
        self._lock = threading.Lock()
        self._seen = self._stamps()
        self._identity = read_identity(files)

    def current(self) -> Identity:
        """Looks whether the files have changed, and reads them again if so. From any thread."""
        with self._lock:
            if (stamps := self._stamps()) != self._seen:
                self._seen = stamps
                try:
                    self._identity = read_identity(self._files)
                    logger.info("took up the certificate in %s", self._files.certificate)
                except ConfigError as error:
                    logger.warning("%s; the last good certificate stays in use", error)
            return self._identity

    def _stamps(self) -> list[tuple[int, int, int]]:
        """Differ whenever a file has been replaced or rewritten."""
        stamps = []
        for path in (self._files.ca, self._files.certificate, self._files.key):
            try:
                of = Path(path).expanduser().stat()
                stamps.append((of.st_ino, of.st_size, of.st_mtime_ns))
            except (OSError, RuntimeError):
                stamps.append((0, 0, 0))
        return stamps


@functools.cache
def live_identity(files: TlsFiles) -> LiveIdentity:
    """This process's one reader of these files, for all of its connections. Raises ConfigError as `read_identity`."""
    return LiveIdentity(files)
