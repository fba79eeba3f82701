"""Benchmarks: the GPU's rehearsal gives every figure and says what it needs; arms are compared at equal translation."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from model import ModelConfig, Transformer

FOLDER = Path(__file__).parent.parent / "benchmarks"


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(FOLDER / "gpu.py"), *arguments]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )


def test_rehearsal_gives_every_figure(tmp_path):
    done = run("--smoke", cwd=tmp_path)
    text = (tmp_path / "benchmarks-gpu.md").read_text("utf-8")
    assert done.returncode == 0 and "failed" not in text, done.stdout + done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    rows = {tuple(row[:3]): row[3:] for row in rows}
    for dtype in "float32", "bfloat16":
        for check in "logits", "sampler":
            assert "at most" in rows["card", "small", f"{check}, torch.{dtype}"][-1]
    wanted = [("train", "--compile --activation-checkpointing"), ("sample", "batch 1"), ("sample", "batch 8")]
    if find_spec("transformers"):
        wanted += [("transformers", setting) for setting in ("batch 1", "batch 8", "training")]
    for what, setting in wanted:
        speed, share, _, memory, _ = rows[what, "1B", setting]
        assert float(speed.replace(",", "")) > 0 and float(share.rstrip("%")) > 0 and float(memory) > 0, setting
    assert len([row for row in rows if row[0] == "ratio"]) == 3 * bool(find_spec("transformers"))


def test_operations_count_each_weight_that_a_token_meets(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from gpu import operations, weights

    config = ModelConfig.from_file(FOLDER / "llama-1b.json")
    with torch.device("meta"):
        matrices = [p.numel() for p in Transformer(config).parameters() if p.dim() > 1]
    assert sum(weights(config)) == sum(matrices) - config.vocab_size * config.hidden_size  # the embedding is looked up
    assert operations(config, 10, 10, 1) == 6 * (10 * sum(weights(config)) + 22 * 2048 * 10**2)


def test_without_a_gpu_it_is_one_line(tmp_path):
    done = run(cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "") and list(tmp_path.iterdir()) == []
    assert done.stderr.startswith("error: no CUDA device") and done.stderr.count("\n") == 1


def test_arms_are_read_where_they_translate_equally_well(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    import arms

    def save(path: Path, points: list[tuple[float, float]]) -> None:
        curve = np.zeros((len(points), len(arms.MEASURES), 4), "float32")  # the value, and three draws like it
        curve[:, [0, 2]] = np.array(points)[..., None]
        np.save(path, curve if len(points) > 1 else curve[0])

    (tmp_path / "curves").mkdir()
    save(tmp_path / "base.npy", [(10, 0)])
    save(tmp_path / "curves" / "0_1e-4_vanilla.npy", [(10, 0), (25, 0.3), (40, 0.5)])
    save(tmp_path / "curves" / "0_1e-4_RaDis.npy", [(10, 0), (20, 0.1)])
    save(tmp_path / "curves" / "0_1e-4_weight_2.npy", [(10, 0), (30, 0.3)])
    arms.table(SimpleNamespace(out=tmp_path, plot=None))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    found = {row[1]: row for row in rows[rows.index([]) :] if len(row) > 2}
    # vanilla is at 0.2 where it translates as RaDis does at its end, at 0.367 where weight 2 does
    assert found["RaDis"][3:6] == ["20.0", "0.200", "-0.100 [-0.100, -0.100]"]
    assert found["weight 2"][3:6] == ["30.0", "0.367", "-0.067 [-0.067, -0.067]"]
    assert found["weight 2"][-1] == "50 [50, 50]", "at 20, where all three are, it has 0.15"
