"""The tiny decoder, streaming: one latent frame and the state in, eight video frames and the next state out.

The state is the last frame that every memory block saw. Growth in time (a 1x1 convolution to two frames) is folded
into the 3x3 convolution after it, one kernel for each new frame, so that frames never share an array.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nd_jax.converters.graphs.builder import Graph, Value
from nd_jax.converters.graphs.codec import conv, double, enter, leave
from nd_jax.converters.graphs.layers import Tree
from nd_jax.errors import UserError
from nd_jax.models.codec_config import AsymmetricVAEConfig


def state_shapes(config: AsymmetricVAEConfig, height: int, width: int) -> list[tuple[int, int, int, int]]:
    """[1, h, w, C] of every state, in order."""
    shapes = []
    for channels, space in zip(config.decoder_num_features[:-1], config.decoder_space_upscale, strict=True):
        shapes += [(1, height, width, channels)] * 3
        height, width = (height * 2, width * 2) if space else (height, width)
    return shapes


class _Decoder:
    def __init__(self, graph: Graph, config: AsymmetricVAEConfig, blocks: Tree, states: list[Value]):
        self.graph, self.config, self.blocks, self.states = graph, config, blocks, states
        self.frames: list[Value] = []

    def conv(self, x: Value, path: str, tree: Mapping[str, Any], **options: Any) -> Value:
        return conv(self.graph, x, path, tree["kernel"], tree.get("bias"), **options)

    def relu(self, x: Value) -> Value:
        return self.graph.unary("Relu", x)

    def memory(self, x: Value, index: int, state: int) -> Value:
        """A memory block; its state becomes ``x``."""
        path, tree = f"decoder/blocks/{index}/conv", self.blocks[str(index)]["conv"]
        with self.graph.scope(path):
            both = self.graph.concat([x, self.states[state]], axis=1)
        self.states[state] = x
        y = self.relu(self.conv(both, f"{path}/0", tree["0"]))
        y = self.conv(self.relu(self.conv(y, f"{path}/2", tree["2"])), f"{path}/4", tree["4"])
        return self.relu(self.graph.add(x, y))

    def level(self, x: Value, level: int) -> None:
        """One frame of a level through it and all after it; video frames are appended to ``frames``."""
        config, first = self.config, 3 + 6 * level
        if level == len(config.decoder_space_upscale):
            last = first + 1
            self.frames.append(self.conv(self.relu(x), f"decoder/blocks/{last}", self.blocks[str(last)]))
            return
        for k in range(3):
            x = self.memory(x, first + k, 3 * level + k)
        if config.decoder_space_upscale[level]:
            x = double(self.graph, x, f"decoder/blocks/{first + 3}")
        grow, then = self.blocks[str(first + 4)]["conv"]["kernel"], self.blocks[str(first + 5)]["kernel"]
        inputs, outputs = then.shape[2:]
        for frame in range(2 if config.decoder_time_upscale[level] else 1):

            def folded(kernel: np.ndarray, start: int = frame * inputs) -> np.ndarray:
                to_frame = np.asarray(grow, np.float64)[0, 0, :, start : start + inputs]
                return np.einsum("ci,hwio->hwco", to_frame, kernel.astype(np.float64)).astype(np.float32)

            path, shape = f"decoder/blocks/{first + 5}", (3, 3, inputs, outputs)
            grown = conv(self.graph, x, path, then, change=folded, shape=shape, suffix=f"/frame{frame}")
            self.level(grown, level + 1)


def decoder_graph(config: AsymmetricVAEConfig, params: Tree, height: int, width: int, name: str = "decoder") -> Graph:
    """Inputs: ``latent`` [1, h, w, C] as the codec has it and ``state/K`` (``state_shapes``, zeros at first). Outputs:
    ``frame/F`` [1, H, W, 3], not clamped, and ``next/K``. The first frames of a clip are for the caller to drop.
    """
    if "blocks" not in params["decoder"]:
        raise UserError(f"graph {name}: this codec has no tiny decoder")
    graph, blocks, post = Graph(name), params["decoder"]["blocks"], params["post_quant_conv"]
    x = enter(graph, "latent", height, width, config.encoder_out_channels)
    shapes = state_shapes(config, height, width)
    states = [enter(graph, f"state/{k}", *shape[1:]) for k, shape in enumerate(shapes)]
    decoder = _Decoder(graph, config, blocks, states)
    # 3 tanh(x / 3): the factors go into the convolutions on both sides
    third, kernel = np.float32(1 / 3), post["kernel"]
    x = conv(graph, x, "post_quant_conv", kernel, post["bias"], change=lambda w: w[0] * third,
             bias_change=lambda b: b * third, shape=kernel.shape[1:])  # fmt: skip
    x = decoder.conv(graph.unary("Tanh", x), "decoder/blocks/1", blocks["1"], change=lambda w: w * 3)
    decoder.level(decoder.relu(x), 0)
    for k, frame in enumerate(decoder.frames):
        leave(graph, f"frame/{k}", frame)
    for k, state in enumerate(decoder.states):
        leave(graph, f"next/{k}", state)
    return graph
