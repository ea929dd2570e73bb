"""A SLURM cluster of one node for a test: no systemd, everything in one folder, own ports."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue")
# {0} folder, {1} host, {2} and {3} ports
CONF = """ClusterName=lab
SlurmctldHost={1}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={0}/munge.sock
SlurmctldPort={2}
SlurmdPort={3}
StateSaveLocation={0}/state
SlurmdSpoolDir={0}/spool
SlurmctldPidFile={0}/slurmctld.pid
SlurmdPidFile={0}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=1,sched_interval=2
MpiDefault=none
ReturnToService=2
NodeName={1} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def possible() -> bool:
    """Whether the daemons are installed and this user may start them."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return os.geteuid() == 0 and all(shutil.which(name, path=path) for name in PROGRAMS)


@contextlib.contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """The environment in which sbatch reaches the cluster; it is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a socket's path has to be short
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o400)
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(CONF.format(folder, host, *_free_ports()))
    env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    env["PATH"] += ":/usr/sbin:/sbin"
    munged = ["munged", "--foreground", "--force", f"--key-file={folder}/key",
              f"--socket={folder}/munge.sock", f"--pid-file={folder}/munged.pid",
              f"--seed-file={folder}/seed", f"--log-file={folder}/munged.log"]  # fmt: skip
    daemons = []
    try:
        with (folder / "log").open("w") as log:
            for command in (munged, ["slurmctld", "-D", "-c"], ["slurmd", "-D", "-c"]):
                daemons.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
                time.sleep(0.5)
        sinfo = ["sinfo", "--noheader", "--format=%T"]
        for _ in range(100):
            state = subprocess.run(sinfo, env=env, capture_output=True, text=True).stdout
            if state.strip() == "idle":
                break
            time.sleep(0.3)
        else:
            raise RuntimeError(f"the cluster does not come up: {(folder / 'log').read_text()}")
        yield env
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        return one.getsockname()[1], two.getsockname()[1]
