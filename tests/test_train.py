"""What train.py promises: the update is exact, a run survives whatever ends it, mistakes leave everything as it was."""

import hashlib
import itertools
import json
import math
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import LINES, PAIRS, read_jsonl, write_config, write_jsonl
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

import data
from data import TEMPLATE, Tokenizer
from generate import generate
from model import Transformer
from train import CrossEntropy, kept_bytes, main, parser

VALID_FIELDS = set("step valid valid_loss reference_loss rationale_loss reference_tokens rationale_tokens".split())
STEP_FIELDS = VALID_FIELDS - {"valid", "valid_loss"} | set("loss tokens padded_tokens learning_rate grad_norm".split())
CLOCK = {"seconds", "mfu", "memory_gib"}  # what may differ between two runs of one command
# batches of 3, 3 and 1 of 7 rows: with two ranks some micro-batches have unequal token counts, and one is empty
TRAIN = "--batch-size 3 --micro-batch-size 2 --epochs 2 --save-every 2 --valid-every 3 --learning-rate 1e-3 "
TRAIN += "--warmup-steps 2"
DRIVER = """
import json, os, resource, signal, sys
sys.path.insert(0, sys.argv[1])
import safetensors.torch
from torch.optim.optimizer import register_optimizer_step_post_hook
rank, codes, count, job = os.environ.get("RANK", "0"), [], 0, {}
full = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
def after(*_):
    global count
    count += 1
    if count == job["step"] and rank == job["rank"]:
        full(100_000) if job["what"] == "full" else os.kill(os.getpid(), getattr(signal, job["what"]))
save_file = safetensors.torch.save_file
def torn(tensors, name, *args, **kwargs):
    save_file(tensors, name, *args, **kwargs)
    if job["what"] == "torn" and count == 4:
        os.truncate(name, 1000)
        os.kill(os.getpid(), signal.SIGKILL)
safetensors.torch.save_file = torn
register_optimizer_step_post_hook(after)
import data, train
for job in json.load(open(sys.argv[2])):
    full(resource.RLIM_INFINITY)
    count, where, sys.argv = 0, sys.argv, ["train.py", *job["argv"]]
    try:
        codes.append(data.cli(train.main, train.parser()))
    except SystemExit as e:
        codes.append(e.code)
    sys.argv = where
    json.dump(codes, open(sys.argv[2] + rank, "w"))
"""


@pytest.fixture(autouse=True)
def handlers():
    """Signals as pytest had them: a test that hangs must still heed Ctrl-C."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    [signal.signal(number, handler) for number, handler in before.items()]


@pytest.fixture(scope="module")
def at(tmp_path_factory, folder) -> SimpleNamespace:
    """A folder with pairs and a ledger of every kind of row, and what each row of the ledger must be trained on."""
    place, tokenizer, rows = tmp_path_factory.mktemp("train"), Tokenizer(folder), []
    for i, pair in enumerate(PAIRS):
        text = "" if i == 2 else ("\nIt says: " + LINES[i])[: 17 + 4 * i]
        # a token a character, as a sampler may choose and no tokenizer would: the ledger's own ids must be used
        ids = [id for c in text for id in tokenizer.sp_continue.encode(c)]
        row = dict(id=f"row{i}", **pair, rationale=text, rationale_ids=ids)
        row["reference_ids"] = tokenizer.answer(pair["reference"])
        rows.append(row | dict(finish="length" if i == 0 else "eos", status={1: "copy", 2: "empty"}.get(i, "ok")))
    meta = dict(tokenizer_hash=tokenizer.hash, chat="chatml", system=None, template="Say in {target_lang}: {source}")
    (place / "ledger.meta.json").write_text(json.dumps(meta))
    ledger, pairs = write_jsonl(place / "ledger.jsonl", rows), write_jsonl(place / "pairs.jsonl", PAIRS)
    end, sequences = tokenizer.sp.piece_to_id("<|im_end|>"), {"joint": [], "vanilla": []}
    for row in rows:
        prompt = tokenizer.chat([{"role": "user", "content": f"Say in English: {row['source']}"}])
        reference, rationale = row["reference_ids"], row["rationale_ids"] + [end] * (row["finish"] == "eos")
        vanilla = prompt, reference + [end], []
        sequences["joint"].append((prompt, reference, rationale) if row["status"] == "ok" else vanilla)
        sequences["vanilla"].append(vanilla)
    command = f"--model {folder} --data {ledger} --valid other={pairs} {ledger} --dtype float32 {TRAIN}".split()
    return SimpleNamespace(folder=folder, place=place, ledger=ledger, pairs=pairs, command=command, **sequences)


def run(out: Path, *argv) -> SimpleNamespace:
    """One run in this process -> its folder, weights and metrics lines, steps and validations apart."""
    main(parser().parse_args([*map(str, argv), "--out", str(out)]))
    return result(out)


def result(out: Path) -> SimpleNamespace:
    lines = read_jsonl(out / "metrics.jsonl")
    steps, valid = ([x for x in lines if ("valid" in x) == kind] for kind in (False, True))
    return SimpleNamespace(out=out, weights=load_file(out / "model.safetensors"), steps=steps, valid=valid)


def gap(a: SimpleNamespace, b: SimpleNamespace) -> float:
    """The largest difference between two runs' weights."""
    assert a.weights.keys() == b.weights.keys()
    return max((a.weights[name] - b.weights[name]).abs().max().item() for name in a.weights)


