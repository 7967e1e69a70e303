"""Pretend machines on this one: namespaces with an address, a root, processes and an sshd of their own.

A host is a copy-on-write view of this machine's root in a mount namespace of its own, so that nothing it writes outlives
it; a bridge in a further namespace joins the hosts, so that this machine gets no interface, no route and no mount. All
of them end with the process that made them. Needs root, overlayfs, and Debian's openssh-server, rsync and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")
NEEDS = ("setpriv", "unshare", "nsenter", "ip", "ssh", "ssh-keygen", "rsync", "/usr/sbin/sshd")
HOME = "/home/root"  # not this machine's own, where programs may lie that the hosts use too
PATH = f"{HOME}/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SHARE = "/mnt/share"  # one folder of all hosts, as NFS would be

# What a host does before it listens: a root over this machine's, its own /proc, /dev, name and keys, then sshd.
BEGIN = r"""
set -eu
mount --make-rprivate /
mkdir -p "$HOME_OF_HOST/cow" && mount -t tmpfs -o size=6g tmpfs "$HOME_OF_HOST/cow" && cd "$HOME_OF_HOST/cow"
mkdir upper work root && mount -t overlay overlay -o lowerdir=/,upperdir=upper,workdir=work root
R=$PWD/root
rm -rf "$R/tmp/ray"; mkdir -p "$R/home/root/venv" "$R/run/sshd" "$R/mnt/share"; mkdir -m 700 "$R/home/root/.ssh"
sed -i 's|^root:\([^:]*\):0:0:\([^:]*\):/root:|root:\1:0:0:\2:/home/root:|' "$R/etc/passwd"
cp "$KEYS/id.pub" "$R/home/root/.ssh/authorized_keys"
[ "$NAME" = "$FIRST" ] && cp "$KEYS/id" "$R/home/root/.ssh/id"
cp "$KEYS/hosts" "$R/etc/hosts"; cp "$KEYS/bashrc" "$R/home/root/.bashrc"; echo "$NAME" > "$R/etc/hostname"
tr -d - < /proc/sys/kernel/random/uuid > "$R/etc/machine-id"
hostname "$NAME"
for x in "$VENV"/*; do ln -s "$x" "$R/home/root/venv/"; done
cp "$LOCK" "$R/home/root/venv/cluster.lock"      # as an image that has the set-up behind it
mount -t proc proc "$R/proc"; mount -t sysfs sysfs "$R/sys"; mount -t tmpfs -o mode=755 tmpfs "$R/dev"
for x in null zero full random urandom tty; do touch "$R/dev/$x"; mount --bind "/dev/$x" "$R/dev/$x"; done
mkdir "$R/dev/pts" "$R/dev/shm"; mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$R/dev/pts"
ln -s pts/ptmx "$R/dev/ptmx"; ln -s /proc/self/fd "$R/dev/fd"; mount -t tmpfs -o size=4g tmpfs "$R/dev/shm"
mount --bind "$SHARED" "$R/mnt/share"
exec chroot "$R" /usr/sbin/sshd -D -e -o ListenAddress=0.0.0.0 -o PermitRootLogin=prohibit-password \
    -o PasswordAuthentication=no -o UsePAM=no -o MaxStartups=100 -o MaxSessions=100 -o PidFile=none
"""


def why_not() -> str | None:
    """Why this machine cannot pretend to be several, or None."""
    if os.geteuid() != 0:
        return "needs root, for namespaces and mounts"
    if missing := [name for name in NEEDS if shutil.which(name) is None]:
        return f"needs {', '.join(missing)} (Debian: openssh-server rsync iproute2)"
    probe = "mount -t tmpfs tmpfs /mnt && mkdir /mnt/u /mnt/w /mnt/r && mount -t overlay overlay -o lowerdir=/,upperdir=/mnt/u,workdir=/mnt/w /mnt/r"
    said = subprocess.run(
        ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "sh", "-c", probe],
        capture_output=True,
        text=True,
    )
    return None if said.returncode == 0 else f"namespaces or overlayfs are not allowed here: {said.stderr.strip()}"


@dataclass
class Hosts:
    """`addresses`: name -> address; the first one has the key to the others. `environment`: what every login has."""

    folder: Path
    addresses: Mapping[str, str]
    venv: Path
    lock: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    _switch: subprocess.Popen[bytes] | None = None
    _hosts: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def share(self) -> Path:
        """On this machine, what the hosts see as SHARE."""
        return self.folder / "share"

    def __enter__(self) -> Hosts:
        keys = self.folder / "keys"
        keys.mkdir(mode=0o700)
        self.share.mkdir()
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / "id")], check=True)
        names = [f"{address} {name}" for name, address in self.addresses.items()]
        (keys / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        (keys / "bashrc").write_text("".join(f"export {key}={value}\n" for key, value in self.environment.items()))
        try:
            self._switch = subprocess.Popen([*DIES_WITH_US, "unshare", "--net", "sleep", "infinity"])
            _wait(lambda: _inside(self._switch, "net"), "a namespace for the bridge")
            self._in_switch("ip", "link", "add", "br0", "type", "bridge")
            self._in_switch("ip", "link", "set", "br0", "up")
            for name in self.addresses:
                self._begin(name)
            for name in self.addresses:
                _wait(lambda name=name: self.run(next(iter(self.addresses)), *SSH, f"root@{name}", "true", check=False).returncode == 0, f"the sshd of {name}")  # fmt: skip
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in (*self._hosts.values(), self._switch):
            if process is not None:
                process.kill()  # --kill-child: the namespace's first process ends with it, and so do all in it
                process.wait()

    def run(self, host: str, *command: str, check: bool = True, timeout: float = 120, text: str = "") -> subprocess.CompletedProcess[str]:  # fmt: skip
        """A command on a host, as root in HOME, with output; a failure shows it."""
        said = subprocess.run(self._on(host, command), capture_output=True, text=True, timeout=timeout, input=text)
        assert not check or said.returncode == 0, (
            f"{host}: {command}: exit {said.returncode}\n{said.stdout[-6000:]}\n{said.stderr[-6000:]}".replace("\0", "")
        )
        return said

    def start(self, host: str, *command: str, **more: Any) -> subprocess.Popen[str]:
        more = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **more}
        return subprocess.Popen(self._on(host, command), text=True, stdin=subprocess.DEVNULL, **more)

    def sh(self, host: str, script: str, **more: Any) -> subprocess.CompletedProcess[str]:
        """As a login has it: with what .bashrc sets."""
        return self.run(host, "bash", "-c", f". ~/.bashrc; {script}", **more)

    def kill(self, host: str, pattern: str) -> int:
        """SIGKILL to every process of a host whose command line matches; returns how many there were."""
        found = self.run(host, "pgrep", "-f", pattern, check=False).stdout.split()
        for pid in found:
            self.run(host, "kill", "-KILL", pid, check=False)
        return len(found)

    def _begin(self, name: str) -> None:
        home = self.folder / name
        home.mkdir()
        environment = {
            "PATH": os.environ["PATH"], "NAME": name, "FIRST": next(iter(self.addresses)), "HOME_OF_HOST": str(home), "KEYS": str(self.folder / "keys"),
            "VENV": str(self.venv), "LOCK": str(self.lock), "SHARED": str(self.share),
        }  # fmt: skip
        with (home / "log.txt").open("w") as log:
            host = subprocess.Popen(
                [*DIES_WITH_US, "unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "bash", "-c", BEGIN],
                env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._hosts[name] = host
        _wait(lambda: _first(host), f"the namespaces of {name}")
        peer = ("peer", "name", "eth0", "netns", str(_first(host)))
        self._in_switch("ip", "link", "add", f"to-{name}", "type", "veth", *peer)
        self._in_switch("ip", "link", "set", f"to-{name}", "master", "br0", "up")
        for what in (("addr", "add", f"{self.addresses[name]}/24", "dev", "eth0"), ("link", "set", "eth0", "up"), ("link", "set", "lo", "up")):  # fmt: skip
            subprocess.run(["nsenter", "-t", str(_first(host)), "--net", "ip", *what], check=True)

    def _in_switch(self, *command: str) -> None:
        assert self._switch is not None
        subprocess.run(["nsenter", "-t", str(self._switch.pid), "--net", *command], check=True)

    def _on(self, host: str, command: Sequence[str]) -> list[str]:
        inside = ("--net", "--mount", "--pid", "--uts", "--ipc", "--root", "--wd")
        clean = ("env", "-i", "-C", HOME, f"HOME={HOME}", f"PATH={PATH}", "TERM=xterm", "LANG=C.UTF-8")
        return ["nsenter", "-t", str(_first(self._hosts[host])), *inside, *clean, *command]


SSH = ("ssh", "-i", f"{HOME}/.ssh/id", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR")  # fmt: skip


def _first(host: subprocess.Popen[bytes]) -> int | None:
    """The first process of a host's namespaces, as this machine numbers it."""
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{host.pid}/task/{host.pid}/children").read_text().split()
        return int(children[0]) if children else None
    return None


def _inside(process: subprocess.Popen[bytes] | None, kind: str) -> bool:
    assert process is not None
    return os.readlink(f"/proc/{process.pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")


def _wait(what: Any, of: str, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, f"waited too long for {of}"
        time.sleep(0.1)


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()
