"""From raw text to batches: sources, cleaning, tokenizers, shards, packing, loading."""
