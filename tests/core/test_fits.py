import json

import pytest
import torch

from diffcolor_core import DiffColor, FitError
from tests.core.test_colorizer import CONTEXT, QUICK, TARGET, scan_bytes


@pytest.fixture(scope="module", params=[None, 2], ids=["full weights", "adapters"])
def pipe(request, tiny_folder) -> DiffColor:
    stage2 = QUICK.stage2.model_copy(update={"adapter_rank": request.param})
    return DiffColor.from_pretrained(str(tiny_folder), settings=QUICK.model_copy(update={"stage2": stage2}))


@pytest.fixture(scope="module")
def fit(pipe):
    return pipe.fit(scan_bytes(), CONTEXT, seed=5)


@pytest.mark.parametrize("with_scan", [True, False])
def test_a_saved_fit_recolours_to_the_same_bytes(pipe, fit, tmp_path, with_scan):
    fit.save(str(tmp_path / "fit"), with_scan=with_scan)
    loaded = pipe.load_fit(str(tmp_path / "fit"), None if with_scan else scan_bytes())
    assert pipe.recolor(loaded, TARGET).image.encode_png() == pipe.recolor(fit, TARGET).image.encode_png()
    assert loaded.losses == fit.losses
    assert loaded.settings == fit.settings


def test_any_fsspec_url_will_do(pipe, fit):
    fit.save("memory://fits/one")
    assert torch.equal(pipe.load_fit("memory://fits/one").prompt_embeds, fit.prompt_embeds)


def test_without_its_scan_a_fit_says_what_is_missing(pipe, fit, tmp_path):
    fit.save(str(tmp_path), with_scan=False)
    result = pipe.recolor(pipe.load_fit(str(tmp_path)), TARGET)
    with pytest.raises(FitError, match="image=the scan"):
        _ = result.image
    with pytest.raises(FitError, match="another picture"):
        pipe.load_fit(str(tmp_path), scan_bytes(20, 30))


def test_another_models_artefact_is_refused(fit, tmp_path, tiny_v_folder):
    fit.save(str(tmp_path))
    with pytest.raises(FitError, match="belongs to model"):
        DiffColor.from_pretrained(str(tiny_v_folder), settings=QUICK).load_fit(str(tmp_path))


def test_what_is_not_a_whole_fit_is_refused(pipe, fit, tmp_path):
    with pytest.raises(FitError, match="no fit at"):
        pipe.load_fit(str(tmp_path / "none"))
    fit.save(str(tmp_path))
    tensors, record = tmp_path / "fit.safetensors", tmp_path / "fit.json"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1])
    with pytest.raises(FitError, match="damaged"):
        pipe.load_fit(str(tmp_path))
    tensors.write_bytes(whole)
    fields = json.loads(record.read_text())
    record.write_text(json.dumps(fields | {"schema_version": 99}))
    with pytest.raises(FitError, match="format 99"):
        pipe.load_fit(str(tmp_path))
    del fields["settings"]
    record.write_text(json.dumps(fields))
    with pytest.raises(FitError, match="whole fit"):
        pipe.load_fit(str(tmp_path))
    record.write_text("{")
    with pytest.raises(FitError, match="damaged"):
        pipe.load_fit(str(tmp_path))
