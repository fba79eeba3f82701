"""Benchmarks: each rehearses on a CPU, and what is computed beforehand is what comes out."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import write_jsonl

import train
from model import ModelConfig, Transformer

FOLDER = Path(__file__).parent.parent / "benchmarks"
needs_transformers = pytest.mark.skipif(not find_spec("transformers"), reason="no transformers")


def run(name: str, *arguments, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(FOLDER / name), *map(str, arguments)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def read_markdown(text: str) -> list[list[str]]:
    """The cells of each row of a table."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_the_gpu_benchmark_gives_every_figure_when_it_is_rehearsed(tmp_path):
    done = run("gpu.py", "--smoke", cwd=tmp_path)
    text = (tmp_path / "benchmarks-gpu.md").read_text("utf-8")
    assert done.returncode == 0 and "failed" not in text, done.stdout + done.stderr
    rows = {tuple(row[:3]): row[3:] for row in read_markdown(text)}
    for dtype in ("float32", "bfloat16"):
        for check in ("logits", "sampler"):
            assert "at most" in rows["card", "small", f"{check}, torch.{dtype}"][-1]
    flags = "--compile --activation-checkpointing"
    wanted = [("train", flags), ("sample", "batch 1"), ("sample", "batch 8")]
    ratios = 0
    if find_spec("transformers"):
        wanted += [("transformers", name) for name in ("batch 1", "batch 8", "training")]
        ratios = 3
    for what, setting in wanted:
        speed, share, _, memory, _ = rows[what, "1B", setting]
        assert float(speed.replace(",", "")) > 0, setting
        assert float(share.rstrip("%")) > 0, setting
        assert float(memory) > 0, setting
    assert "GiB" in rows["train", "1B", flags][-1], "the forecast stands beside the measurement"
    assert len([row for row in rows if row[0] == "ratio"]) == ratios


def test_without_a_gpu_the_gpu_benchmark_ends_in_one_line(tmp_path):
    done = run("gpu.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert list(tmp_path.iterdir()) == []
    assert done.stderr.startswith("error: no CUDA device")
    assert done.stderr.count("\n") == 1


@needs_transformers
@pytest.mark.parametrize("name", ["train.py", "generate.py"])
def test_the_comparison_with_transformers_runs_on_a_tiny_model(tmp_path, name):
    done = run(name, "--smoke", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ratio" in done.stdout or "ours / peer" in done.stdout


@needs_transformers
def test_choices_scored_together_have_the_likelihoods_of_each_alone(tmp_path, folder):
    rows = [{"prompt": "What colour is the door?", "choices": ["green", "red"], "answer": 0}]
    choice = write_jsonl(tmp_path / "choice.jsonl", rows)
    done = run("evaluate.py", "--model", folder, "--choice", choice, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1e-4


def test_operations_count_each_weight_that_a_token_meets(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import bounds

    config = ModelConfig.from_file(FOLDER / "llama-1b.json")
    with torch.device("meta"):
        matrices = [p.numel() for p in Transformer(config).parameters() if p.dim() > 1]
    looked_up = config.vocab_size * config.hidden_size  # the embedding multiplies nothing
    weights = sum(bounds.matrix_weights(config))
    assert weights == sum(matrices) - looked_up
    wanted = 6 * (10 * weights + 22 * 2048 * 10**2)
    assert bounds.training_operations(config, [10], 10) == wanted


@pytest.fixture
def estimate(monkeypatch, capsys):
    """A function from arguments to what memory.py prints, and its table: ranks -> GiB by part."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import memory

    def run_memory(*arguments) -> tuple[str, dict]:
        memory.main(memory.parser().parse_args([str(argument) for argument in arguments]))
        printed = capsys.readouterr().out
        table = {}
        names = []
        for line in printed.splitlines():
            cells = line.split()
            if cells[:1] == ["ranks"]:
                names = cells
            elif names:
                values = dict(zip(names, map(float, cells)))
                table[int(values["ranks"])] = values
        return printed, table

    return run_memory


def test_the_memory_estimate_counts_every_weight_once_and_a_teacher_on_top(tmp_path, estimate):
    config = FOLDER / "llama-1b.json"
    size = f"--config {config} --micro-batch-size 2 --max-length 64 --dtype bfloat16".split()
    _, table = estimate(*size)
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_file(config))
    whole = 4 * sum(p.numel() for p in model.parameters()) / 2**30
    assert abs(table[1]["weights"] - whole) < 0.01
    assert table[1]["optimizer"] == pytest.approx(2 * table[1]["gradients"], abs=0.02)
    assert table[64]["weights"] == pytest.approx(whole / 64, rel=0.1)
    assert table[1]["recomputed"] < table[1]["activations"]
    assert table[2]["base"] > table[1]["base"], "NCCL takes some"
    parts = [value for name, value in table[1].items() if name in PARTS]
    assert table[1]["total"] == pytest.approx(sum(parts), abs=0.05)

    (tmp_path / "config.json").write_text(config.read_text())
    _, table_with_teacher = estimate(*size, "--teacher", tmp_path)
    soft = table_with_teacher[1]
    assert soft["teacher"] > whole / 2, "its weights are bfloat16, and a part is gathered"
    assert soft["logits"] > table[1]["logits"]
    grown = soft["total"] - table[1]["total"]
    logits = soft["logits"] - table[1]["logits"]
    assert grown == pytest.approx(soft["teacher"] + logits, abs=0.05)


PARTS = "base weights gradients optimizer unsharded logits activations".split()


def test_the_memory_estimate_of_activations_is_what_a_gpu_keeps(estimate):
    sizes = "--micro-batch-size 2 --max-length 512 --dtype bfloat16".split()
    _, table = estimate("--config", FOLDER / "llama-1b.json", *sizes)
    C = 2048
    attention = 2 * C + 2 * 256 + C  # q, output, k, v, output once more
    norms = 2 * 3 * C  # of each the input, the normalized input, and that times the weight
    mlp = 4 * 5632
    numbers = 22 * 2 * 511 * (attention + norms + mlp)
    assert table[1]["activations"] == pytest.approx(2 * numbers / 2**30, rel=0.03)


def test_the_memory_estimate_says_how_many_tokens_are_computed(tmp_path, folder, pairs, estimate):
    options = ["--micro-batch-size", 2, "--batch-size", 4, "--epochs", 2]
    command = ["--model", folder, "--data", pairs, *options]
    printed, _ = estimate(*command)
    assert " fewer: what rows share counts once" in printed
    assert "4 steps" in printed
    words = [str(argument) for argument in (*command, "--out", tmp_path / "out")]
    train.main(train.parser().parse_args(words))
    lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    tokens = sum(json.loads(line)["tokens"] for line in lines)
    in_epoch = printed.split(" tokens an epoch")[0].split("\n")[-1]
    assert 2 * int(in_epoch.replace(",", "")) == tokens
