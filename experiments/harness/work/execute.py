"""Executes one run of any kind and writes its record."""

import traceback
from importlib import import_module
from pathlib import Path

from experiments.harness.runs.record import record_of
from experiments.harness.runs.spec import Network, Run, Stability, Training
from experiments.harness.work.session import Interrupted, Session
from experiments.harness.work.train import train


def execute(spec: Run, session: Session, *, redo: bool = False) -> None:
    """Start or resume the run and complete it; a finished run is left unchanged.

    A curvature run first trains the network that it measures, if that is not done.

    Args:
        spec: The run.
        session: The folders of records and data, and the callbacks for progress and stopping.
        redo: Delete this run's record first and redo it; the network that it measures is never redone.

    Raises:
        Interrupted: if `session.stop` returns True.
        RunLocked: if another process is working on this run, or on the network that it measures.
        RecordError: if its folder holds another run or a newer version's record; nothing is changed then.
        Exception: the error that ended the run, which is also in the record.
    """
    if type(spec) is Training:
        return train(spec, session, redo=redo)
    record = record_of(spec, session.root)
    if spec.network and (redo or not record.done):
        train(spec.network, session)
    with record.locked():
        if not record.begin(spec, redo=redo):
            return None
        try:
            with record.session():
                import_module(f"experiments.harness.{spec.module}").measure(spec, record, session)
        except Interrupted:
            raise
        except Exception as error:
            record.fail(f"{type(error).__name__}: {error}", traceback.format_exc())
            raise
    return None


def check(spec: Run, data_root: Path | None = None) -> None:
    """Fetch and verify a spec's data and model, before any run starts.

    Raises:
        DataError: if they do not match the spec; `DataUnavailable` if no source has the data.
    """
    if isinstance(spec, Network):
        from experiments.harness.tasks.build import check_task

        check_task(spec, data_root)
    elif isinstance(spec, Stability):
        from experiments.harness.work import stability

        stability.check(spec)
