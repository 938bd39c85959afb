"""Videos from a bundle of ONNX graphs: numpy and onnxruntime, without JAX.

This folder is a distribution of its own, ``nd-jax-runtime``, importable as ``nd_jax_runtime``; inside nd-jax it is
``nd_jax.converters.runtime``. It imports neither jax nor nd_jax and reads every layout, schedule and constant from the
bundle. ``pipeline.Pipeline`` makes videos, ``python -m nd_jax_runtime`` does it from a command line.
"""
