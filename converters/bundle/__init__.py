"""Bundles: the folder that a mobile team gets. ``build`` writes one, ``inspect`` reads one, ``quantise`` and
``calibration`` make its W8A16 graphs; ``nd_jax.converters.runtime`` runs it."""
