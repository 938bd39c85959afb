"""Golden weights of the video codecs as parameter trees, by rules of this file's own (the converters have theirs)."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from nd_jax.models.causal_vae import config_from_dict, definition

AXES = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0), 5: (2, 3, 4, 1, 0)}


def load_codec(case):
    """(definition, params) of a golden codec case."""
    return load_codec_files(case.config, case.folder / "weights.safetensors")


def load_codec_files(config, weights):
    net = definition(config_from_dict(config))
    tensors, used = load_file(weights), set()

    parts = {name.split(".")[0] for name in tensors}  # some cases hold the encoder or the decoder alone

    def fill(abstract, path):
        if path and path[0] not in parts:
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), abstract)
        if isinstance(abstract, dict):
            return {key: fill(value, [*path, key]) for key, value in abstract.items()}
        name = ".".join(re.sub(r"^(kernel|scale)$", "weight", key) for key in path)
        if name not in tensors:  # a 3-D convolution: torch wraps it once more
            name = re.sub(r"\.(weight|bias)$", r".conv.\1", name)
        used.add(name)
        value = np.transpose(tensors[name], AXES[tensors[name].ndim])
        assert value.shape == abstract.shape, name
        return jnp.asarray(value)

    params = fill(net.abstract(), [])
    assert used == set(tensors)
    return net, params


def channels_last(array):
    """B C T H W to B T H W C."""
    return jnp.asarray(np.moveaxis(array, 1, -1))


def channels_first(array):
    """B T H W C to B C T H W."""
    return np.moveaxis(np.asarray(array), -1, 1)
