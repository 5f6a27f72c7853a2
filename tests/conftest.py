"""What every test starts from: no network, one seed, one thread a worker."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
IN_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IN_WORKER:
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

pytest.register_assert_rewrite("tests.rewrites")


@pytest.fixture(scope="session", autouse=True)
def one_thread_a_worker() -> None:
    import torch

    if IN_WORKER:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    import torch

    torch.manual_seed(0)
