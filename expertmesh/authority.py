"""A certificate authority of one's own, in a folder: for those who have none.

Owns what certificates say and where they lie; knows nothing of who uses them. Invariant: only the folder `node` is for
other machines, and a node's certificate and key belong together but for the moment between two renames.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from expertmesh.clock import SYSTEM_CLOCK
from expertmesh.errors import ConfigError
from expertmesh.tls import HOST_NAME, TlsFiles

if TYPE_CHECKING:
    from expertmesh.clock import Clock

AUTHORITY_DAYS = 3650
_SKEW = datetime.timedelta(hours=1)
"""A node's clock may be so far behind."""


class Authority:
    """Signs certificates for the nodes of a mesh, any of which may be a router, a controller or a host."""

    def __init__(self, folder: Path, clock: Clock = SYSTEM_CLOCK) -> None:
        self._folder = folder
        self._clock = clock

    @property
    def key_file(self) -> Path:
        """The authority's key: who has it can make certificates. It stays where it is."""
        return self._folder / "authority.key"

    @property
    def files(self) -> TlsFiles:
        """What every node needs, the same for all."""
        node = self._folder / "node"
        names = {"ca": "ca.pem", "certificate": "certificate.pem", "key": "key.pem"}
        return TlsFiles(**{what: str(node / name) for what, name in names.items()})

    def make(self) -> None:
        """Draw the authority's key. Raises ConfigError when there is one already, or the folder cannot be written."""
        if self.key_file.exists():
            raise ConfigError(f"{self._folder}: it holds an authority already; --renew makes a certificate under it")
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name(f"expertmesh authority {secrets.token_hex(4)}")  # two of them are told apart by name
        public = key.public_key()
        certificate = (
            self._certificate(name, name, public, public, AUTHORITY_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        self._write(self.key_file, _pem(key))
        self._write(Path(self.files.ca), certificate.public_bytes(Encoding.PEM))

    def issue(self, days: float) -> datetime.datetime:
        """Make a certificate for `days`, in place of the last: until when it is valid.

        Raises ConfigError when there is no authority.
        """
        authority, authority_key = self._load()
        key = ec.generate_private_key(ec.SECP256R1())
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        certificate = (
            self._certificate(
                _name("expertmesh node"), authority.subject, key.public_key(), authority_key.public_key(), days
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(usage, critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST_NAME)]), critical=False)
            .sign(authority_key, hashes.SHA256())
        )
        self._write(Path(self.files.key), _pem(key))
        self._write(Path(self.files.certificate), certificate.public_bytes(Encoding.PEM))
        return certificate.not_valid_after_utc

    def _load(self) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        try:
            key = load_pem_private_key(self.key_file.read_bytes(), None)
            certificate = x509.load_pem_x509_certificate(Path(self.files.ca).read_bytes())
        except OSError as error:
            raise ConfigError(
                f"{error.filename}: {error.strerror}; to make an authority there, leave out --renew"
            ) from error
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{self._folder}: its authority is damaged; make one in another folder") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise ConfigError(f"{self._folder}: authority.key is not the key of node/ca.pem; make another authority")
        return certificate, key

    def _certificate(
        self,
        subject: x509.Name,
        issuer: x509.Name,
        key: ec.EllipticCurvePublicKey,
        issuer_key: ec.EllipticCurvePublicKey,
        days: float,
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.fromtimestamp(self._clock.wall(), datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _SKEW)
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
        )

    def _write(self, path: Path, content: bytes) -> None:
        """Whole or not at all; for its owner's eyes only."""
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            draft = path.with_name(f".{secrets.token_hex(8)}")
            try:
                with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    file.write(content)
                draft.replace(path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    draft.unlink()
        except OSError as error:
            raise ConfigError(f"{error.filename or path}: {error.strerror}; choose another folder") from error


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
