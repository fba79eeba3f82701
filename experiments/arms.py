"""Ways of fine-tuning, run alike and measured alike: arms x learning rates x seeds.

    python experiments/arms.py --world --out DIR --seeds 0 1 2 --rates 1e-3 2e-3
    python experiments/arms.py --model DIR --pairs train.json --direction de-en --out DIR \\
        --valid valid.json --test test.json --prompts prompts.jsonl --drift vicuna.jsonl \\
        --human human.jsonl --choice blimp.jsonl piqa.jsonl --seeds 0 1 2 --rates 3e-5 1e-4

For each seed pairs and prompts are drawn anew, the model writes its rationales and answers, and
every arm starts from the model with the same pairs and steps. What is measured stands in
DIR/points, a file a model; the same command resumes. readings.py makes tables of it.
"""

import argparse
import contextlib
import csv
import gc
import json
import math
import multiprocessing
import os
import random
import shlex
import shutil
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import world  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import generate  # noqa: E402
import train  # noqa: E402
from data import Encoder, Tokenizer, require  # noqa: E402
from model import Transformer, hash_model, read_object, write_text  # noqa: E402


@dataclass(frozen=True)
class Arm:
    """A way of fine-tuning. Its step holds the pairs that every arm's holds, and its answers."""

    data: str  # the seed's file of pairs: bare pairs, or with what the model wrote to each
    weight: float = 1.0  # of the tokens that the model wrote itself
    soft: bool = False  # they are learnt from the base's distribution, not from the samples
    replay: int = 0  # the base's answers to other prompts, in multiples of --answers a step
    flags: tuple = ()  # of train.py

    @property
    def per_mean(self) -> bool:
        """Whether `weight` compares the mean loss of answers with that of references."""
        return self.data == "pairs" and self.replay > 0


COVERAGE = ("--rationale-coverage", "0.5")
# Adam does not see the scale of a loss: as if references weighed 0.001 and rationales 1
ALONE = ("--max-grad-norm", "1000")
ARMS = {
    "vanilla": Arm("pairs", weight=0),
    "RaDis": Arm("rationales"),
    "soft RaDis": Arm("rationales", soft=True),
    "hard replay": Arm("pairs", replay=1),
    "soft replay 1": Arm("pairs", soft=True, replay=1),
    "soft replay 3": Arm("pairs", weight=3, soft=True, replay=1),
    "soft RaDis + soft replay": Arm("rationales", soft=True, replay=1),
    # controls: is it the missing EOS? how far does noise alone carry?
    "no EOS": Arm("bare"),
    "rationales alone": Arm("rationales", weight=1000, flags=ALONE),
    "soft rationales alone": Arm("rationales", weight=1000, soft=True, flags=ALONE),
    # beyond the plan
    "soft replay 3, twice the answers": Arm("pairs", weight=3, soft=True, replay=2),
    "shuffled rationales": Arm("shuffled"),
    "weight 0.33": Arm("rationales", weight=0.33),
    "coverage 0.5": Arm("rationales", flags=COVERAGE),
    "SeqKD": Arm("translation"),
    "SDFT": Arm("paraphrase"),
}
PLAN = [*ARMS][:10]
PARTS = (0.4, 0.6, 0.8)  # of the way from the base's weights to the tuned ones
TASKS = {"rationales": "rationale", "translation": "translation", "paraphrase": "paraphrase"}
MADE_FROM_RATIONALES = ("bare", "shuffled")
# settings that decide nothing about a point that is there
FREE = "out seeds rates arms parts workers ranks keep rows micro_batch_size".split()

# what is not given on the command line
REAL = {
    "rates": ["3e-5", "1e-4"],
    "points": [16, 32, 64],
    "batch_size": 16,
    "answers": 2,
    "tests": 512,
    "new_tokens": 64,
    "answer_tokens": 128,
    "cue": "\\n",
}
WORLD = {
    "rates": ["1e-3"],
    "points": [50, 100, 200, 300],
    "batch_size": 32,
    "answers": 16,
    "tests": 100,
    "new_tokens": 32,
    "answer_tokens": 48,
    "cue": "",
    "template": world.TEMPLATE,
    "chat": "llama2",
}


