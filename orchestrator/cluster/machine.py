"""What a command has of the machine that it runs on: its output, its temporary folder, cores and memory."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TextIO

from trainables.storage.files import StorageError

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class _Output(io.FileIO):
    """A file descriptor that drops what it cannot write, so that a sweep outlives the reader of its output."""

    fault: OSError | None = None  # the first

    def write(self, content: object) -> int | None:  # type: ignore[override]
        try:
            return super().write(content)  # type: ignore[arg-type]
        except OSError as error:
            self.fault = self.fault or error
            return len(content)  # type: ignore[arg-type]


def start(main: Callable[[], int]) -> NoReturn:
    """Runs a command, and ends the process with its exit code.

    Characters that the output's encoding lacks are replaced. What a reader that has left (`| head`) would have read is dropped.
    """
    sys.stdin = sys.stdin or os.fdopen(os.open(os.devnull, os.O_RDONLY))  # None: closed by the shell (`<&-`)
    raw, sys.stdout = _lenient(sys.stdout, 1)
    _, sys.stderr = _lenient(sys.stderr, 2)
    if "TMPDIR" in os.environ:
        os.environ["TMPDIR"] = os.path.abspath(os.environ["TMPDIR"])  # child processes have other working directories
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
    except StorageError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    if raw.fault is not None and not isinstance(raw.fault, BrokenPipeError):
        print(f"error: the output cannot be written ({raw.fault.strerror})", file=sys.stderr)
        code = code or 1
    sys.exit(code)


def _lenient(before: TextIO | None, descriptor: int) -> tuple[_Output, TextIO]:
    """Returns an output, and a text stream over it with the encoding and the buffering of the one before; None: closed."""
    raw = _Output(descriptor if before else os.open(os.devnull, os.O_WRONLY), "w", closefd=False)
    is_unbuffered = bool(getattr(before, "write_through", False))
    return raw, io.TextIOWrapper(
        raw if is_unbuffered else io.BufferedWriter(raw),  # type: ignore[arg-type]
        encoding=before.encoding if before else "utf-8",
        errors="replace",
        line_buffering=bool(getattr(before, "line_buffering", False)),
        write_through=is_unbuffered,
    )


def num_cores() -> int:
    """Cores that this process may use: those of its affinity, and of the container that limits it (at least 1)."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for quota, period in _limits("cpu", "cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"):
        cores = min(cores, quota / period) if quota > 0 and period > 0 else cores  # -1: no limit
    return max(1, int(cores))


def machine_memory() -> float:
    """Bytes of memory of this machine, or of the container that limits it."""
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(total, *(limit for (limit,) in _limits("memory", "memory.max", "memory.limit_in_bytes")), total)


def _limits(controller: str, file: str, *files: str) -> Iterator[tuple[float, ...]]:
    """Yields the numbers of `file` (cgroup v2), and of `files` (v1), of this process's groups; none where there is no limit.

    A group is limited by those above it, too. A container often sees its own group as the topmost.
    """
    with suppress(OSError):
        for line in OWN_CGROUPS.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            top = CGROUPS / controller if controllers else CGROUPS
            names = files if controllers else (file,)
            path = top / group.lstrip("/")
            for folder in (path, *path.parents[: len(path.relative_to(top).parts)]):
                with suppress(OSError, ValueError):  # no such file, or `max`
                    yield tuple(float(word) for name in names for word in (folder / name).read_text().split())
