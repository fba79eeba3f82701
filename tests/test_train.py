"""train.py: the update is exact, a run survives whatever ends it, only finite numbers are written.

What needs two ranks shares one start of torchrun: as a script, this file does a list of jobs.
"""

import hashlib
import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import plain
import pytest
import torch
from conftest import (
    CHATML,
    LINES,
    PAIRS,
    error_of,
    read_jsonl,
    write_config,
    write_jsonl,
    write_model,
    write_tokenizer,
)
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_post_hook

import data
import train
from data import Tokenizer
from generate import generate
from model import Transformer
from train import TokenLosses, batch_of, cross_entropy, kl_divergence, learning_rate

ROOT = Path(train.__file__).parent
SEGMENTS = {"reference_loss", "rationale_loss", "reference_tokens", "rationale_tokens"}
COUNTS = {"step", "tokens", "padded_tokens"}
CLOCK = {"seconds", "memory_gib"}  # what differs between two runs of one command
STEP_FIELDS = SEGMENTS | COUNTS | CLOCK | {"loss", "learning_rate", "grad_norm"}
VALID_FIELDS = SEGMENTS | COUNTS | {"valid", "valid_loss"}
# batches of 3, 3 and 1 of seven rows: two ranks get unequal numbers of tokens, and one of them none
TRAIN = (
    "--batch-size 3 --micro-batch-size 2 --epochs 2 --save-every 2 --valid-every 3 "
    "--learning-rate 1e-3 --warmup-steps 2 --dtype float32"
)
ONE_STEP = "--batch-size 7 --micro-batch-size 8 --max-steps 1"


# 1. What is trained on, and what a run leaves


@dataclass
class Files:
    """Files to train on, and the segments of each row that must be learned."""

    path: Path
    folder: Path
    teacher: Path
    ledger: Path
    pairs: Path
    start: str  # a command without data
    command: str
    joint: list  # (prompt, reference, rationale) with EOS, of each row
    vanilla: list


def make_rows(tokenizer) -> list:
    """A ledger with every kind of row: truncated, repetitive, without a rationale."""
    rows = []
    for i, pair in enumerate(PAIRS):
        text = f"\nIt says: {LINES[i]}"[: 17 + 4 * i]
        if i == 2:
            text = ""
        rationale = []
        for character in text:  # a token each, as a model may sample and no tokenizer would
            rationale += tokenizer.encode(character, within=True)
        message = {"role": "user", "content": f"Say in English: {pair['source']}"}
        row = {
            "id": f"row{i}",
            "rationale": text,
            "prompt_ids": tokenizer.chat([message]),
            "reference_ids": tokenizer.answer(pair["reference"]),
            "rationale_ids": rationale,
            "tokenizer": tokenizer.hash,
            "finish": "length" if i == 0 else "eos",
            "status": {1: "repetitive", 2: "empty"}.get(i, "ok"),
            "template": "Say in {target_lang}: {source}",
        }
        rows.append(pair | row)
    return rows


def make_example(row, end) -> tuple:
    """The segments of a row, with the EOS `end` where the model is to stop."""
    prompt = row["prompt_ids"]
    reference = row["reference_ids"]
    rationale = row["rationale_ids"]
    if not rationale:
        return prompt, reference + [end], []
    if row["finish"] == "length":
        return prompt, reference, rationale
    return prompt, reference, rationale + [end]


@pytest.fixture(scope="module", autouse=True)
def handlers():
    """Restores the signal handlers that runs replace."""
    stops = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in stops}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def at(tmp_path_factory, folder) -> Files:
    path = tmp_path_factory.mktemp("train")
    tokenizer = Tokenizer(folder)
    end = tokenizer.sp.piece_to_id("<|im_end|>")
    rows = make_rows(tokenizer)
    ledger = write_jsonl(path / "ledger.jsonl", rows)
    pairs = write_jsonl(path / "pairs.jsonl", PAIRS)
    teacher = write_model(path / "teacher", seed=1)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(folder / name, teacher / name)
    start = f"--model {folder} {TRAIN}"
    command = f"{start} --data {ledger} --valid other={pairs} {ledger}"
    joint = [make_example(row, end) for row in rows]
    vanilla = [make_example(row | {"rationale_ids": []}, end) for row in rows]
    return Files(path, folder, teacher, ledger, pairs, start, command, joint, vanilla)


@dataclass
class Result:
    """What a finished run has left: its weights, and the lines of its metrics by kind."""

    out: Path
    weights: dict
    steps: list
    valid: list


def run(out: Path, command: str) -> Result:
    """One run in this process."""
    words = f"{command} --out {out}".split()
    train.main(train.parser().parse_args(words))
    return result(out)