def same_metrics(a: SimpleNamespace, b: SimpleNamespace, rel: float, but: tuple = ()) -> None:
    def numbers(line):  # no rationale, no mean
        return {k: v or 0 for k, v in line.items() if k not in CLOCK.union(but, ["valid"])}

    assert [x["valid"] for x in a.valid] == [x["valid"] for x in b.valid]
    for mine, theirs in zip(a.steps + a.valid, b.steps + b.valid, strict=True):
        assert numbers(mine) == pytest.approx(numbers(theirs), rel=rel, abs=0)


def fingerprint(folder: Path) -> dict:
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).digest() for p in folder.rglob("*") if p.is_file()}


def limit_files(size: int) -> None:
    """From here on no file can grow beyond `size`: to the writer the same as a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@contextmanager
def after_step(step: int, action):
    """Does `action` right after the optimizer's step number `step` of this process, before the step is logged."""
    count = itertools.count(1)
    handle = register_optimizer_step_post_hook(lambda *_: action() if next(count) == step else None)
    try:
        yield count
    finally:
        handle.remove()
        limit_files(resource.RLIM_INFINITY)


def break_off(at: SimpleNamespace, out: Path, step: int, how: str = "power cut") -> None:
    def cut():
        raise RuntimeError("power cut")

    ends = {"power cut": (RuntimeError, cut), "SIGTERM": (SystemExit, lambda: os.kill(os.getpid(), signal.SIGTERM)),
            "disk full": (OSError, lambda: limit_files(100_000))}  # fmt: skip
    error, action = ends[how]
    with after_step(step, action), pytest.raises(error) as e:
        run(out, *at.command)
    assert how != "SIGTERM" or e.value.code == 143
    assert how != "disk full" or "\n" not in str(e.value)


@pytest.fixture(scope="module")
def subprocesses(at) -> SimpleNamespace:
    """One process that is killed while it saves, and beside it, under one torchrun, all that needs two ranks."""
    place, here, jobs = at.place, str(Path(__file__).parent.parent), []
    (place / "driver.py").write_text(DRIVER)
    break_off(at, place / "onto two", 5)

    def add(name, *argv, what="", step=3, rank="0"):
        jobs.append(dict(argv=[*at.command, "--out", str(place / name), *argv], what=what, step=step, rank=rank))

    add("killed", what="torn", step=0)
    (place / "one").write_text(json.dumps(jobs))
    jobs.clear()
    add("two", step=0), add("onto two", "--resume", step=0)
    add("term", what="SIGTERM", rank="1"), add("term", "--resume", step=0)
    add("full", what="full"), add("full", "--resume", step=0)
    add("diverged", "--learning-rate", "1e30", step=0), add("missing", "--data", "nowhere.jsonl")
    add("dead", what="SIGKILL", rank="1")
    (place / "many").write_text(json.dumps(jobs))
    start = dict(env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True)
    start |= dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    alone = subprocess.Popen([sys.executable, place / "driver.py", here, place / "one"], **start)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    both = subprocess.Popen([*torchrun, place / "driver.py", here, place / "many"], **start)
    try:
        alone.communicate(timeout=60)
        errors = both.communicate(timeout=60)[1]  # a rank that waits for a dead one for ever would be caught here
    finally:
        for process in (alone, both):
            process.terminate()  # if one hangs: torchrun ends its ranks, after 30 s by force
            process.wait(timeout=40)
    codes = [json.loads((place / f"many{rank}").read_text()) for rank in (0, 1)]
    return SimpleNamespace(status=alone.returncode, codes=codes, errors=errors, torchrun=both.returncode)


