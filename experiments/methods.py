"""The study: methods of fine-tuning, trained on the same pairs and measured on the same tests.

    python experiments/methods.py --model DIR --pairs train.jsonl --test test.jsonl \\
        --drift general-vicuna.jsonl --prompts prompts.jsonl --out DIR --only vanilla RaDis

The commands of the scripts are printed and run one by one; DIR/points keeps the measures for
report.py. The same command runs what is missing; others can run at the same time.
"""

import contextlib
import fcntl
import functools
import gc
import importlib
import itertools
import json
import math
import random
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import ifeval  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from world import write_jsonl  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import train  # noqa: E402
from data import Encoder, Tokenizer  # noqa: E402
from model import hash_model, read_object, require, write_text  # noqa: E402
from train import cross_entropy, make_optimizer  # noqa: E402


@dataclass(frozen=True)
class Method:
    """What a method trains on. The pairs of a step are the same for all methods."""

    pairs: str = "pairs"  # the seed's file: pairs alone, or a ledger of this task
    weight: float = 1.0  # of generated tokens; of replayed answers, a ratio of means, not of sums
    teacher: bool = False  # soft targets from the base model for generated tokens
    replay: int = 0  # the model's answers to other prompts in a step, in multiples of --replayed
    loss: str = ""  # of reference tokens, one of LOSSES
    ends: float = 0  # share of the layers that is trained at each end; 0: all parameters are
    after: str = ""  # repair: train the model of this method on its own answers to prompts


METHODS = {
    "vanilla": Method(weight=0),
    "RaDis": Method("rationale"),
    "soft RaDis": Method("rationale", teacher=True),
    "hard replay": Method(replay=1),
    "soft replay 1": Method(replay=1, teacher=True),
    "soft replay 3": Method(replay=1, teacher=True, weight=3),
    "soft replay 3, twice the answers": Method(replay=2, teacher=True, weight=3),
    "soft RaDis + soft replay": Method("rationale", replay=1, teacher=True),
    "SeqKD": Method("translation"),
    "SDFT": Method("paraphrase"),
    "vanilla, middle frozen": Method(weight=0, ends=1 / 6),
    "soft RaDis, middle frozen": Method("rationale", teacher=True, ends=1 / 6),
    "repair": Method(teacher=True, after="vanilla"),
    "EAFT": Method(weight=0, loss="EAFT"),
    "DFT": Method(weight=0, loss="DFT"),
}
REPAIR = 1 / 4  # of --steps
IFEVAL = "--max-new-tokens 384 --batch-size 64"
# options that may differ between commands with the same --out
FREE = ("out", "seeds", "rate", "only", "weights", "keep", "ifeval")


def eaft(logits, targets):
    """The loss times the entropy of the 20 most likely tokens / log 20 (arXiv 2601.02151)."""
    top = logits.detach().float().topk(20).values.log_softmax(-1)
    weights = -(top.exp() * top).sum(-1) / math.log(20)
    return weights * cross_entropy(logits, targets)


def dft(logits, targets):
    """The loss times the probability of the target (arXiv 2508.05629)."""
    losses = cross_entropy(logits, targets)
    return losses.detach().neg().exp() * losses


LOSSES = {"": cross_entropy, "EAFT": eaft, "DFT": dft}


def train_ends(share: float, model, weight_decay: float):
    """Freezes all but this share of the layers at each end (0: nothing), and makes the optimizer.

    The idea is that of arXiv 2609.13680; the share is ours, and embeddings are frozen as well.
    """
    if share:
        layers = model.model["layers"]
        count = max(1, round(share * len(layers)))
        model.requires_grad_(False)
        for layer in [*layers[:count], *layers[-count:]]:
            layer.requires_grad_(True)
    optimizer = make_optimizer(model, weight_decay)
    for p in model.parameters():
        if not p.requires_grad:  # a checkpoint has the moments of all parameters
            optimizer.state[p] = {name: torch.zeros_like(p) for name in train.MOMENTS}
    return optimizer


def run(options, script: str, words: list, **changes):
    """Runs `python SCRIPT.py WORDS` in this process; logs what it prints.

    changes: what was changed in the script, for its record of settings (args.json).
    """
    words = [str(word) for word in words]
    folder = "experiments/" if script == "interpolate" else ""
    command = f"$ python {folder}{script}.py {shlex.join(words)}"
    command += f"  # with {changes}" if any(changes.values()) else ""
    print(command, flush=True)
    log = options.out / f"logs/{script}.txt"
    log.parent.mkdir(exist_ok=True)
    with open(log, "a", encoding="utf-8") as f:
        print(command, file=f, flush=True)
        module = importlib.import_module(script)
        args = module.parser().parse_args(words)
        vars(args).update(changes)
        with contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
            module.main(args)
    gc.collect()  # models hold themselves in cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def generate(options, model: Path, seed: int, task: str, source: Path, out: Path, flags: str):
    """The model writes a ledger, unless it is there: the study's settings have not changed."""
    words = ["--model", model, "--task", task, "--data", source, "--out", out]
    words += ["--seed", seed, *shlex.split(f"{flags} {options.flags}")]
    if not out.exists():
        run(options, "generate", words)


