"""Converts the metrics of runs into TensorBoard's event files. The records stay the only store."""

from collections.abc import Iterable
from pathlib import Path

from experiments.harness.runs.command_line import Mistake
from experiments.harness.runs.record import Record

NOT_DRAWN = ("epoch", "step", "steps")
"""Entries of a line that count and measure nothing."""


def convert(records: Iterable[Record], folder: Path) -> int:
    """Write one folder of events for each run that has metrics; events of an earlier call are replaced.

    Args:
        records: The runs, finished or under way.
        folder: Where to write; a run's folder is named by its title and id.

    Returns:
        The number of runs written.

    Raises:
        Mistake: if TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise Mistake(
            f"TensorBoard is not installed ({error}): install it with .venv/bin/python -m pip install tensorboard, "
            "and run again."
        ) from error
    written = 0
    for record in records:
        lines = [line for line in record.metrics() if "epoch" in line]
        if not lines:
            continue
        place = folder / f"{record.spec().title.replace('/', '_').replace(' ', '_')}_{record.run_id}"
        for old in place.glob("events.out.tfevents.*"):
            old.unlink()
        with SummaryWriter(str(place)) as writer:
            for line in lines:
                for name, value in line.items():
                    if name not in NOT_DRAWN and isinstance(value, int | float):
                        writer.add_scalar(name, value, line["epoch"])
        written += 1
    return written
