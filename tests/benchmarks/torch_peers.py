"""PyTorch networks that do the same arithmetic as ours, for timing only.

Written plainly from the description of the layers (3-D convolutions on zero-padded clips, the whole clip at once),
not the official code. Weights are random; what they compute is never compared.
"""

import itertools

import torch
from torch import nn
from torch.nn import functional as F


class CausalConv3d(nn.Module):
    """Zeros before the first frame and around each frame, then an ordinary 3-D convolution."""

    def __init__(self, inputs, outputs, size=3, stride=1):
        super().__init__()
        self.pad = (size // 2,) * 4 + (size - 1, 0)
        self.conv = nn.Conv3d(inputs, outputs, size, stride=stride)

    def forward(self, x):
        return self.conv(F.pad(x, self.pad))


def frame_norm(norm, x):
    """Group norm of every frame by itself."""
    b, c, t, h, w = x.shape
    y = norm(x.transpose(1, 2).reshape(b * t, c, h, w))
    return y.reshape(b, t, c, h, w).transpose(1, 2)


class ResidualBlock(nn.Module):
    def __init__(self, inputs, outputs, groups=32):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, inputs, 1e-6), nn.GroupNorm(groups, outputs, 1e-6)
        self.conv1, self.conv2 = CausalConv3d(inputs, outputs), CausalConv3d(outputs, outputs)
        self.skip = CausalConv3d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x):
        y = self.conv1(F.silu(frame_norm(self.norm1, x)))
        return self.skip(x) + self.conv2(F.silu(frame_norm(self.norm2, y)))


class FrameAttention(nn.Module):
    def __init__(self, channels, groups=32):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, 1e-6)
        self.q, self.k, self.v, self.out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x):
        b, c, t, h, w = x.shape
        y = frame_norm(self.norm, x).permute(0, 2, 3, 4, 1).reshape(b * t, 1, h * w, c)
        y = self.out(F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)))
        return x + y.reshape(b, t, h, w, c).permute(0, 4, 1, 2, 3)


def causal_encoder(channels=(128, 256, 512, 512), layers=2, latent=16):
    """Pixels [B, 3, T, H, W] to moments, all three levels halving space and time."""
    steps, before = [CausalConv3d(3, channels[0])], channels[0]
    for level, width in enumerate(channels):
        for _ in range(layers):
            steps.append(ResidualBlock(before, width))
            before = width
        if level < 3:
            steps += [CausalConv3d(width, width, stride=(1, 2, 2)), CausalConv3d(width, width, stride=(2, 1, 1))]
    steps += [ResidualBlock(before, before), FrameAttention(before), ResidualBlock(before, before)]
    steps += [FrameNorm(before), nn.SiLU(), CausalConv3d(before, 2 * latent), nn.Conv3d(2 * latent, 2 * latent, 1)]
    return nn.Sequential(*steps)


class FrameNorm(nn.Module):
    def __init__(self, channels, groups=32):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, 1e-6)

    def forward(self, x):
        return frame_norm(self.norm, x)


class Memory(nn.Module):
    """Residual block over each frame beside the one before; frames of ONE clip are the batch."""

    def __init__(self, channels):
        super().__init__()
        conv = [nn.Conv2d(n * channels, channels, 3, padding=1) for n in (2, 1, 1)]
        self.body = nn.Sequential(conv[0], nn.ReLU(), conv[1], nn.ReLU(), conv[2])

    def forward(self, x):
        before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
        return F.relu(x + self.body(torch.cat([x, before], 1)))


class GrowTime(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 1, bias=False)

    def forward(self, x):
        n, c, h, w = x.shape
        return self.conv(x).reshape(2 * n, c, h, w)


def tiny_decoder(widths=(256, 128, 64, 64), latent=16):
    """Latent frames [T, C, h, w] of one clip to video frames [8T, 3, 8h, 8w]."""
    steps = [nn.Conv2d(latent, latent, 1), nn.Conv2d(latent, widths[0], 3, padding=1), nn.ReLU()]
    for width, after in itertools.pairwise(widths):
        steps += [Memory(width) for _ in range(3)]
        steps += [nn.Upsample(scale_factor=2), GrowTime(width), nn.Conv2d(width, after, 3, padding=1, bias=False)]
    return nn.Sequential(*steps, nn.ReLU(), nn.Conv2d(widths[-1], 3, 3, padding=1))


class JointBlock(nn.Module):
    """A denoiser block: modulated norms, joint attention of text and image with RMS-normed heads, two MLPs."""

    def __init__(self, width=1536, heads=24):
        super().__init__()
        self.heads = heads
        self.modulate = nn.ModuleList(nn.Linear(width, 6 * width) for _ in range(2))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)) for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(width // heads, eps=1e-5) for _ in range(4))

    def forward(self, text, image, condition, mask, cos, sin):
        streams, parts, heads = [text, image], [], []
        for i, x in enumerate(streams):
            parts.append(self.modulate[i](F.silu(condition))[:, None].chunk(6, -1))
            shift, scale = parts[i][:2]
            y = self.qkv[i](F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)
            q, k, v = y.reshape(*x.shape[:2], 3, self.heads, -1).unbind(2)
            heads.append((self.norms[2 * i](q), self.norms[2 * i + 1](k), v))
        q, k, v = (torch.cat(pair, 1).transpose(1, 2) for pair in zip(*heads, strict=True))

        def rotate(x):
            even, odd = x[..., ::2], x[..., 1::2]
            return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

        seen = F.scaled_dot_product_attention(rotate(q), rotate(k), v, attn_mask=mask)
        seen = seen.transpose(1, 2).flatten(2).split([text.shape[1], image.shape[1]], 1)
        for i, x in enumerate(streams):
            _, _, gate, shift, scale, gate_mlp = parts[i]
            x = x + gate * self.out[i](seen[i])
            y = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
            streams[i] = x + gate_mlp * self.mlp[i](y)
        return streams


def denoiser_blocks(tokens, blocks=4, width=1536, heads=24, text=128):
    """``blocks`` denoiser blocks on random tokens; returns a function without arguments."""
    stack = nn.ModuleList(JointBlock(width, heads) for _ in range(blocks))
    streams = [torch.randn(1, text, width), torch.randn(1, tokens - text, width)]
    condition, mask = torch.randn(1, width), torch.ones(1, 1, tokens, tokens, dtype=torch.bool)
    angle = torch.rand(tokens, width // heads // 2)

    def run():
        state = streams
        for block in stack:
            state = block(*state, condition, mask, angle.cos(), angle.sin())
        return state

    return run
