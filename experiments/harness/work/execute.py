"""Carries out one run of whatever kind, in its record."""

import traceback
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from experiments.harness.runs.record import record_of
from experiments.harness.runs.spec import Network, Run, Stability, Training
from experiments.harness.work.session import Interrupted
from experiments.harness.work.train import train


def execute(
    spec: Run,
    root: Path,
    *,
    data_root: str | None = None,
    environment: Mapping[str, Any] | None = None,
    redo: bool = False,
    report: Callable[[int, int], None] = lambda step, steps: None,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Bring the run to its end, from where it stands; a finished run is left alone.

    A curvature run first trains the network that it measures, if that is not done.

    Args:
        spec: The run.
        root: The results root; the record is `root/runs/<run_id>/`.
        data_root: A folder to look for data in first.
        environment: Provenance of this session, for the record.
        redo: Delete what there is of this run first, and make it anew; never the network that it measures.
        report: Called with (steps done, steps in all) as the run goes on.
        stop: Asked often; True writes down what there is and raises `Interrupted`.

    Raises:
        Interrupted: if `stop` said so.
        RunLocked: if another process is at work on this run, or on the network that it measures.
        RecordError: if its folder holds something else, or a newer version's record; nothing is touched then.
        Exception: whatever ended the run; it is also in the record.
    """
    settings: dict[str, Any] = {
        "data_root": data_root,
        "environment": environment or {},
        "report": report,
        "stop": stop,
    }
    if type(spec) is Training:
        return train(spec, root, redo=redo, **settings)
    record = record_of(spec, root)
    if spec.network and (redo or not record.done):
        train(spec.network, root, **settings)
    with record.locked():
        if not record.begin(spec, redo=redo):
            return None
        try:
            with record.session():
                import_module(f"experiments.harness.{spec.module}").measure(spec, record, **settings)
        except Interrupted:
            raise
        except Exception as error:
            record.fail(f"{type(error).__name__}: {error}", traceback.format_exc())
            raise
    return None


def check(spec: Run, data_root: str | None = None) -> None:
    """Fetch and verify what a spec's task is made from, before any run starts.

    Raises:
        DataError: if it does not fit; `DataUnavailable` if no source has the data.
    """
    if isinstance(spec, Network):
        from experiments.harness.tasks.build import check_task

        check_task(spec, data_root)
    elif isinstance(spec, Stability):
        from experiments.harness.work import stability

        stability.check(spec)