def result(out: Path) -> Result:
    lines = read_jsonl(out / "metrics.jsonl")
    steps = [line for line in lines if "valid" not in line]
    valid = [line for line in lines if "valid" in line]
    return Result(out, load_file(out / "model.safetensors"), steps, valid)


@pytest.fixture(scope="module")
def straight(at) -> Result:
    """The run that nothing interrupts."""
    return run(at.path / "straight", at.command)


@pytest.fixture(scope="module")
def taught(at) -> Result:
    """The same with a teacher."""
    return run(at.path / "taught", f"{at.command} --teacher {at.teacher}")


def gap(a: Result, b: Result) -> float:
    """The largest difference between two runs' weights."""
    assert a.weights.keys() == b.weights.keys()
    largest = 0.0
    for name, weight in a.weights.items():
        difference = (weight - b.weights[name]).abs()
        largest = max(largest, difference.max().item())
    return largest


def assert_same_metrics(a: Result, b: Result, rel: float, but=()):
    """Equal numbers in every line, except for the clock and the fields `but`."""
    lines = a.steps + a.valid
    others = b.steps + b.valid
    for line, expected in zip(lines, others, strict=True):
        assert line.keys() == expected.keys()
        for name in line.keys() - {*CLOCK, *but}:
            value = expected[name]
            if rel and isinstance(value, float):
                value = pytest.approx(value, rel=rel, abs=1e-7)  # a loss may be 0
            assert line[name] == value, name


