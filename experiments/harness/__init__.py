"""Runs any experiment: specs and records, data and models, training and measuring, many runs on a machine."""