@pytest.fixture(scope="module")
def straight(at) -> SimpleNamespace:
    """The run that nothing interrupts."""
    return run(at.place / "straight", *at.command)


@pytest.mark.parametrize("weight, decay", [(1.0, 0.0), (0.33, 0.1), (0.0, 0.1)])
def test_training_equals_a_plain_loop_written_with_transformers(at, tmp_path, weight, decay):
    transformers = pytest.importorskip("transformers")
    rows, peak = at.joint if weight else at.vanilla, 3e-4
    some = f"--batch-size 7 --micro-batch-size 4 --max-steps 4 --export-every 2 --valid {at.ledger}".split()
    some += f"--learning-rate {peak} --weight-decay {decay} --rationale-weight {weight}".split()
    mine = run(tmp_path, *at.command, *some)
    model = transformers.AutoModelForCausalLM.from_pretrained(at.folder, dtype=torch.float32).train()
    groups = [[p for p in model.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False)]
    optimizer = torch.optim.AdamW([dict(params=p, weight_decay=d) for p, d in zip(groups, (decay, 0))], lr=peak)
    counts = [sum(len(row[i]) for row in rows) for i in (1, 2)]
    # two steps of warm-up, then half a cosine wave
    for line, rate in zip(mine.steps, [peak / 2, peak, peak, peak / 2], strict=True):
        sums = [0.0, 0.0]
        for prompt, reference, rationale in rows:
            ids = torch.tensor([prompt + reference + rationale])
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
            losses = F.cross_entropy(logits, ids[0, len(prompt) :], reduction="none")
            losses = losses.split([len(reference), len(rationale)])
            ((losses[0].sum() + weight * losses[1].sum()) / sum(counts)).backward()
            sums = [s + x.sum().item() for s, x in zip(sums, losses)]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        loss, means = (sums[0] + weight * sums[1]) / sum(counts), [x / max(n, 1) for x, n in zip(sums, counts)]
        found = [line[k] or 0 for k in ("loss", "reference_loss", "rationale_loss")]
        assert found == pytest.approx([loss, *means], rel=1e-4)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-3)  # float32 sums in another order
        assert line["learning_rate"] == pytest.approx(rate)
        assert [line["reference_tokens"], line["rationale_tokens"]] == counts
        assert line["tokens"] == sum(len(part) for row in rows for part in row)
    for name, p in model.state_dict().items():  # float32 sums in another order; a wrong rate or decay is 1e-4 and more
        assert torch.allclose(mine.weights[name], p, rtol=0, atol=1e-5), name
    assert mine.valid[0]["valid_loss"] == pytest.approx(mine.steps[0]["loss"], rel=1e-5)  # same rows, same weights
    exported = transformers.AutoModelForCausalLM.from_pretrained(mine.out, dtype=torch.float32)
    with torch.no_grad():  # 1e-4: logits reach 10, and float32 has seven digits
        assert torch.allclose(Transformer.from_pretrained(mine.out)(ids), exported(ids).logits, atol=1e-4)
    for part in ("model.safetensors", "config.json", "tokenizer.model", "tokenizer_config.json"):
        assert (mine.out / "step-4" / part).read_bytes() == (mine.out / part).read_bytes()
    earlier = load_file(mine.out / "step-2/model.safetensors")
    assert not torch.equal(earlier["lm_head.weight"], mine.weights["lm_head.weight"])
    assert Tokenizer(mine.out).hash == Tokenizer(at.folder).hash


def test_the_update_does_not_depend_on_micro_batches_or_recomputed_activations(at, tmp_path):
    some = [*at.command, "--batch-size", 7, "--max-steps", 3, "--learning-rate", 2e-5]
    whole = run(tmp_path / "8", *some, "--micro-batch-size", 8)
    for name, *argv in [(1,), (2,), (3,), ("recompute", "--activation-checkpointing")]:
        parts = run(tmp_path / str(name), *some, "--micro-batch-size", name if argv == [] else 8, *argv)
        assert gap(parts, whole) < 1e-6  # sums in another order; the weights moved by 5e-5
        same_metrics(parts, whole, 1e-5, ("padded_tokens",))
        padded = [r.steps[0]["padded_tokens"] for r in (parts, whole)]
        assert name != 1 or parts.steps[0]["tokens"] == padded[0] < padded[1]