def hashes(folder: Path) -> dict:
    """The content of a folder, to the last bit."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            name = str(path.relative_to(folder))
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def count(rows: list, segment: int) -> int:
    """Tokens in a segment (0 prompt, 1 reference, 2 rationale) of all rows."""
    return sum(len(row[segment]) for row in rows)


# 2. The loss and the update


def load_plain(folder: Path, peer: str) -> tuple:
    """The parameters of a model by name, and a function from tokens to logits."""
    if peer == "ours":
        learner = Transformer.from_pretrained(folder)
        return dict(learner.named_parameters()), learner
    transformers = pytest.importorskip("transformers")
    load = transformers.AutoModelForCausalLM.from_pretrained
    learner = load(folder, dtype=torch.float32)
    return dict(learner.named_parameters()), lambda tokens: learner(tokens).logits


@pytest.mark.parametrize(
    "weight, decay, clip, soft, peer",
    [
        (1, 0, 1, False, "ours"),
        (0.33, 0.1, 0.05, False, "ours"),
        (0, 0.1, 0, False, "ours"),
        (0.6, 0, 1, True, "transformers"),
    ],
)
def test_training_equals_the_plain_version(at, tmp_path, weight, decay, clip, soft, peer):
    peak = 3e-4
    command = f"{at.command} --batch-size 7 --micro-batch-size 4 --max-steps 4"
    command += f" --learning-rate {peak} --weight-decay {decay} --max-grad-norm {clip}"
    command += f" --rationale-weight {weight}"
    if soft:
        command += f" --teacher {at.teacher}"
    mine = run(tmp_path, command)

    rows = at.joint if weight else at.vanilla
    parameters, student = load_plain(at.folder, peer)
    teacher = load_plain(at.teacher, peer)[1] if soft else None
    matrices = [p for p in parameters.values() if p.dim() > 1]
    vectors = [p for p in parameters.values() if p.dim() == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, weight_decay=decay)
    # two steps of warm-up, then half a cosine wave
    rates = [peak / 2, peak, peak, peak / 2]
    for line, rate in zip(mine.steps, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        step = (student, teacher, optimizer, rows, weight, clip or math.inf)
        loss, norm = plain.train_step(*step)
        assert line["loss"] == pytest.approx(loss, rel=1e-4)  # float32 sums in another order
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert line["learning_rate"] == pytest.approx(rate)
    for name, p in parameters.items():
        difference = (mine.weights[name] - p).abs()
        # a wrong rate, decay or weight moves all; where a gradient is nearly 0, Adam turns its
        # rounding error into a step
        assert difference.mean() < 1e-7, name
        assert difference.max() < 1e-4, name


def test_the_parts_of_the_loss_are_means_over_their_own_tokens(at, tmp_path):
    options = f"--teacher {at.teacher} --rationale-weight 0.5"
    mine = run(tmp_path, f"{at.command} {ONE_STEP} {options}")
    _, student = load_plain(at.folder, "ours")
    _, teacher = load_plain(at.teacher, "ours")
    references = []
    rationales = []
    for prompt, reference, rationale in at.joint:
        references.append((prompt, reference, []))
        rationales.append((prompt + reference, [], rationale))
    expected = {
        "loss": plain.joint_loss(student, teacher, at.joint, 0.5),
        "reference_loss": plain.joint_loss(student, teacher, references, 1),
        "rationale_loss": plain.joint_loss(student, teacher, rationales, 1),
    }
    step = mine.steps[0]
    for name, value in expected.items():
        assert step[name] == pytest.approx(value.item(), rel=1e-5), name
    # validation is of the same rows, and before the step of the same weights
    valid = mine.valid[1]
    assert valid["valid_loss"] == step["loss"]
    assert valid["reference_loss"] == step["reference_loss"]
    assert valid["rationale_loss"] == step["rationale_loss"]


@pytest.mark.parametrize("soft", [False, True])
def test_losses_are_computed_in_chunks_and_their_gradient_overwrites_the_logits(soft):
    torch.manual_seed(0)
    leaf = torch.randn(300, 9, requires_grad=True)
    logits = leaf * 3
    twin = logits.detach().clone().requires_grad_()
    references = torch.randint(9, (140,))
    rationales = torch.randn(160, 9) if soft else torch.randint(9, (160,))
    loss = kl_divergence if soft else cross_entropy
    expected = torch.cat([cross_entropy(twin[:140], references), loss(twin[140:], rationales)])
    losses = TokenLosses.apply((cross_entropy, loss), logits, references, rationales)
    assert torch.equal(losses, expected)
    weights = torch.rand(300)
    (losses * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.allclose(logits, twin.grad, atol=1e-6)
    assert torch.allclose(leaf.grad, 3 * twin.grad, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    ["--micro-batch-size 1", "--micro-batch-size 3 --activation-checkpointing"],
)
def test_micro_batches_and_recomputed_activations_do_not_change_the_update(
    at, whole_batches, tmp_path, options
):
    command, whole = whole_batches
    parts = run(tmp_path, f"{command} {options}")
    assert gap(parts, whole) < 1e-6  # sums in another order; the weights moved by 5e-5
    assert_same_metrics(parts, whole, 1e-5, ["padded_tokens"])
    if options == "--micro-batch-size 1":
        # no padding, and the last token of a row is predicted, never read
        step = parts.steps[0]
        assert step["padded_tokens"] == step["tokens"] - 7


@pytest.fixture(scope="module")
def whole_batches(at) -> tuple:
    """Three steps of all rows at a time, with a teacher."""
    options = f"--max-steps 3 --learning-rate 2e-5 --teacher {at.teacher}"
    command = f"{at.command} {ONE_STEP} {options}"
    return command, run(at.path / "whole", command)


# a value that changes the update, for each setting that a resumed run must share; a new option
# needs one here
CHANGES = {
    "rationale_weight": "0.5",
    "rationale_coverage": "0.5",
    "only_ok": "",
    "epochs": "1",
    "max_steps": "3",
    "batch_size": "3",
    "max_length": "100",
    "learning_rate": "2e-3",
    "schedule": "constant",
    "warmup_steps": "0",
    "weight_decay": "0.5",
    "max_grad_norm": "0.01",
    "seed": "1",
    "dtype": "bfloat16",
    "direction": "en-de",
    "chat": "plain",
    "system": "Kind.",
    "template": "{source}",
}
SETTINGS = vars(train.parser().parse_args(["--data", "x", "--out", "x"])).keys() - {*train.FREE}


@pytest.fixture(scope="module")
def unchanged(at) -> dict:
    """Runs by their data: a ledger, and pairs, for what shapes a prompt."""
    runs = {}
    for file in (at.ledger, at.pairs):
        command = f"{at.start} --batch-size 4 --data {file}"
        runs[file] = command, run(at.path / f"unchanged-{file.stem}", command)
    return runs


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_every_setting_changes_the_update(at, unchanged, tmp_path, name):
    prompts = name in ("direction", "chat", "system", "template")
    command, before = unchanged[at.pairs if prompts else at.ledger]
    option = "--" + name.replace("_", "-")
    after = run(tmp_path / "out", f"{command} {option} {CHANGES[name]}")
    assert gap(after, before) > 1e-6


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_row_is_in_one_micro_batch_of_one_rank(monkeypatch, world_size):
    rows = ["x" * length for length in range(10, 110, 10)]
    found = []
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: world_size)
    for rank in range(world_size):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        parts = train.micro_batches(rows, 2)
        assert len(parts) == math.ceil(10 / (2 * world_size))
        for part in parts:
            assert len(part) <= 2
            found += part
    assert sorted(found) == rows


# 3. What is learned, and in which order


def test_metrics_hold_each_step_once_and_each_validation(at, straight):
    found = []
    for line in read_jsonl(straight.out / "metrics.jsonl"):
        name = line.get("valid", "train")
        found.append(f"{name} {line['step']}")
    expected = """other 0, ledger 0, train 1, train 2, train 3, other 3, ledger 3,
        train 4, train 5, train 6, other 6, ledger 6"""
    assert found == [item.strip() for item in expected.split(",")]
    for line in straight.steps:
        assert line.keys() == STEP_FIELDS
        assert 0 < line["seconds"] < math.inf
        assert 0 < line["memory_gib"] < math.inf
    for line in straight.valid:
        assert line.keys() == VALID_FIELDS
    pairs, ledger = straight.valid[:2]
    assert pairs["rationale_loss"] is None
    assert ledger["reference_tokens"] == count(at.joint, 1)
    assert ledger["rationale_tokens"] == count(at.joint, 2)
    assert ledger["tokens"] == sum(count(at.joint, i) for i in range(3))
    epoch = straight.steps[:3]
    assert sum(line["tokens"] for line in epoch) == ledger["tokens"]
    assert not (straight.out / "checkpoint").exists()


def test_an_epoch_has_each_example_once_in_an_order_by_seed_and_epoch():
    orders = set()
    rows = list(range(7))
    for seed in (0, 1):
        batches = [batch_of(rows, step, 3, seed) for step in range(6)]
        sizes = [len(batch) for batch in batches]
        assert sizes == [3, 3, 1, 3, 3, 1]
        for epoch in (batches[:3], batches[3:]):
            order = tuple(itertools.chain(*epoch))
            assert sorted(order) == rows
            orders.add(order)
    assert len(orders) == 4


def test_a_row_that_is_too_long_is_dropped_whole_and_counted(at, tmp_path, capsys):
    lengths = [sum(map(len, row)) for row in at.joint]
    longest = max(lengths)
    command = f"{at.command} {ONE_STEP} --max-length"
    whole = run(tmp_path / "whole", f"{command} {longest}")
    assert whole.steps[0]["tokens"] == sum(lengths)
    capsys.readouterr()
    less = run(tmp_path / "less", f"{command} {longest - 1}")
    assert less.steps[0]["tokens"] == sum(lengths) - longest
    expected = f"1 of 7 rows dropped (no target, or over {longest - 1} tokens)"
    assert expected in capsys.readouterr().out


def test_only_ok_and_coverage_drop_rationales_and_keep_the_rows(at, tmp_path, capsys):
    counts = {}
    for share in (0.5, 1.0):
        command = f"{at.command} {ONE_STEP} --only-ok --rationale-coverage {share}"
        [line] = run(tmp_path / str(share), command).steps
        counts[share] = (line["reference_tokens"], line["rationale_tokens"])
    # row 1 is repetitive, row 2 has no rationale
    rows = [*at.joint]
    rows[1:3] = at.vanilla[1:3]
    assert counts[1.0] == (count(rows, 1), count(rows, 2))
    assert "1 rationales not used" in capsys.readouterr().out
    references, rationales = counts[0.5]
    assert 0 < rationales < count(rows, 2)
    assert references > count(rows, 1)  # an EOS for each that is dropped


def ask(pair) -> list:
    text = f"Translate this from German to English:\nGerman: {pair['source']}\nEnglish:"
    return [{"role": "user", "content": text}]


def test_random_weights_learn_seven_pairs_by_heart(at, tmp_path):
    write_config(tmp_path)
    command = f"--config {tmp_path}/config.json --tokenizer {at.folder} --data {at.pairs}"
    options = "--max-steps 60 --learning-rate 5e-3 --schedule linear --save-every 0"
    run(tmp_path / "out", f"{command} {options}")
    tokenizer = Tokenizer(tmp_path / "out")
    learner = Transformer.from_pretrained(tmp_path / "out")
    prompts = [tokenizer.chat(ask(pair)) for pair in PAIRS]
    answers = generate(learner, prompts, max_new_tokens=80, eos_ids=tokenizer.eos_ids)
    for ids, pair in zip(answers, PAIRS, strict=True):
        assert tokenizer.decode(ids) == pair["reference"]


def test_bfloat16_is_near_float32_and_is_exported(at, straight, tmp_path):
    half = run(tmp_path, f"{at.command} --dtype bfloat16")
    assert half.weights["lm_head.weight"].dtype == torch.bfloat16
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    losses = [line["loss"] for line in half.steps]
    exact = [line["loss"] for line in straight.steps]
    assert losses == pytest.approx(exact, rel=0.02)  # bfloat16 has eight bits
    assert losses != exact


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "inverse_sqrt"])
def test_a_schedule_is_that_of_transformers(schedule, warmup):
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=8.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = transformers.get_scheduler(name, optimizer, warmup, 100)
    for step in range(100):
        rate = learning_rate(step, 100, 8.0, warmup, schedule)
        if step < warmup:  # theirs begins with a step of rate 0
            assert rate == pytest.approx(8 * (step + 1) / warmup)
        else:
            assert rate == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


# 4. Runs that end early


def limit_files(size: int):
    """From here on no file can grow beyond `size`: to the writer the same as a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def cut_power():
    raise RuntimeError("power cut")


