"""Prints how right each recipe of docs/integrations.md is: python -m tests.integrations [FRAMEWORK]...

The relative error of the gradient at the optimizer's step against a float64 reference, and at rho = 0 against the stock
framework, in each setting. A framework that is not installed is "not run". Exits with 1 if an error is above 1e-5.
"""

import contextlib
import io
import logging
import sys
import time
import warnings

from tests.integrations.catalogue import all_cases
from tests.integrations.problems import RIGHT, Case
from tests.needs import reason

HEAD = ("recipe", "setting", "error", "at rho=0", f"right to {RIGHT:.0e}".replace("e-0", "e-"))
WIDTHS = (20, 34, 7, 8, 14)


def line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)) + " |"


def row(case: Case) -> tuple[str, ...]:
    """A case's cells: its two errors and what they say."""
    if why := next(filter(None, map(reason, case.needs)), None):
        return case.framework, case.setting, "", "", f"not run: {why}"
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            errors = case.error(), case.error_at_zero()
    except Exception as error:
        return case.framework, case.setting, "", "", f"failed: {type(error).__name__}: {error}"
    right = all(error <= RIGHT for error in errors)
    return case.framework, case.setting, f"{errors[0]:.0e}", f"{errors[1]:.0e}", "yes" if right else "no"


def main(only: list[str]) -> int:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    started, bad = time.monotonic(), 0
    print(line(HEAD), line(tuple("-" * width for width in WIDTHS)), sep="\n")
    for case in all_cases():
        if only and case.framework not in only:
            continue
        cells = row(case)
        bad += cells[-1] == "no" or cells[-1].startswith("failed")
        print(line(cells), flush=True)
    print(f"{bad} wrong, in {time.monotonic() - started:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
