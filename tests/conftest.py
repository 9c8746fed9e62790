import os
from pathlib import Path

import pytest
import torch

# Small products run no faster on two threads, and far slower where the machine is busy; also in child processes.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The directory of real text that MINILLM_TEST_DATA names."""
    if "MINILLM_TEST_DATA" not in os.environ:
        pytest.skip("MINILLM_TEST_DATA is not set: the real texts are not part of the project")
    return Path(os.environ["MINILLM_TEST_DATA"])
