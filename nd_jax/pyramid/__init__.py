"""The mathematics of pyramidal video diffusion: pure functions on channels-last arrays [B, T, H, W, C].

``schedule`` (stages, sigmas, steps), ``resample`` and ``renoise`` (between resolutions), ``layout`` and ``history``
(what one denoiser call sees), ``targets`` and ``examples`` (what it is trained on), ``columns`` and ``lengths`` (how a
batch is split), ``noise`` (named draws), ``normalise`` (latent and pixel ranges), ``sampler`` (the loop).
"""
