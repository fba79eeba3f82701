"""benchmarks/gpu.py without a GPU: its rehearsal gives every figure, and without --smoke it says what it needs."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

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
    wanted = [("train", "plain"), ("sample", "batch 1"), ("sample", "batch 8")]
    if rows["train", "1B", "--compile --activation-checkpointing"][-1] != "n/a: train.py has no such flag":
        wanted.append(("train", "--compile --activation-checkpointing"))
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
