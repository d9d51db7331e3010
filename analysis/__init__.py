"""What a run costs: operations, bytes and seconds, known before it starts."""
