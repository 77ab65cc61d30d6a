"""A real Slurm on this machine: munged, slurmctld and two slurmd on loopback, which end with this process.

On Debian: apt-get install --no-install-recommends slurm-wlm munge; it runs as root. It has two nodes with 32 simulated
CPUs and 4 simulated GPUs each, and the partitions debug, low (preempted by high and requeued) and high. There is no
accounting, as on many clusters.
"""

import ctypes
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from pathlib import Path

from tests import needs

CONFIGURATION = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={state}/munge.sock,cred_expire=5
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
StateSaveLocation={state}/saved
SlurmdSpoolDir={state}/%n
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/%n.pid
SlurmctldLogFile={state}/slurmctld.log
SlurmdLogFile={state}/%n.log
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,defer_batch=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=2
MinJobAge=86400
MaxArraySize={largest_array}
InactiveLimit=0
WaitTime=0
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=32 RealMemory=131072 Gres=gpu:none:4
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=32 RealMemory=131072 Gres=gpu:none:4
PartitionName=debug Nodes=ALL Default=YES PriorityTier=1 PreemptMode=OFF
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=9 PreemptMode=OFF
"""


class Loopback:
    """The cluster, from construction until `stop`. With `environment`, Slurm's commands use it."""

    def __init__(self, largest_array: int = 1001) -> None:
        needs.require("slurm")
        self.state = Path(tempfile.mkdtemp(prefix="slurm-"))  # socket paths must be shorter than 108 bytes
        self.state.chmod(0o755)
        self.environment = {"SLURM_CONF": str(self.state / "slurm.conf")}
        self._daemons: list[subprocess.Popen] = []
        ports = _free_ports(3)
        text = CONFIGURATION.format(
            host=socket.gethostname().split(".")[0], state=self.state, ports=ports, largest_array=largest_array
        )
        (self.state / "slurm.conf").write_text(text)
        for gpu in range(4):  # Slurm needs existing devices: these are copies of /dev/null
            os.mknod(self.state / f"gpu{gpu}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        gpus = f"NodeName=n[1-2] Name=gpu Type=none Flags=nvidia_gpu_env File={self.state}/gpu[0-3]"
        (self.state / "gres.conf").write_text(f"AutoDetect=off\n{gpus}\n")
        (self.state / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.state / "saved").mkdir()
        key = self.state / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        files = {name: f"{self.state}/munge{end}" for name, end in MUNGE_FILES.items()}
        self._launch("munged", "--foreground", "--force", *(f"--{name}={file}" for name, file in files.items()))
        _until(lambda: (self.state / "munge.sock").exists(), 10, self._logs)
        self._launch("slurmctld", "-D", "-i", "-f", self.environment["SLURM_CONF"])
        for node in ("n1", "n2"):
            self._launch("slurmd", "-D", "-N", node, "-f", self.environment["SLURM_CONF"])
        _until(lambda: self("sinfo", "-h", "-N", "-p", "debug", "-o", "%T").split() == ["idle"] * 2, 60, self._logs)

    def __call__(self, *command: str, check: bool = False) -> str:
        """The output of a Slurm command."""
        environment = {**os.environ, **self.environment}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=check)
        return done.stdout

    def stop(self) -> None:
        """End all jobs and daemons, and remove their files."""
        if len(self._daemons) > 1:
            self("scancel", "--user=root")
            with_jobs = time.monotonic() + 15
            while self("squeue", "-h").strip() and time.monotonic() < with_jobs:
                time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()
        shutil.rmtree(self.state, ignore_errors=True)

    def _launch(self, *command: str) -> None:
        with open(self.state / "console.log", "a") as log:
            daemon = subprocess.Popen(
                command,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        self._daemons.append(daemon)

    def _logs(self) -> str:
        return "\n".join(f"--- {path}\n{path.read_text()[-2000:]}" for path in sorted(self.state.glob("*.log")))


MUNGE_FILES = {"key-file": ".key", "socket": ".sock", "pid-file": ".pid", "log-file": ".log", "seed-file": ".seed"}


def _die_with_parent() -> None:
    """End this process (on Linux) when its parent dies, however it dies."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _until(ready, seconds: float, logs) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise RuntimeError(f"The loopback Slurm did not start.\n{logs()}")
        time.sleep(0.1)
