"""Shared by the tests: the repository on the path, one thread, a tiny random checkpoint, real problems if they are there."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# torch's store asks for the name behind every connection; a name server that does not answer would cost 5 s each time
os.environ.setdefault("RES_OPTIONS", "attempts:0")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest
import torch

torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "vllm: needs the vLLM environment, bash tests/run.sh --vllm")


def single_rank():
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """folder of a random Qwen2.5-VL in the Hugging Face layout"""
    import toy

    path = tmp_path_factory.mktemp("tiny")
    toy.random_model(path, seed=3, max_pixels=16 * 28 * 28)
    return str(path)


@pytest.fixture(scope="session")
def real():
    """folder of real problems with images"""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("the real problems (../shared/data) are not here")
    return path


@pytest.fixture()
def pictures():
    """a few records of the toy world with images of several sizes, and one without an image"""
    import io

    from PIL import Image

    import toy
    from nano.data import Record

    records = toy.problems(4, 0, "t")
    for i, size in enumerate([(56, 84), (140, 56)]):
        out = io.BytesIO()
        Image.effect_noise(size, 80).convert("RGB").save(out, "PNG")
        records[i].images = [out.getvalue()]
    records.append(
        Record(
            "two",
            "<image>Add the numbers of<image>both .",
            "7",
            [records[0].images[0], records[3].images[0]],
        )
    )
    records.append(Record("none", "Add 2 and 3 .", "5", []))
    return records
