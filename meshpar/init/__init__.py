"""Models too big to build: what a constructor does is recorded, and done shard by shard."""
