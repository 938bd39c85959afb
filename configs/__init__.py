"""Presets, one file each; ``nd_jax.recipes.preset.load_preset`` finds them by name."""
