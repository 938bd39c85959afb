"""What every test shares: eight fake CPU devices, the golden folder and a reader for its cases."""

import json
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and run little: without LLVM's optimisations they take half the time.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)

import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden"


class GoldenCase:
    """One folder of golden data: config, arrays by ``SUBCASE/NAME`` and what meta.json says of the subcases."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.meta = json.loads((folder / "meta.json").read_text())
        self.inputs = dict(np.load(folder / "inputs.npz", allow_pickle=False))
        self.outputs = dict(np.load(folder / "outputs.npz", allow_pickle=False))

    def subcase(self, name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Inputs and outputs whose names start with ``name/``, without that prefix."""
        cut = len(name) + 1
        return tuple(
            {key[cut:]: value for key, value in arrays.items() if key.startswith(name + "/")}
            for arrays in (self.inputs, self.outputs)
        )


@pytest.fixture(scope="session")
def golden():
    """Function from a case's name to its ``GoldenCase``."""
    return lambda case: GoldenCase(GOLDEN / case)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Folder with ``system`` (official layout, random weights) and ``tokenizers``; read only."""
    import tiny_system

    folder = tmp_path_factory.mktemp("tiny")
    tiny_system.write_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """The tiny folder's system in memory."""
    from nd_jax.system import load_system

    return load_system(tiny_folder / "system")


@pytest.fixture(scope="session")
def tiny_generator(tiny):
    """Up to 17 frames of 64 x 128 with the tiny system, its programs compiled once for the whole session."""
    from nd_jax.generate import Generator

    return Generator(tiny, height=64, width=128, frames=17)


@pytest.fixture
def run(capsys):
    """Function from a command's arguments to (exit code, standard output, standard error)."""
    from nd_jax import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        told = capsys.readouterr()
        return code, told.out, told.err

    return call


@pytest.fixture
def refused(run):
    """Checks that arguments end in exit code 2 and one line on standard error that holds every one of ``told``."""

    def check(*arguments: object, told: str | tuple[str, ...]) -> str:
        code, out, err = run(*arguments)
        assert code == 2, (out, err)
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        for each in (told,) if isinstance(told, str) else told:
            assert each in err
        return err

    return check


@pytest.fixture
def secret(monkeypatch):
    """``SECRET`` is one more prompt that evaluation uses."""
    from prompt_corpora import SECRET

    from nd_jax.data import evaluation_prompts, prompts

    hashes = evaluation_prompts.HASHES | {evaluation_prompts.prompt_hash(SECRET)}
    for module in (evaluation_prompts, prompts):
        monkeypatch.setattr(module, "HASHES", hashes)
