"""How good is a model, and how sure is that? Every number comes with an interval."""
