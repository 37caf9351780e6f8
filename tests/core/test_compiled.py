"""A compiled UNet gives what the plain one gives, and is compiled once for all photographs."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from diffcolor_core import DiffColor, ToFit, models
from tests.core.test_colorizer import TARGET, scan_bytes
from tests.core.test_sdxl import SETTINGS

KINDS = 2
"""Of training: the adapters of both stages, and the embedding."""


@pytest.fixture(autouse=True)
def nothing_is_compiled():
    """Before and after each test."""
    torch._dynamo.reset()
    models.compiled_call.cache_clear()
    yield
    models.compiled_call.cache_clear()


@pytest.fixture
def graphs(monkeypatch):
    """Counts what is compiled. It then runs by the same operations as without, so that no digit differs."""
    counter = CompileCounterWithBackend("aot_eager")
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, options, **how: compile_(call, backend=counter, **how))
    return counter


@pytest.mark.parametrize(("folder", "recompute"), [("tiny_folder", False), ("tiny_xl_folder", True)])
def test_each_kind_of_training_is_compiled_once_for_all_photographs(folder, recompute, graphs, request):
    spared = {"recompute": recompute}
    settings = SETTINGS.model_copy(
        update={stage: getattr(SETTINGS, stage).model_copy(update=spared) for stage in ("stage1", "stage2")}
    )
    plain = DiffColor.from_pretrained(str(request.getfixturevalue(folder)), settings=settings)
    compiled = DiffColor(replace(plain.checkpoint, compiled=True), settings)
    for number in range(2):
        asked = [ToFit(scan_bytes(), prompt, number) for prompt in ("a ball", "a dog on grass")]
        for one, other in zip(plain.fit_batch(asked), compiled.fit_batch(asked), strict=True):
            assert torch.equal(plain.recolor(one, TARGET).chroma, compiled.recolor(other, TARGET).chroma)
            assert one.losses == other.losses
    assert graphs.frame_count == KINDS


def test_pytorchs_compiler_gives_the_same_up_to_rounding(tiny_folder):
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler here: apt-get install g++")
    checkpoint = models.load_checkpoint(str(tiny_folder))
    z, t = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([300])
    e = checkpoint.encode_prompts(["a ball"]).requires_grad_()
    found = []
    for one in (checkpoint, replace(checkpoint, compiled=True)):
        output = one.predict(one.unet, z, t, e)
        found.append((output, *torch.autograd.grad(output.square().sum(), e)))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)
    assert models.compiled_call.cache_info().misses == 1, "the other was compiled"
