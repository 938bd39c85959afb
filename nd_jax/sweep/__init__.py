"""Which blocks can go: populations of pruned denoisers, scored by one program and searched."""
