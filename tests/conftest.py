import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from forks import Forks

# Small products run no faster on two threads, and far slower where the machine is busy; also in child processes.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The directory of real text that MINILLM_TEST_DATA names."""
    if "MINILLM_TEST_DATA" not in os.environ:
        pytest.skip("MINILLM_TEST_DATA is not set: the real texts are not part of the project")
    return Path(os.environ["MINILLM_TEST_DATA"])


@pytest.fixture(scope="session")
def forks(tmp_path_factory) -> Iterator[Forks]:
    """Starts processes at once."""
    with Forks(tmp_path_factory.mktemp("forks")) as forks:
        yield forks


@pytest.fixture
def known_peak(monkeypatch) -> None:
    """train.py is told how fast the device is: measuring that takes longer than a small run."""
    monkeypatch.setattr("minillm.recipe.wiring.peak_flops", lambda *_: 1e10)


@pytest.fixture
def disk(tmp_path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A file system of 8 MB, and a function that fills all but 64 kB of it.

    Where none can be mounted the function sets a limit of 4 kB on the size of files.
    """
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        if mounted:
            (place / "filler").write_bytes(bytes(shutil.disk_usage(place).free - 2**16))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    yield place, fill
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if mounted:
        subprocess.run(["umount", str(place)], check=True)
