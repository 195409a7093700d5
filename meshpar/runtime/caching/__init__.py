"""Generation with a cache of keys and values: what is kept, where, and whether it is exact for a model."""
