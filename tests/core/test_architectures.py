"""The published architectures at reduced width: they load through `from_pretrained` and go through the method."""

import pytest

from diffcolor_core import DiffColor
from diffcolor_core.config import preset
from support.checkpoints import save_architecture
from tests.core.test_colorizer import CONTEXT, QUICK, TARGET, scan_bytes


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("version", "kind", "side"), [("1.5", "epsilon", 512), ("2.1", "v_prediction", 768), ("xl", "epsilon", 1024)]
)
def test_stable_diffusion_goes_through(tmp_path, version, kind, side):
    pipe = DiffColor.from_pretrained(str(save_architecture(tmp_path, version, scale=0.05)))
    assert pipe.checkpoint.scheduler.config.prediction_type == kind
    assert pipe.checkpoint.native_size_px == side
    assert pipe.checkpoint.vae_factor == 8
    assert pipe.settings == preset("standard")  # not a model of ours
    stage2 = QUICK.stage2.model_copy(update={"adapter_rank": 4, "keep_unchanged": True})
    stage1 = QUICK.stage1.model_copy(update={"adapter_rank": 4})
    pipe.settings = QUICK.model_copy(update={"working_size_px": 128, "stage1": stage1, "stage2": stage2})
    fit = pipe.fit(scan_bytes(90, 130), CONTEXT)
    result = pipe.recolor(fit, TARGET)
    assert result.image.pixels.shape == (90, 130, 3)
    assert result.metrics["p99_abs_delta_l"] <= 0.5
