"""What the codecs' graphs share: convolutions of single frames [1, C, h, w], norms and attention of frames.

Clips enter and leave channels-last and are transposed once; an NPU that works channels-last drops these transposes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nd_jax.converters.graphs.builder import Graph, Value
from nd_jax.converters.graphs.layers import Tree, linear, parameter, silu
from nd_jax.models.causal_blocks import EPS


def enter(graph: Graph, name: str, height: int, width: int, channels: int) -> Value:
    """An input [1, h, w, C] as a frame [1, C, h, w]."""
    with graph.scope(name):
        return graph.transpose(graph.input(name, 1, height, width, channels), 0, 3, 1, 2)


def leave(graph: Graph, name: str, x: Value) -> None:
    """A frame as an output [1, h, w, C]."""
    with graph.scope(name):
        graph.output(name, graph.transpose(x, 0, 2, 3, 1))


def conv(
    graph: Graph,
    x: Value,
    name: str,
    kernel: Any,
    bias: Any = None,
    *,
    stride: int = 1,
    pad: tuple[int, int] | None = None,
    change: Callable[[np.ndarray], np.ndarray] = lambda kernel: kernel,
    bias_change: Callable[[np.ndarray], np.ndarray] | None = None,
    shape: Sequence[int] | None = None,
    suffix: str = "",
) -> Value:
    """Convolution padded with zeros (``pad``: before and after, default half the kernel's size on both sides);
    ``change`` makes of the stored kernel one of ``shape`` [k, k, in, out]."""
    size, _, inputs, outputs = kernel.shape if shape is None else shape
    weights = [
        parameter(
            graph,
            f"{name}/kernel{suffix}",
            kernel,
            lambda w: np.ascontiguousarray(change(w).transpose(3, 2, 0, 1)),
            (outputs, inputs, size, size),
        )
    ]
    if bias is not None:
        weights.append(parameter(graph, f"{name}/bias{suffix}", bias, bias_change, (outputs,)))
    before, after = (size // 2, size // 2) if pad is None else pad
    out = [(n + before + after - size) // stride + 1 for n in x.shape[2:]]
    with graph.scope(name):
        return graph.op(
            "Conv",
            [x, *weights],
            (1, outputs, *out),
            "conv",
            kernel_shape=[size] * 2,
            pads=[before, before, after, after],
            strides=[stride] * 2,
        )


def double(graph: Graph, x: Value, name: str) -> Value:
    """Nearest upsampling by 2, in the one form that has an operator on the NPU."""
    _, channels, height, width = x.shape
    scales = graph.weight("scales/2", np.array([1, 1, 2, 2], np.float32))
    with graph.scope(name):
        return graph.op(
            "Resize",
            [x, "", scales],
            (1, channels, 2 * height, 2 * width),
            "double",
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )


def group_norm(graph: Graph, x: Value, name: str, tree: Tree, groups: int, eps: float = EPS) -> Value:
    """Statistics over positions, then over the group's channels by a 1x1 convolution: the operator for it splits an
    axis, which costs six layout copies."""
    channels = x.shape[1]
    average = graph.weight(
        f"group_average/{channels}/{groups}",
        lambda: np.kron(np.eye(groups), np.full([channels // groups] * 2, groups / channels))[:, :, None, None],
        (channels, channels, 1, 1),
    )

    def mean(value: Value, label: str) -> Value:
        each = graph.op("GlobalAveragePool", [value], (1, channels, 1, 1), f"{label}_each")
        return graph.op("Conv", [each, average], each.shape, label, kernel_shape=[1, 1])

    scale, bias = (
        parameter(graph, f"{name}/{key}", tree[key], lambda w: w.reshape(1, -1, 1, 1), (1, channels, 1, 1))
        for key in ("scale", "bias")
    )
    with graph.scope(name):
        centred = graph.sub(x, mean(x, "mean"), "centred")
        variance = mean(graph.mul(centred, centred, "squared"), "variance")
        deviation = graph.unary("Sqrt", graph.add(variance, graph.constant(eps)), "deviation")
        return graph.add(graph.mul(centred, graph.div(scale, deviation), "scaled"), bias, "out")


def attention(graph: Graph, x: Value, name: str, tree: Tree, groups: int) -> Value:
    """Self-attention among a frame's positions, one head over all channels, with residual."""
    _, channels, height, width = x.shape
    normed = group_norm(graph, x, f"{name}/group_norm", tree["group_norm"], groups)
    with graph.scope(name):
        tokens = graph.reshape(graph.transpose(normed, 0, 2, 3, 1), height * width, channels)
        factor = np.float32(channels**-0.5)
        query = linear(graph, tokens, f"{name}/to_q", tree["to_q"], lambda w: w * factor)
        key, value = (linear(graph, tokens, f"{name}/{each}", tree[each]) for each in ("to_k", "to_v"))
        weights = graph.softmax(graph.matmul(query, graph.transpose(key, 1, 0), "scores"))
        seen = linear(graph, graph.matmul(weights, value, "seen"), f"{name}/to_out/0", tree["to_out"]["0"])
        return graph.add(x, graph.transpose(graph.reshape(seen, 1, height, width, channels), 0, 3, 1, 2), "out")


class Frames:
    """Causal convolutions over a list of frames, with what they remember from the frames before.

    With ``past`` None the clip starts here, with a single frame: a convolution is then the 2-D convolution by its last
    time slice. Otherwise ``past(channels, height, width)`` gives the next remembered frame, oldest first.
    """

    def __init__(self, graph: Graph, past: Callable[[int, int, int], Value] | None):
        self.graph, self.past = graph, past
        self.kept: list[Value | None] = []
        """What the next call remembers; None: a frame of zeros, of the size of the frame after it."""

    def conv(self, frames: Sequence[Value], name: str, tree: Tree, *, stride: int = 1, pick: slice | None = None):
        """Every frame convolved with those before it. ``pick`` takes some of the output channels."""
        kernel, bias = tree["kernel"], tree["bias"]
        time, size, _, inputs, outputs = kernel.shape
        chosen = slice(None) if pick is None else pick
        shape = (size, size, inputs, len(range(outputs)[chosen]))
        suffix = "" if pick is None else f"/{pick.start}"
        options = {"stride": stride, "bias_change": lambda b: b[chosen], "suffix": suffix}
        if time == 1 or self.past is None:
            if time > 1:
                self._keep([None] * (time - 1 - len(frames)) + list(frames)[1 - time :], pick)
            last = {"change": lambda w: w[-1][..., chosen], "shape": shape}
            return [conv(self.graph, x, name, kernel, bias, **last, **options) for x in frames]
        _, channels, height, width = frames[0].shape
        seen = [*self._remembered(time - 1, (channels, height, width), name, pick), *frames]
        self._keep(seen[1 - time :], pick)

        def stacked(w: np.ndarray) -> np.ndarray:
            return w[..., chosen].transpose(1, 2, 0, 3, 4).reshape(size, size, time * inputs, -1)

        wide = {"change": stacked, "shape": (size, size, time * inputs, shape[-1])}
        out = []
        for i in range(len(frames)):
            with self.graph.scope(name):
                window = self.graph.concat(seen[i : i + time], axis=1)
            out.append(conv(self.graph, window, name, kernel, bias, **wide, **options))
        return out

    def _remembered(self, count: int, size: tuple[int, int, int], name: str, pick: slice | None) -> list[Value]:
        if pick is None or pick.start == 0:  # the picks of one convolution share their past
            self._last = [self.past(*size) for _ in range(count)]
        return self._last

    def _keep(self, frames: Sequence[Value | None], pick: slice | None) -> None:
        if pick is None or pick.start == 0:
            self.kept += frames

    def residual(self, frames: Sequence[Value], name: str, tree: Tree, groups: int) -> list[Value]:
        """norm, SiLU, convolution, twice, around a skip."""
        y = frames
        for norm, layer in (("norm1", "conv1"), ("norm2", "conv2")):
            y = [group_norm(self.graph, x, f"{name}/{norm}", tree[norm], groups) for x in y]
            y = [self.silu(x, f"{name}/{norm}") for x in y]
            y = self.conv(y, f"{name}/{layer}", tree[layer])
        if "conv_shortcut" in tree:
            frames = self.conv(frames, f"{name}/conv_shortcut", tree["conv_shortcut"])
        with self.graph.scope(name):
            return [self.graph.add(a, b, "out") for a, b in zip(frames, y, strict=True)]

    def silu(self, x: Value, name: str) -> Value:
        with self.graph.scope(name):
            return silu(self.graph, x)

    def middle(self, frames: Sequence[Value], name: str, tree: Tree, groups: int) -> list[Value]:
        """Residual block, attention, residual block."""
        x = self.residual(frames, f"{name}/resnets/0", tree["resnets"]["0"], groups)
        x = [attention(self.graph, y, f"{name}/attentions/0", tree["attentions"]["0"], groups) for y in x]
        return self.residual(x, f"{name}/resnets/1", tree["resnets"]["1"], groups)
