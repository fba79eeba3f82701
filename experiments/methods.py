"""The study: methods of fine-tuning, trained on the same pairs and measured on the same tests.

    python experiments/methods.py --model DIR --pairs train.jsonl --test test.jsonl \\
        --drift general-vicuna.jsonl --prompts prompts.jsonl --out DIR --only vanilla RaDis

The commands of the scripts are printed and run one by one; DIR/points keeps the measures for
report.py. The same command runs what is missing; others can run at the same time.
"""

import argparse
import contextlib
import fcntl
import gc
import importlib
import itertools
import json
import math
import random
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import ifeval  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from world import write_jsonl  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
from data import Encoder, Tokenizer  # noqa: E402
from model import hash_model, read_object, require, write_text  # noqa: E402


@dataclass(frozen=True)
class Method:
    """What a method trains on. The pairs of a step are the same for all methods."""

    pairs: str = "pairs"  # the seed's file: pairs alone, or a ledger of this task
    weight: float = 1.0  # of generated tokens; of replayed answers, a ratio of means, not of sums
    teacher: bool = False  # soft targets from the base model for generated tokens
    replay: int = 0  # the model's answers to other prompts in a step, in multiples of --replayed


METHODS = {
    "vanilla": Method(weight=0),
    "RaDis": Method("rationale"),
    "soft RaDis": Method("rationale", teacher=True),
    "hard replay": Method(replay=1),
    "soft replay 1": Method(replay=1, teacher=True),
    "soft replay 3": Method(replay=1, teacher=True, weight=3),
    "soft replay 3, twice the answers": Method(replay=2, teacher=True, weight=3),
    "soft RaDis + soft replay": Method("rationale", replay=1, teacher=True),
    "no EOS": Method("no-eos"),  # a control: the reference, one more token, and no end
    "SeqKD": Method("translation"),
    "SDFT": Method("paraphrase"),
}
# options that may differ between commands with the same --out
FREE = ("out", "seeds", "rate", "only", "weights", "ranks", "keep")


def run(options, script: str, words: list):
    """Runs `python SCRIPT.py WORDS`, in this process or by torchrun; logs what it prints."""
    words = [str(word) for word in words]
    folder = "experiments/" if script == "interpolate" else ""
    command = f"$ python {folder}{script}.py {shlex.join(words)}"
    print(command, flush=True)
    log = options.out / f"logs/{script}.txt"
    log.parent.mkdir(exist_ok=True)
    with open(log, "a", encoding="utf-8") as f:
        print(command, file=f, flush=True)
        if options.ranks and not folder:
            launch = f"-m torch.distributed.run --standalone --nproc-per-node {options.ranks}"
            launch = [sys.executable, *launch.split(), str(ROOT / f"{script}.py")]
            done = subprocess.run([*launch, *words], stdout=f, stderr=f)
            require(done.returncode == 0, log, "the command failed; its last lines say why")
        else:
            module = importlib.import_module(script)
            with contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
                module.main(module.parser().parse_args(words))
    gc.collect()  # models hold themselves in cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def generate(options, seed: int, task: str, source: Path, out: Path, flags: str):
    """The base model writes a ledger."""
    words = ["--model", options.model, "--task", task, "--data", source, "--out", out]
    run(options, "generate", [*words, "--seed", seed, *shlex.split(f"{flags} {options.flags}")])


def read_jsonl(file: Path) -> list[dict]:
    return [row for _, row in data.read_json(file)]


def write_drift(options, file: Path):
    """The base model's answers to prompts, as a ledger for --drift."""
    answers = options.out / f"tests/answers/{file.stem}.jsonl"
    flags = f"--temperature 0 --limit {options.measured} {options.answer_flags}"
    generate(options, 0, "answer", file, answers, flags)
    meta = read_object(answers.with_suffix(".meta.json"))
    if not file.name.startswith("general"):  # the length of the models' own answers is not measured
        meta["max_new_tokens"] = 1
    ledger = options.out / f"tests/drift/{file.stem}.jsonl"
    write_jsonl(ledger, read_jsonl(answers))
    write_text(ledger.with_suffix(".meta.json"), json.dumps(meta))


