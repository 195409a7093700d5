"""From one checkpoint to another one: other meshes, other formats."""
