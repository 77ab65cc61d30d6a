"""Turn run records into tables, figures and a report. Never imports torch."""
