"""Models as people write them by hand, in plain torch."""
