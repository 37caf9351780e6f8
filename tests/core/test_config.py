import pytest

from diffcolor_core import DiffColor
from diffcolor_core.config import Settings, Stage1Settings, preset, preset_for
from diffcolor_core.models import load_checkpoint


def test_presets():
    paper = preset("paper")
    assert (paper.stage1.num_steps, paper.stage2.embedding_steps, paper.stage2.model_steps) == (1500, 500, 1000)
    assert paper.sha256() != preset("demo").sha256()
    assert paper.sha256() == Settings().sha256()
    with pytest.raises(ValueError, match="demo, fast, instant, paper, photo, standard"):
        preset("quick")
    with pytest.raises(ValueError, match="learning_rat"):
        Stage1Settings(learning_rat=1.0)  # type: ignore[call-arg]


def test_the_preset_of_a_model_is_its_own_or_standard():
    assert [preset_for(model) for model in ("demo", "photo", "a/folder")] == ["demo", "photo", "standard"]
    assert DiffColor(load_checkpoint("demo")).settings == preset("demo")


@pytest.mark.parametrize("name", ["standard", "fast", "instant"])
def test_presets_for_real_checkpoints_train_adapters_and_bind_colors_to_nouns(name):
    settings = preset(name)
    assert settings.stage1.adapter_rank == settings.stage2.adapter_rank == 4
    assert settings.stage1.diffusion_target == "prior"
    assert settings.stage2.regional_prompts
    assert settings.stage2.keep_unchanged


def test_settings_that_differ_from_a_preset():
    changed = preset("paper", {"stage2.adapter_rank": 4, "batch_size": 2, "stage2.alpha": 1.1})
    assert (changed.stage2.adapter_rank, changed.batch_size, changed.stage2.alpha) == (4, 2, 1.1)
    assert changed.stage1 == preset("paper").stage1
    assert preset("paper").stage2.adapter_rank is None


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("stage2.adapter_rnk", 4, r"no setting 'stage2.adapter_rnk' \(did you mean 'stage2.adapter_rank'\?\)"),
        ("stage2.alphas", [1.0], r"no setting 'stage2.alphas' \(did you mean 'stage2.alpha'\?\)"),
        ("stage2", 4, "no setting 'stage2'"),
        ("adapter_rank.x.y", 4, "no setting"),
        ("stage2.adapter_rank", 0, r"setting stage2.adapter_rank: Input should be greater than or equal to 1"),
        ("stage2.adapter_rank", "four", "setting stage2.adapter_rank: .*integer"),
        ("stage1.diffusion_target", "nois", "setting stage1.diffusion_target: .*'noise' or 'prior'"),
    ],
)
def test_a_setting_that_cannot_be_is_named_with_the_nearest_that_can(path, value, message):
    with pytest.raises(ValueError, match=message):
        preset("demo", {path: value})
