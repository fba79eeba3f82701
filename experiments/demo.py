"""The claim, on a laptop: from random weights to the comparison of vanilla fine-tuning and RaDis. `make demo`

    python demo/demo.py --out demo/run              five minutes on two cores; no GPU, no network, no data needed

Every stage is a command line of the five scripts, as it would run on eight GPUs; only the world (demo/world.py) and the
numbers are small. What the commands print stands in OUT/logs.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from world import MEMORY, TEMPLATE

ROOT = Path(__file__).parent.parent
CORES = min(2, os.cpu_count() or 1)
SIZES = dict(chats=40000, pairs=4000, tests=100)
BASE_STEPS, EXPORTS = 1400, (25, 50, 100, 200, 300)  # fine-tuning is measured after these steps: much happens early
CHOICE, NUMERIC = ("facts", "meaning", "spelling", "format"), ("arithmetic", "backwards", "ages")
BASE = "--config start/config.json --tokenizer start --data chats.jsonl --out base --batch-size 32".split()
BASE += "--micro-batch-size 16 --learning-rate 3e-3".split()
RATIONALES = ["--model", "base", "--data", "pairs.jsonl", "--template", TEMPLATE]
RATIONALES += "--out rationales.jsonl --max-new-tokens 32 --batch-size 128".split()
TUNE = "--model base --batch-size 32 --micro-batch-size 16 --learning-rate 1e-3 --save-every 0".split()
TESTS = ["--translation", "tasks/translation.jsonl", "--template", TEMPLATE, "--safety", "tasks/safety.jsonl"]
TESTS += ["--choice", *(f"tasks/{s}.jsonl" for s in CHOICE), "--numeric", *(f"tasks/{s}.jsonl" for s in NUMERIC)]
TESTS += "--chat llama2 --max-new-tokens 48 --batch-size 128".split()
ANSWERS = "--data prompts.jsonl --task answer --temperature 0 --max-new-tokens 48".split()
ROWS = {"translation, chrF++": "chrf++/translation", "translation, BLEU": "bleu/translation"}
ROWS |= {s + " (memory)" * (s in MEMORY): f"{'acc' if s in CHOICE else 'flexible'}/{s}" for s in (*CHOICE, *NUMERIC)}
ROWS |= {"harmful requests refused": "refusal/harmful", "benign requests refused": "refusal/benign"}


def run(folder: Path, commands: dict[str, list], launch: bool = False) -> None:
    """Runs command lines in `folder`, by name, as many at a time as there are cores; `launch`: one, on all cores."""
    waiting, running, start = dict(commands), {}, time.time()
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    spread = f"-m torch.distributed.run --standalone --nproc-per-node {CORES}".split() if launch and CORES > 1 else []
    words = [repr(str(word)) if " " in str(word) else word for word in next(iter(commands.values()))]
    print("$ python", *spread, *words)
    if len(commands) > 1:
        print(f"  and the same for {', '.join(list(commands)[1:])}")
    while waiting or running:
        while waiting and len(running) < CORES:
            name = next(iter(waiting))
            script, *words = map(str, waiting.pop(name))
            log, threads = folder / "logs" / f"{name.replace('/', '-')}.log", {"OMP_NUM_THREADS": "1"}
            with open(log, "w") as f:
                words = [sys.executable, *spread, ROOT / script, *words]
                process = subprocess.Popen(
                    words, cwd=folder, env=os.environ | threads, stdout=f, stderr=subprocess.STDOUT
                )
            running[process] = log
        time.sleep(0.2)
        for process in [p for p in running if p.poll() is not None]:
            log = running.pop(process)
            if process.returncode:
                for other in running:
                    other.terminate()
                sys.exit(f"{log.read_text()[-2000:]}\nerror: {log}: the command failed; the lines above say why")
        if sys.stdout.isatty():
            last = [log.read_text().replace("\r", "\n").strip().rpartition("\n")[2][:54] for log in running.values()]
            print(f"\r\033[K  {time.time() - start:3.0f} s  " + "  |  ".join(last), end="", flush=True)
    print("\r\033[K" * sys.stdout.isatty() + f"  {time.time() - start:.0f} s", flush=True)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def table(out: Path, runs: list[str]) -> None:
    """What a reader wants to see first, in percent; comparison.md has it all, with intervals."""
    found = [json.loads((out / "results" / run / "results.json").read_text())["measures"] for run in runs]
    print(f"{'%':28}" + "".join(f"{name:>18}" for name in runs))
    for title, name in ROWS.items():
        factor = 1 if title.startswith("translation") else 100
        print(f"{title:28}" + "".join(f"{factor * measures[name]['value']:18.0f}" for measures in found))


def prompts(out: Path) -> list[dict]:
    """One test item of each skill, and a harmful request beside a benign one."""
    asked = [read(out / "tasks" / f"{s}.jsonl")[0] for s in (*CHOICE[:1], *CHOICE[3:], *NUMERIC)]
    safety = read(out / "tasks" / "safety.jsonl")
    asked += [next(row for row in safety if row["harmful"] == harmful) for harmful in (True, False)]
    asked.append({"prompt": TEMPLATE.format(**read(out / "tasks" / "translation.jsonl")[0])})
    return [{"prompt": row.get("prompt") or row["question"]} for row in asked]


def main(args: argparse.Namespace) -> None:
    start, out, seed = time.time(), args.out.resolve(), ["--seed", args.seed]

    print("1. A small world, from a seed: English, the invented language Vela, eight skills; texts and tests.")
    sizes = [word for name, n in SIZES.items() for word in (f"--{name}", n)]
    run(out, {"world": ["demo/world.py", "--out", ".", *seed, *sizes]})

    print("\n2. The base model, from random weights. It learns the skills, and a little Vela: half the words.")
    run(out, {"base": ["train.py", *BASE, "--max-steps", BASE_STEPS, *seed]})

    print("\n3. Rationales: the answer is forced to begin with the reference, and the base model goes on by itself.")
    run(out, {"rationales": ["generate.py", *RATIONALES, *seed]}, launch=True)
    for row in read(out / "rationales.jsonl")[:4]:
        print(f"  {row['source']}\n    reference: {row['reference']}  rationale: {row['rationale'].strip()}")

    print("\n4. The same pairs learnt twice: references alone (vanilla), with the rationales (RaDis), all else equal.")
    tune = ["train.py", *TUNE, "--data", "rationales.jsonl", *seed]
    tune += ["--max-steps", EXPORTS[-1], "--export-every", EXPORTS[0]]
    run(out, {"vanilla": [*tune, "--out", "vanilla", "--rationale-weight", "0"], "radis": [*tune, "--out", "radis"]})

    print("\n5. What was gained and what was lost. No test item was in training, but where it says memory.")
    models = ["base", *(f"{arm}/step-{step}" for arm in ("vanilla", "radis") for step in EXPORTS)]
    run(out, {model: ["evaluate.py", "--model", model, "--out", f"results/{model}", *TESTS] for model in models})
    results = [f"results/{model}" for model in models]
    compare = ["evaluate.py", "--compare", *results, "--out", "comparison", "--plot", "comparison.png"]
    run(out, {"compare": compare})
    table(out, ["base", *models[len(EXPORTS) :: len(EXPORTS)]])

    print("\n6. The same prompts, answered by the three models.")
    (out / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts(out)))
    names = ("base", "vanilla", "radis")
    run(out, {f"answers-{n}": ["generate.py", "--model", n, "--out", f"answers-{n}.jsonl", *ANSWERS] for n in names})
    for rows in zip(*(read(out / f"answers-{name}.jsonl") for name in names)):
        print(f"\n  {rows[0]['prompt']}")
        for name, row in zip(names, rows):
            print(f"{name:>10}: {row['response'].strip().replace(chr(10), ' / ')[:100]}")
    print(f"\nTable with intervals: {out}/comparison/comparison.md, picture: {out}/comparison.png")
    print(f"{time.time() - start:.0f} s in all")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="From random weights to the comparison of vanilla fine-tuning and RaDis.")
    p.add_argument("--out", type=Path, default=ROOT / "demo" / "run", help="folder to write (default demo/run)")
    p.add_argument("--seed", type=int, default=0, help="of world, weights, order and samples (default 0)")
    return p


if __name__ == "__main__":
    main(parser().parse_args())
