"""The paper's experiments, one file each; `python -m experiments list` shows them."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  a checkout may be run with any Python
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    sys.stderr.write(
        f"Python 3.11 or newer is needed, but this is Python {version}: use .venv/bin/python, which `make setup` "
        "builds.\n"
    )
    raise SystemExit(2)
