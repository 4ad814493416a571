"""Attention over many ranks: each holds a shard of the tokens and gets its shard of the output, exact in gradient."""
