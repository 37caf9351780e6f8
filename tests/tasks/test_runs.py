import shutil

import pytest
import torch

from diffcolor_core import ModelError
from diffcolor_core.adapters import fitted_state, trainable_copy
from diffcolor_core.models import load_checkpoint
from support.checkpoints import save_single_file
from tasks.runs import trained_bytes


@pytest.mark.parametrize("rank", [None, 2])
def test_the_size_of_a_fit_is_known_from_the_configuration(tiny_folder, rank):
    checkpoint = load_checkpoint(str(tiny_folder))
    state = fitted_state(trainable_copy(checkpoint.unet, rank, [torch.Generator()]), rank)
    assert trained_bytes(str(tiny_folder), rank) == sum(4 * tensor.numel() for tensor in state.values())


def test_the_configuration_may_lie_beside_a_single_file(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "one")
    single_file = save_single_file(tiny_folder, tmp_path / "one.safetensors")
    assert trained_bytes(str(single_file), 2) == trained_bytes(str(tiny_folder), 2)


def test_a_model_that_trains_adapters_only_has_no_size_without(tiny_xl_folder):
    with pytest.raises(ModelError, match="adapters only"):
        trained_bytes(str(tiny_xl_folder), None)
    assert trained_bytes(str(tiny_xl_folder), 2) > 0
