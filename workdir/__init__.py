"""A run's directory: checkpoints, metrics, progress, reports; the only code that knows its
layout.
"""
