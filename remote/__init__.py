"""Buckets: how they are read and written where the house expects a directory."""
