"""Settings and helpers that several test files share."""

import os

# Idle OpenMP threads otherwise spin and slow down the processes that tests start.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():  # the kernel of CUDA runs in an interpreter instead
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_report_header():
    checkout = os.environ.get("DETREX_CHECKOUT")
    return f"detrex: {checkout or 'a stand-in; DETREX_CHECKOUT=FOLDER names a checkout'}"


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)
