"""Where arrays live and how they move."""