def test_metrics_hold_each_step_once_and_each_validation(at, straight):
    lines = read_jsonl(straight.out / "metrics.jsonl")
    assert [(x["step"], x.get("valid")) for x in lines] == [
        (0, "other"), (0, "ledger"), (1, None), (2, None), (3, None), (3, "other"), (3, "ledger"),
        (4, None), (5, None), (6, None), (6, "other"), (6, "ledger"),
    ]  # fmt: skip
    assert all(set(x) >= STEP_FIELDS | CLOCK for x in straight.steps)
    assert all(set(x) >= VALID_FIELDS for x in straight.valid)
    for x in straight.steps:  # weight 1
        parts = x["reference_loss"] * x["reference_tokens"] + (x["rationale_loss"] or 0) * x["rationale_tokens"]
        assert x["loss"] == pytest.approx(parts / (x["reference_tokens"] + x["rationale_tokens"]))
        assert x["tokens"] <= x["padded_tokens"] and all(0 < x[name] < math.inf for name in CLOCK)
    assert not straight.valid[0]["rationale_loss"] and straight.valid[0]["rationale_tokens"] == 0  # plain pairs
    for i, name in enumerate(("reference_tokens", "rationale_tokens"), 1):
        counted = sum(len(row[i]) for row in at.joint)
        assert sum(x[name] for x in straight.steps[:3]) == counted == straight.valid[1][name]
    assert not (straight.out / "checkpoint").exists() and (straight.out / "args.json").exists()


