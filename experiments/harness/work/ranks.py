"""The processes that train one run together: `spec.ranks` of them, each on its share of every mini-batch.

Whoever starts them (slurm/job.py) has called `torch.distributed.init_process_group` in each. m counts micro-batches
over all ranks: a mini-batch is split into the same m micro-batches as in one process, and rank r takes the r-th of
the w equal groups of them. The first rank alone keeps the record.
"""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import msam
from experiments.harness.runs.files import RecordError
from experiments.harness.runs.spec import SpecError, Training


class Ranks:
    """This process among those of a run; a run of one rank needs no process group, and nothing is sent for it.

    Args:
        spec: The run.

    Raises:
        SpecError: if this process is not one of exactly `spec.ranks`.
    """

    def __init__(self, spec: Training) -> None:
        self.count = spec.ranks
        started = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if started != self.count:
            raise SpecError(
                f"ranks is {self.count}, but {started} process{'es' * (started > 1)} trained it: such a run is started "
                "by python -m slurm submit, one process a rank."
            )
        self.rank = dist.get_rank() if self.count > 1 else 0
        hosts = dist.new_group(backend="gloo") if self.count > 1 else None
        assert not isinstance(hosts, int)  # -100, for a process outside of the group
        self._hosts = hosts
        """For what the processes agree about: on GPUs too it is sent between hosts, without a wait for the device."""
        self._micro_batches = spec.micro_batches // self.count
        self._seed = spec.seed

    @property
    def first(self) -> bool:
        """Whether this process keeps the record."""
        return self.rank == 0

    def seed(self) -> None:
        """Seed torch's generators: the first rank's as a run's of its own, each other one's apart from it."""
        apart = int(np.random.SeedSequence((self._seed, self.rank)).generate_state(1)[0])
        torch.manual_seed(apart if self.rank else self._seed)

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The model to train: itself, or in DistributedDataParallel, which gives all ranks the first one's weights.

        Without `find_unused_parameters` the gradients' places in the buckets change after the first step, and with
        them the order of sums over three or more ranks: a resumed run would end with other bits.
        """
        return DistributedDataParallel(model, find_unused_parameters=True) if self.count > 1 else model

    def share(self, batch: Any) -> tuple[Any, int | list[Any]]:
        """What this rank gives `msam.backward` as `batch` and `micro_batches`."""
        if self.count == 1:
            return batch, self._micro_batches
        parts = msam.split(batch, self._micro_batches * self.count)
        return None, parts[self.rank * self._micro_batches : (self.rank + 1) * self._micro_batches]

    def any(self, *flags: bool) -> list[bool]:
        """Whether each flag is true on any rank: the same answer on all."""
        if self.count == 1:
            return list(flags)
        both = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(both, dist.ReduceOp.MAX, self._hosts)
        return [bool(flag) for flag in both.tolist()]

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the ranks, whose shares of a mini-batch are equal."""
        if self.count == 1:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values / self.count

    def gathered(self, value: Tensor) -> list[Tensor]:
        """A CPU tensor of every rank, in order."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, self._hosts)
        return values

    def agree(self, number: int, words: str) -> None:
        """Go on only if all ranks came with the same number.

        Raises:
            RecordError: with `words`, if not.
        """
        found = [int(value) for value in self.gathered(torch.tensor(number))]
        if len(set(found)) > 1:
            raise RecordError(f"{words} ({found}): start the run again, or use another disk.")

    def wait(self) -> None:
        """Go on only once all ranks have come here."""
        if self.count > 1:
            dist.barrier(self._hosts)
