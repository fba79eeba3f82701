"""The claim, on a laptop: the smallest case of the harness, told step by step. `make demo`

    python experiments/demo.py --out experiments/run      two cores, no GPU, no network, no data

A chat model is made from random weights in a small world (world.py), lets itself be asked for
rationales, and is taught a language in three ways. Every stage runs command lines of the five
scripts, as they would run on eight GPUs; they stand, with what they print, in OUT/**/logs.
"""

import argparse
import os
import shutil
import time
from pathlib import Path

import arms
import readings
import world

import generate

ARMS = ("vanilla", "RaDis", "soft replay 1")
RATE = "1e-3"
POINTS = (40, 120, 240)  # steps; much happens early
SIZES = "--chats 40000 --world-pairs 3200 --base-steps 1100 --tests 60 --general 40"
WORKERS = min(2, os.cpu_count() or 1)
MEMORY = {name: f"{name} (memory)" for name in world.MEMORY}


def show_commands(log: Path, root: Path):
    """The command lines in a log, with short paths."""
    for line in log.read_text("utf-8").splitlines():
        if line.startswith("$ "):
            print("  " + line.replace(f"{root}/", ""), flush=True)


def skill_rows() -> dict[str, str]:
    """What is printed of each model: title -> measure."""
    rows = {"translation, chrF++": "chrf++/test-et-en", "translation, BLEU": "bleu/test-et-en"}
    for skill in world.CHOICE:
        rows[MEMORY.get(skill, skill)] = f"acc/{skill}"
    for skill in world.NUMERIC:
        rows[MEMORY.get(skill, skill)] = f"flexible/{skill}"
    rows["harmful requests refused"] = "refusal/harmful"
    rows["benign requests refused"] = "refusal/benign"
    return rows


def print_skills(results: dict[str, Path]):
    """What was gained and what was lost, in percent; intervals stand in results.json."""
    measured = {name: arms.read_object(path / "results.json") for name, path in results.items()}
    print(f"{'%':28}" + "".join(f"{name:>15}" for name in results))
    for title, measure in skill_rows().items():
        factor = 1 if title.startswith("translation") else 100
        values = [found["measures"][measure]["value"] for found in measured.values()]
        print(f"{title:28}" + "".join(f"{factor * value:15.0f}" for value in values))


def questions(folder: Path) -> list[dict]:
    """A test item of some skills, a harmful request beside a benign one, and a translation."""
    asked = []
    for skill in ("facts", "format", "arithmetic", "backwards", "ages"):
        row = arms.read_ledger(folder / f"tasks/{skill}.jsonl")[0]
        asked.append(row.get("prompt") or row["question"])
    requests = arms.read_ledger(folder / "tasks/safety.jsonl")
    for harmful in (True, False):
        found = [row["prompt"] for row in requests if row["harmful"] == harmful]
        asked.append(found[0])
    pair = arms.read_ledger(folder / "tasks/translation.jsonl")[0]
    asked.append(world.TEMPLATE.format(source=pair["source"]))
    return [{"prompt": text} for text in asked]


def print_answers(models: dict[str, Path], out: Path, folder: Path):
    """The same questions, answered by each model."""
    world.write(out / "questions.jsonl", questions(folder))
    answers = {}
    for name, model in models.items():
        file = out / f"answers-{arms.slug(name)}.jsonl"
        words = ["--model", model, "--data", out / "questions.jsonl", "--out", file]
        words += "--task answer --temperature 0 --max-new-tokens 48".split()
        arms.call(generate, words, out / "logs/answers.log")
        answers[name] = arms.read_ledger(file)
    for i, row in enumerate(answers["base"]):
        print(f"\n  {row['prompt']}")
        for name, rows in answers.items():
            said = rows[i]["rationale"].strip().replace("\n", " / ")
            print(f"{name:>15}: {said[:80]}")


def main(args: argparse.Namespace):
    start = time.time()
    out = args.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    words = f"--world --seeds {args.seed} --rates {RATE} {SIZES} --rows 128 --keep".split()
    words += ["--out", out, "--points", *POINTS, "--workers", WORKERS]
    words += ["--parts", "--arms", *reversed(ARMS)]  # the longest first
    options = arms.settle(arms.parser().parse_args([str(word) for word in words]))
    arms.check_settings(options)
    folder = arms.seed_folder(options, args.seed)
    with arms.open_workers(options.workers) as workers:
        tell_stages(options, workers, folder)

    print("\n4. What was gained and what was lost. No test item was in training, but where it says")
    print("   memory; replay has asked for format, arithmetic and requests, in other words.")
    ends = {arm: f"seed-{args.seed}/{RATE}/{arms.slug(arm)}" for arm in ARMS}
    results = {"base": out / f"results/seed-{args.seed}/base"}
    results |= {arm: out / f"results/{name}/step-{POINTS[-1]}" for arm, name in ends.items()}
    print_skills(results)
    picture = out / "comparison.png"
    title = f"skills: mean, %\n(dots: base, and after {', '.join(map(str, POINTS))} steps)"
    readings.draw(readings.read_study(out), picture, "skills", title)

    print("\n5. The same questions, answered by each model.")
    models = {"base": folder / "base"} | {arm: out / "models" / name for arm, name in ends.items()}
    print_answers(models, out, folder)
    print(f"\nPicture of skill against ability: {picture}")
    print(f"Tables with intervals: python experiments/readings.py --out {args.out}")
    print(f"{time.time() - start:.0f} s in all")


def tell_stages(options: argparse.Namespace, workers, folder: Path):
    """From nothing to three tuned models, measured."""
    print("1. A small world, from a seed: English, the invented language Vela, eight skills; and a")
    print("   base model, from random weights. It learns the skills, and half of Vela's words.")
    arms.prepare_seeds(options, workers)
    show_commands(folder / "logs/base.log", options.out)

    print("\n2. Rationales: the answer is forced to begin with the reference, and the base model")
    print("   goes on by itself. For replay it answers other prompts, of three of the skills.")
    arms.write_ledgers(options, workers)
    show_commands(folder / "logs/rationales.log", options.out)
    for row in arms.read_ledger(folder / "drawn/rationales.jsonl")[:3]:
        print(f"  {row['source']}\n    reference: {row['reference']}")
        print(f"    rationale: {row['rationale'].strip()}")

    print("\n3. The same pairs learnt in three ways: alone (vanilla); with the rationales (RaDis);")
    print("   alone, but beside own answers whose distribution is to be kept (soft replay).")
    arms.run_arms(options, workers)
    for arm in ARMS:
        log = f"logs/{folder.name}/{RATE}/{arms.slug(arm)}.log"
        show_commands(options.out / log, options.out)


def parser() -> argparse.ArgumentParser:
    default = Path(__file__).resolve().parent / "run"
    p = argparse.ArgumentParser(description="Vanilla fine-tuning, RaDis and replay compared.")
    p.add_argument("--out", type=Path, default=default, help="folder, made anew (experiments/run)")
    p.add_argument("--seed", type=int, default=0, help="of everything (default 0)")
    return p


if __name__ == "__main__":
    main(parser().parse_args())
