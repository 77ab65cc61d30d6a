"""Data-parallel training: `spec.ranks` processes train one run, each on its share of every mini-batch.

The caller (slurm/job.py) must call `torch.distributed.init_process_group` in each process first. m counts micro-batches
over all ranks: a mini-batch is split into the same m micro-batches as in one process, and each of the w ranks takes one
of w equal groups, rank r the r-th. Only the first rank writes the record.
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
    """This process and the other ranks of its run. A run with one rank needs no process group and no communication.

    Args:
        spec: The run.

    Raises:
        SpecError: if the number of started processes is not `spec.ranks`.
    """

    def __init__(self, spec: Training) -> None:
        self.count = spec.ranks
        started = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if started != self.count:
            raise SpecError(
                f"ranks is {self.count}, but {started} process{'es' * (started > 1)} started: start such a run with "
                "python -m slurm submit, which starts one process per rank."
            )
        self.rank = dist.get_rank() if self.count > 1 else 0
        hosts = dist.new_group(backend="gloo") if self.count > 1 else None
        assert not isinstance(hosts, int)  # -100, for a process outside the group
        self._hosts = hosts
        """Process group for control messages: they go between hosts even on GPUs, without waiting for the device."""
        self._micro_batches = spec.micro_batches // self.count
        self._seed = spec.seed

    @property
    def first(self) -> bool:
        """Whether this process writes the record."""
        return self.rank == 0

    def seed(self) -> None:
        """Seed torch's generators: the first rank like a run in one process, every other rank differently."""
        own = int(np.random.SeedSequence((self._seed, self.rank)).generate_state(1)[0])
        torch.manual_seed(own if self.rank else self._seed)

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The model, in DistributedDataParallel if there are several ranks; all ranks get the first rank's weights.

        Without `find_unused_parameters`, DDP rearranges the gradients in its buckets after the first step. This changes
        the order of sums over three or more ranks, so a resumed run would not match bit for bit.
        """
        return DistributedDataParallel(model, find_unused_parameters=True) if self.count > 1 else model

    def share(self, batch: Any) -> tuple[Any, int | list[Any]]:
        """This rank's arguments `batch` and `micro_batches` of `msam.backward`."""
        if self.count == 1:
            return batch, self._micro_batches
        parts = msam.split(batch, self._micro_batches * self.count)
        return None, parts[self.rank * self._micro_batches : (self.rank + 1) * self._micro_batches]

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is true on any rank; all ranks get the same answer."""
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
        """The CPU tensors of all ranks, in order."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, self._hosts)
        return values

    def agree(self, number: int, words: str) -> None:
        """Check that all ranks have the same number.

        Raises:
            RecordError: with `words`, if they differ.
        """
        numbers = [int(value) for value in self.gathered(torch.tensor(number))]
        if len(set(numbers)) > 1:
            raise RecordError(f"{words} ({numbers}): start the run again, or use another disk.")

    def wait(self) -> None:
        """Wait until all ranks call this."""
        if self.count > 1:
            dist.barrier(self._hosts)