def send(*signals):
    for number in signals:
        os.kill(os.getpid(), number)


def send_as_a_scheduler_does():
    """SIGTERM to torchrun and to this rank; returns when torchrun has passed its own on."""
    if os.environ["RANK"] == "1":
        send(signal.SIGTERM)
        return
    heard, hearing = os.pipe()
    os.set_blocking(hearing, False)
    signal.set_wakeup_fd(hearing)
    os.kill(os.getppid(), signal.SIGTERM)
    send(signal.SIGTERM)
    for _ in range(2):
        os.read(heard, 1)


ACTIONS = {
    "nothing": lambda: None,
    "power cut": cut_power,
    "full disk": lambda: limit_files(100_000),
    "SIGTERM twice": lambda: send(signal.SIGTERM, signal.SIGTERM),
    "SIGINT": lambda: send(signal.SIGINT),
    "SIGTERM to all": send_as_a_scheduler_does,
}
ENDS = {
    "power cut": RuntimeError,
    "full disk": OSError,
    "SIGTERM twice": SystemExit,
    "SIGINT": SystemExit,
}


@contextmanager
def after_step(step: int, action: Callable):
    """Does `action` right after the optimizer's step number `step` of this process."""
    count = itertools.count(1)

    def hook(*_):
        if next(count) == step:
            action()

    handle = register_optimizer_step_post_hook(hook)
    try:
        yield
    finally:
        handle.remove()
        limit_files(resource.RLIM_INFINITY)


