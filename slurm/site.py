"""Settings of one cluster, read from a small TOML file outside the code. Standard library only.

    partition = "gpu"              # all of these are optional
    account = "my-group"
    qos = "normal"
    constraint = "a100"
    modules = ["python/3.11"]      # loaded first in every job
    setup = ["export NCCL_SOCKET_IFNAME=ib0"]
    gpus_through = "gres"          # if this Slurm has no --gpus-per-node

The file is `--site FILE`, else the one in MSAM_SLURM_SITE, else ~/.config/msam/slurm.toml if it exists.
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
    """One cluster's settings; an empty setting leaves Slurm's default."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    gpus_through: str = "gpus_per_node"

    @property
    def flags(self) -> dict[str, str]:
        """Options that are passed to sbatch unchanged, by submitit's names."""
        names = ("partition", "account", "qos", "constraint")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    @property
    def lines(self) -> list[str]:
        """Shell lines at the start of every job."""
        return [*(f"module load {shlex.quote(name)}" for name in self.modules), *self.setup]

    def gpus(self, count: int) -> dict[str, Any]:
        """The option that requests `count` GPUs per node."""
        if not count:
            return {}
        return {"gres": f"gpu:{count}"} if self.gpus_through == "gres" else {"gpus_per_node": count}


def read(path: Path | None = None, partition: str | None = None) -> Site:
    """Read the site's file; the module's docstring says which file that is.

    Args:
        path: The file; it must exist.
        partition: Overrides the file's partition.

    Raises:
        SpecError: if the file is missing, is not TOML, or has an unknown setting.
    """
    named = path or (Path(os.environ["MSAM_SLURM_SITE"]) if os.environ.get("MSAM_SLURM_SITE") else None)
    file = (named or DEFAULT).expanduser()
    settings: dict[str, Any] = {}
    if named or file.exists():
        try:
            settings = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SpecError(f"The site file {file} cannot be read ({error}): fix it, or give another.") from error
    known = {field.name: field.default for field in fields(Site)}
    for name, value in settings.items():
        if name not in known:
            raise SpecError(f"{file}: unknown setting {name!r}; the settings are {', '.join(known)}.")
        is_list = isinstance(known[name], tuple)
        if not (
            isinstance(value, list) and all(isinstance(v, str) for v in value) if is_list else isinstance(value, str)
        ):
            raise SpecError(f"{file}: {name} must be {'a list of strings' if is_list else 'a string'}, not {value!r}.")
        settings[name] = tuple(value) if is_list else value
    if settings.get("gpus_through", "gres") not in ("gres", "gpus_per_node"):
        raise SpecError(f"{file}: gpus_through must be 'gres' or 'gpus_per_node', not {settings['gpus_through']!r}.")
    return Site(**{**settings, **({"partition": partition} if partition else {})})
