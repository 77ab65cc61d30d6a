"""Data, models and scores, combined in a `Task`."""
