"""`docs/sweep.sbatch` from its first line to its last, on two pretend machines. Slurm's own part is played by `srun`, which
starts a command on each node with the caller's environment, and `scontrol`, which names the nodes and notes a requeue."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.hosts import HOME, SHARE, Hosts, why_not
from tests.support.sweeps import ROOT, STUDY, attempts, tables
from tests.support.trials import wordy_documents

pytestmark = pytest.mark.hosts
NODES = {"n1": "10.78.0.1", "n2": "10.78.0.2"}
SRUN = rf"""#!/bin/bash
while [[ $1 == --* ]]; do shift; done
umask 077; export -p > {SHARE}/environment; printf '%q ' "$@" > {SHARE}/command
for node in {" ".join(NODES)}; do
    ssh -i {HOME}/.ssh/id -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR root@$node \
        ". {SHARE}/environment; export SLURMD_NODENAME=$node; cd $PWD; eval exec \$(cat {SHARE}/command)" &
    pids+=($!)
done
worst=0; for pid in "${{pids[@]}}"; do wait $pid || worst=$?; done
exit $worst
"""
SCONTROL = f"""#!/bin/bash
case "$1 $2" in
    "show hostnames") printf '%s\\n' {" ".join(NODES)};;
    "requeue 4242") echo requeued >> {SHARE}/requeued;;
    *) echo "scontrol: $*" >&2; exit 1;;
esac
"""
STEPS = 12_000  # so many that no machine is through when the first job's hours, 54 s, are over
REST = "arms: {alone: {phases.distil.terms.soft.weight: 0}, taught: {}}\nseeds: 2\nlimits: {checkpoint_seconds: 1}"


@pytest.mark.long
def test_what_is_left_when_the_hours_are_over_goes_on_when_the_job_starts_again(tmp_path: Path) -> None:
    if (reason := why_not()) is not None:
        pytest.skip(f"no pretend machines: {reason}")
    with Hosts(tmp_path, NODES, ROOT / ".venv", ROOT / "cluster.lock") as hosts:
        (hosts.share / "corpus.txt").write_text("\n\n".join(wordy_documents(160, seed=1)))
        (hosts.share / "study.yaml").write_text(STUDY.format(corpus=f"{SHARE}/corpus.txt", steps=STEPS, rest=REST))
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            hosts.run("n1", "tee", f"/usr/local/bin/{name}", text=text)
            hosts.run("n1", "chmod", "755", f"/usr/local/bin/{name}")

        def job(hours: float) -> str:
            slurm = (
                f"SLURM_JOB_ID=4242 SLURM_JOB_NODELIST='n[1-2]' SLURM_JOB_NUM_NODES=2 HOURS={hours} RUNS={SHARE}/runs"
            )
            return hosts.sh(
                "n1", f"cd {ROOT} && {slurm} bash docs/sweep.sbatch {SHARE}/study.yaml", timeout=1500
            ).stdout

        said = job(0.015)
        assert "--hours 0.015 have passed" in said and "Still to run" in said, said
        assert (hosts.share / "requeued").read_text() == "requeued\n"
        assert (hosts.share / "runs" / "study" / "report.html").exists()
        for host in NODES:  # the job has taken its Ray along
            assert hosts.run(host, "pgrep", "-f", "raylet/raylet", check=False).stdout == ""
        before = attempts(hosts.share / "runs")

        said = job(1)
        assert (hosts.share / "requeued").read_text() == "requeued\n", "a sweep that has ended is put back"
        trials = tables(hosts.share / "runs").trials
        assert len(trials) == 4 and (trials["status"] == "ended").all(), said
        assert set(trials["node"]) == set(NODES)
        moved = [trial for trial in before if len(attempts(hosts.share / "runs")[trial]) > len(before[trial])]
        assert moved, f"nothing was left at a checkpoint: {before}"
        faults = [json.loads((hosts.share / "runs/study/trials" / t / "end.json").read_text()) for t in moved]
        assert all(end["status"] == "ended" for end in faults)