def break_off(out: Path, step: int, how: str, command: str) -> BaseException:
    """A run that is ended after `step` -> the exception that ended it."""
    with after_step(step, ACTIONS[how]), pytest.raises(ENDS[how]) as ended:
        run(out, command)
    return ended.value


@pytest.mark.parametrize(
    "how, step, left",
    [
        ("power cut", 1, []),
        ("full disk", 4, ["step-2"]),
        ("SIGTERM twice", 3, ["step-3"]),
        ("SIGINT", 5, ["step-5"]),
    ],
)
def test_a_run_that_ends_early_is_resumed_bit_for_bit(at, straight, tmp_path, how, step, left):
    ended = break_off(tmp_path, step, how, at.command)
    if isinstance(ended, SystemExit):
        assert ended.code == {"SIGTERM twice": 143, "SIGINT": 130}[how]
    found = (tmp_path / "checkpoint").glob("step-*")
    assert [path.name for path in found if path.suffix != ".tmp"] == left
    assert not (tmp_path / "config.json").exists()
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 5, "lo')  # as a kill may leave it
    again = run(tmp_path, f"{at.command} --resume")
    assert gap(again, straight) == 0
    assert_same_metrics(again, straight, 0)
    assert hashes(tmp_path).keys() == hashes(straight.out).keys()


def test_after_the_first_ctrl_c_a_second_one_ends_the_process():
    noted = train.note_signals()
    send(signal.SIGINT)
    assert noted == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


