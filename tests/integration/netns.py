"""Machines on this machine: Linux namespaces, each with its own network, processes, home, /tmp and ssh server.

Owns their making and unmaking; knows nothing of Ray. A machine sees this one's files, but for the folders that its
programs write to. Invariant: a machine and all that runs on it end when its standard input closes, and so with the
process that made it, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]

_HOME = pwd.getpwuid(os.getuid()).pw_dir
"""Where ssh logs in to, whatever HOME says here."""
_SSHD = "/usr/sbin/sshd"
_TOOLS = ("bash", "ip", "mount", "nsenter", "rsync", "ssh", "ssh-keygen", "unshare", _SSHD)
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
_NAMESPACES = ("--net", "--mount", "--uts")

# Runs as a machine's first process, whose end is the machine's. Its arguments are folders that stay visible though
# they lie in folders that are its own. It waits for a line on its input once, for the wire, and then for the end.
_INIT = f"""
set -eu
hostname "$NAME"
mount -t tmpfs tmpfs /mnt
cp -a "$SEED" /mnt/seed
kept=0; for path; do kept=$((kept + 1)); mkdir /mnt/$kept; mount --bind "$path" /mnt/$kept; done
for folder in ~ /tmp /run /dev/shm; do mount -t tmpfs -o mode=755 tmpfs "$folder"; done
chmod 1777 /tmp /dev/shm
kept=0; for path; do kept=$((kept + 1)); mkdir -p "$path"; mount --bind /mnt/$kept "$path"; done
cp -a /mnt/seed/. ~
mount --bind /dev/null /etc/resolv.conf
ip link set lo up
echo made; read -r
mkdir /run/sshd
{_SSHD} -f ~/.sshd/config
echo ready; read -r || true
"""

_SSHD_CONFIG = """
HostKey ~/.sshd/key
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UseDNS no
"""


def missing() -> str | None:
    """Why there can be no machines here, or None."""
    absent = [tool for tool in _TOOLS if not shutil.which(tool, path=_PATH)]
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux, to make network namespaces"
    if absent:
        return f"needs {', '.join(absent)} (Debian: openssh-server, openssh-client, rsync, iproute2)"
    made = subprocess.run(["unshare", *_NAMESPACES, "--pid", "--fork", "--mount-proc", "true"], capture_output=True)
    return None if made.returncode == 0 else f"cannot make namespaces: {made.stderr.decode().strip()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine that runs."""

    name: str
    address: str
    process: subprocess.Popen[str]

    def run(self, command: str, *, given: str = "", timeout_s: float = 60) -> str:
        """What a shell command says that is typed on this machine at the root of the checkout. It must succeed."""
        enter = ["nsenter", "-t", str(self.process.pid), *_NAMESPACES]
        enter += [f"--pid=/proc/{self.process.pid}/ns/pid_for_children", "bash", "--login", "-c"]
        done = subprocess.run(
            [*enter, f"cd {CHECKOUT} && {command}"],
            input=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            env=_environment(),
        )
        assert done.returncode == 0, f"{command!r} on {self.name} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def stop(self) -> None:
        """Pull its plug. Idempotent."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


class Network:
    """Machines on one wire, and this one's own end of it."""

    def __init__(self, folder: Path) -> None:
        """`folder` takes the machines' keys."""
        self._folder = folder
        self._machines: list[Machine] = []
        self._subnet = f"198.18.{os.getpid() % 256}"  # of a block set aside for tests between networks
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key"))
        self._switch = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "ip link add bridge up type bridge && echo made && exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(),
        )
        assert self._switch.stdout is not None
        assert self._switch.stdout.readline() == "made\n"
        self._wire(None, f"mesh{os.getpid()}", 254)

    @property
    def key(self) -> Path:
        """The private key that every machine lets in."""
        return self._folder / "key"

    def add(self, name: str, home: Mapping[str, str | Path]) -> Machine:
        """A new machine, with these files in its home: text, or a link to a path of the checkout's environment."""
        seed = self._folder / name
        (seed / ".sshd").mkdir(parents=True)
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(seed / ".sshd/key"))
        (seed / ".sshd/config").write_text(_SSHD_CONFIG.replace("~", _HOME))
        for path, content in {".ssh/authorized_keys": self.key.with_suffix(".pub").read_text(), **home}.items():
            (seed / path).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                (seed / path).symlink_to(content)
            else:
                (seed / path).write_text(content)
                (seed / path).chmod(0o600)
        kept = [str(CHECKOUT), sys.prefix, sys.base_prefix]
        process = subprocess.Popen(
            [
                "unshare",
                *_NAMESPACES,
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "bash",
                "-c",
                _INIT,
                name,
                *kept,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environment() | {"NAME": name, "SEED": str(seed)},
        )
        number = len(self._machines) + 1
        machine = Machine(name=name, address=f"{self._subnet}.{number}", process=process)
        self._machines.append(machine)
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "made\n"
        self._wire(process.pid, "eth0", number)
        process.stdin.write("wired\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ready\n"
        return machine

    def _wire(self, pid: int | None, device: str, number: int) -> None:
        """Join a machine, or None for this one, to the switch."""
        switch, port = str(self._switch.pid), f"port{number}"
        there = ["nsenter", "-t", str(pid), "--net"] if pid else []
        where = ["netns", str(pid)] if pid else []
        _run("ip", "link", "add", device, *where, "type", "veth", "peer", "name", port, "netns", switch)
        _run("nsenter", "-t", switch, "--net", "ip", "link", "set", port, "master", "bridge", "up")
        _run(*there, "ip", "address", "add", f"{self._subnet}.{number}/24", "dev", device)
        _run(*there, "ip", "link", "set", device, "up")
        if pid:
            _run(*there, "ip", "route", "add", "default", "via", f"{self._subnet}.254")

    @contextlib.contextmanager
    def cut_off(self, machine: Machine) -> Iterator[None]:
        """Unplug a machine's wire at the switch: nothing reaches it, and nobody is told."""
        port = f"port{self._machines.index(machine) + 1}"
        switch = ("nsenter", "-t", str(self._switch.pid), "--net", "ip", "link", "set", port)
        _run(*switch, "down")
        try:
            yield
        finally:
            _run(*switch, "up")

    def close(self) -> None:
        """End all machines and the wire."""
        for machine in self._machines:
            machine.stop()
        self._switch.communicate(timeout=10)


@contextlib.contextmanager
def network(folder: Path) -> Iterator[Network]:
    """A network that ends with the block."""
    with contextlib.closing(Network(folder)) as made:
        yield made


def _run(*command: str) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def _environment() -> dict[str, str]:
    """Only what a fresh login has: this process may run under settings of its own."""
    return {"PATH": _PATH, "HOME": _HOME, "LANG": "C.UTF-8"}
