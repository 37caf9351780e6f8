"""Fixtures that all tests share: tiny checkpoints, small scans, empty stores, the shared data where it is present."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from PIL import Image
from playwright.sync_api import Browser

from support import s3_server
from support.browser import NoBrowserError, browser, chromium
from support.checkpoints import save_tiny_blip, save_tiny_checkpoint, save_tiny_xl_checkpoint
from support.pictures import gray_picture
from tasks.storage import Store

os.environ["DO_NOT_TRACK"] = "1"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
ON_S3_TOO = pytest.mark.parametrize("store", ["local", "memory", "s3"], indirect=True)
"""For tests of what depends on the store: each takes seconds on S3."""


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real inputs in a folder beside the checkout; tests that need them skip without it."""
    if not SHARED.is_dir():
        pytest.skip(f"no shared data at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def s3_environment(tmp_path_factory) -> Iterator[dict[str, str]]:
    """The environment variables of a real S3 server on loopback, also set in this process."""
    folder = tmp_path_factory.mktemp("s3")
    try:
        variables = s3_server.start(folder, s3_server.free_port(), install="DIFFCOLOR_TEST_S3" in os.environ)
    except s3_server.NoServerError as error:
        pytest.skip(f"no S3 server: {error}")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("diffcolor-tests")
        yield variables
    s3_server.stop(folder)


@pytest.fixture
def s3_url(s3_environment) -> str:
    """An empty folder on the real S3 server."""
    return f"s3://diffcolor-tests/{uuid.uuid4().hex}"


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path) -> Store:
    """An empty folder on a disk and one in memory; with `ON_S3_TOO` on an S3 server too."""
    return empty_store(request.param, request, tmp_path)


def empty_store(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty folder on a disk ("local"), in memory, or on an S3 server ("s3")."""
    if kind == "s3":
        return Store(request.getfixturevalue("s3_url"))
    return Store(str(tmp_path / "it's out") if kind == "local" else f"memory://{tmp_path}")


@pytest.fixture(scope="module")
def chrome() -> Iterator[Browser]:
    """A headless Chromium. Only for a module, as no other event loop can run beside its own."""
    try:
        path = chromium(install="DIFFCOLOR_TEST_BROWSER" in os.environ)
    except NoBrowserError as error:
        pytest.skip(str(error))
    with browser(path) as running:
        yield running


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One real local Ray for all tests that need one in this process."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on loopback
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_v_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny-v"), "v_prediction")


@pytest.fixture(scope="session")
def tiny_xl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_xl_checkpoint(tmp_path_factory.mktemp("tiny-xl"))


@pytest.fixture(scope="session")
def tiny_blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_blip(tmp_path_factory.mktemp("blip"))


@pytest.fixture
def small_archive(tmp_path: Path) -> Path:
    """Three small scans and a broken file, with a catalog that gives the first scan two target prompts."""
    folder = tmp_path / "archive"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(gray_picture(seed=number)).save(folder / f"scan {number}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    (folder / "catalog.csv").write_text(
        "image,context_prompt,target_prompt,source\n"
        "scan 0.png,a ball on a table,a red ball on a green table,somewhere else\n"
        "scan 0.png,a ball on a table,a blue ball on a green table,somewhere\n"
        "scan 1.png,a box on a table,a yellow box on a blue table,\n"
        "scan 2.png,a vase on a table,,\n"
        "broken.jpg,a cone on a table,a red cone on a table,\n",
        encoding="utf-8",
    )
    return folder