def prepare(options, seed: int):
    """Writes what the methods train on, for one seed, to DIR/seed-N."""
    folder = options.out / f"seed-{seed}"
    methods = [METHODS[name] for name in options.only]
    pairs = [row for file in options.pairs for row in read_jsonl(file)]
    count = min(len(pairs), options.steps * options.batch_size)  # of fewer, several epochs
    write_jsonl(folder / "pairs.jsonl", random.Random(seed).sample(pairs, count))
    tasks = {"rationale" if method.pairs == "no-eos" else method.pairs for method in methods}
    for task in sorted(tasks - {"pairs"}):
        flags = options.rationale_flags if task == "rationale" else options.answer_flags
        source = folder / "pairs.jsonl"
        generate(options, seed, task, source, folder / f"{task}.jsonl", flags)
    if METHODS["no EOS"] in methods:
        tokenizer = Tokenizer(options.model)
        rows = read_jsonl(folder / "rationale.jsonl")
        write_jsonl(folder / "no-eos.jsonl", [truncate(row, tokenizer) for row in rows])
    for replay in sorted({method.replay for method in methods} - {0}):
        prompts = unmeasured_prompts(options)
        random.Random(seed).shuffle(prompts)
        count = replay * options.replayed * options.steps
        source = folder / f"prompts-{replay}.jsonl"
        write_jsonl(source, list(itertools.islice(itertools.cycle(prompts), count)))
        answers = folder / f"answers-{replay}.jsonl"
        generate(options, seed, "answer", source, answers, options.answer_flags)


def unmeasured_prompts(options) -> list[dict]:
    """The prompts for replay, without ids. Raises UserError if one is also measured."""
    measured = data.read_rows(options.drift, prompts=True)
    texts = {row.messages[-1]["content"].strip() for row in measured if row.messages}
    prompts = []
    for row in data.read_rows(options.prompts, prompts=True):
        new = row.messages[-1]["content"].strip() not in texts
        require(new, row.where, "this prompt is also in --drift; remove it")
        prompts.append({"messages": row.messages})
    return prompts


def truncate(row: dict, tokenizer: Tokenizer) -> dict:
    """The row with the first token of its rationale alone, and no EOS after it."""
    ids = row["rationale_ids"][:1]
    if not ids:  # the model ended its answer at once
        return row
    text = tokenizer.decode_after(row["reference_ids"], ids)
    return row | {"rationale": text, "rationale_ids": ids, "finish": "length"}


def slug(method: str) -> str:
    """The name of a method's folder."""
    return method.replace(" + ", "+").replace(", ", "-").replace(" ", "-")


def run_method(options, seed: int, name: str):
    key = f"seed-{seed}/{options.rate}/{slug(name)}/step-{options.steps}"
    weights = {key: 1.0} | {f"{key}-at-{weight:g}": weight for weight in options.weights}
    missing = [point for point in weights if not point_file(options, point).exists()]
    if not missing:
        return
    method = METHODS[name]
    tuned = options.out / "models" / key
    files = [options.out / f"seed-{seed}/{method.pairs}.jsonl"]
    if method.replay:
        files.append(files[0].with_name(f"answers-{method.replay}.jsonl"))
    weight = method.weight
    if method.replay and method.pairs == "pairs":
        weight *= ratio_of_means(options, files)
    words = ["--model", options.model, "--data", *files, "--out", tuned, "--resume"]
    words += ["--learning-rate", options.rate, "--seed", seed]
    words += ["--batch-size", options.batch_size + method.replay * options.replayed]
    words += ["--max-steps", options.steps, "--warmup-steps", math.ceil(options.steps / 10)]
    words += ["--rationale-weight", f"{weight:.4g}"]
    words += ["--teacher", options.model] * method.teacher
    run(options, "train", [*words, *shlex.split(f"{options.train_flags} {options.flags}")])
    trained = sum(line["tokens"] for line in read_jsonl(tuned / "metrics.jsonl"))
    generated = [row.get("rationale_ids", []) for file in files for row in read_jsonl(file)]
    cost = {"trained": trained, "taught": trained * method.teacher}
    cost["sampled"] = sum(map(len, generated))
    for point in missing:
        model = tuned
        if weights[point] != 1:
            model = tuned / "interpolated"
            shutil.rmtree(model, ignore_errors=True)
            run(options, "interpolate", [options.model, tuned, weights[point], model])
        measure(options, model, point, cost)
    if not options.keep:
        shutil.rmtree(tuned)


def ratio_of_means(options, files: list) -> float:
    """The weight at which the mean losses of references and of answers count alike."""
    encoder = Encoder(Tokenizer(options.model))
    examples = [encoder.example(row) for row in data.read_rows(files)]
    references = sum(len(example.reference) for example in examples)
    return references / sum(len(example.rationale) for example in examples)


