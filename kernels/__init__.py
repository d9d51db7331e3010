"""Attention: one mask algebra, one dispatch, an oracle that every backend is held to."""
