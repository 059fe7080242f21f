"""What every test shares: shapes in signatures are checked, seeds and thread counts are fixed, nothing is fetched."""

import os
import random
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # products are tiny here
os.environ["HF_HUB_OFFLINE"] = "1"

import jaxtyping
import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {module.parent.name for module in (ROOT / "moe_lab").glob("*/*.py")}
UNCHECKED = {"kernels"}  # a custom op's schema is read off its bare function
jaxtyping.install_import_hook([f"moe_lab.{room}" for room in sorted(ROOMS - UNCHECKED)], "typechecker.check")

import torch  # noqa: E402  (after the hook, like everything that may import moe_lab)

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported: its kernels run on the CPU

settings.register_profile("lab", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("soak", settings.get_profile("lab"), max_examples=5000)
settings.load_profile("lab")


@pytest.fixture(autouse=True)
def seeds():
    """Tests that draw without a generator of their own still draw the same numbers alone and together."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """As many as a rank has: for bits that are compared with those of ranks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def two_threads():
    """For what threads share among them."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def layer_config():
    """A small layer's settings, with changes."""
    from moe_lab import MoEConfig

    return lambda **changes: MoEConfig(**{"dim": 16, "hidden_dim": 24, "num_experts": 8, "top_k": 2} | changes)