# 1. One command, and many


def call(script, words: list, log: Path, ranks: int = 0):
    """Runs `python SCRIPT WORDS`, in this process or by torchrun; what it prints goes to a log."""
    words = [str(word) for word in words]
    name = script.__name__
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as f:
        f.write(f"$ python {name}.py {shlex.join(words)}\n")
        f.flush()
        if ranks:
            launch = f"-m torch.distributed.run --standalone --nproc-per-node {ranks}".split()
            command = [sys.executable, *launch, str(ROOT / f"{name}.py"), *words]
            done = subprocess.run(command, stdout=f, stderr=f)
            require(done.returncode == 0, log, "the command failed; its last lines say why")
            return
        with contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
            script.main(script.parser().parse_args(words))
    evaluate.load_model.cache_clear()
    gc.collect()  # models hold themselves in cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def open_workers(count: int):
    """Processes that perform tasks beside each other; None is this process itself."""
    if count == 1:
        yield None
        return
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, initializer=end_with_parent) as workers:
        yield workers


def end_with_parent():
    """A worker ends when the process that has started it does, however that ends."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def perform(tasks: list, workers: ProcessPoolExecutor | None):
    """Calls each of the tasks, several beside each other. What fails is told at the end."""
    failed = 0
    start = time.time()
    if workers:
        ended = as_completed([workers.submit(attempt, task) for task in tasks])
        outcomes = (done.result() for done in ended)
    else:
        outcomes = map(attempt, tasks)
    for line, fine in outcomes:
        print(f"[{time.time() - start:5.0f} s] {line}", flush=True)
        failed += not fine
    if failed:
        sys.exit(f"error: {failed} of these failed; the same command tries them again")


def attempt(task: partial) -> tuple[str, bool]:
    """-> how the task went, and whether it went well."""
    name = " ".join(str(word) for word in [task.func.__name__, *task.args[1:]])
    start = time.time()
    try:
        task()
    except (Exception, SystemExit):
        return f"{name}: failed\n{traceback.format_exc()}", False
    return f"{name}: {time.time() - start:.0f} s", True


# 2. What a seed has: pairs, prompts, and what the model writes


def seed_folder(args, seed: int) -> Path:
    return args.out / f"seed-{seed}"


def base_model(args, seed: int) -> Path:
    return seed_folder(args, seed) / "base" if args.world else args.model


def test_folder(args, seed: int) -> Path:
    """Tests are the same for all seeds; but each seed of the small world is a world of its own."""
    return (seed_folder(args, seed) if args.world else args.out) / "tests"


def seeds_of_tests(args) -> list[int]:
    return args.seeds if args.world else args.seeds[:1]


def steps(args) -> int:
    return args.points[-1]


def prepare(args, seed: int):
    """Draws the pairs and prompts of a seed; the small world is made before."""
    folder = seed_folder(args, seed)
    count = steps(args) * args.batch_size
    if args.world:
        make_world(args, seed)
        pairs = read_pairs([folder / "pairs.jsonl"], args)
        prompts = data.read_rows([folder / "replay.jsonl"], prompts=True)
        count = min(count, len(pairs))  # these may be seen more than once
    else:
        pairs = read_pairs(args.pairs, args)
        prompts = data.read_rows(args.prompts, prompts=True)
        require_disjoint(args, prompts)
    fault = f"--points and --batch-size want {count} pairs, and there are {len(pairs)}"
    require(len(pairs) >= count, "--pairs", fault)
    rng = random.Random(seed)
    world.write(folder / "drawn/pairs.jsonl", rng.sample(pairs, count))
    rng.shuffle(prompts)
    wanted = max(rows_replayed(args, ARMS[arm].replay, count) for arm in args.arms)
    rows = []
    for i in range(wanted):  # with few prompts, each is answered more than once
        rows.append({"id": i, "messages": prompts[i % len(prompts)]["messages"]})
    file = folder / "drawn/prompts.jsonl"
    drawn = len(read_ledger(file)) if file.exists() else 0  # for other arms, earlier
    if wanted > drawn:
        world.write(file, rows)


def make_world(args, seed: int):
    """The texts of a small world, and a base model from random weights."""
    folder = seed_folder(args, seed)
    if not (folder / "start").exists():
        sizes = {"chats": args.chats, "pairs": args.world_pairs, "tests": args.tests}
        world.write_world(folder, seed, **sizes)
    words = f"--batch-size 32 --micro-batch-size 16 --learning-rate 3e-3 --seed {seed}".split()
    words += ["--config", folder / "start/config.json", "--tokenizer", folder / "start"]
    words += ["--data", folder / "chats.jsonl", "--out", folder / "base", "--resume"]
    words += ["--max-steps", args.base_steps, "--save-every", 200]
    call(train, words, folder / "logs/base.log")


def rows_replayed(args, replay: int, pairs: int) -> int:
    """Answers beside so many pairs, of which a step has --batch-size."""
    return replay * args.answers * pairs // args.batch_size


def read_pairs(files: list, args) -> list[dict]:
    """Pairs in every direction that is asked for, of the lengths that are."""
    names = ("source", "reference", "source_lang", "target_lang")
    pairs = []
    for row in data.read_rows(files, args.direction):
        lengths = (len(row["source"]), len(row["reference"]))
        if args.characters[0] <= min(lengths) and max(lengths) <= args.characters[1]:
            pairs.append({name: row[name] for name in names})
    return pairs


def require_disjoint(args, prompts: list):
    """ValueError where a prompt that is replayed is also measured."""
    measured = {}
    for file in [*args.drift, *args.human, *args.choice, *args.numeric, *args.safety]:
        if file.suffix == ".csv":
            with open(file, newline="", encoding="utf-8") as f:
                rows = [*csv.DictReader(f)]
        else:
            rows = read_ledger(file)
        for row in rows:
            texts = [row.get(name) for name in ("prompt", "question", "goal")]
            texts += row.get("turns", [])
            measured |= {text.strip(): file for text in texts if text}
    for row in prompts:
        text = row["messages"][-1]["content"].strip()
        file = measured.get(text)
        require(not file, row["where"], f"this prompt is also in {file}, which is measured")


def write_ledger(args, seed: int, name: str):
    """What the model writes for a seed: rationales and the like, or answers for replay."""
    folder = seed_folder(args, seed)
    words = ["--model", base_model(args, seed), "--seed", seed, *sampling_words(args)]
    words += ["--out", folder / f"drawn/{name}.jsonl", *template_words(args)]
    if name == "answers":
        words += ["--task", "answer", "--data", folder / "drawn/prompts.jsonl"]
        words += ["--max-new-tokens", args.answer_tokens]
    else:
        words += ["--task", TASKS[name], "--data", folder / "drawn/pairs.jsonl"]
        words += ["--max-new-tokens", args.new_tokens]
        words += ["--cue", args.cue] if name == "rationales" else []
    call(generate, words, folder / f"logs/{name}.log", args.ranks)


def sampling_words(args) -> list:
    return ["--batch-size", args.rows, "--dtype", args.dtype]


def template_words(args) -> list:
    return ["--template", args.template] if args.template else []


def ledgers_of(args) -> list[str]:
    """Which of the model's texts the arms need."""
    needed = set()
    for arm in (ARMS[name] for name in args.arms):
        needed |= {"answers"} if arm.replay else set()
        needed |= {"rationales"} if arm.data in MADE_FROM_RATIONALES else set()
        needed |= {arm.data} if arm.data in TASKS else set()
    return sorted(needed)


