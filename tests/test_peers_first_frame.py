"""Live against PyTorch, with random weights: diffusers' UNet, autoencoder, LCM scheduler and safety checker,
transformers' CLIP, open_clip's vocabulary.

Needs the `peers` extra. Folders are written by the peers' own ``save_pretrained`` and read by ours.
"""

import gzip
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from nd_jax.converters.component import load_component
from nd_jax.data.tokenizers import TextTokenizer
from nd_jax.models import clip, image_vae, safety_checker, unet
from nd_jax.models.image_vae import ImageVAEConfig
from nd_jax.models.unet import UNetConfig
from nd_jax.pyramid.lcm import LCMSchedule, lcm_sample

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

SMALL = UNetConfig(
    block_out_channels=(8, 12, 24),
    transformer_layers_per_block=(1, (1, 2), (2, 1)),
    reverse_transformer_layers_per_block=((1, 2, 3), (2, 1, 1), 1),
    attention_head_dim=(1, 2, 3),
    cross_attention_dim=20,
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=64,
    norm_num_groups=4,
    sample_size=16,
)
# SSD-1B's widths and heads, one transformer block and one residual block per layer: 0.6 of its 1.3 B parameters.
WIDE = UNetConfig(
    layers_per_block=1,
    transformer_layers_per_block=(1, 1, 1),
    reverse_transformer_layers_per_block=(1, 1, 1),
)


