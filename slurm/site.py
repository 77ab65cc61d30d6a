"""What belongs to one cluster: read from a small TOML file outside the code. Standard library only.

    partition = "gpu"              # all of these are optional
    account = "my-group"
    qos = "normal"
    constraint = "a100"
    modules = ["python/3.11"]      # loaded first in every job
    setup = ["export NCCL_SOCKET_IFNAME=ib0"]
    gpus_through = "gres"          # for a Slurm that does not know --gpus-per-node

It is `--site FILE`, else the file that MSAM_SLURM_SITE names, else ~/.config/msam/slurm.toml if there is one.
"""

import os
import shlex
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from experiments.harness.runs.spec import SpecError

DEFAULT = Path("~/.config/msam/slurm.toml")


@dataclass(frozen=True, kw_only=True)
class Site:
    """One cluster's facts; empty where nothing was said, so that Slurm's own defaults hold."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    gpus_through: str = "gpus_per_node"

    @property
    def flags(self) -> dict[str, str]:
        """What goes to sbatch as it is, by submitit's names."""
        names = ("partition", "account", "qos", "constraint")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    @property
    def lines(self) -> list[str]:
        """Shell lines that begin every job."""
        return [*(f"module load {shlex.quote(name)}" for name in self.modules), *self.setup]

    def gpus(self, count: int) -> dict[str, Any]:
        """How `count` GPUs on each node are asked for."""
        if not count:
            return {}
        return {"gres": f"gpu:{count}"} if self.gpus_through == "gres" else {"gpus_per_node": count}


def read(path: Path | None = None, partition: str | None = None) -> Site:
    """The site's file, found as the module says.

    Args:
        path: The file; it must exist.
        partition: Put in place of the file's.

    Raises:
        SpecError: if the file is missing, no TOML, or says what is not known.
    """
    named = path or (Path(os.environ["MSAM_SLURM_SITE"]) if os.environ.get("MSAM_SLURM_SITE") else None)
    file = (named or DEFAULT).expanduser()
    said: dict[str, Any] = {}
    if named or file.exists():
        try:
            said = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SpecError(f"The site file {file} cannot be read ({error}): mend it, or name another.") from error
    known = {field.name: field.default for field in fields(Site)}
    for name, value in said.items():
        if name not in known:
            raise SpecError(f"{file} says {name!r}, which is not known; there are {', '.join(known)}.")
        words = isinstance(known[name], tuple)
        if not (
            isinstance(value, list) and all(isinstance(v, str) for v in value) if words else isinstance(value, str)
        ):
            raise SpecError(f"{file}: {name} must be {'a list of strings' if words else 'a string'}, not {value!r}.")
        said[name] = tuple(value) if words else value
    if said.get("gpus_through", "gres") not in ("gres", "gpus_per_node"):
        raise SpecError(f"{file}: gpus_through must be 'gres' or 'gpus_per_node', not {said['gpus_through']!r}.")
    return Site(**{**said, **({"partition": partition} if partition else {})})
