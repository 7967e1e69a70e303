"""What a command has of its machine: output whose reader leaves, cores and memory of a container, a temporary folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.cluster import machine, ray_cluster

COMMANDS = (
    "sweep",
    "report",
    "export",
    "store",
    "cluster.check_config",
    "cluster.mlflow_server",
    "cluster.spot_watcher",
)


def run(command: str, *, shell: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of ours by bash, with what `shell` appends."""
    line = f"{sys.executable} -m orchestrator.{command} {shell}"
    every = {**os.environ, **environment}
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=every, encoding="latin-1")


# ------------------------------------------------------------------------------------------------------------- output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_quick_and_survives_a_reader_that_has_left(command: str) -> None:
    said = run(f"{command} --help", shell="| true", PYTHONPROFILEIMPORTTIME="1")
    imported = {line.rpartition("|")[2].strip() for line in said.stderr.splitlines() if line.startswith("import time")}
    assert "argparse" in imported and not imported & {"torch", "ray", "mlflow", "transformers"}
    assert "Traceback" not in said.stderr and "Error" not in said.stderr


@pytest.fixture
def phases(tmp_path: Path) -> Path:
    """A storage whose list is longer than a pipe holds, with names that ASCII lacks."""
    for number in range(800):
        (tmp_path / "runs" / "phases" / f"{number:04}-\u00e9\u4e2d{'x' * 120}").mkdir(parents=True)
    return tmp_path / "runs"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_characters_that_the_output_lacks_are_replaced(phases: Path, encoding: str) -> None:
    said = run("store", shell=f"--storage {phases}", PYTHONIOENCODING=encoding)
    assert said.returncode == 0 and said.stdout.count("\n") == 801 and not said.stderr
    assert encoding != "ascii" or "0000-??xxx" in said.stdout


@pytest.mark.parametrize(
    ("shell", "code", "says"),
    [
        ("| head -n 1; exit ${PIPESTATUS[0]}", 0, ""),
        ("> /dev/full", 1, "error: the output cannot be written (No space left on device)\n"),
        (">&-", 0, ""),
        (">&- 2>&- <&-", 0, ""),
        ("2>&-", 0, ""),
        ("--prune < /dev/null > /dev/null", 1, ""),  # no answer deletes nothing
    ],
)
def test_output_that_nobody_takes_ends_no_command_in_a_traceback(
    phases: Path, shell: str, code: int, says: str
) -> None:
    said = run("store", shell=f"--storage {phases} {shell}")
    assert (said.returncode, said.stderr) == (code, says)


# --------------------------------------------------------------------------------------------------- cores and memory


def contained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, groups: str, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(text)
    (tmp_path / "own").write_text(groups)
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


V1 = "4:memory:/docker/ab\n3:cpu,cpuacct:/docker/ab\n1:name=systemd:/docker/ab\n"


@pytest.mark.parametrize(
    ("groups", "files", "cores", "memory"),
    [
        ("0::/\n", {"cpu.max": "100000 100000", "memory.max": "2700000000\n"}, 1, 2.7e9),
        ("0::/\n", {"cpu.max": "max 100000", "memory.max": "max\n"}, 8, None),
        ("0::/a/b\n", {"a/cpu.max": "350000 100000", "a/b/memory.max": "2700000000"}, 3, 2.7e9),  # above us, and ours
        ("0::/\n", {"cpu.max": "20000 100000"}, 1, None),  # a fifth of a core
        (V1, {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000",
              "memory/memory.limit_in_bytes": "2700000000"}, 1, 2.7e9),
        (V1, {"cpu/docker/ab/cpu.cfs_quota_us": "200000", "cpu/docker/ab/cpu.cfs_period_us": "100000",
              "memory/memory.limit_in_bytes": "9223372036854771712",
              "memory/docker/ab/memory.limit_in_bytes": "2700000000"}, 2, 2.7e9),
        (V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8, None),
        ("", {}, 8, None),
    ],
)  # fmt: skip
def test_a_containers_limits_count(
    groups: str, files: dict[str, str], cores: int, memory: float | None,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    contained(monkeypatch, tmp_path, groups, files)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert machine.num_cores() == cores and machine.machine_memory() == min(memory or whole, whole)


# ---------------------------------------------------------------------------------------------------- temporary files


@pytest.mark.parametrize(("folder", "expected"), [("t", "t"), ("t" * 90, "/tmp")])
def test_rays_sockets_have_short_paths_wherever_temporary_files_are(
    folder: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/tmp")
    monkeypatch.setenv("RAY_TMPDIR", folder)
    ray_cluster._keep_socket_paths_short()
    assert os.environ["RAY_TMPDIR"] == os.path.abspath(expected)
    monkeypatch.setattr(ray_cluster, "_before", {})


def test_a_relative_folder_for_temporary_files_is_the_same_for_child_processes(tmp_path: Path) -> None:
    code = "from orchestrator.cluster.machine import start; import os; start(lambda: print(os.environ['TMPDIR']) or 0)"
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "TMPDIR": "t"}, capture_output=True, text=True
    )
    assert said.stdout == f"{tmp_path / 't'}\n", said.stderr