def derive(args, seed: int):
    """Ledgers that are made of others: rationales of other rows, none at all, fewer answers."""
    folder = seed_folder(args, seed) / "drawn"
    kinds = {ARMS[name].data for name in args.arms}
    if kinds & {"bare", "shuffled"}:
        rows = read_ledger(folder / "rationales.jsonl")
        names = ("rationale", "rationale_ids", "finish", "status")
        others = random.Random(seed).sample(rows, len(rows))
        shuffled = [a | {name: b[name] for name in names} for a, b in zip(rows, others)]
        copy_ledger(folder, "rationales", "shuffled", shuffled)
        tokenizer = Tokenizer(base_model(args, seed), args.chat or "auto")
        cue = data.unescape(args.cue)
        copy_ledger(folder, "rationales", "bare", [bare(row, tokenizer, cue) for row in rows])
    for replay in {ARMS[name].replay for name in args.arms} - {0}:
        rows = read_ledger(folder / "answers.jsonl")
        count = rows_replayed(args, replay, len(read_ledger(folder / "pairs.jsonl")))
        copy_ledger(folder, "answers", f"answers-{replay}", rows[:count])


def bare(row: dict, tokenizer: Tokenizer, cue: str) -> dict:
    """The reference and what follows it first, without an end.

    That is the cue, or the first token that the model wrote; where it wrote none, the row ends.
    """
    before = row["reference_ids"]
    ids = tokenizer.continuation(row["reference"], before, cue) or row["rationale_ids"][:1]
    if not ids:
        return row
    text = tokenizer.decode_after(before, ids)
    return row | {"rationale": text, "rationale_ids": ids, "finish": "length", "status": "ok"}


