"""The benchmarks follow the code that they measure: the quickest one is run, the others are at least imported."""

import importlib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.flops import Cost, Stage
from diffcolor_core import models, preset

ROOT = Path(__file__).parents[2]


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_plan_is_measured(tmp_path):
    run("-m", "benchmarks.scale", "plan", "--rows", "500", "--json", str(tmp_path / "scale.json"))
    figures = json.loads((tmp_path / "scale.json").read_text())["planning"]["figures"]
    assert [figure["rows"] for figure in figures] == [50, 500]


@pytest.mark.parametrize(
    "name",
    [
        "costs",
        "drift",
        "dry_run",
        "fleet",
        "flops",
        "gpu",
        "pipeline",
        "presets",
        "quality",
        "report_scale",
        "s3",
        "screenshots",
        "steps",
    ],
)
def test_the_others_explain_themselves(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    assert "Usage" in capsys.readouterr().out


def test_the_benchmark_of_gpus_runs_on_a_cpu(tiny_folder, tmp_path, monkeypatch):
    from benchmarks import gpu

    compiled = []  # tests/core/test_compiled.py compiles in earnest, which takes a minute
    monkeypatch.setattr(models, "compiled_call", lambda: lambda unet, *z, **e: compiled.append(unet) or unet(*z, **e))
    gpu.correct(str(tiny_folder), 0.02, "cpu", tmp_path / "gpu.json")
    figures = json.loads((tmp_path / "gpu.json").read_text())["correct"]["figures"]
    assert figures["same_bits_with_other_neighbours"]
    assert figures["delta_e_alone"] < 0.01 * figures["delta_e_other_photograph"]
    assert figures["delta_e_bfloat16"] > 0
    assert figures["delta_e_compiled"] == 0
    assert compiled
    row = gpu.measured(tiny_folder, gpu.CONTENDERS["fast"]._replace(parts=(0.0, 0.05)), 2, 32, "cpu")
    assert row["recolor_seconds"] > 0
    assert row.keys() >= {"seconds", "steps_seconds", "fit_over_recolor"}


def test_the_speed_of_gpus_is_compared_with_the_references(tmp_path, monkeypatch):
    from benchmarks import gpu

    seconds = {"R0": 36.0, "R1": 18.0, "standard": 4.0, "instant": 1.0}

    def measured(folder, contender, batch, size_px, device):
        if contender == gpu.CONTENDERS["standard"]._replace(parts=(0.0, 1.0)):
            return {"seconds": 5.0}
        (name,) = (name for name in seconds if gpu.CONTENDERS[name] == contender)
        return {"seconds": seconds[name] / batch**0.5, "steps_seconds": 2.0 * batch**0.5}

    class Counter:
        def stages(self, settings):
            assert not settings.stage1.recompute, "what is computed twice is no use of the GPU"
            assert not settings.stage2.recompute
            steps = (settings.stage1.num_steps, settings.stage2.embedding_steps, settings.stage2.model_steps)
            names = ("stage 1", "embedding", "fine-tune")
            return {name: Stage(count, Cost(1e12, 0)) for name, count in zip(names, steps, strict=True)}

    monkeypatch.setattr(gpu, "measured", measured)
    monkeypatch.setattr(gpu, "Counter", lambda checkpoint, size_px: Counter())
    gpu.speed([1, 4], list(seconds), 3, 100, 0.125, 32, "cpu", tmp_path / "gpu.json")
    figures = json.loads((tmp_path / "gpu.json").read_text())["speed"]["figures"]
    assert figures["standard"]["4"]["photographs_per_hour"] == 1800
    assert "4" not in figures["R1"]
    assert [figures[name]["over_R1"] for name in seconds] == [0.5, 1, 9, 36]
    assert [figures[name]["over_R0"] for name in seconds] == [1, 2, 18, 72]
    one, two = preset("standard").stage1, preset("standard").stage2
    tflop = one.num_steps + two.embedding_steps + two.model_steps
    assert figures["standard"]["4"]["mfu_nominal"] == pytest.approx(4 * tflop / (2 * 2) / 100)
    assert "mfu_nominal" not in figures["instant"]["1"], "it takes no steps"
    assert figures["standard_in_full"] == {"seconds": 5.0}


def test_the_scenes_of_several_sessions_add_up(tmp_path, monkeypatch):
    from benchmarks import presets

    asked = []

    def scores_of(checkpoint, task, method, seed, out):
        asked.append((method, seed))
        return {"leakage": [seed + place + (method == "fast") for place in range(8)]}

    monkeypatch.setattr(presets, "scores_of", scores_of)
    monkeypatch.setattr(presets, "load_checkpoint", lambda model: None)
    options = {"task": ["edit"], "out": tmp_path, "json_file": tmp_path / "presets.json"}

    def pairs():
        return json.loads((tmp_path / "presets.json").read_text())["edit"]["figures"]["pairs"]

    presets.main(num=16, seed=7000, method=["standard", "fast"], **options)
    presets.main(num=8, seed=7001, method=["paper"], **options)
    scenes = [{name: row["leakage"]["scenes"] for name, row in pair.items()} for pair in pairs()]
    assert scenes == [{"paper": 8, "standard": 8}, {"standard": 16, "fast": 16}], "those that both have"
    presets.main(num=16, seed=7000, method=["paper", "standard", "fast"], **options)
    assert sorted(asked) == [(name, seed) for name in ("fast", "paper", "standard") for seed in (7000, 7001)]
    of_paper, of_standard = pairs()
    assert of_paper["standard"]["leakage"]["difference"] == {"mean": 0, "low": 0, "high": 0, "scenes": 16}
    assert of_standard["fast"]["leakage"]["difference"]["mean"] == 1
    assert of_standard["standard"]["leakage"]["mean"] == 7004


@pytest.mark.parametrize("module", ["benchmarks.fleet_worker", "benchmarks.sleeping_worker", "support.poison"])
def test_the_workers_of_the_benchmarks_load(module):
    importlib.import_module(module)