def write_drift(options, file: Path):
    """The base model's answers to prompts, as a ledger for --drift."""
    answers = options.out / f"tests/answers/{file.stem}.jsonl"
    flags = f"--temperature 0 --limit {options.measured} {options.answer_flags}"
    generate(options, options.model, 0, "answer", file, answers, flags)
    meta = read_object(answers.with_suffix(".meta.json"))
    if not file.name.startswith("general"):  # the length of the models' own answers is not measured
        meta["max_new_tokens"] = 1
    ledger = options.out / f"tests/drift/{file.stem}.jsonl"
    ledger.parent.mkdir(exist_ok=True)
    shutil.copyfile(answers, ledger)
    write_text(ledger.with_suffix(".meta.json"), json.dumps(meta))


def prepare(options, seed: int):
    """Writes what the methods train on, for one seed, to DIR/seed-N."""
    folder = options.out / f"seed-{seed}"
    methods = [METHODS[name] for name in options.only]
    pairs = [row for file in options.pairs for _, row in data.read_json(file)]
    count = min(len(pairs), options.steps * options.batch_size)  # of fewer, several epochs
    write_jsonl(folder / "pairs.jsonl", random.Random(seed).sample(pairs, count))
    for task in sorted({method.pairs for method in methods} - {"pairs"}):
        flags = options.rationale_flags if task == "rationale" else options.answer_flags
        source = folder / "pairs.jsonl"
        generate(options, options.model, seed, task, source, folder / f"{task}.jsonl", flags)
    for replay in sorted({method.replay for method in methods} - {0}):
        source = folder / f"prompts-{replay}.jsonl"
        write_prompts(options, seed, replay * options.replayed * options.steps, source)
        answers = folder / f"answers-{replay}.jsonl"
        generate(options, options.model, seed, "answer", source, answers, options.answer_flags)


def write_prompts(options, seed: int, count: int, file: Path):
    """Writes prompts for replay, without ids. Raises UserError if one is also measured."""
    measured = data.read_rows(options.drift, prompts=True)
    texts = {row.messages[-1]["content"].strip() for row in measured if row.messages}
    prompts = []
    for row in data.read_rows(options.prompts, prompts=True):
        new = row.messages[-1]["content"].strip() not in texts
        require(new, row.where, "this prompt is also in --drift; remove it")
        prompts.append({"messages": row.messages})
    random.Random(seed).shuffle(prompts)
    write_jsonl(file, list(itertools.islice(itertools.cycle(prompts), count)))


def slug(method: str) -> str:
    """The name of a method's folder."""
    return method.replace(" + ", "+").replace(", ", "-").replace(" ", "-")


def run_method(options, seed: int, name: str):
    key = f"seed-{seed}/{options.rate}/{slug(name)}/step-{options.steps}"
    weights = {key: 1.0} | {f"{key}-at-{weight:g}": weight for weight in options.weights}
    missing = [point for point in weights if not is_measured(options, point)]
    if not missing:
        return
    tuned = train_method(options, seed, name)
    for point in missing:
        model = tuned
        if weights[point] != 1:
            model = tuned / "interpolated"
            shutil.rmtree(model, ignore_errors=True)
            run(options, "interpolate", [options.model, tuned, weights[point], model])
        measure(options, model, point)
    if not options.keep:
        shutil.rmtree(tuned)


def train_method(options, seed: int, name: str) -> Path:
    """-> the folder of the trained model."""
    method = METHODS[name]
    tuned = options.out / f"models/seed-{seed}/{options.rate}/{slug(name)}/step-{options.steps}"
    steps = options.steps
    start = options.model
    weight = method.weight
    files = [options.out / f"seed-{seed}/{method.pairs}.jsonl"]
    if method.replay:
        files.append(files[0].with_name(f"answers-{method.replay}.jsonl"))
        if method.pairs == "pairs":
            weight *= ratio_of_means(options, files)
    if method.after:
        start = train_method(options, seed, method.after)
        steps = math.ceil(REPAIR * steps)
        source = tuned.with_name("prompts.jsonl")
        write_prompts(options, seed, steps * options.batch_size, source)
        files = [tuned.with_name("answers.jsonl")]
        generate(options, start, seed, "answer", source, files[0], options.answer_flags)
    words = ["--model", start, "--data", *files, "--out", tuned, "--resume"]
    words += ["--learning-rate", options.rate, "--seed", seed]
    words += ["--batch-size", options.batch_size + method.replay * options.replayed]
    words += ["--max-steps", steps, "--warmup-steps", math.ceil(steps / 10)]
    words += ["--rationale-weight", f"{weight:.4g}"]
    words += ["--teacher", options.model] * method.teacher
    words += shlex.split(f"{options.train_flags} {options.flags}")
    changes = {"changed_loss": method.loss or None, "layers_at_ends": method.ends or None}
    if (tuned / "config.json").exists():  # this run is finished
        data.require_same(tuned, read_object(tuned / "args.json"), changes)
    else:
        make = functools.partial(train_ends, method.ends)
        loss = LOSSES[method.loss]
        with mock.patch.multiple(train, cross_entropy=loss, make_optimizer=make):
            run(options, "train", words, **changes)
    return tuned