def read_ledger(file: Path) -> list[dict]:
    return [row for _, row in data.read_json(file)]


def copy_ledger(folder: Path, old: str, new: str, rows: list):
    """Writes rows as a ledger with the settings of another."""
    world.write(folder / f"{new}.jsonl", rows)
    meta = data.meta_path(folder / f"{new}.jsonl")
    shutil.copyfile(data.meta_path(folder / f"{old}.jsonl"), meta)


# 3. What is measured


def write_tests(args, seed: int):
    """Sentences to translate, and the base's answers to all on which drift is measured."""
    ways = set()
    for kind, files in translation_files(args, seed).items():
        by_way = {}
        for row in read_pairs(files, args):
            by_way.setdefault((row["source_lang"], row["target_lang"]), []).append(row)
        count = args.tests if kind == "test" else args.tests // 2
        # drift is measured on the last ones: where there are enough, these are not translated
        last = {}
        for way, rows in by_way.items():
            file = test_folder(args, seed) / f"{kind}-{'-'.join(way)}.jsonl"
            world.write(file, rows[:count])
            last[way] = rows[-max(1, args.general // len(by_way)) :]
        ways |= set(by_way)
    for (source, target), rows in last.items():
        write_answers(args, seed, f"task-{source}-{target}", rows)
        if (target, source) not in ways and not args.world:
            turned = [turn(row) for row in rows]
            write_answers(args, seed, f"reverse-{target}-{source}", turned)
    for file in args.drift or [seed_folder(args, seed) / "questions.jsonl"]:
        asked = data.read_rows([file], prompts=True)[: args.general]
        rows = [{"id": i, "messages": row["messages"]} for i, row in enumerate(asked)]
        write_answers(args, seed, f"general-{file.stem}", rows)
    if args.human:
        write_human(args, seed)


def turn(row: dict) -> dict:
    """The pair in the other direction."""
    other = {"source": row["reference"], "reference": row["source"]}
    return other | {"source_lang": row["target_lang"], "target_lang": row["source_lang"]}


def translation_files(args, seed: int) -> dict[str, list]:
    """Pairs to translate, by what they serve for."""
    if args.world:
        folder = seed_folder(args, seed)
        return {"test": [folder / "tasks/translation.jsonl"], "valid": [folder / "valid.jsonl"]}
    files = {"test": args.test, "valid": args.valid}
    return {kind: found for kind, found in files.items() if found}


def write_answers(args, seed: int, name: str, rows: list):
    """The base's answers to prompts that no arm trains on, as a ledger for the drift measure."""
    folder = test_folder(args, seed)
    answers = folder / f"answers/{name}.jsonl"
    world.write(folder / f"asked/{name}.jsonl", rows)
    words = ["--model", base_model(args, seed), "--data", folder / f"asked/{name}.jsonl"]
    words += ["--task", "answer", "--out", answers]
    words += ["--max-new-tokens", args.answer_tokens, *sampling_words(args), *template_words(args)]
    call(generate, words, folder / f"logs/{name}.log", args.ranks)
    meta = read_object(data.meta_path(answers))
    if not name.startswith("general"):  # lengths of answers are read of general prompts alone
        meta["max_new_tokens"] = 1
    write_measured(folder, name, read_ledger(answers), meta)


def write_human(args, seed: int):
    """Answers written by people, in the form of a ledger: the same measures on other texts."""
    tokenizer = Tokenizer(base_model(args, seed), args.chat or "auto")
    rows = []
    for row in data.read_rows(args.human):
        ids = tokenizer.answer(row["reference"])
        cut = len(ids) > args.answer_tokens
        new = {"id": len(rows), "messages": row["messages"], "reference_ids": []}
        new["rationale_ids"] = ids[: args.answer_tokens]
        new["rationale"] = tokenizer.decode(new["rationale_ids"])
        rows.append(new | {"finish": "length" if cut else "eos", "status": "ok"})
    meta = {"task": "answer", "temperature": 0.0, "top_p": 1.0, "seed": 0}
    meta |= {"tokenizer_hash": tokenizer.hash, "chat": tokenizer.chat_name, "max_new_tokens": 1}
    write_measured(test_folder(args, seed), "human", rows, meta)


def write_measured(folder: Path, name: str, rows: list, meta: dict):
    """A ledger for the drift measure."""
    file = folder / f"drift/{name}.jsonl"
    world.write(file, rows)
    write_text(data.meta_path(file), json.dumps(meta))


def test_words(args, seed: int, valid: bool) -> list:
    """What evaluate.py is told to measure."""
    folder = test_folder(args, seed)
    words = ["--translation", *sorted(folder.glob("test-*.jsonl"))]
    words += sorted(folder.glob("valid-*.jsonl")) if valid else []
    words += ["--drift", *sorted(folder.glob("drift/*.jsonl")), "--base", base_model(args, seed)]
    for kind, files in choice_files(args, seed).items():
        words += [f"--{kind}", *files] if files else []
    words += ["--max-new-tokens", args.answer_tokens, *sampling_words(args), *template_words(args)]
    return words + (["--chat", args.chat] if args.chat else [])


def choice_files(args, seed: int) -> dict[str, list]:
    """The tests that are not made here, by kind."""
    if not args.world:
        return {"choice": args.choice, "numeric": args.numeric, "safety": args.safety}
    names = {"choice": world.CHOICE, "numeric": world.NUMERIC, "safety": ("safety",)}
    folder = seed_folder(args, seed) / "tasks"
    return {kind: [folder / f"{name}.jsonl" for name in found] for kind, found in names.items()}


def measure(args, seed: int, model: Path, name: str, cost: dict, valid: bool = False):
    """Measures a model into DIR/points/NAME.npz, unless that is there.

    valid: with the sentences by which the best learning rate is found.
    """
    point = args.out / "points" / f"{name}.npz"
    if point.exists():
        return
    out = args.out / "results" / name
    words = ["--model", model, "--out", out, *test_words(args, seed, valid)]
    call(evaluate, words, args.out / f"logs/{name}.log", args.ranks)
    found = {}
    for measure_name, statistic in evaluate.read_results(str(out)).statistics.items():
        if not measure_name.startswith(("acc", "margin")):  # these are counted by file, below
            found[measure_name] = statistic
    base = args.out / "results" / base_name(args, seed)
    for file in choice_files(args, seed)["choice"]:
        found |= measure_choice_file(file, out, base)
    values = {key: [statistic.value, *statistic.draws] for key, statistic in found.items()}
    save_point(point, values, cost)


def measure_choice_file(file: Path, out: Path, base: Path) -> dict:
    """Of a file of choices: accuracy, and how clearly the model prefers what is right.

    The latter, `margin`, is of what the base can do, and what it can do is found on other items
    than it is measured on: of each set of questions one half says whether the base is far from
    chance there, the other is measured. On the items that the base itself got right, any change
    at all would look like a loss.
    """
    rows = data.read_json(file)
    tasks = {row.get("task") or file.stem for _, row in rows}
    known = {}
    of_base = {}
    for task in tasks:
        for place, found in ((out, known), (base, of_base)):
            items = read_ledger(place / f"items/choice/{task}.jsonl")
            found |= {item["id"]: item for item in items}
    sets = {}
    for i, (_, row) in enumerate(rows):
        key = row.get("uid") or row.get("task") or file.stem
        id = row.get("id")
        sets.setdefault(key, []).append(i if id is None else id)
    measured = []
    for ids in sets.values():
        screened = [of_base[id] for id in ids[::2] if id in of_base]
        chance = np.mean([1 / len(item["choices"]) for item in screened])
        if np.mean([item["acc"] for item in screened]) >= (1 + chance) / 2:
            measured += [known[id] for id in ids[1::2] if id in known]
    found = {f"choice/{file.stem}": evaluate.ratio(list(known.values()), "acc")}
    if measured:
        found[f"margin/{file.stem}"] = evaluate.ratio(measured, "margin")
    return found


def save_point(file: Path, values: dict, cost: dict):
    """values: each measure and its bootstrap draws, [1 + draws]."""
    file.parent.mkdir(parents=True, exist_ok=True)
    table = np.array([*values.values()])
    # of a draw's distance from the value three digits are enough
    distances = (table[:, 1:] - table[:, :1]).astype(np.float16)
    arrays = {"names": [*values], "values": table[:, 0], "draws": distances}
    temporary = file.with_suffix(".tmp")
    with open(temporary, "wb") as f:
        np.savez_compressed(f, **arrays, cost=json.dumps(cost))
    temporary.rename(file)


def base_name(args, seed: int) -> str:
    return f"seed-{seed}/base" if args.world else "base"


def measure_base(args, seed: int):
    measure(args, seed, base_model(args, seed), base_name(args, seed), {})


# 4. One arm


def slug(arm: str) -> str:
    return arm.replace(" + ", "+").replace(", ", "-").replace(" ", "-")


def run_arm(args, seed: int, rate: str, name: str):
    """Trains an arm and measures it: along training, and at its end between base and tuned."""
    key = f"seed-{seed}/{rate}/{slug(name)}"
    last = f"step-{steps(args)}"
    wanted = [f"step-{step}" for step in args.points]
    wanted += [f"{last}-at-{part}" for part in args.parts]
    if all((args.out / f"points/{key}/{point}.npz").exists() for point in wanted):
        return
    out = args.out / "models" / key
    call(train, train_words(args, seed, rate, name, out), args.out / f"logs/{key}.log", args.ranks)
    cost = costs(args, seed, ARMS[name], out)
    for step in args.points[:-1]:
        measure(args, seed, out / f"step-{step}", f"{key}/step-{step}", cost)
    measure(args, seed, out, f"{key}/{last}", cost, valid=name == "vanilla")
    for part in args.parts:
        between = out / f"at-{part}"
        if not (args.out / f"points/{key}/{last}-at-{part}.npz").exists():
            interpolate(base_model(args, seed), out, between, part, args.dtype)
            measure(args, seed, between, f"{key}/{last}-at-{part}", cost)
            shutil.rmtree(between)
    if not args.keep:
        shutil.rmtree(out)


def data_files(args, seed: int, arm: Arm) -> list[Path]:
    folder = seed_folder(args, seed) / "drawn"
    files = [folder / f"{arm.data}.jsonl"]
    if arm.replay:
        files.append(folder / f"answers-{arm.replay}.jsonl")
    return files


def train_words(args, seed: int, rate: str, name: str, out: Path) -> list:
    arm = ARMS[name]
    batch = args.batch_size + arm.replay * args.answers
    between = math.gcd(*args.points[:-1])  # 0 where there is but one point
    words = ["--model", base_model(args, seed), "--data", *data_files(args, seed, arm)]
    words += ["--out", out, "--resume", "--export-every", between]
    words += ["--save-every", math.ceil(steps(args) / 4)]
    words += ["--batch-size", batch, "--micro-batch-size", args.micro_batch_size]
    words += ["--max-steps", steps(args), "--warmup-steps", math.ceil(steps(args) / 10)]
    words += ["--learning-rate", rate, "--dtype", args.dtype, "--seed", seed]
    words += ["--rationale-weight", f"{joint_weight(args, seed, arm):.4g}"]
    words += ["--teacher", base_model(args, seed)] if arm.soft else []
    return [*words, *template_words(args), *arm.flags, *args.train_flags]


def joint_weight(args, seed: int, arm: Arm) -> float:
    """The weight in the joint loss, which is over tokens: means compare as the arm wants."""
    if not arm.per_mean:
        return arm.weight
    tokenizer = Tokenizer(base_model(args, seed), args.chat or "auto")
    encoder = Encoder(tokenizer, args.template)
    rows = data.read_rows(data_files(args, seed, arm))
    examples = [encoder.example(row) for row in rows]
    references = sum(len(example.reference) for example in examples)
    answers = sum(len(example.rationale) for example in examples)
    return arm.weight * references / answers


def costs(args, seed: int, arm: Arm, out: Path) -> dict:
    """Tokens that were trained on, read by the teacher, and sampled for this arm."""
    lines = [line for _, line in data.read_json(out / "metrics.jsonl") if "valid" not in line]
    trained = sum(line["tokens"] for line in lines)
    sampled = 0
    for file in data_files(args, seed, arm):
        sampled += sum(len(row.get("rationale_ids", [])) for row in read_ledger(file))
    return {
        "trained": trained,
        "taught": trained if arm.soft else 0,
        "sampled": 0 if arm.data == "bare" and args.cue else sampled,
        "seconds": sum(line["seconds"] for line in lines),
    }


@torch.no_grad()
def interpolate(base: Path, tuned: Path, out: Path, part: float, dtype: str):
    """A model whose weights lie between two others (WiSE-FT, Wortsman et al. 2022)."""
    model = Transformer.from_pretrained(base)
    other = dict(Transformer.from_pretrained(tuned).named_parameters())
    for name, p in model.named_parameters():
        p.lerp_(other[name], part)
    model.save_pretrained(out, getattr(torch, dtype))
    for name in train.TOKENIZER_FILES:
        train.copy_own_file(tuned / name, out / name)


# 5. Everything


def check_settings(args):
    """ValueError where DIR holds points of another experiment."""
    settings = {}
    for name, value in vars(args).items():
        if name not in FREE:
            settings[name] = json.loads(json.dumps(value, default=known_by))
    file = args.out / "settings.json"
    if file.exists():
        data.require_same(file, read_object(file), settings, free=())
    write_text(file, json.dumps(settings, indent=2))


def known_by(path: Path) -> str:
    """A model by what it holds, a file also by its name, which its measures bear."""
    return hash_model(path) if path.is_dir() else f"{path.name} {hash_model(path)}"


def check_texts(args):
    """ValueError where DIR's points are of other texts: another processor may sample others."""
    file = args.out / "texts.json"
    known = read_object(file) if file.exists() else {}
    found = {}
    for seed in seeds_of_tests(args):
        folder = test_folder(args, seed)
        for part in sorted([*folder.glob("*.jsonl"), *folder.glob("drift/*.jsonl")]):
            texts = []
            for row in read_ledger(part):
                texts.append([row.get(name) for name in ("source", "reference", "rationale")])
            found[str(part.relative_to(args.out))] = data.short_hash(texts)
    data.require_same(file, found | known, found, free=())
    write_text(file, json.dumps(found | known, indent=2))


def settle(args: argparse.Namespace) -> argparse.Namespace:
    """Fills in what was not given. ValueError where something is missing."""
    for name, value in (WORLD if args.world else REAL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not args.world:
        for name in ("model", "pairs", "test", "prompts", "drift"):
            require(getattr(args, name), "arms.py", f"give --world, or --{name}")
    several = len(args.rates) > 1 and not args.world
    require(args.valid or not several, "--rates", "the best of several is found by --valid")
    return args


def prepare_seeds(args, workers):
    perform([partial(prepare, args, seed) for seed in args.seeds], workers)


def write_ledgers(args, workers):
    """All that the base writes, for training and for the drift measure."""
    tasks = []
    for seed in args.seeds:
        tasks += [partial(write_ledger, args, seed, name) for name in ledgers_of(args)]
    tasks += [partial(write_tests, args, seed) for seed in seeds_of_tests(args)]
    perform(tasks, workers)
    for seed in args.seeds:
        derive(args, seed)


def run_arms(args, workers):
    """The base first: what it can do decides which choices count as its own."""
    check_texts(args)
    perform([partial(measure_base, args, seed) for seed in seeds_of_tests(args)], workers)
    tasks = []
    for rate in args.rates:
        for name in args.arms:
            tasks += [partial(run_arm, args, seed, rate, name) for seed in args.seeds]
    perform(tasks, workers)


def main(args: argparse.Namespace):
    settle(args)
    check_settings(args)
    with open_workers(args.workers) as workers:
        prepare_seeds(args, workers)
        write_ledgers(args, workers)
        run_arms(args, workers)


def parser() -> argparse.ArgumentParser:
    p = data.Arguments(description="Ways of fine-tuning, run alike and measured alike.")
    add = p.add_argument
    path = lambda text: Path(text).resolve()  # noqa: E731
    files = {"nargs": "+", "default": [], "type": path, "metavar": "FILE"}
    add("--out", type=path, required=True, help="folder for everything")
    add("--world", action="store_true", help="the small world instead of a model and files")
    add("--model", type=path, help="model folder")
    add("--pairs", **files, help="what is learnt; each seed draws its own")
    add("--direction", nargs="+", default=[], help="of pairs and tests, as in train.py")
    add("--characters", nargs=2, type=int, default=[1, 10**6], help="least and most of a text")
    add("--valid", **files, help="pairs by which the best learning rate is found")
    add("--test", **files, help="pairs to translate")
    add("--prompts", **files, help="prompts whose answers are replayed")
    add("--drift", **files, help="prompts on which drift is measured")
    add("--human", **files, help="prompts with answers that people wrote")
    add("--choice", **files, help="choices")
    add("--numeric", **files, help="questions in GSM8K's form")
    add("--safety", **files, help="harmful and benign requests")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    add("--rates", nargs="+", help="learning rates (default 3e-5 1e-4; world 1e-3)")
    add("--arms", nargs="+", default=PLAN, choices=ARMS, help="default: those of the plan")
    add("--parts", nargs="*", type=float, default=PARTS, help="of the way to the tuned weights")
    add("--points", nargs="+", type=int, help="steps to measure after; the last ends the run")
    add("--batch-size", type=int, help="pairs of a step (default 16; world 32)")
    add("--answers", type=int, help="replayed beside them (default 2; world 16)")
    add("--micro-batch-size", type=int, default=16, help="rows at a time (default 16)")
    add("--tests", type=int, help="sentences to translate (default 512; world 100)")
    add("--general", type=int, default=80, help="drift prompts of each file (default 80)")
    add("--new-tokens", type=int, help="of a rationale (default 64; world 32)")
    add("--answer-tokens", type=int, help="of an answer (default 128; world 48)")
    add("--cue", help="forced after the reference (default '\\n'; world none)")
    add("--template", type=data.unescape, help="instruction (default: ALMA's)")
    add("--chat", help="chat format, and choices are asked in it")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="default float32")
    add("--rows", type=int, default=64, help="rows at a time in sampling (default 64)")
    add("--train-flags", nargs=argparse.REMAINDER, default=[], help="last: more for train.py")
    add("--chats", type=int, default=40000, help="world: examples of the base (40000)")
    add("--world-pairs", type=int, default=4000, help="world: pairs (4000)")
    add("--base-steps", type=int, default=1400, help="world: steps of the base (1400)")
    add("--workers", type=int, default=1, help="processes beside each other (default 1)")
    add("--ranks", type=int, default=0, help="GPUs of each command, by torchrun (default none)")
    add("--keep", action="store_true", help="keep the models")
    return p


if __name__ == "__main__":
    data.cli(main, parser())
