"""The whole student out of its parts, in the official layout and back."""

from __future__ import annotations

import dataclasses

import jax
import pytest
import tiny_system
import training_toy as toy

from nd_jax import combine as module
from nd_jax.combine import combine, write_combined
from nd_jax.converters.component import save_component
from nd_jax.decoder_workflow import with_constants
from nd_jax.errors import UserError
from nd_jax.models.causal_vae import definition
from nd_jax.models.system import ADAPTER, CODEC, DENOISER, T5
from nd_jax.pyramid.sampler import SamplePlan
from nd_jax.recipes.decoder_distillation import ENCODER
from nd_jax.recipes.tiny_student import student_config
from nd_jax.system import TOKENIZERS, load_system
from nd_jax.workflow import without_blocks

FEW = SamplePlan((1, 2, 1), (1, 2, 1), grid="plain", renew=True)


@pytest.fixture
def parts(tiny):
    """A pruned denoiser with a plan of few steps, a system with another text student, and a tiny decoder."""
    pruned, _ = without_blocks(tiny, (1,))
    pruned = dataclasses.replace(pruned, sampling=FEW)
    read = {name: jax.tree.map(lambda x: x + 1, tiny.params[name]) for name in (T5, ADAPTER)}
    reader = dataclasses.replace(tiny, params={**tiny.params, **read})
    config = student_config(with_constants(tiny.config.causal_video_vae), (24, 12, 6, 3), *((True, True, True),) * 2)
    params = tiny_system.random_params(definition(config), 5)
    return pruned, reader, (config, {**params, **{name: tiny.params[CODEC][name] for name in ENCODER}})


def test_every_part_is_in_the_whole(parts, tiny_folder, tmp_path):
    pruned, reader, codec = parts
    whole = combine(pruned, text=reader, codec=codec)
    tokenizers = {name: tiny_folder / "tokenizers" / name for name in TOKENIZERS.values()}
    again = write_combined(tmp_path / "whole", whole, tokenizers)
    assert (again.sampling, again.kept_blocks) == (FEW, pruned.kept_blocks)
    for name in (T5, ADAPTER):
        toy.assert_same(toy.numbers(again.params[name]), toy.numbers(reader.params[name]))
    toy.assert_same(toy.numbers(again.params[DENOISER]), toy.numbers(pruned.params[DENOISER]))
    toy.assert_same(toy.numbers(again.params[CODEC]), toy.numbers(codec[1]))


def test_parts_that_do_not_belong_together(parts, tmp_path, monkeypatch):
    pruned, reader, (config, params) = parts
    tower = jax.tree.map(lambda x: x + 1, reader.params["text_encoder_2"])
    with pytest.raises(UserError, match="text_encoder_2 is not that of"):
        combine(pruned, text=dataclasses.replace(reader, params={**reader.params, "text_encoder_2": tower}))
    bare = dataclasses.replace(reader.config, context_adapter=None)
    with pytest.raises(UserError, match="has no text student"):
        combine(pruned, text=dataclasses.replace(reader, config=bare))
    moved = {**params, ENCODER[0]: jax.tree.map(lambda x: x + 1, params[ENCODER[0]])}
    with pytest.raises(UserError, match="expected the same encoder"):
        combine(pruned, codec=(config, moved))
    monkeypatch.setattr(module, "load_system", lambda path: reader)
    with pytest.raises(UserError, match="not what was written"):
        write_combined(tmp_path / "whole", pruned, {})


def test_combining_by_command(run, refused, parts, tiny_folder, tmp_path):
    refused("combine", tiny_folder / "system", "--out", tmp_path / "whole", told="expected --text SYSTEM")
    save_component(tmp_path / "codec", *parts[2])
    code, out, err = run(
        *("combine", tiny_folder / "system", "--text", tiny_folder / "system", "--decoder", tmp_path / "codec"),
        *("--out", tmp_path / "whole"),
    )
    assert (code, out.strip()) == (0, str(tmp_path / "whole")), err
    assert load_system(tmp_path / "whole").config.causal_video_vae == parts[2][0]
