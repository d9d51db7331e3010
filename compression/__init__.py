"""A smaller model: in codes, or with numbers left out; and what that cost."""
