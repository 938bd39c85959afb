"""One loop for every recipe: meshes, sharding, optimizers, metrics and checkpoints. Knows no recipe."""
