"""Turn run records into tables, figures and a report. Never imports torch."""

from experiments.harness import runs as _runs  # noqa: F401  experiments rejects a Python that is too old
