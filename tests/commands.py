"""Commands and scripts without the seconds that a process takes to import torch: called here, or forked."""

import contextlib
import importlib
import io
import logging
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
WARM = multiprocessing.get_context("forkserver")
"""Its processes are forked from one that has imported torch and has computed nothing: the pool's, if that started."""


def command(module: str, *arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    """What `python -m MODULE ARGUMENTS` in this checkout prints, and its exit status.

    An exception that would end it with a traceback is raised. Workers still are processes: the pool forks them from a
    server that the tests of this process share.

    Args:
        module: `"experiments"`, `"analysis"` or `"slurm"`.
        arguments: The rest of the command line.
        environment: Variables to set.
    """
    words = [module, *map(str, arguments)]
    main = importlib.import_module(f"{module}.__main__").main
    out, errors = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", words),
        mock.patch.dict(os.environ, environment),
        contextlib.chdir(ROOT),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
        _unconfigured_log(),
    ):
        try:
            main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
    return subprocess.CompletedProcess(words, status, out.getvalue(), errors.getvalue())


def script(path: Path) -> "subprocess.CompletedProcess[str]":
    """What `python PATH` prints in the folder of the script, and its exit status; the process is forked."""
    process = warm(_script, path)
    process.start()
    process.join()
    out, errors = (path.with_suffix(end).read_text() for end in (".out", ".err"))
    return subprocess.CompletedProcess([str(path)], process.exitcode or 0, out, errors)


def warm(target: Callable[..., object], *arguments: object) -> "multiprocessing.context.ForkServerProcess":
    """A process that will call a function of a module; start it, and join or kill it."""
    WARM.set_forkserver_preload(["experiments.harness.machine.worker", "experiments.harness.work.train"])
    return WARM.Process(target=target, args=arguments)


def _script(path: Path) -> None:
    for number, end in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(path.with_suffix(end), os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.chdir(path.parent)
    runpy.run_path(str(path), run_name="__main__")


@contextlib.contextmanager
def _unconfigured_log() -> Iterator[None]:
    """Without the handlers of pytest, so that a command sets up its own, as at the start of a process."""
    handlers, level = logging.root.handlers, logging.root.level
    logging.root.handlers = []
    logging.root.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logging.root.handlers = handlers
        logging.root.setLevel(level)
