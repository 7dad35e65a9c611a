"""Limits before the model, sanitizers on the way in, output control on the way out."""