def ratio_of_means(options, files: list) -> float:
    """The weight at which the mean losses of references and of answers count alike."""
    encoder = Encoder(Tokenizer(options.model))
    examples = [encoder.example(row) for row in data.read_rows(files)]
    references = sum(len(example.reference) for example in examples)
    return references / sum(len(example.rationale) for example in examples)


def point_file(options, name: str) -> Path:
    return options.out / f"points/{name}.npz"


def is_measured(options, name: str) -> bool:
    file = point_file(options, name)
    if not file.exists():
        return False
    return not options.ifeval or "ifeval_loose/all" in np.load(file)["names"]


def measure(options, model: Path, name: str):
    """Measures a model, and keeps the scores with their bootstrap draws."""
    if not point_file(options, name).exists():
        out = options.out / f"results/{name}"
        words = ["--model", model, "--base", options.model, "--out", out, "--translation"]
        words += [*options.test, "--drift", *sorted(options.out.glob("tests/drift/*.jsonl"))]
        words += shlex.split(f"{options.answer_flags} {options.evaluate_flags} {options.flags}")
        run(options, "evaluate", words)
        _, statistics = evaluate.read_results(out)
        keep(options, name, statistics)
    if not is_measured(options, name):
        out = options.out / f"ifeval/{name}"
        answers = out / f"items/answers/{Path(options.ifeval).stem}.jsonl"
        if not answers.exists():
            words = ["--model", model, "--out", out, "--answers", options.ifeval]
            run(options, "evaluate", [*words, *shlex.split(f"{IFEVAL} {options.flags}")])
        settings = {"model_hash": hash_model(model), "max_new_tokens": 384, "limit": None}
        data.require_same(out, read_object(out / "settings.json"), settings)
        scores = evaluate.read_results(out)[1] | ifeval.read_scores(out, options.ifeval)
        keep(options, name, scores)


def keep(options, name: str, statistics: dict):
    """Adds scores to a point."""
    table = np.array([statistic.values for statistic in statistics.values()])
    # of each draw the distance from the score of all items: three digits of it are enough
    draws = (table[:, 1:] - table[:, :1]).astype(np.float16)
    arrays = {"names": [*statistics], "values": table[:, 0], "draws": draws}
    file = point_file(options, name)
    if file.exists():
        known = np.load(file)
        arrays = {key: np.concatenate([known[key], value]) for key, value in arrays.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    with open(temporary, "wb") as f:
        np.savez_compressed(f, **arrays)
    temporary.rename(file)


def check_settings(options):
    """Raises UserError if --out has points of other settings."""
    settings = {name: value for name, value in vars(options).items() if name not in FREE}
    settings["model"] = hash_model(options.model)
    for name in ("pairs", "test", "drift", "prompts"):
        settings[name] = [f"{Path(x).name} {hash_model(x)}" for x in settings[name]]
    file = options.out / "settings.json"
    if file.exists():
        data.require_same(file, read_object(file), settings, free=())
    else:
        write_text(file, json.dumps(settings, indent=2))


def main(options):
    options.only = options.only or ["vanilla", "RaDis", "soft RaDis", "soft RaDis + soft replay"]
    options.seeds = options.seeds or [0, 1, 2]
    options.out = Path(options.out).resolve()
    for name in options.only:
        require(name in METHODS, f"--only {name}", f"must be one of {', '.join(METHODS)}")
        method = METHODS[name]
        answers = method.replay or method.after
        require(options.prompts or not answers, name, "needs --prompts")
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one command makes what several need
        check_settings(options)
        for file in options.drift:
            write_drift(options, Path(file))
        if not is_measured(options, "base"):
            measure(options, Path(options.model), "base")
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
--ifeval FILE           IFEval's prompts; the answers are in OUT/ifeval
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
--train-flags WORDS=--micro-batch-size 16   for train.py
--evaluate-flags WORDS=--batch-size 64   for evaluate.py, such as "--choice piqa.jsonl"
--flags WORDS=--dtype float32   for all scripts, such as --template
--keep                  keep the tuned models
"""


def parser():
    return data.make_parser("Trains and measures methods of fine-tuning.", OPTIONS)


if __name__ == "__main__":
    data.cli(main, parser())
