"""Measurement, Evidence and its appraisal."""