@pytest.mark.parametrize("script", ["train", "evaluate", "generate", "data"])
def test_ctrl_c_while_torch_is_imported_ends_without_a_traceback(script):
    command = [sys.executable, "-X", "importtime", ROOT / f"{script}.py", "--help"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        for line in process.stderr:  # a line for each module that has been imported
            if " torch." in line:
                break
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert printed == ""
    assert "Traceback" not in errors


# 5. Several processes


def do_jobs(file: str):
    """As a script: trains for each job in `file`, then runs benchmarks/ranks.py.

    The statuses go to FILE.RANK.
    """
    import ranks

    rank = int(os.environ["RANK"])
    # rank 1 need not wait for torchrun to end it
    data.time = Namespace(sleep=lambda _: None, strftime=time.strftime)
    statuses = {}
    for name, job in json.loads(Path(file).read_text()).items():
        sys.argv = ["train.py", *job["command"].split()]
        if rank == 1:
            sys.argv += job.get("more", "").split()
        action = job.get("action", "nothing")
        with after_step(3, ACTIONS[action]):
            statuses[name] = status_of(train.main, train.parser())
    sys.argv = ["ranks.py"]
    statuses["ranks.py"] = status_of(ranks.main, ranks.parser())
    Path(f"{file}.{rank}").write_text(json.dumps(statuses))


def status_of(main, parser) -> int:
    try:
        data.cli(main, parser)
    except SystemExit as ended:
        return ended.code
    return 0


@pytest.fixture(scope="module")
def ranks(at) -> tuple:
    """What needs two ranks -> their statuses by job, [of rank 0, of rank 1], and what they print.

    Both do an action after the third step; `more` are options of rank 1 alone.
    """

    def job(out, options="", **more):
        return {"command": f"{at.command} {options} --out {at.path / out}"} | more

    break_off(at.path / "onto-two", 3, "SIGTERM twice", at.command)
    jobs = {
        "two ranks": job("two-ranks"),
        "with a teacher": job("two-taught", f"--teacher {at.teacher}"),
        "from one to two": job("onto-two", "--resume"),
        "other data": job("apart", more=f"--data {at.pairs}"),
        "a scheduler": job("scheduler", action="SIGTERM to all"),
    }
    file = at.path / "jobs.json"
    file.write_text(json.dumps(jobs))
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2"
    command = [sys.executable, *torchrun.split(), __file__, str(file)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, env=environment, **pipes)
    watch = threading.Timer(90, process.terminate)  # ranks may wait for each other for ever
    watch.start()
    try:
        printed, errors = process.communicate()
    finally:
        watch.cancel()
        process.terminate()
    statuses = {}
    for rank in (0, 1):
        found = json.loads(Path(f"{file}.{rank}").read_text())
        for name, status in found.items():
            statuses.setdefault(name, []).append(status)
    return statuses, printed + errors


@pytest.mark.parametrize("name", ["two-ranks", "onto-two", "two-taught"])
def test_two_ranks_make_the_run_of_one(at, straight, taught, ranks, name):
    alone = taught if name == "two-taught" else straight
    both = result(at.path / name)
    # gradients are summed in another order: 1e-7 of each, which Adam may make 1e-5 of a weight
    assert gap(both, alone) < 1e-5
    assert_same_metrics(both, alone, 1e-4, ["padded_tokens"])


def test_ranks_that_read_different_data_end_in_an_error(at, ranks):
    statuses, printed = ranks
    assert statuses["other data"] == [2, 2]
    assert "examples differ between the ranks" in printed
    assert not (at.path / "apart").exists()


def test_a_schedulers_sigterm_leaves_a_checkpoint_that_one_rank_resumes(at, ranks):
    statuses, _ = ranks
    assert statuses["a scheduler"] == [143, 143]
    out = at.path / "scheduler"
    assert os.listdir(out / "checkpoint") == ["step-3"]
    again = run(out, f"{at.command} --resume")
    assert gap(again, result(at.path / "two-ranks")) < 1e-5  # as above
    steps = [line["step"] for line in again.steps]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_the_comparison_of_ranks_finds_them_equal(ranks):
    statuses, printed = ranks
    assert statuses["ranks.py"] == [0, 0]
    assert "24 of 24 rationales are equal" in printed
    # a signal to one rank stopped both, and both were resumed bit for bit
    assert "differs from `many` by 0e+00" in printed


# 6. Only finite numbers are written


def assert_finite(folder: Path):
    for file in folder.rglob("*.safetensors"):
        for tensor in load_file(file).values():
            assert tensor.isfinite().all(), file
    for file in folder.rglob("metrics.jsonl"):
        words = file.read_text().replace(",", " ").split()
        assert not {"NaN", "Infinity"} & set(words)


@pytest.fixture
def error(monkeypatch, capsys) -> Callable:
    """The one line with which a command must end."""
    return lambda command: error_of(train, command.split(), monkeypatch, capsys)


@pytest.mark.parametrize(
    "options",
    [
        "--learning-rate 1e38 --max-steps 1 --export-every 1",
        "--learning-rate 1e38 --max-steps 5 --save-every 1",
        "--learning-rate 1e30 --max-steps 5 --valid-every 2 --valid {pairs}",
    ],
)
def test_a_rate_that_is_far_too_high_ends_before_anything_infinite_is_written(
    at, tmp_path, error, options
):
    out = tmp_path / "out"
    command = f"--model {at.folder} --data {at.ledger} --dtype float32 --warmup-steps 0 "
    message = error(f"{command} {options.format(pairs=at.pairs)} --out {out}")
    assert "NaN or infinite" in message or "nan" in message
    assert_finite(out)
    assert not list(out.rglob("config.json"))


def copy_model(folder: Path, target: Path, **changed) -> Path:
    """A copy, with some of the weights replaced."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    save_file(weights | changed, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_data_with_nothing_to_learn_is_refused(at, tmp_path, error):
    row = read_jsonl(at.ledger)[2]
    row |= {"reference": "", "reference_ids": [], "rationale_ids": [], "finish": "length"}
    ledger = write_jsonl(tmp_path / "nothing.jsonl", [row])
    message = error(f"{at.start} --data {ledger} --out {tmp_path}/out")
    assert "--data: 1 of 1 rows dropped" in message


# 7. The folder of a run


def test_resuming_compares_what_the_update_depends_on_and_not_paths(at, straight, tmp_path, error):
    out = tmp_path / "out"
    break_off(out, 4, "power cut", at.command)
    before = hashes(out)
    norm = load_file(at.folder / "model.safetensors")["model.norm.weight"]
    moved = copy_model(at.folder, tmp_path / "moved")
    other = copy_model(at.folder, tmp_path / "other", **{"model.norm.weight": norm + 1e-3})
    turned = copy_model(at.folder, tmp_path / "turned")
    write_config(turned, rope_theta=20000.0)
    changes = {
        "learning_rate": "--learning-rate 2e-3",
        "rationale_weight": "--rationale-weight 0.5",
        "data_hash": f"--data {at.pairs}",
        "start_hash": f"--model {other}",
        "start_hash was": f"--model {turned}",
        "teacher_hash": f"--teacher {at.teacher}",
    }
    for words, options in changes.items():
        message = error(f"{at.command} --resume --out {out} {options}")
        assert f"args.json: {words}" in message
    assert hashes(out) == before
    ledger = shutil.copyfile(at.ledger, tmp_path / "moved.jsonl")
    settings = json.loads((out / "args.json").read_text())
    del settings["only_ok"]  # an option that is newer than the run
    (out / "args.json").write_text(json.dumps(settings))
    out.rename(tmp_path / "elsewhere")
    command = f"--model {moved} --data {ledger} {TRAIN} --valid other={at.pairs} {at.ledger}"
    again = run(tmp_path / "elsewhere", f"{command} --resume")
    assert gap(again, straight) == 0


def test_what_others_put_next_to_the_checkpoints_stays(at, straight, tmp_path):
    foreign = [".DS_Store", "step-notes/x", "step-4.bak/x", "4/x"]
    break_off(tmp_path, 4, "power cut", at.command)
    for name in foreign:
        file = tmp_path / "checkpoint" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    again = run(tmp_path, f"{at.command} --resume")
    assert gap(again, straight) == 0
    assert sorted(hashes(tmp_path / "checkpoint")) == sorted(foreign)


def test_a_finished_run_stays_as_it_is_but_for_a_leftover_checkpoint(
    at, straight, tmp_path, capsys, error
):
    out = tmp_path / "out"
    shutil.copytree(straight.out, out)
    before = hashes(out)
    left = out / "checkpoint/step-4/weights"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("left")
    run(out, f"{at.command} --resume")
    assert "finished" in capsys.readouterr().out
    assert hashes(out) == before
    assert not (out / "checkpoint").exists()
    message = error(f"{at.command} --out {out}")
    assert "holds a run; continue it with --resume" in message
    assert hashes(out) == before


def test_a_link_to_a_run_is_that_run(at, straight, tmp_path):
    latest = tmp_path / "latest"
    latest.symlink_to("run1")
    break_off(latest, 3, "SIGTERM twice", at.command)
    assert gap(run(latest, f"{at.command} --resume"), straight) == 0
    assert latest.is_symlink()
    assert not (tmp_path / "run1").is_symlink()


# 8. Exports


def test_a_run_exports_model_folders_on_its_way(at, tmp_path):
    last = run(tmp_path, f"{at.command} --max-steps 4 --export-every 2")
    names = ["config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"]
    for step in ("step-2", "step-4"):
        assert sorted(file.name for file in (tmp_path / step).iterdir()) == names
    for name in names:
        assert (tmp_path / "step-4" / name).read_bytes() == (tmp_path / name).read_bytes()
    earlier = load_file(tmp_path / "step-2/model.safetensors")
    assert not torch.equal(earlier["lm_head.weight"], last.weights["lm_head.weight"])


def test_an_export_has_logits_and_prompts_of_transformers(at, straight):
    transformers = pytest.importorskip("transformers")
    tokens = torch.tensor([[1, *range(100, 160)]])
    _, theirs = load_plain(straight.out, "transformers")
    with torch.no_grad():
        mine = Transformer.from_pretrained(straight.out)(tokens)
        assert torch.allclose(mine, theirs(tokens), atol=1e-4)  # logits reach 10
    tokenizer = Tokenizer(straight.out)
    assert tokenizer.hash == Tokenizer(at.folder).hash
    peer = transformers.AutoTokenizer.from_pretrained(straight.out)
    for pair in PAIRS:
        prompt = peer.apply_chat_template(ask(pair), add_generation_prompt=True)
        assert tokenizer.chat(ask(pair)) == prompt["input_ids"]


def test_an_export_has_the_tokenizers_files_by_content_from_a_folder_of_links(at, tmp_path):
    store = tmp_path / "store"
    linked = tmp_path / "linked"
    shutil.copytree(at.folder, store)
    templates = store / "additional_chat_templates"
    templates.mkdir()
    (templates / "rag.jinja").write_text("{{ messages[0].content }}")
    (store / "chat_template.jinja").write_text(CHATML)
    (store / "notes.txt").write_text("mine")
    linked.mkdir()
    for file in store.iterdir():
        (linked / file.name).symlink_to(file)
    out = tmp_path / "out"
    run(out, f"--model {linked} --data {at.ledger} {TRAIN} {ONE_STEP}")
    shutil.rmtree(store)
    names = ["tokenizer.model", "tokenizer_config.json", "additional_chat_templates/rag.jinja"]
    for name in names:
        assert not (out / name).is_symlink()
    assert (out / "tokenizer.model").read_bytes() == (at.folder / "tokenizer.model").read_bytes()
    assert (out / names[2]).read_text() == "{{ messages[0].content }}"
    assert not (out / "notes.txt").exists()


@pytest.mark.parametrize("chat", ["zephyr", "mine.jinja"])
def test_an_export_has_the_chat_template_that_it_was_trained_with(at, tmp_path, monkeypatch, chat):
    monkeypatch.chdir(tmp_path)
    Path("mine.jinja").write_text("{{ bos_token }}Q: {{ messages[-1].content }}\nA:")
    options = f"--data {at.pairs} --chat {chat}"
    run(tmp_path / "out", f"{at.start} {ONE_STEP} {options}")
    expected = Tokenizer(at.folder, chat).chat(ask(PAIRS[0]))
    assert Tokenizer(tmp_path / "out").chat(ask(PAIRS[0])) == expected
    assert Tokenizer(at.folder).chat(ask(PAIRS[0])) != expected


# 9. Mistakes


def test_a_validation_set_is_named_by_its_file_or_by_the_user(at, tmp_path):
    place = tmp_path / "lr=1"
    place.mkdir()
    copy = shutil.copyfile(at.pairs, place / "a=b.jsonl")
    options = f"--data {at.pairs} --valid named={copy} {at.pairs}"
    found = run(tmp_path / "out", f"{at.start} {ONE_STEP} {options}").valid
    assert [line["valid"] for line in found[:2]] == ["named", "pairs"]


@pytest.fixture(scope="module")
def mistakes(at, tmp_path_factory) -> Path:
    """A folder with models that do not fit."""
    path = tmp_path_factory.mktemp("mistakes")
    for name in ("ledger.jsonl", "pairs.jsonl"):
        shutil.copyfile(at.path / name, path / name)
    write_config(path)
    wide = write_model(path / "wide", vocab_size=481)
    foreign = write_model(path / "foreign")
    narrow = write_model(path / "narrow", vocab_size=300)
    for folder in (wide, narrow):
        for name in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copyfile(at.folder / name, folder / name)
    write_tokenizer(foreign, added_tokens_decoder={"480": {"content": "<new>"}})
    return path


@pytest.mark.parametrize(
    "options, words",
    [
        ("--model nowhere", "nowhere"),
        ("--model narrow", "narrow: "),
        ("--data nowhere.jsonl", "nowhere.jsonl: "),
        ("--valid ledger=pairs.jsonl", "--valid: two sets are called ledger"),
        ("--teacher wide", "wide: its vocabulary"),
        ("--teacher foreign", "foreign: its vocabulary"),
        ("--config config.json", "--model, or --config"),
        ("--max-length 5", "--data: 7 of 7 rows"),
        ("--learning-rate -1", "--learning-rate"),
        ("--rationale-coverage 1.5", "--rationale-coverage"),
        ("--out ledger.jsonl", "ledger.jsonl"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(
    at, mistakes, monkeypatch, error, options, words
):
    monkeypatch.chdir(mistakes)
    before = hashes(mistakes)
    assert words in error(f"{at.command} --out {mistakes}/out {options}")
    assert hashes(mistakes) == before
    assert not (mistakes / "out").exists()


if __name__ == "__main__":
    do_jobs(sys.argv[1])
