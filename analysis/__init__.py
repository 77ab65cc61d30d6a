"""Turn run records into tables, figures and a report. Never imports torch."""

import experiments  # noqa: F401  rejects a Python that is too old
