"""Ratios against named peers and physical limits, both sides measured in one run."""
