"""One engine, many people, the same answers."""
