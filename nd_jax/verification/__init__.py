"""Golden cases recomputed: reading them, the tolerances, and one file per family of networks.

``nd_jax.verify`` is the entrance.
"""