def randomise(network, seed=0):
    """Small random numbers everywhere, also where construction leaves zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            fan_in = max(1, tensor[0].numel()) if tensor.ndim > 1 else 16
            tensor.copy_(1 + 0.1 * noise if "norm" in name and name.endswith("weight") else noise / fan_in**0.5)
    return network.eval()


def close(ours, theirs, scale=2e-5):
    """Within float32 rounding, relative to the largest value."""
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=scale * max(1, np.abs(theirs).max()))


@pytest.mark.parametrize(
    ("config", "size"),
    [
        pytest.param(SMALL, (10, 14), id="small"),
        pytest.param(WIDE, (16, 8), id="full width", marks=pytest.mark.heavy),
    ],
)
def test_unet(tmp_path, config, size):
    peer = randomise(diffusers.UNet2DConditionModel.from_config(config.to_dict()))
    peer.save_pretrained(tmp_path)
    loaded, params = load_component(tmp_path)
    assert loaded == config
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((2, *size, 4), np.float32)
    text = rng.standard_normal((2, 9, config.cross_attention_dim), np.float32)
    pooled = rng.standard_normal((2, config.pooled_channels), np.float32)
    sizes = np.asarray([[640, 1024, 0, 0, 640, 1024], [64, 96, 3, 5, 32, 48]], np.float32)
    timestep = np.asarray([999, 249])
    with torch.no_grad():
        theirs = peer(
            torch.from_numpy(sample).permute(0, 3, 1, 2),
            torch.from_numpy(timestep),
            torch.from_numpy(text),
            added_cond_kwargs={"text_embeds": torch.from_numpy(pooled), "time_ids": torch.from_numpy(sizes)},
        ).sample
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(unet.definition(config))(params, sample, timestep, text, pooled, sizes)
    close(ours, theirs.permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("config", "size"),
    [
        pytest.param(ImageVAEConfig(block_out_channels=(8, 12, 16, 16), norm_num_groups=4), (40, 24), id="small"),
        pytest.param(ImageVAEConfig(), (64, 32), id="full width", marks=pytest.mark.heavy),
    ],
)
def test_image_vae(tmp_path, config, size):
    peer = randomise(diffusers.AutoencoderKL.from_config(config.to_dict()))
    peer.save_pretrained(tmp_path)
    loaded, params = load_component(tmp_path)
    assert loaded == config
    rng = np.random.default_rng(1)
    image = rng.uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    latent = rng.standard_normal((1, 5, 4, 4), np.float32)
    network = image_vae.definition(config)
    with torch.no_grad():
        moments = peer.encode(torch.from_numpy(image).permute(0, 3, 1, 2)).latent_dist.parameters
        decoded = peer.decode(torch.from_numpy(latent).permute(0, 3, 1, 2)).sample
    with jax.default_matmul_precision("highest"):
        close(jax.jit(lambda p, x: network.bind(p).encode(x))(params, image), moments.permute(0, 2, 3, 1))
        close(jax.jit(lambda p, z: network.bind(p).decode(z))(params, latent), decoded.permute(0, 2, 3, 1))


def test_lcm_walk():
    """Against the scheduler as the first-frame generator builds it, on a network that is a fixed function."""
    peer = diffusers.LCMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        original_inference_steps=4,
        steps_offset=1,
    )
    peer.set_timesteps(timesteps=[999, 749, 499, 249], original_inference_steps=4)
    rng = np.random.default_rng(2)
    noises = [rng.standard_normal((1, 6, 5, 4), np.float32) for _ in range(4)]

    def predict(sample, timestep):
        return 0.5 * np.sin(np.asarray(sample)) + timestep / 1000

    ours = lcm_sample(LCMSchedule(), predict, noises[0], noises[1:], LCMSchedule().timesteps(4))
    drawn = iter(noises[1:])
    sample = torch.from_numpy(noises[0])
    for timestep in peer.timesteps:
        # The scheduler draws by itself: only its clean prediction is taken, and noise put on it by its own rule.
        step = peer.step(torch.from_numpy(predict(sample, int(timestep)).astype(np.float32)), timestep, sample)
        later = [int(t) for t in peer.timesteps if t < timestep]
        sample = step.denoised
        if later:
            noise = torch.from_numpy(next(drawn))
            sample = peer.add_noise(step.denoised, noise, torch.tensor([later[0]]))
    close(ours, sample, 1e-5)


def test_clip_text(tmp_path):
    config = transformers.CLIPTextConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        projection_dim=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=20,
    )
    peer = randomise(transformers.CLIPTextModelWithProjection(config))
    peer.save_pretrained(tmp_path)
    loaded, params = load_component(tmp_path)
    ids = np.random.default_rng(3).integers(3, 60, (2, 20))
    with torch.no_grad():
        theirs = peer(torch.from_numpy(ids), output_hidden_states=True)
    with jax.default_matmul_precision("highest"):
        ours = clip.definition(loaded)(params, ids)
    close(ours.penultimate_hidden_state, theirs.hidden_states[-2])
    close(ours.text_embeds, theirs.text_embeds)


def test_safety_checker(tmp_path):
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    peer = StableDiffusionSafetyChecker(
        transformers.CLIPConfig(vision_config={**vision, "projection_dim": 12}, projection_dim=12)
    )
    randomise(peer, seed=5)
    with torch.no_grad():
        for name in ("concept_embeds_weights", "special_care_embeds_weights"):
            getattr(peer, name).uniform_(0.1, 0.5, generator=torch.Generator().manual_seed(6))
    pictures = np.random.default_rng(4).standard_normal((24, 32, 32, 3), np.float32)
    peer.save_pretrained(tmp_path)
    config, params = load_component(tmp_path)
    checker = jax.jit(safety_checker.definition(config))
    with jax.default_matmul_precision("highest"):
        best = np.sort(np.asarray(checker(params, pictures).scores).max(1))
        between = np.argmax(np.diff(best[4:20])) + 4  # thresholds go into the widest gap between the middle pictures
        moved = (best[between] + best[between + 1]) / 2 - safety_checker.MARGIN
        params |= {"concept_embeds_weights": params["concept_embeds_weights"] + moved}
        ours = checker(params, pictures)
    with torch.no_grad():
        peer.concept_embeds_weights += float(moved)
        black = np.ones((24, 1, 1, 3))  # the peer blackens what it objects to
        _, theirs = peer(torch.from_numpy(pictures).permute(0, 3, 1, 2), black)
    assert list(np.asarray(ours.unsafe)) == list(theirs)
    assert 0 < sum(theirs) < 24


def open_clip_folder(folder: Path) -> tuple[Path, object]:
    """CLIP's published vocabulary as a tokenizer folder, and open_clip's own tokenizer."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        pytest.skip("open-clip-torch is not installed")
    package = Path(spec.submodule_search_locations[0])
    alone = importlib.util.spec_from_file_location("open_clip_tokenizer", package / "tokenizer.py")
    module = importlib.util.module_from_spec(alone)  # the package itself would want torchvision
    alone.loader.exec_module(module)
    peer = module.SimpleTokenizer()
    packed = (package / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    merges = gzip.decompress(packed).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(peer.encoder), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special = {**marks, "pad_token": "<|endoftext|>"}
    about = {"tokenizer_class": "CLIPTokenizer", **special, "do_lower_case": True, "model_max_length": 77}
    for name, content in (("special_tokens_map.json", special), ("tokenizer_config.json", about)):
        (folder / name).write_text(json.dumps(content))
    return folder, peer


def test_clip_tokenizer_with_the_published_vocabulary(tmp_path):
    # open_clip writes its marks <start_of_text> and <end_of_text>; their ids are those of the published files.
    folder, peer = open_clip_folder(tmp_path / "tokenizer")
    vocabulary = json.loads((folder / "vocab.json").read_text())
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    (folder / "vocab.json").write_text(json.dumps({renamed.get(name, name): n for name, n in vocabulary.items()}))
    ours = TextTokenizer.from_folder(folder)
    assert ours.vocab_size == 49408
    texts = [
        "a photo of a cat",
        "A Huge CRIMSON disc, gliding -- to the upper-left!!",
        "  two   spaces\tand a tab ",
        "don't stop: 12 ducks' cafés, 3.14159 and hyper-realistic 8K",
        "日本 🎈 naïve Ærøskøbing",
        "",
    ]
    found = ours(texts)
    assert list(found.ids[0][:8]) == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    for text, row, mask in zip(texts, found.ids, found.mask, strict=True):
        expected = peer([text])[0].numpy()
        count = int(np.argmax(expected == 49407)) + 1
        assert list(row[:count]) == list(expected[:count]), text
        assert mask.sum() == count
    (warning,) = ours(["word " * 100]).warnings
    assert "cut to 77 tokens" in warning
