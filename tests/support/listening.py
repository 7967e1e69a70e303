"""Which TCP ports the processes of a tree listen on, and at which address, by /proc."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
from pathlib import Path

LISTEN = "0A"


def tree(root: int) -> dict[int, str]:
    """A process and all below it: pid -> command line."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found, todo = {}, [root]
    while todo:
        pid = todo.pop()
        try:
            found[pid] = command_line(pid)
        except OSError:
            continue
        todo += [child for child, parent in parents.items() if parent == pid]
    return found


def command_line(pid: int) -> str:
    """By one read: a second one may be of what the process has become meanwhile, and the two together are nobody's."""
    file = os.open(f"/proc/{pid}/cmdline", os.O_RDONLY)
    try:
        return os.read(file, 1 << 20).decode(errors="replace").replace("\0", " ").strip()
    finally:
        os.close(file)


def listening(pid: int) -> set[tuple[str, int]]:
    """(address, port) of each socket on which a process waits for others."""
    sockets = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN:
                host, _, port = fields[1].partition(":")
                sockets[fields[9]] = (_address(host), int(port, 16))
    links = []
    with contextlib.suppress(OSError):  # it has ended
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                links.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    inodes = (match[1] for link in links if (match := re.fullmatch(r"socket:\[(\d+)\]", link)))
    return {sockets[inode] for inode in inodes if inode in sockets}


def _address(text: str) -> str:
    """From hex digits, 32 bits at a time in the machine's order."""
    words = [bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8)]
    address = ipaddress.ip_address(b"".join(words))
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)