def test_an_epoch_has_each_example_once_in_an_order_that_hangs_on_the_seed_and_the_epoch(at, tmp_path):
    lengths = [sum(map(len, row)) for row in at.joint]
    assert len(set(lengths)) == 7  # so a step of one example is known by its tokens
    orders = []
    for seed in (0, 1):
        steps = run(tmp_path / str(seed), *at.command, "--batch-size", 1, "--seed", seed).steps
        orders += [[x["tokens"] for x in steps[:7]], [x["tokens"] for x in steps[7:]]]
    assert all(sorted(order) == sorted(lengths) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_a_row_that_is_too_long_is_left_out_whole_and_named(at, tmp_path, capsys):
    lengths = {f"row{i}": sum(map(len, row)) for i, row in enumerate(at.joint)}
    longest = max(lengths, key=lengths.get)
    argv = [*at.command, "--batch-size", 7, "--max-steps", 1]
    line = run(tmp_path / "fits", *argv, "--max-length", max(lengths.values())).steps[0]
    assert line["tokens"] == sum(lengths.values())
    capsys.readouterr()
    line = run(tmp_path / "long", *argv, "--max-length", max(lengths.values()) - 1).steps[0]
    assert line["tokens"] == sum(lengths.values()) - lengths[longest]
    text = capsys.readouterr().out
    assert "1 longer than" in text and longest in text
    with pytest.raises(ValueError, match="ledger.jsonl.*--max-length"):
        run(tmp_path / "none", *argv, "--max-length", 5)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("how, step", [
    ("power cut", 1), ("power cut", 4), ("SIGTERM", 3), ("SIGTERM", 5), ("disk full", 4), ("disk full", 6),
])  # fmt: skip
def test_a_run_that_is_broken_off_and_resumed_ends_in_the_same_bits(at, straight, tmp_path, how, step):
    break_off(at, tmp_path, step, how)
    # a signal may be heeded in its own step or, where the ranks have already talked, in the next
    saved = {"power cut": {4: ["step-2"]}, "disk full": {4: ["step-2"], 6: ["step-4"]}}.get(how, {}).get(step, [])
    found = [p.name for p in (tmp_path / "checkpoint").glob("step-*") if p.suffix != ".tmp"]
    assert found == saved or how == "SIGTERM" and found in ([f"step-{step}"], [f"step-{step + 1}"])
    assert not (tmp_path / "config.json").exists()
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 5, "lo')  # the kill tore a line
    again = run(tmp_path, *at.command, "--resume")
    assert gap(again, straight) == 0
    same_metrics(again, straight, 0)


def test_sigkill_while_saving_leaves_the_last_checkpoint_and_resuming_ends_in_the_same_bits(at, straight, subprocesses):
    assert subprocesses.status == -signal.SIGKILL
    assert (at.place / "killed/checkpoint/step-2").is_dir() and not (at.place / "killed/checkpoint/step-4").exists()
    again = run(at.place / "killed", *at.command, "--resume")
    assert gap(again, straight) == 0
    same_metrics(again, straight, 0)


def test_two_ranks_make_the_run_of_one(at, straight, subprocesses):
    # two ranks sum gradients in another order: 1e-7 of each, which Adam's division makes up to 1e-5 of a weight
    for name in ("two", "onto two"):
        both = result(at.place / name)
        assert gap(both, straight) < 1e-5
        same_metrics(both, straight, 1e-4, ("padded_tokens",))
    for name in ("term", "full"):
        assert gap(result(at.place / name), result(at.place / "two")) == 0
        same_metrics(result(at.place / name), result(at.place / "two"), 0)


def test_a_failure_on_one_rank_ends_every_rank_with_one_message(at, subprocesses):
    wanted = [None, None, 143, None, 2, None, 2, 2]
    assert [codes[:8] for codes in subprocesses.codes] == [wanted, wanted] and subprocesses.torchrun != 0
    errors = [line for line in subprocesses.errors.splitlines() if line.startswith("error: ")]
    # a full disk is told by every rank, a mistake that all ranks see by the first
    assert [sum(word in line for line in errors) for word in ("full", "step 2", "nowhere.jsonl")] == [2, 1, 1]
    assert len(errors) <= 5 and not (at.place / "missing").exists()  # a fifth, where torchrun lets rank 0 say it
    again = run(at.place / "dead", *at.command, "--resume")  # a checkpoint of two ranks goes on in one process
    assert gap(again, result(at.place / "two")) < 1e-5  # as above
    assert [x["step"] for x in again.steps] == [1, 2, 3, 4, 5, 6]


def test_resume_takes_the_same_settings_and_says_when_nothing_is_left(at, straight, tmp_path, capsys):
    before = fingerprint(straight.out)
    run(straight.out, *at.command, "--resume")
    assert "finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match="not empty.*--resume"):
        run(straight.out, *at.command)
    assert fingerprint(straight.out) == before
    break_off(at, tmp_path, 4)
    before = fingerprint(tmp_path)
    for changes, name in [(["--learning-rate", 2e-3], "learning_rate"), (["--data", at.pairs], "data")]:
        with pytest.raises(ValueError, match=f"args.json: {name}"):
            run(tmp_path, *at.command, *changes, "--resume")
    assert fingerprint(tmp_path) == before


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(at, tmp_path):
    with after_step(0, None) as count, pytest.raises(ValueError, match=r"step 2\b") as e:
        run(tmp_path, *at.command, "--learning-rate", "1e30", "--save-every", 1)
    assert next(count) == 2  # the optimizer made one step
    assert sum(f"row{i}" in str(e.value) for i in range(7)) == 3 and "\n" not in str(e.value)
    assert (tmp_path / "checkpoint/step-1").is_dir() and not (tmp_path / "config.json").exists()
    assert [x["step"] for x in read_jsonl(tmp_path / "metrics.jsonl") if "valid" not in x] == [1]


def test_random_weights_learn_seven_pairs_by_heart(at, tmp_path):
    write_config(tmp_path)
    argv = ["--config", tmp_path / "config.json", "--tokenizer", at.folder, "--data", at.pairs, "--dtype", "float32"]
    run(tmp_path / "out", *argv, *"--max-steps 100 --learning-rate 3e-3 --schedule constant --save-every 0".split())
    tokenizer, model = Tokenizer(tmp_path / "out"), Transformer.from_pretrained(tmp_path / "out")
    prompts = [tokenizer.chat([{"role": "user", "content": ask(pair)}]) for pair in PAIRS]
    answers = generate(model, prompts, max_new_tokens=80, eos_ids=tokenizer.eos_ids)
    assert [tokenizer.decode(ids) for ids in answers] == [pair["reference"] for pair in PAIRS]


def ask(pair: dict) -> str:
    return TEMPLATE.format(source_lang="German", target_lang="English", source=pair["source"])


def test_ledgers_pairs_and_conversations_train_together(at, tmp_path):
    turns = [dict(role=role, content=text) for role, text in zip(["user", "assistant"] * 2, LINES)]
    plain = write_jsonl(tmp_path / "plain.jsonl", [{"prompt": LINES[0], "response": LINES[1]}, {"messages": turns}])
    argv = [*at.command, "--data", at.ledger, at.pairs, plain, "--batch-size", 100, "--max-steps", 1]
    line, tokenizer = run(tmp_path / "out", *argv).steps[0], Tokenizer(at.folder)
    chats = [[{"role": "user", "content": ask(pair)}] for pair in PAIRS] + [turns[:1], turns[:3]]
    answers = [pair["reference"] for pair in PAIRS] + [LINES[1], LINES[3]]
    counts = [sum(len(row[i]) for row in at.joint) for i in range(3)]
    counts[0] += sum(len(tokenizer.chat(chat)) for chat in chats)
    counts[1] += sum(len(tokenizer.answer(text)) + 1 for text in answers)  # and EOS
    assert [line["reference_tokens"], line["rationale_tokens"], line["tokens"]] == [*counts[1:], sum(counts)]


def test_bfloat16_computes_near_float32_and_exports_its_own_type(at, straight, tmp_path, monkeypatch):
    # timing a bfloat16 product takes 12 s on a CPU without it
    monkeypatch.setattr("train.matmul_rate", lambda *_: 1e12, raising=False)
    half = run(tmp_path, *at.command, "--dtype", "bfloat16")
    assert {w.dtype for w in half.weights.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    losses = [[x["loss"] for x in r.steps] for r in (half, straight)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]  # bfloat16 has eight bits


@pytest.mark.parametrize("meta", [True, False])
def test_a_row_of_no_use_trains_on_its_reference_and_eos_even_if_it_was_cut(at, meta):
    # nothing but control tokens up to the limit; meta: from a model of this tokenizer or of another
    tokenizer, row = Tokenizer(at.folder), read_jsonl(at.ledger)[2]
    row |= dict(finish="length", rationale_ids=[3, 3, 3], where="here")
    row["meta"] = json.loads(at.ledger.with_suffix(".meta.json").read_text()) if meta else {}
    example = data.Encoder(tokenizer).example(row)
    assert (example.reference, example.rationale) == (row["reference_ids"] + [tokenizer.end_id], [])


@pytest.mark.parametrize("changes, words", [
    ("--data nowhere.jsonl", "nowhere"), ("--model nowhere", "nowhere"), ("--valid nowhere.jsonl", "nowhere"),
    ("--schedule steep", "--schedule"), ("--learning-rate -1", "--learning-rate"), ("--max-steps some", "--max-steps"),
    (None, "--model"), (None, "--tokenizer"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_leaves_nothing_behind(at, tmp_path, monkeypatch, capsys, changes, words):
    argv = [*at.command, *changes.split()] if changes else ["--data", str(at.pairs)]  # neither --model nor --config
    argv += ["--config", str(at.folder / "config.json")] if words == "--tokenizer" else []
    monkeypatch.setattr(sys, "argv", ["train.py", *argv, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as e:
        data.cli(main, parser())
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert not (tmp_path / "out").exists()


def test_the_folder_that_one_stands_in_can_take_the_run(at, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(Path("."), *at.command, "--max-steps", 1, "--export-every", 1)
    assert {"config.json", "model.safetensors", "tokenizer.model", "step-1"} <= {f.name for f in tmp_path.iterdir()}
    assert not [f for f in tmp_path.rglob("*") if "tmp" in f.name]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_dry_run_counts_what_a_forward_pass_keeps_and_writes_nothing(at, tmp_path, capsys, recompute):
    main(parser().parse_args([*map(str, at.command), "--dry-run", "--out", str(tmp_path / "none")]))
    printed = capsys.readouterr().out
    assert "7 examples" in printed and "with padding" in printed and not (tmp_path / "none").exists()

    model, tokenizer = Transformer.from_pretrained(at.folder).train(), Tokenizer(at.folder)
    examples = [data.Encoder(tokenizer).example(row) for row in data.read_rows([at.ledger])]
    model.activation_checkpointing, kept = recompute, {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes(), x  # held, so that no other takes its place
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        tokens, select, targets, _ = data.collate(examples)
        CrossEntropy.apply(model(tokens, select), targets)
    really = sum(size for place, (size, _) in kept.items() if place not in weights)
    foretold, _ = kept_bytes(model.config, examples, torch.float32, recompute)
    assert foretold == pytest.approx(really, rel=0.02)
