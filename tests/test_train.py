"""train.py: the update is exact, a run survives whatever ends it, only finite numbers are written.

What needs processes of its own shares them: as a script this file trains once for each job that it
is given, on one rank or under torchrun.
"""

import functools
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
from argparse import Namespace
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import (
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
import model
import train
from data import Example, Tokenizer
from generate import generate
from model import Transformer, start_processes
from train import TokenLosses, batch_of, joint_loss, learning_rate

ROOT = Path(train.__file__).parent
PARTS = ["reference_loss", "rationale_loss", "reference_tokens", "rationale_tokens"]
VALID_FIELDS = {"step", "valid", "valid_loss", "tokens", "padded_tokens", *PARTS}
STEP_FIELDS = {"step", "loss", "tokens", "padded_tokens", "learning_rate", "grad_norm", *PARTS}
CLOCK = {"seconds", "memory_gib"}  # what differs between two runs of one command
# batches of 3, 3 and 1 of seven rows: two ranks get unequal numbers of tokens, and once none
TRAIN = "--batch-size 3 --micro-batch-size 2 --epochs 2 --save-every 2 --valid-every 3".split()
TRAIN += "--learning-rate 1e-3 --warmup-steps 2 --dtype float32".split()
ONE_STEP = "--batch-size 7 --micro-batch-size 8 --max-steps 1".split()


# 1. Runs, and what ends them


@dataclass
class Result:
    """What a finished run has left: its weights, and the lines of its metrics by kind."""

    out: Path
    weights: dict
    steps: list
    valid: list


def run(out: Path, *arguments) -> Result:
    """One run in this process."""
    words = [str(argument) for argument in (*arguments, "--out", out)]
    train.main(train.parser().parse_args(words))
    return result(out)


def result(out: Path) -> Result:
    lines = read_jsonl(out / "metrics.jsonl")
    steps = [line for line in lines if "valid" not in line]
    valid = [line for line in lines if "valid" in line]
    return Result(out, load_file(out / "model.safetensors"), steps, valid)


def gap(a: Result, b: Result) -> float:
    """The largest difference between two runs' weights."""
    assert a.weights.keys() == b.weights.keys()
    return max((a.weights[name] - b.weights[name]).abs().max().item() for name in a.weights)


def assert_same_metrics(a: Result, b: Result, rel: float, but=()):
    """Equal numbers in every line, but for the clock and the fields `but`."""
    left_out = {*CLOCK, *but}
    for mine, theirs in zip(a.steps + a.valid, b.steps + b.valid, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - left_out:
            wanted = theirs[name]
            if rel and isinstance(wanted, float):
                wanted = pytest.approx(wanted, rel=rel, abs=1e-7)  # a loss may be 0
            assert mine[name] == wanted, name


def fingerprint(folder: Path) -> dict:
    """What is in a folder, to the last bit."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def limit_files(size: int):
    """From here on no file can grow beyond `size`: to the writer the same as a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def cut_power():
    raise RuntimeError("power cut")


def send(*numbers):
    for number in numbers:
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


def tear_next_save():
    """The next file of weights is cut, and the process killed, before it is whole."""

    def torn(tensors, file, **options):
        save_file(tensors, file, **options)
        os.truncate(file, 1000)
        send(signal.SIGKILL)

    model.save_file = torn


ACTIONS = {
    "nothing": lambda: None,
    "power cut": cut_power,
    "full disk": lambda: limit_files(100_000),
    "SIGTERM twice": lambda: send(signal.SIGTERM, signal.SIGTERM),
    "SIGINT twice": lambda: send(signal.SIGINT, signal.SIGINT),
    "SIGTERM to all": send_as_a_scheduler_does,
    "torn save": tear_next_save,
}
ENDS = {
    "power cut": RuntimeError,
    "full disk": OSError,
    "SIGTERM twice": SystemExit,
    "SIGINT twice": SystemExit,
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


def break_off(out: Path, step: int, how: str, *arguments) -> BaseException:
    """A run that is ended after `step` -> the exception that ended it."""
    with after_step(step, ACTIONS[how]), pytest.raises(ENDS[how]) as ended:
        run(out, *arguments)
    return ended.value


def drive(file: str):
    """Trains once for each job in `file`; with which status each ended stands in FILE.RANK."""
    rank = int(os.environ.get("RANK", 0))
    data.time = Namespace(sleep=lambda _: None)  # rank 1 need not wait for torchrun to end it
    statuses = []
    for job in json.loads(Path(file).read_text()):
        sys.argv = ["train.py", *job["arguments"], *job["more"][rank]]
        action = ACTIONS[job["how"] if rank in job["ranks"] else "nothing"]
        status = 0
        with after_step(job["step"], action):
            try:
                data.cli(train.main, train.parser())
            except SystemExit as ended:
                status = ended.code
        statuses.append(status)
        Path(f"{file}.{rank}").write_text(json.dumps(statuses))


# 2. What is trained on


@dataclass
class Place:
    """Files to train on, and the segments of each row as they must be learnt."""

    path: Path
    folder: Path
    teacher: Path
    ledger: Path
    pairs: Path
    command: list
    joint: list
    vanilla: list


def make_rows(tokenizer) -> list:
    """A ledger of each kind of row: cut, of a doubtful status, without a rationale."""
    rows = []
    for i, pair in enumerate(PAIRS):
        text = "" if i == 2 else ("\nIt says: " + LINES[i])[: 17 + 4 * i]
        # a token a character, as a sampler may choose and no tokenizer would
        ids = []
        for character in text:
            ids += tokenizer.encode(character, within=True)
        row = {"id": f"row{i}"} | pair
        row["rationale"] = text
        row["rationale_ids"] = ids
        row["reference_ids"] = tokenizer.answer(pair["reference"])
        row["finish"] = "length" if i == 0 else "eos"
        row["status"] = {1: "copy", 2: "empty"}.get(i, "ok")
        rows.append(row)
    return rows


def make_segments(row, tokenizer) -> tuple:
    """prompt, reference, rationale: what the loss of this row is over."""
    end = tokenizer.sp.piece_to_id("<|im_end|>")
    prompt = tokenizer.chat([{"role": "user", "content": f"Say in English: {row['source']}"}])
    if not row["rationale_ids"]:
        return prompt, row["reference_ids"] + [end], []
    last = [end] if row["finish"] == "eos" else []
    return prompt, row["reference_ids"], row["rationale_ids"] + last


def write_meta(ledger: Path, tokenizer):
    meta = {"tokenizer_hash": tokenizer.hash, "chat": "chatml", "system": None}
    meta["template"] = "Say in {target_lang}: {source}"
    ledger.with_suffix(".meta.json").write_text(json.dumps(meta))


@pytest.fixture(scope="module")
def at(tmp_path_factory, folder) -> Place:
    path = tmp_path_factory.mktemp("train")
    tokenizer = Tokenizer(folder)
    rows = make_rows(tokenizer)
    ledger = write_jsonl(path / "ledger.jsonl", rows)
    write_meta(ledger, tokenizer)
    pairs = write_jsonl(path / "pairs.jsonl", PAIRS)
    teacher = write_model(path / "teacher", seed=1)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(folder / name, teacher / name)
    command = ["--model", folder, "--data", ledger, "--valid", f"other={pairs}", ledger, *TRAIN]
    joint = [make_segments(row, tokenizer) for row in rows]
    vanilla = [make_segments(row | {"rationale_ids": []}, tokenizer) for row in rows]
    return Place(path, folder, teacher, ledger, pairs, command, joint, vanilla)


@pytest.fixture(scope="module")
def straight(at) -> Result:
    """The run that nothing interrupts."""
    return run(at.path / "straight", *at.command)


@pytest.fixture(scope="module")
def taught(at) -> Result:
    """The same with a teacher."""
    return run(at.path / "taught", *at.command, "--teacher", at.teacher)


# 3. The loss and its gradient


def token_losses_by_autograd(x, targets, soft):
    hard = len(x) - len(soft)
    log_probs = x.log_softmax(-1)
    nll = -log_probs.gather(-1, targets[:, None])[:hard, 0]
    wanted = soft.softmax(-1)
    kl = (wanted * (soft.log_softmax(-1) - log_probs[hard:])).sum(-1)
    return torch.cat([nll, kl])


@pytest.mark.parametrize("hard, soft", [(150, 0), (0, 150), (70, 200), (1, 1)])
def test_token_losses_and_their_gradient_are_those_of_autograd(hard, soft):
    torch.manual_seed(0)
    x = torch.randn(hard + soft, 50) * 3  # more rows than one chunk has
    targets = torch.randint(50, (hard + soft,))
    teacher = torch.randn(soft, 50) * 3
    weights = torch.rand(hard + soft)
    mine = x.clone().requires_grad_()
    theirs = x.clone().requires_grad_()
    found = TokenLosses.apply(mine * 1, targets, teacher)
    wanted = token_losses_by_autograd(theirs, targets, teacher)
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    assert torch.allclose(found, wanted, atol=1e-5)  # losses reach 10: float32 has seven digits
    assert torch.allclose(mine.grad, theirs.grad, atol=1e-6)


def test_the_gradient_of_the_losses_takes_the_place_of_the_logits():
    leaf = torch.randn(100, 9, requires_grad=True)
    logits = leaf * 2
    places = [logits.data_ptr()]
    logits.register_hook(lambda gradient: places.append(gradient.data_ptr()))
    TokenLosses.apply(logits, torch.zeros(100).long(), torch.randn(30, 9)).sum().backward()
    assert places[0] == places[1]


def gradient(learner, teacher, examples) -> torch.Tensor:
    """Of the joint loss at weight 0.7, as one vector."""
    args = Namespace(micro_batch_size=2, rationale_weight=0.7)
    joint_loss(learner, teacher, examples, args, learn=True)
    parts = []
    for p in learner.parameters():
        parts.append(p.grad.flatten().double())
    learner.zero_grad()
    return torch.cat(parts)


def test_the_soft_gradient_is_the_mean_of_the_hard_ones_over_the_teachers_tokens(tmp_path):
    start_processes()
    models = []
    for seed in (0, 1):
        folder = write_model(tmp_path / str(seed), seed, vocab_size=5)
        models.append(Transformer.from_pretrained(folder))
    prompts = [[1, 3, 4], [4, 2, 2, 3]]

    def examples(token):
        return [Example(i, prompt, [i, 2], [token]) for i, prompt in enumerate(prompts)]

    found = gradient(*models, examples(0))
    # one example has each token in turn, while the others hold a token whose part is taken off
    rest = gradient(models[0], None, examples(0))
    wanted = rest.clone()
    for i, prompt in enumerate(prompts):
        with torch.no_grad():
            logits = models[1](torch.tensor([prompt + [i, 2]]))[0, -1]
        for token, p in enumerate(logits.double().softmax(-1)):
            one = examples(0)
            one[i].rationale = [token]
            wanted += p * (gradient(models[0], None, one) - rest)
    assert torch.allclose(found, wanted, atol=1e-6)  # float32: gradients of size 1 are subtracted
    assert (found - rest).abs().max() > 0.01


def test_a_model_that_is_its_own_teacher_has_nothing_to_learn_from_rationales(at, tmp_path):
    answers = []
    for row in read_jsonl(at.ledger)[3:]:
        answers.append(row | {"reference": "", "reference_ids": []})
    ledger = write_jsonl(tmp_path / "answers.jsonl", answers)
    write_meta(ledger, Tokenizer(at.folder))
    command = ["--model", at.folder, "--data", ledger, *TRAIN, *ONE_STEP, "--teacher"]
    [own] = run(tmp_path / "own", *command, at.folder).steps
    # float32: differences of two equal logarithms of size 10, over 480 tokens
    assert own["rationale_loss"] == pytest.approx(0, abs=1e-6)
    assert own["grad_norm"] == pytest.approx(0, abs=1e-5)
    assert own["reference_loss"] is None
    [other] = run(tmp_path / "other", *command, at.teacher).steps
    assert other["grad_norm"] > 0.1
    assert other["rationale_tokens"] == own["rationale_tokens"] > 20


def plain_losses(student, teacher, ids, start) -> torch.Tensor:
    """The loss of each token of `ids` from `start` on, by transformers and autograd."""
    tokens = torch.tensor([ids])
    logits = student(tokens).logits[0, start - 1 : -1]
    if teacher is None:
        return F.cross_entropy(logits, tokens[0, start:], reduction="none")
    with torch.no_grad():
        wanted = teacher(tokens).logits[0, start - 1 : -1].log_softmax(-1)
    return F.kl_div(logits.log_softmax(-1), wanted, reduction="none", log_target=True).sum(-1)


def plain_step(student, teacher, rows, weight) -> dict:
    """The gradient of the joint loss over all rows, one at a time, and what metrics say of it."""
    references = sum(len(reference) for _, reference, _ in rows)
    rationales = sum(len(rationale) for _, _, rationale in rows)
    sums = torch.zeros(2)
    for prompt, reference, rationale in rows:
        middle = len(prompt + reference)
        ids = prompt + reference + rationale
        hard = plain_losses(student, None, ids[:middle], len(prompt)).sum()
        extra = torch.zeros(())
        if rationale:
            extra = plain_losses(student, teacher, ids, middle).sum()
        ((hard + weight * extra) / (references + rationales)).backward()
        sums += torch.stack([hard, extra]).detach()
    loss = (sums[0] + weight * sums[1]) / (references + rationales)
    return {
        "loss": loss.item(),
        "reference_loss": sums[0].item() / references,
        "rationale_loss": sums[1].item() / max(rationales, 1),
        "reference_tokens": references,
        "rationale_tokens": rationales,
        "tokens": sum(len(prompt) for prompt, _, _ in rows) + references + rationales,
    }


@pytest.fixture(scope="module")
def load_plain():
    """Reads a model folder with transformers."""
    transformers = pytest.importorskip("transformers")
    read = transformers.AutoModelForCausalLM.from_pretrained
    return functools.partial(read, dtype=torch.float32)


@pytest.mark.parametrize(
    "weight, decay, clip, soft",
    [(1, 0, 1, False), (0.33, 0.1, 0.05, False), (0, 0.1, 0, False), (0.6, 0, 1, True)],
)
def test_training_is_that_of_a_plain_loop(at, tmp_path, load_plain, weight, decay, clip, soft):
    peak = 3e-4
    options = ["--batch-size", 7, "--micro-batch-size", 4, "--max-steps", 4, "--valid", at.ledger]
    options += ["--learning-rate", peak, "--weight-decay", decay, "--max-grad-norm", clip]
    options += ["--rationale-weight", weight] + (["--teacher", at.teacher] if soft else [])
    mine = run(tmp_path, *at.command, *options)
    rows = at.joint if weight else at.vanilla
    student = load_plain(at.folder).train()
    teacher = load_plain(at.teacher) if soft else None
    matrices = [p for p in student.parameters() if p.dim() > 1]
    vectors = [p for p in student.parameters() if p.dim() == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, weight_decay=decay)
    # two steps of warm-up, then half a cosine wave
    for line, rate in zip(mine.steps, [peak / 2, peak, peak, peak / 2], strict=True):
        wanted = plain_step(student, teacher, rows, weight)
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), clip or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        found = {name: line[name] or 0 for name in wanted}  # no rationales, no mean
        assert found == pytest.approx(wanted, rel=1e-4)  # float32 sums in another order
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert line["learning_rate"] == pytest.approx(rate)
    for name, p in student.state_dict().items():
        difference = (mine.weights[name] - p).abs()
        # a wrong rate, decay or weight moves all; where a gradient is nearly 0, Adam makes its
        # rounding up to a step
        assert difference.mean() < 1e-7, name
        assert difference.max() < 1e-4, name
    # the same rows and the same weights
    assert mine.valid[0]["valid_loss"] == pytest.approx(mine.steps[0]["loss"], rel=1e-5)


def test_what_is_exported_has_the_same_logits_in_transformers(at, straight, load_plain):
    tokens = torch.tensor([[1, *range(100, 160)]])
    with torch.no_grad():
        mine = Transformer.from_pretrained(straight.out)(tokens)
        theirs = load_plain(straight.out)(tokens).logits
    assert torch.allclose(mine, theirs, atol=1e-4)  # logits reach 10: float32 has seven digits
    assert Tokenizer(straight.out).hash == Tokenizer(at.folder).hash
    assert Tokenizer(straight.out).chat_name == "chatml"


def test_a_run_exports_model_folders_on_its_way(at, tmp_path):
    last = run(tmp_path, *at.command, "--max-steps", 4, "--export-every", 2)
    names = ["config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"]
    for step in ("step-2", "step-4"):
        assert sorted(file.name for file in (tmp_path / step).iterdir()) == names
    for name in names:
        assert (tmp_path / "step-4" / name).read_bytes() == (tmp_path / name).read_bytes()
    earlier = load_file(tmp_path / "step-2/model.safetensors")
    assert not torch.equal(earlier["lm_head.weight"], last.weights["lm_head.weight"])


@pytest.fixture(scope="module")
def whole_batches(at) -> dict:
    """Three steps of all rows at a time, without and with a teacher."""
    command = [*at.command, *ONE_STEP[:-1], 3, "--learning-rate", 2e-5, "--valid", at.ledger]
    hard = run(at.path / "whole", *command)
    soft = run(at.path / "whole taught", *command, "--teacher", at.teacher)
    return {False: (command, hard), True: ([*command, "--teacher", at.teacher], soft)}


@pytest.mark.parametrize(
    "options, soft",
    [
        ("--micro-batch-size 1", False),
        ("--micro-batch-size 3", False),
        ("--activation-checkpointing", False),
        ("--micro-batch-size 2 --activation-checkpointing", True),
    ],
)
def test_micro_batches_and_recomputed_activations_do_not_change_the_update(
    whole_batches, tmp_path, options, soft
):
    command, whole = whole_batches[soft]
    parts = run(tmp_path, *command, *options.split())
    assert gap(parts, whole) < 1e-6  # sums in another order; the weights moved by 5e-5
    assert_same_metrics(parts, whole, 1e-5, ["padded_tokens"])
    if options == "--micro-batch-size 1":
        # no padding, and the last token of a row is predicted, never read
        assert parts.steps[0]["padded_tokens"] == parts.steps[0]["tokens"] - 7


# 4. What is learnt, and in which order


def test_metrics_hold_each_step_once_and_each_validation(at, straight):
    lines = read_jsonl(straight.out / "metrics.jsonl")
    found = [(line["step"], line.get("valid", "")) for line in lines]
    valid = {step: [(step, "other"), (step, "ledger")] for step in (0, 3, 6)}
    steps = [(step, "") for step in range(7)]
    assert found == valid[0] + steps[1:4] + valid[3] + steps[4:7] + valid[6]
    assert all(line.keys() == STEP_FIELDS | CLOCK for line in straight.steps)
    assert all(line.keys() == VALID_FIELDS for line in straight.valid)
    for line in straight.steps:
        total = line["reference_loss"] * line["reference_tokens"]
        total += (line["rationale_loss"] or 0) * line["rationale_tokens"]
        count = line["reference_tokens"] + line["rationale_tokens"]
        assert line["loss"] == pytest.approx(total / count)
        assert all(0 < line[name] < math.inf for name in CLOCK)
    assert straight.valid[0]["rationale_loss"] is None  # plain pairs
    for i, name in enumerate(("reference_tokens", "rationale_tokens"), 1):
        counted = sum(len(row[i]) for row in at.joint)
        assert sum(line[name] for line in straight.steps[:3]) == counted
        assert straight.valid[1][name] == counted
    assert not (straight.out / "checkpoint").exists()


def test_a_step_without_rationales_says_so(at, tmp_path, capsys):
    [line] = run(tmp_path, *at.command, *ONE_STEP, "--rationale-weight", 0).steps
    assert line["rationale_loss"] is None
    assert line["rationale_tokens"] == 0
    assert "rationale      -" in capsys.readouterr().out


def test_an_epoch_has_each_example_once_in_an_order_by_seed_and_epoch():
    orders = set()
    for seed in (0, 1):
        args = Namespace(batch_size=3, seed=seed)
        batches = [batch_of(list(range(7)), step, args) for step in range(6)]
        assert [len(batch) for batch in batches] == [3, 3, 1, 3, 3, 1]
        for epoch in (batches[:3], batches[3:]):
            order = tuple(itertools.chain(*epoch))
            assert sorted(order) == list(range(7))
            orders.add(order)
    assert len(orders) == 4


def test_a_row_that_is_too_long_is_left_out_whole_and_told(at, tmp_path, capsys):
    lengths = [sum(map(len, row)) for row in at.joint]
    most = max(lengths)
    fits = run(tmp_path / "fits", *at.command, *ONE_STEP, "--max-length", most)
    assert fits.steps[0]["tokens"] == sum(lengths)
    capsys.readouterr()
    less = run(tmp_path / "less", *at.command, *ONE_STEP, "--max-length", most - 1)
    assert less.steps[0]["tokens"] == sum(lengths) - most
    assert f"6 examples; left out: 1 rows longer than {most - 1} tokens" in capsys.readouterr().out


def test_only_ok_and_coverage_leave_out_rationales_and_keep_the_rows(at, tmp_path):
    counts = {}
    for share in (0.5, 1.0):
        options = ["--only-ok", "--rationale-coverage", share]
        [line] = run(tmp_path / str(share), *at.command, *ONE_STEP, *options).steps
        counts[share] = (line["reference_tokens"], line["rationale_tokens"])
    ok = at.joint[:1] + at.vanilla[1:3] + at.joint[3:]  # row 1 is a copy, row 2 has none
    wanted = tuple(sum(len(row[i]) for row in ok) for i in (1, 2))
    assert counts[1.0] == wanted
    assert 0 < counts[0.5][1] < wanted[1]
    assert counts[0.5][0] > wanted[0]  # an EOS for each that is left out


def ask(pair) -> list:
    text = f"Translate this from German to English:\nGerman: {pair['source']}\nEnglish:"
    return [{"role": "user", "content": text}]


def test_ledgers_pairs_and_conversations_train_together(at, tmp_path):
    roles = ["user", "assistant", "user", "assistant"]
    turns = [{"role": role, "content": text} for role, text in zip(roles, LINES)]
    rows = [{"prompt": LINES[0], "response": LINES[1]}, {"messages": turns}]
    chats = write_jsonl(tmp_path / "chats.jsonl", rows)
    options = ["--data", at.ledger, at.pairs, chats, "--batch-size", 100, "--max-steps", 1]
    [line] = run(tmp_path / "out", *at.command, *options).steps
    tokenizer = Tokenizer(at.folder)
    prompts = [turns[:1], turns[:3], *(ask(pair) for pair in PAIRS)]
    answers = [LINES[1], LINES[3], *(pair["reference"] for pair in PAIRS)]
    counts = [sum(len(row[i]) for row in at.joint) for i in range(3)]
    counts[0] += sum(len(tokenizer.chat(prompt)) for prompt in prompts)
    counts[1] += sum(len(tokenizer.answer(text)) + 1 for text in answers)  # and EOS
    assert line["reference_tokens"] == counts[1]
    assert line["rationale_tokens"] == counts[2]
    assert line["tokens"] == sum(counts)


def test_random_weights_learn_seven_pairs_by_heart(at, tmp_path):
    write_config(tmp_path)
    start = ["--config", tmp_path / "config.json", "--tokenizer", at.folder, "--data", at.pairs]
    options = "--max-steps 60 --learning-rate 5e-3 --schedule linear --save-every 0".split()
    run(tmp_path / "out", *start, *options)
    tokenizer = Tokenizer(tmp_path / "out")
    learner = Transformer.from_pretrained(tmp_path / "out")
    prompts = [tokenizer.chat(ask(pair)) for pair in PAIRS]
    answers = generate(learner, prompts, max_new_tokens=80, eos_ids=tokenizer.eos_ids)
    assert [tokenizer.decode(ids) for ids in answers] == [pair["reference"] for pair in PAIRS]


def test_bfloat16_computes_near_float32_and_is_exported(at, straight, tmp_path):
    half = run(tmp_path, *at.command, "--dtype", "bfloat16")
    assert {w.dtype for w in half.weights.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    mine = [line["loss"] for line in half.steps]
    exact = [line["loss"] for line in straight.steps]
    assert mine == pytest.approx(exact, rel=0.02)  # bfloat16 has eight bits
    assert mine != exact


SHAPES = {
    "constant": [1, 1, 1, 1],
    "linear": [1, 0.75, 0.5, 0.25],
    "cosine": [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)],
    "inverse_sqrt": [math.sqrt(2 / n) for n in (2, 3, 4, 5)],
}


@pytest.mark.parametrize("schedule", SHAPES)
def test_a_schedule_has_its_shape_after_a_linear_warm_up(schedule):
    args = Namespace(warmup_steps=2, learning_rate=8.0, schedule=schedule)
    rates = [learning_rate(step, 6, args) / 8 for step in range(6)]
    assert rates == pytest.approx([0.5, 1, *SHAPES[schedule]])


# 5. Runs that end early


@pytest.mark.parametrize(
    "how, step, left",
    [
        ("power cut", 1, []),
        ("power cut", 4, ["step-2"]),
        ("full disk", 4, ["step-2"]),
        ("full disk", 6, ["step-4"]),
        ("SIGTERM twice", 3, ["step-3"]),
        ("SIGINT twice", 5, ["step-5"]),
    ],
)
def test_a_run_that_ends_early_is_resumed_bit_for_bit(at, straight, tmp_path, how, step, left):
    ended = break_off(tmp_path, step, how, *at.command)
    if isinstance(ended, SystemExit):
        assert ended.code == {"SIGTERM twice": 143, "SIGINT twice": 130}[how]
    found = (tmp_path / "checkpoint").glob("step-*")
    assert [path.name for path in found if path.suffix != ".tmp"] == left
    assert not (tmp_path / "config.json").exists()
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 5, "lo')  # as a kill may leave it
    again = run(tmp_path, *at.command, "--resume")
    assert gap(again, straight) == 0
    assert_same_metrics(again, straight, 0)
    assert fingerprint(tmp_path).keys() == fingerprint(straight.out).keys()


def test_a_run_with_a_teacher_is_resumed_bit_for_bit(at, straight, taught, tmp_path):
    command = [*at.command, "--teacher", at.teacher]
    break_off(tmp_path, 4, "power cut", *command)
    again = run(tmp_path, *command, "--resume")
    assert gap(again, taught) == 0
    assert_same_metrics(again, taught, 0)
    assert gap(taught, straight) > 1e-4


class Ended(BaseException):
    """In place of os._exit."""


def test_a_later_ctrl_c_ends_a_run_at_once(at, tmp_path, monkeypatch):
    statuses = []

    def end(status):
        statuses.append(status)
        raise Ended

    monkeypatch.setattr("os._exit", end)
    monkeypatch.setattr(train, "REPEAT_S", -1)  # every second one is later
    with after_step(3, ACTIONS["SIGINT twice"]), pytest.raises(Ended):
        run(tmp_path, *at.command)
    assert statuses == [130]


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


# 6. Several processes


class Jobs:
    """Runs that share one start of processes."""

    def __init__(self, at: Place, name: str, *launcher):
        self.at = at
        self.file = at.path / f"{name}.json"
        self.launcher = launcher
        self.jobs = []

    def add(self, out, *options, how="nothing", step=0, ranks=(0, 1), more=()):
        """A run; `how` it is ended after a step on these ranks. more: options of rank 1 alone."""
        words = [*self.at.command, *options, "--out", self.at.path / out]
        job = {"arguments": list(map(str, words)), "more": [[], list(map(str, more))]}
        self.jobs.append(job | {"how": how, "step": step, "ranks": ranks})

    def start(self) -> subprocess.Popen:
        self.file.write_text(json.dumps(self.jobs))
        command = [sys.executable, *self.launcher, str(Path(__file__)), str(self.file)]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, start_new_session=True, **pipes)

    def statuses(self, rank: int) -> list:
        return json.loads(Path(f"{self.file}.{rank}").read_text())


@dataclass
class Ranks:
    """How the processes ended, and what torchrun and its ranks said."""

    killed: int
    statuses: list
    errors: str


@pytest.fixture(scope="module")
def ranks(at) -> Ranks:
    """One process that is killed while it saves, and beside it all that needs two ranks."""
    break_off(at.path / "onto two", 3, "SIGTERM twice", *at.command)
    one = Jobs(at, "one")
    one.add("killed", how="torn save", step=4, ranks=[0])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = Jobs(at, "two", *torchrun)
    two.add("two ranks")
    two.add("two taught", "--teacher", at.teacher)
    two.add("onto two", "--resume")
    two.add("ended", how="SIGTERM twice", step=3, ranks=[1])
    two.add("ended", "--resume")
    two.add("apart", more=["--data", at.pairs])
    two.add("scheduler", how="SIGTERM to all", step=3)
    alone = one.start()
    both = two.start()
    watch = threading.Timer(90, both.terminate)  # ranks may wait for each other for ever
    watch.start()
    try:
        _, errors = both.communicate()
        alone.communicate(timeout=30)
    finally:
        watch.cancel()
        alone.kill()
        both.terminate()
    return Ranks(alone.returncode, [two.statuses(0), two.statuses(1)], errors)


def test_sigkill_in_mid_save_leaves_the_last_checkpoint(at, straight, ranks):
    assert ranks.killed == -signal.SIGKILL
    out = at.path / "killed"
    assert sorted(path.name for path in (out / "checkpoint").iterdir()) == ["step-2", "step-4.tmp"]
    again = run(out, *at.command, "--resume")
    assert gap(again, straight) == 0
    assert_same_metrics(again, straight, 0)


def test_two_ranks_make_the_run_of_one(at, straight, taught, ranks):
    wanted = {"two ranks": straight, "onto two": straight, "two taught": taught}
    for name, alone in wanted.items():
        both = result(at.path / name)
        # gradients are summed in another order: 1e-7 of each, which Adam may make 1e-5 of a weight
        assert gap(both, alone) < 1e-5
        assert_same_metrics(both, alone, 1e-4, ["padded_tokens"])


def test_two_ranks_of_which_one_is_told_to_stop_are_resumed_bit_for_bit(at, ranks):
    assert [statuses[:5] for statuses in ranks.statuses] == [[0, 0, 0, 143, 0]] * 2
    whole = result(at.path / "two ranks")
    again = result(at.path / "ended")
    assert gap(again, whole) == 0
    assert_same_metrics(again, whole, 0)


def test_ranks_that_read_other_data_are_told_so(at, ranks):
    assert [statuses[5] for statuses in ranks.statuses] == [2, 2]
    assert "is not the same on all ranks" in ranks.errors
    assert not (at.path / "apart").exists()


def test_a_schedulers_sigterm_leaves_a_checkpoint_that_one_rank_resumes(at, ranks):
    assert [statuses[6] for statuses in ranks.statuses] == [143, 143]
    out = at.path / "scheduler"
    assert [path.name for path in (out / "checkpoint").iterdir()] == ["step-3"]
    again = run(out, *at.command, "--resume")
    assert gap(again, result(at.path / "two ranks")) < 1e-5  # as above
    assert [line["step"] for line in again.steps] == [1, 2, 3, 4, 5, 6]


def test_of_two_processes_with_one_out_the_second_is_told_so(
    at, straight, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    break_off(out, 3, "SIGTERM twice", *at.command)
    before = fingerprint(tmp_path)
    with data.lock(out):
        for more in ([], ["--resume"]):
            error = error_of(train, [*at.command, *more, "--out", out], monkeypatch, capsys)
            assert "another process is writing it" in error
    assert fingerprint(tmp_path) == before
    assert gap(run(out, *at.command, "--resume"), straight) == 0


# 7. Only what is finite is written


def assert_finite(folder: Path):
    for file in folder.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values()), file
    text = (folder / "metrics.jsonl").read_text() if (folder / "metrics.jsonl").exists() else ""
    assert not {"NaN", "Infinity"} & set(text.replace(",", " ").split())


@pytest.mark.parametrize(
    "options",
    [
        "--learning-rate 1e38 --max-steps 1",
        "--learning-rate 1e38 --max-steps 1 --export-every 1",
        "--learning-rate 1e38 --max-steps 5 --warmup-steps 0 --save-every 1",
        "--learning-rate 1e30 --max-steps 5 --warmup-steps 0 --save-every 1",
        "--learning-rate 1e30 --max-steps 1 --valid pairs.jsonl",
        "--learning-rate 1e30 --max-steps 5 --valid-every 2 --valid pairs.jsonl --warmup-steps 0",
    ],
)
def test_a_rate_that_is_far_too_high_ends_before_anything_infinite_is_written(
    at, tmp_path, monkeypatch, capsys, options
):
    monkeypatch.chdir(at.path)
    out = tmp_path / "out"
    command = ["--model", at.folder, "--data", at.ledger, "--out", out, "--dtype", "float32"]
    error = error_of(train, [*command, *options.split()], monkeypatch, capsys)
    assert "finite" in error or "nan" in error
    assert_finite(out)
    assert not (out / "config.json").exists()
    assert not (out / "step-1").exists()


def test_a_checkpoint_outlives_a_run_that_diverges_later(at, tmp_path, monkeypatch, capsys):
    def spoil():
        with torch.no_grad():
            next(p for p in held if p.dim() > 1).fill_(math.nan)

    held = []
    make = train.make_optimizer

    def make_and_hold(learner, args):
        held.extend(learner.parameters())
        return make(learner, args)

    monkeypatch.setattr(train, "make_optimizer", make_and_hold)
    with after_step(4, spoil):
        error = error_of(train, [*at.command, "--out", tmp_path / "out"], monkeypatch, capsys)
    assert "embed_tokens" in error
    assert "step-4" in error
    assert_finite(tmp_path / "out")
    assert (tmp_path / "out/checkpoint/step-2").is_dir()
    assert not (tmp_path / "out/checkpoint/step-4").exists()


def copy_model(folder: Path, target: Path, **changed) -> Path:
    """A copy, with some of the weights replaced."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    save_file(weights | changed, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("option", ["--model", "--teacher"])
def test_weights_that_are_not_finite_are_named(at, tmp_path, monkeypatch, capsys, option):
    spoilt = torch.ones(64)
    spoilt[7] = math.nan
    folder = copy_model(at.folder, tmp_path / "nan", **{"model.norm.weight": spoilt})
    command = [*at.command, "--out", tmp_path / "out", option, folder]
    error = error_of(train, command, monkeypatch, capsys)
    assert "nan/model.safetensors: model.norm.weight" in error
    assert not (tmp_path / "out/metrics.jsonl").exists()


def test_a_step_with_nothing_to_learn_is_told_with_its_rows(at, tmp_path, monkeypatch, capsys):
    row = read_jsonl(at.ledger)[2]
    row |= {"reference": "", "reference_ids": [], "rationale_ids": [], "finish": "length"}
    ledger = write_jsonl(tmp_path / "nothing.jsonl", [row])
    write_meta(ledger, Tokenizer(at.folder))
    command = [*at.command, "--data", ledger, "--out", tmp_path / "out"]
    error = error_of(train, command, monkeypatch, capsys)
    assert "nan" not in error
    assert "learn" in error


# 8. What a run owns, and what is another's


def test_resuming_compares_what_the_update_depends_on_and_not_where_it_lies(
    at, straight, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    break_off(out, 4, "power cut", *at.command)
    before = fingerprint(out)
    norm = load_file(at.folder / "model.safetensors")["model.norm.weight"]
    moved = copy_model(at.folder, tmp_path / "moved")
    other = copy_model(at.folder, tmp_path / "other", **{"model.norm.weight": norm + 1e-3})
    turned = copy_model(at.folder, tmp_path / "turned")
    write_config(turned, rope_theta=20000.0)
    changes = {
        "learning_rate": ["--learning-rate", 2e-3],
        "rationale_weight": ["--rationale-weight", 0.5],
        "data_hash": ["--data", at.pairs],
        "start_hash": ["--model", other],
        "start_hash was": ["--model", turned],
        "teacher_hash": ["--teacher", at.teacher],
    }
    for words, options in changes.items():
        command = [*at.command, "--resume", "--out", out, *options]
        assert f"args.json: {words}" in error_of(train, command, monkeypatch, capsys)
    assert fingerprint(out) == before
    ledger = shutil.copyfile(at.ledger, tmp_path / "moved.jsonl")
    shutil.copyfile(at.ledger.with_suffix(".meta.json"), tmp_path / "moved.meta.json")
    out.rename(tmp_path / "elsewhere")
    paths = ["--model", moved, "--data", ledger]
    again = run(tmp_path / "elsewhere", *at.command, "--resume", *paths)
    assert gap(again, straight) == 0


def test_a_run_of_random_weights_is_resumed_with_the_same_config_alone(
    at, tmp_path, monkeypatch, capsys
):
    config = tmp_path / "config.json"
    write_config(tmp_path)
    start = ["--config", config, "--tokenizer", at.folder, "--data", at.pairs, *TRAIN]
    whole = run(tmp_path / "whole", *start)
    out = tmp_path / "out"
    break_off(out, 3, "SIGTERM twice", *start)
    write_config(tmp_path, rope_theta=20000.0)
    command = [*start, "--resume", "--out", out]
    assert "start_hash was" in error_of(train, command, monkeypatch, capsys)
    write_config(tmp_path)
    assert gap(run(out, *start, "--resume"), whole) == 0


def test_a_leftover_of_args_json_blocks_nothing(at, straight, tmp_path):
    (tmp_path / "args.json.tmp").write_text('{"mod')
    ended = break_off(tmp_path, 2, "SIGTERM twice", *at.command)
    assert ended.code == 143
    (tmp_path / "args.json.tmp").write_text('{"mod')
    assert gap(run(tmp_path, *at.command, "--resume"), straight) == 0


def test_what_others_put_beside_the_checkpoints_stays(at, straight, tmp_path):
    foreign = [".DS_Store", "step-notes/x", "step-4.bak/x", "4/x"]
    break_off(tmp_path, 4, "power cut", *at.command)
    for name in foreign:
        file = tmp_path / "checkpoint" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    again = run(tmp_path, *at.command, "--resume")
    assert gap(again, straight) == 0
    left = fingerprint(tmp_path / "checkpoint")
    assert sorted(left) == sorted(foreign)


def test_a_finished_run_is_left_as_it_is_but_for_a_leftover_checkpoint(
    at, straight, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    shutil.copytree(straight.out, out)
    before = fingerprint(out)
    left = out / "checkpoint/step-4/weights"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("left")
    run(out, *at.command, "--resume")
    assert "finished" in capsys.readouterr().out
    assert fingerprint(out) == before
    assert not (out / "checkpoint").exists()
    error = error_of(train, [*at.command, "--out", out], monkeypatch, capsys)
    assert "is not empty; resume it with --resume" in error
    assert fingerprint(out) == before


def test_a_folder_that_holds_something_else_is_refused(at, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("mine")
    before = fingerprint(tmp_path)
    for more in ([], ["--resume"]):
        command = [*at.command, "--out", tmp_path / "out", *more]
        assert "is not empty" in error_of(train, command, monkeypatch, capsys)
    assert fingerprint(tmp_path) == before


def test_an_export_has_the_tokenizers_own_files_and_no_others(at, tmp_path):
    folder = copy_model(at.folder, tmp_path / "model")
    (tmp_path / "secret").write_text("secret")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    (folder / "added_tokens.json").write_text("{}")
    (folder / "special_tokens_map.json").symlink_to("added_tokens.json")
    (folder / "notes.txt").write_text("mine")
    run(tmp_path / "out", *at.command, "--model", folder, *ONE_STEP)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"tokenizer.model", "added_tokens.json", "special_tokens_map.json"} <= names
    assert not {"tokenizer.json", "notes.txt"} & names


def test_the_cache_of_hugging_face_is_read_through_its_links(at, tmp_path):
    snapshot = tmp_path / "models--x/snapshots/1234"
    blobs = tmp_path / "models--x/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    names = [file.name for file in at.folder.iterdir()]
    for i, name in enumerate(names):
        shutil.copyfile(at.folder / name, blobs / f"abc{i}")
        (snapshot / name).symlink_to(f"../../blobs/abc{i}")
    out = tmp_path / "out"
    run(out, *at.command, "--model", snapshot, *ONE_STEP)
    for name in names:
        assert (out / name).is_file()
        assert not (out / name).is_symlink()
    same = (out / "tokenizer.model").read_bytes()
    assert same == (at.folder / "tokenizer.model").read_bytes()


def test_a_path_of_validation_may_hold_an_equals_sign(at, tmp_path):
    place = tmp_path / "lr=1"
    place.mkdir()
    plain = shutil.copyfile(at.pairs, place / "a=b.jsonl")
    options = ["--valid", plain, f"named={plain}", at.pairs, f"named={at.pairs}"]
    found = run(tmp_path / "out", *at.command, *ONE_STEP, *options).valid
    assert [line["valid"] for line in found[:3]] == ["a=b", "named", "pairs"]
    assert found[1]["tokens"] == 2 * found[0]["tokens"]


def test_the_folder_that_one_stands_in_can_take_the_run(at, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run(Path("."), *at.command, *ONE_STEP, "--export-every", 1)
    names = {file.name for file in Path(".").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.model", "step-1"} <= names
    assert not [file for file in tmp_path.rglob("*") if file.suffix in (".tmp", ".lock")]


# 9. Mistakes


@pytest.mark.parametrize(
    "options, words",
    [
        ("--model nowhere", "nowhere"),
        ("--data nowhere.jsonl", "nowhere.jsonl: "),
        ("--valid nowhere.jsonl", "nowhere.jsonl: "),
        ("--valid pairs.jsonl other=nowhere.jsonl", "nowhere.jsonl: "),
        ("--teacher nowhere", "nowhere"),
        ("--teacher wide", "wide: its vocabulary"),
        ("--teacher foreign", "foreign: its vocabulary"),
        ("--config config.json", "--model or --config"),
        ("--max-length 5", "ledger.jsonl: no row"),
        ("--schedule steep", "--schedule"),
        ("--learning-rate -1", "--learning-rate"),
        ("--learning-rate nan", "--learning-rate"),
        ("--rationale-coverage 1.5", "--rationale-coverage"),
        ("--max-steps 0", "--max-steps"),
        ("--seed 18446744073709551616", "--seed"),
        ("--out ledger.jsonl", "ledger.jsonl"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(
    at, mistakes, monkeypatch, capsys, options, words
):
    monkeypatch.chdir(mistakes)
    before = fingerprint(mistakes)
    command = [*at.command, "--out", mistakes / "out", *options.split()]
    assert words in error_of(train, command, monkeypatch, capsys)
    assert fingerprint(mistakes) == before
    assert not (mistakes / "out").exists()


@pytest.fixture(scope="module")
def mistakes(at, tmp_path_factory) -> Path:
    """A folder with two teachers that do not fit."""
    path = tmp_path_factory.mktemp("mistakes")
    for name in ("ledger.jsonl", "ledger.meta.json", "pairs.jsonl"):
        shutil.copyfile(at.path / name, path / name)
    write_config(path)
    wide = write_model(path / "wide", vocab_size=481)
    foreign = write_model(path / "foreign")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(at.folder / name, wide / name)
    write_tokenizer(foreign, added_tokens_decoder={"479": {"content": "<new>"}})
    return path


if __name__ == "__main__":
    drive(sys.argv[1])
