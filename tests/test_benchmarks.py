"""Benchmarks: each rehearses on a CPU, and what is computed beforehand is what comes out."""

import contextlib
import io
import json
import re
import runpy
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import write_jsonl

import train
from model import ModelConfig, Transformer

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks"
needs_transformers = pytest.mark.skipif(not find_spec("transformers"), reason="no transformers")
# imports each file as if no other file of the project had been imported
STARTS = """
import runpy, sys
from pathlib import Path
for file in map(Path, sys.argv[1:]):
    path = list(sys.path)
    sys.path.insert(0, str(file.parent))
    runpy.run_path(str(file))
    sys.path[:] = path
    for own in [*file.parent.glob("*.py"), *file.parent.parent.glob("*.py")]:
        sys.modules.pop(own.stem, None)
"""


def run_here(command: list[str], **_) -> subprocess.CompletedProcess:
    """As subprocess.run, but in this process, which has imported PyTorch already."""
    before = sys.argv
    sys.argv = command[1:]
    output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    errors = ""
    status = 0
    try:
        with contextlib.redirect_stdout(output):
            runpy.run_path(command[1], run_name="__main__")
    except SystemExit as ended:
        if isinstance(ended.code, str):
            errors = ended.code
        status = 1 if errors else ended.code or 0
    finally:
        sys.argv = before
    output.seek(0)
    return subprocess.CompletedProcess(command, status, output.read(), errors)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A function from a benchmark's name and arguments to what it has done."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    monkeypatch.setattr(subprocess, "run", run_here)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield lambda name, *words: run_here([sys.executable, *map(str, (FOLDER / name, *words))])
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def gpu(run):
    import gpu

    return gpu


def read_markdown(text: str) -> list[list[str]]:
    """The cells of each row of a table."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_every_benchmark_finds_what_it_imports(tmp_path):
    command = [sys.executable, "-c", STARTS, *sorted(map(str, FOLDER.glob("*.py")))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_gpu_benchmark_gives_every_figure_when_it_is_rehearsed(gpu, tmp_path, monkeypatch):
    printed = []

    def launch_here(command, limit, heard):
        done = run_here([sys.executable, *map(str, command)])
        for line in done.stdout.splitlines():
            printed.append(line)
            heard(line.strip())
        return done.returncode, done.stderr or printed[-1]

    monkeypatch.setattr(gpu, "launch", launch_here)
    status = gpu.main(gpu.parser().parse_args(["--smoke"]))
    text = (tmp_path / "benchmarks-gpu.md").read_text("utf-8")
    assert status == 0 and "failed" not in text, text + "\n".join(printed)
    rows = {tuple(row[:3]): row[3:] for row in read_markdown(text)}
    for dtype in ("float32", "bfloat16"):
        for check in ("logits", "sampler"):
            assert "at most" in rows["card", "small", f"{check}, torch.{dtype}"][-1]
    flags = "--activation-checkpointing"
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


def test_a_part_of_the_gpu_benchmark_that_fails_or_takes_too_long_says_so(gpu):
    heard = []
    failing = ["-c", "print('a line'); raise ValueError('a fault')"]
    assert gpu.launch(failing, 60, heard.append) == (1, "ValueError: a fault")
    assert heard[0] == "a line"
    waiting = ["-c", "import time; time.sleep(60)"]
    assert gpu.launch(waiting, 1, heard.append) == (-signal.SIGKILL, "stopped after 1 s")


def test_without_a_gpu_the_gpu_benchmark_ends_in_one_line(run, tmp_path, capsys):
    done = run("gpu.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert list(tmp_path.iterdir()) == []
    told = capsys.readouterr().err
    assert told.startswith("error: no CUDA device")
    assert told.count("\n") == 1


@needs_transformers
@pytest.mark.parametrize("name", ["train.py", "generate.py"])
def test_the_comparison_with_transformers_runs_on_a_tiny_model(run, name):
    done = run(name, "--smoke")
    assert done.returncode == 0, done.stderr
    assert "ratio" in done.stdout or "ours / peer" in done.stdout
    assert_bound(done.stdout)


def assert_bound(printed: str):
    """The machine's rates come first; then how far a command is from its products alone."""
    assert re.match(r"processor: .*; matrix products on cpu: float32 [\d.]+ G.*bfloat16 ", printed)
    products, seconds, times = re.search(
        "matmuls alone: (.*) of (.*) s; ratio (.*)", printed
    ).groups()
    assert float(times) > 1
    assert float(seconds) / float(products) == pytest.approx(float(times), rel=0.02)


@needs_transformers
def test_choices_scored_together_have_the_likelihoods_of_each_alone(run, tmp_path, folder):
    rows = [{"prompt": "What colour is the door?", "choices": ["green", "red"], "answer": 0}]
    choice = write_jsonl(tmp_path / "choice.jsonl", rows)
    done = run("evaluate.py", "--model", folder, "--choice", choice)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1e-4
    assert_bound(done.stdout)


def test_recorded_operations_are_those_of_tokens_that_are_read_and_predicted(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import bounds

    config = ModelConfig.from_file(FOLDER / "llama-1b.json")
    layers, head = bounds.matrix_weights(config)
    with torch.device("meta"):
        model = Transformer(config)
        tokens = torch.zeros(2, 5, dtype=torch.long)
        operations = bounds.record_operations(model)
        model(tokens)
        model(tokens, torch.tensor([4, 9]))
    assert operations == [2 * 10 * (layers + head), 2 * (10 * layers + 2 * head)]


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
