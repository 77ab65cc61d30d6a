"""Run records -> tables. Never imports torch."""
