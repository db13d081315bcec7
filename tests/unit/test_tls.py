"""Which files make an identity, what is wrong with those that do not, and what happens while they are replaced."""

from __future__ import annotations

import datetime
import os
import shutil
import stat
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cryptography import x509

from expertmesh.authority import Authority
from expertmesh.clock import SYSTEM_CLOCK
from expertmesh.errors import ConfigError
from expertmesh.tls import HOST_NAME, LiveIdentity, TlsFiles, read_identity


@dataclass
class Days:
    """A clock that is so many days ahead."""

    ahead: float

    def monotonic(self) -> float:
        return 0.0

    def wall(self) -> float:
        return SYSTEM_CLOCK.wall() + 86_400 * self.ahead


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority(tmp_path / "tls")
    made.make()
    made.issue(30)
    return made


def test_a_certificate_is_in_the_one_name_signed_by_the_authority_and_as_long_as_asked(authority: Authority) -> None:
    identity = read_identity(authority.files)
    own, ca = (x509.load_pem_x509_certificate(pem) for pem in (identity.certificate, identity.ca))
    own.verify_directly_issued_by(ca)
    names = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [HOST_NAME]
    assert own.not_valid_after_utc - own.not_valid_before_utc == datetime.timedelta(days=30, hours=1)
    assert not own.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_only_the_owner_can_read_what_was_made_and_the_authoritys_key_is_not_among_what_nodes_get(
    authority: Authority,
) -> None:
    files = authority.files
    for path in (authority.key_file, Path(files.key)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(path.name for path in Path(files.key).parent.iterdir()) == ["ca.pem", "certificate.pem", "key.pem"]
    assert b"PRIVATE" not in Path(files.ca).read_bytes() + Path(files.certificate).read_bytes()


def test_the_key_is_not_shown(authority: Authority) -> None:
    assert "PRIVATE" not in repr(read_identity(authority.files))


def test_an_authority_is_not_made_twice_but_its_certificate_renewed(authority: Authority) -> None:
    first = read_identity(authority.files)
    with pytest.raises(ConfigError, match="--renew"):
        authority.make()
    authority.issue(30)
    second = read_identity(authority.files)
    assert (second.ca == first.ca, second.certificate == first.certificate, second.key == first.key) == (
        True,
        False,
        False,
    )


def test_there_is_nothing_to_renew_where_no_authority_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"authority.key: No such file or directory; .* leave out --renew"):
        Authority(tmp_path).issue(30)


def test_a_folder_that_cannot_be_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another folder"):
        Authority(tmp_path / "file" / "tls").make()


@pytest.mark.parametrize("what", ["ca", "certificate", "key"])
@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"", "in PEM"), (b"\xff" * 99, "in PEM"), (b"-----BEGIN CERTIFICATE-----\n", "in PEM")],
    ids=["missing", "empty", "noise", "cut off"],
)
def test_a_file_that_will_not_do_is_named(authority: Authority, what: str, content: bytes | None, message: str) -> None:
    path = Path(getattr(authority.files, what))
    path.unlink()
    if content is not None:
        path.write_bytes(content)
        path.chmod(0o600)
    with pytest.raises(ConfigError, match=rf"^network\.tls\.{what}: .*{message}") as refused:
        read_identity(authority.files)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("permissions", [0o640, 0o604, 0o660])
def test_a_key_that_others_can_read_is_refused(authority: Authority, permissions: int) -> None:
    Path(authority.files.key).chmod(permissions)
    with pytest.raises(ConfigError, match=r"^network\.tls\.key: others can read .*chmod 600"):
        read_identity(authority.files)


def test_another_certificates_key_is_refused(authority: Authority, tmp_path: Path) -> None:
    old = shutil.copy(authority.files.key, tmp_path / "old.pem")
    authority.issue(30)
    with pytest.raises(ConfigError, match=r"^network\.tls\.key: .* is not the key of"):
        read_identity(replace(authority.files, key=str(old)))


def test_an_expired_certificate_is_refused_with_the_day(authority: Authority) -> None:
    assert read_identity(authority.files, Days(29.9))
    with pytest.raises(ConfigError, match=r"^network\.tls\.certificate: .* expired on 20\d\d-\d\d-\d\d; .*--renew"):
        read_identity(authority.files, Days(30.1))


def test_a_certificate_in_another_name_is_refused(authority: Authority) -> None:
    """The authority's own has no name at all."""
    files = replace(authority.files, certificate=authority.files.ca, key=str(authority.key_file))
    with pytest.raises(ConfigError, match=rf"^network\.tls\.certificate: .* does not carry the name {HOST_NAME}"):
        read_identity(files)


def test_a_path_may_begin_at_home(authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    at_home = {what: f"~/tls/node/{what}.pem" for what in ("ca", "certificate", "key")}
    assert read_identity(TlsFiles(**at_home)) == read_identity(authority.files)


def test_what_is_replaced_is_taken_up_when_it_is_whole(authority: Authority, tmp_path: Path) -> None:
    live = LiveIdentity(authority.files)
    first = live.current()
    assert live.current() is first
    old = {what: Path(getattr(authority.files, what)).read_bytes() for what in ("certificate", "key")}
    authority.issue(30)
    new_certificate = Path(authority.files.certificate).read_bytes()
    put(authority.files.certificate, old["certificate"])  # the moment between the two
    assert live.current() is first
    put(authority.files.certificate, new_certificate)
    assert live.current().certificate == new_certificate


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"nothing")])
def test_the_last_good_certificate_stays_when_the_files_go_and_it_is_said_once(
    authority: Authority, damage, caplog: pytest.LogCaptureFixture
) -> None:
    live = LiveIdentity(authority.files)
    first = live.current()
    damage(Path(authority.files.certificate))
    assert [live.current() for _ in range(5)] == [first] * 5
    (record,) = caplog.records
    assert record.getMessage().endswith("the last good certificate stays in use")


def put(path: str, content: bytes) -> None:
    draft = Path(f"{path}.draft")
    draft.write_bytes(content)
    draft.chmod(0o600)
    os.replace(draft, path)
