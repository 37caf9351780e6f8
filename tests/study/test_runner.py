import math

import numpy as np
import pytest

from diffcolor_core.models import load_checkpoint
from diffcolor_study.cases import TASKS
from diffcolor_study.runner import run_study, summarise
from support.settings import QUICK


@pytest.mark.parametrize("task", TASKS)
def test_a_study_runs_and_scores_saved_files(tiny_folder, tmp_path, task):
    checkpoint = load_checkpoint(str(tiny_folder))
    told = []
    figures = run_study(
        checkpoint,
        QUICK,
        task=task,
        methods=["full", "img2img", "stage1"],
        num=2,
        seed=3,
        folder=tmp_path,
        judge=checkpoint,
        progress=lambda *a: told.append(a),
    )
    assert told[-1][1:] == (6, 6)
    summary = summarise(figures)
    assert set(summary) == {"full", "img2img", "stage1"}
    for method in summary:
        assert len(list((tmp_path / task).rglob(f"{method}.png"))) == 2
        assert summary[method]["p99_abs_delta_l"]["mean"] <= 0.5
        assert summary[method]["mean_abs_delta_l_before_lock"]["mean"] > 1e-3
        assert len(figures[method]["clip_similarity"]) == 2
    assert ("edit_success" in summary["full"]) == (task == "edit")
    assert ("chroma_share" in summary["full"]) == (task == "exact")
    assert ("leakage" in summary["full"]) == (task != "automatic")
    assert ("clip_margin_of_truth" in summary["full"]) == (task == "automatic")
    margins, looks = figures["full"]["clip_margin"], figures["full"]["anti_color_look"]
    assert [float(margin < 0) for margin in margins] == looks


def test_unknown_names_are_refused_with_the_known_ones(tiny_folder, tmp_path):
    common = {"num": 1, "seed": 0, "folder": tmp_path}
    checkpoint = load_checkpoint(str(tiny_folder))
    with pytest.raises(ValueError, match="img2img"):
        run_study(checkpoint, QUICK, task="edit", methods=["best"], **common)
    with pytest.raises(ValueError, match="full-prompt"):
        run_study(checkpoint, QUICK, task="all", methods=["full"], **common)


def test_intervals_leave_out_what_does_not_apply():
    figures = {"full": {"some": [1.0, math.nan, 0.0, 1.0], "none": [math.nan] * 4, "same": [2.0] * 4}}
    (summary,) = summarise(figures).values()
    assert set(summary) == {"some", "same"}
    assert summary["some"]["mean"] == pytest.approx(2 / 3)
    assert summary["some"]["low"] <= summary["some"]["mean"] <= summary["some"]["high"]
    assert summary["same"] == {"mean": 2, "low": 2, "high": 2, "scenes": 4}


def test_methods_are_compared_scene_by_scene_with_the_first():
    scenes = np.random.default_rng(0).normal(size=20) * 10  # their spread hides what each scene shows
    figures = {"full": {"some": list(scenes)}, "other": {"some": list(scenes + 1), "own": [1.0] * 20}}
    summary = summarise(figures)
    assert "difference" not in summary["full"]["some"]
    assert summary["other"]["some"]["low"] < summary["full"]["some"]["high"]
    assert summary["other"]["some"]["difference"]["low"] == pytest.approx(1)
    assert summary["other"]["some"]["difference"]["high"] == pytest.approx(1)
    assert "difference" not in summary["other"]["own"]
