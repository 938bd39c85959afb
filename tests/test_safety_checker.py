"""The safety checker: what it reads, how it decides, names both ways, full size."""

import jax
import numpy as np
import pytest
from tiny_system import random_params

from nd_jax.converters.component import load_component, save_component
from nd_jax.converters.kinds import abstract_tensors, detect_kind
from nd_jax.errors import UserError
from nd_jax.models.functional import count_parameters
from nd_jax.models.safety_checker import MEAN, STD, SafetyCheckerConfig, definition, prepare

SMALL = SafetyCheckerConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=12,
    patch_size=4,
    projection_dim=8,
)


def test_full_size():
    config = SafetyCheckerConfig()
    assert count_parameters(definition(config).abstract()) == 303_179_776 + 1024 * 768 + 20 * 768 + 20
    names = abstract_tensors("safety_checker", config)
    assert names["vision_model.vision_model.embeddings.position_embedding.weight"][0] == (257, 1024)
    assert names["vision_model.vision_model.embeddings.patch_embedding.weight"][0] == (1024, 3, 14, 14)
    assert names["visual_projection.weight"][0] == (768, 1024)
    assert names["concept_embeds"][0] == (17, 768)
    assert names["special_care_embeds_weights"][0] == (3,)


def test_config_both_ways_and_defaults():
    assert SafetyCheckerConfig.from_dict(SMALL.to_dict()) == SMALL
    official = {
        "architectures": ["StableDiffusionSafetyChecker"],
        "model_type": "clip",
        "projection_dim": 768,
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
        },
    }
    assert detect_kind(official, "config.json").name == "safety_checker"
    assert SafetyCheckerConfig.from_dict(official) == SafetyCheckerConfig()
    with pytest.raises(UserError, match="image_size"):
        SafetyCheckerConfig(image_size=225)
    with pytest.raises(UserError, match="num_hidden_layers"):
        SafetyCheckerConfig.from_dict({"vision_config": {"num_hidden_layers": 10**9}})


def test_folder_both_ways(tmp_path):
    params = random_params(definition(SMALL))
    save_component(tmp_path / "official", SMALL, params)
    config, loaded = load_component(tmp_path / "official")
    assert config == SMALL
    jax.tree.map(np.testing.assert_array_equal, params, loaded)


def test_decision():
    """Thresholds are set around the cosines that the network itself finds."""
    network, params = definition(SMALL), random_params(definition(SMALL))
    image = np.random.default_rng(0).random((2, 12, 12, 3), np.float32)
    params |= {"concept_embeds_weights": np.zeros(17, np.float32)}
    params |= {"special_care_embeds_weights": np.full(3, 2, np.float32)}
    cosines = np.asarray(network(params, image).scores)

    def verdict(margins, special=2.0):
        """``margins``: distance of each picture's first concept from its threshold; all others are out of reach."""
        weights = np.full(17, 2, np.float32)
        weights[0] = cosines[0, 0] - margins
        changed = {"concept_embeds_weights": weights, "special_care_embeds_weights": np.full(3, special, np.float32)}
        return bool(network(params | changed, image[:1]).unsafe[0])

    assert verdict(0.002)
    assert not verdict(0.0003)  # 0.000 when rounded to three decimals
    assert not verdict(-0.005)
    assert verdict(-0.005, special=-2.0)  # special care lowers the thresholds by 0.01
    assert not verdict(-0.012, special=-2.0)


def test_prepared_pictures():
    wide = np.zeros((1, 24, 48, 3), np.float32)
    wide[:, :, 12:36] = 1
    made = np.asarray(prepare(wide, 12))
    assert made.shape == (1, 12, 12, 3)
    white = (1 - np.asarray(MEAN)) / np.asarray(STD)
    np.testing.assert_allclose(made[0, 6, 6], white, atol=1e-5)  # only the middle is left
    assert prepare(np.zeros((1, 5, 7, 3), np.float32), 12).shape == (1, 12, 12, 3)