def point_file(options, name: str) -> Path:
    return options.out / f"points/{name}.npz"


def measure(options, model: Path, name: str, cost: dict):
    """Measures a model, and keeps the scores with their bootstrap draws."""
    out = options.out / f"results/{name}"
    words = ["--model", model, "--base", options.model, "--out", out, "--translation"]
    words += [*options.test, "--drift", *sorted(options.out.glob("tests/drift/*.jsonl"))]
    words += shlex.split(f"{options.answer_flags} {options.evaluate_flags} {options.flags}")
    run(options, "evaluate", words)
    _, statistics = evaluate.read_results(out)
    for file in options.ifeval:
        out = options.out / f"ifeval/{name}"
        words = ["--model", model, "--out", out, "--answers", file]
        run(options, "evaluate", words + shlex.split(f"{options.ifeval_flags} {options.flags}"))
        statistics |= evaluate.read_results(out)[1] | ifeval.read_scores(out, file)
    table = np.array([statistic.values for statistic in statistics.values()])
    # of each draw the distance from the score of all items: three digits of it are enough
    draws = (table[:, 1:] - table[:, :1]).astype(np.float16)
    arrays = {"names": [*statistics], "values": table[:, 0], "draws": draws}
    file = point_file(options, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    with open(temporary, "wb") as f:
        np.savez_compressed(f, **arrays, cost=json.dumps(cost))
    temporary.rename(file)


def check_settings(options):
    """Raises UserError if --out has points of other settings."""
    settings = {name: value for name, value in vars(options).items() if name not in FREE}
    settings["model"] = hash_model(options.model)
    for name in ("pairs", "test", "drift", "prompts", "ifeval"):
        settings[name] = [f"{Path(x).name} {hash_model(x)}" for x in settings[name]]
    file = options.out / "settings.json"
    if file.exists():
        data.require_same(file, read_object(file), settings, free=())
    else:
        write_text(file, json.dumps(settings, indent=2))


def main(options: argparse.Namespace):
    options.only = options.only or ["vanilla", "RaDis", "soft RaDis", "soft RaDis + soft replay"]
    options.seeds = options.seeds or [0, 1, 2]
    options.out = Path(options.out).resolve()
    for name in options.only:
        require(name in METHODS, f"--only {name}", f"must be one of {', '.join(METHODS)}")
        require(options.prompts or not METHODS[name].replay, name, "needs --prompts")
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one command makes what several need
        check_settings(options)
        for file in options.drift:
            write_drift(options, Path(file))
        if not point_file(options, "base").exists():
            measure(options, Path(options.model), "base", {})
        for seed in options.seeds:
            prepare(options, seed)
    for seed in options.seeds:
        for name in options.only:
            run_method(options, seed, name)


OPTIONS = """
--model! DIR            base model
--out! DIR              folder of the study
--pairs! FILE...        pairs to train on; each seed draws its own
--test! FILE...         pairs to translate
--drift! FILE...        prompts or pairs, for KL to base; of general*.jsonl also answer length
--prompts FILE...       prompts whose answers are replayed
--ifeval FILE...        IFEval's prompts: the models answer them too, and are scored
--only METHOD...        methods (default: vanilla, RaDis, soft RaDis, soft RaDis + soft replay)
--seeds N...            default 0 1 2
--rate RATE=1e-4        peak learning rate
--weights SHARE...      measure each method also interpolated with these weights
--steps COUNT=64        optimizer steps
--batch-size COUNT=16   pairs in a step
--replayed COUNT=2      answers in a step beside them
--measured COUNT=40     rows of each file of --drift
--rationale-flags WORDS=--max-new-tokens 64 --cue '\\n'   for rationales, as one word
--answer-flags WORDS=--max-new-tokens 128   for answers and evaluate.py
--ifeval-flags WORDS=--max-new-tokens 384   for these answers
--train-flags WORDS=--micro-batch-size 16   for train.py
--evaluate-flags WORDS=--batch-size 64   for evaluate.py, such as "--choice piqa.jsonl"
--flags WORDS=--dtype float32   for all scripts, such as --template
--ranks N=0             GPUs for each command, by torchrun; 0: in this process
--keep                  keep the tuned models
"""


def parser() -> argparse.ArgumentParser:
    return data.make_parser("Trains and measures methods of fine-tuning.", OPTIONS)


if __name__ == "__main__":
    data.cli(main, parser())
