"""Files for judges that need a network or a model of their own.

    python experiments/judges.py mt-bench --model DIR --data question.jsonl --out answers.jsonl
    python experiments/judges.py alpaca --model DIR --data alpaca_eval.json --out outputs.json
    python experiments/judges.py comet --data RESULTS/items/translation/test.jsonl --out DIR

MT-Bench's questions have two turns: the second is asked with the first and its answer before it,
at the temperature of its category, as FastChat does. AlpacaEval's are answered greedily. COMET
reads lines; `--data` is then what evaluate.py has written.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import arms  # noqa: E402
import world  # noqa: E402

import data  # noqa: E402
import generate  # noqa: E402
from model import require, write_text  # noqa: E402

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}  # others: 0


def answer(args, name: str, rows: list, temperature: float) -> dict:
    """The model's answers by the rows' ids; the ledger beside --out can be resumed."""
    folder = args.out.with_suffix(".parts")
    world.write(folder / f"{name}.asked.jsonl", rows)
    words = ["--model", args.model, "--data", folder / f"{name}.asked.jsonl"]
    words += ["--task", "answer", "--out", folder / f"{name}.jsonl", "--temperature", temperature]
    words += ["--max-new-tokens", args.max_new_tokens, "--seed", args.seed]
    words += ["--batch-size", args.batch_size]
    arms.call(generate, words, folder / "log")
    return {row["id"]: row["rationale"] for row in arms.read_ledger(folder / f"{name}.jsonl")}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def mt_bench(args):
    """One line a question, in FastChat's form, in the order of the ids."""
    questions = {}
    for where, row in data.read_json(args.data):
        fits = isinstance(row.get("turns"), list) and len(row["turns"]) == 2
        require(fits, where, "wanted a question with two turns")
        questions.setdefault(TEMPERATURES.get(row.get("category"), 0.0), []).append(row)
    lines = {}
    for temperature, asked in questions.items():
        rows = []
        for row in asked:
            rows.append({"id": row["question_id"], "messages": [user(row["turns"][0])]})
        first = answer(args, f"{temperature}-first", rows, temperature)
        for row, question in zip(rows, asked):
            said = {"role": "assistant", "content": first[row["id"]] or " "}
            row["messages"] += [said, user(question["turns"][1])]
        rows = [row for row in rows if first[row["id"]].strip()]  # silence can't be gone on from
        second = answer(args, f"{temperature}-second", rows, temperature)
        for id in first:
            lines[id] = [first[id], second.get(id, "")]
    name = Path(args.model).name
    written = []
    for id in sorted(lines):
        choices = [{"index": 0, "turns": lines[id]}]
        line = {"question_id": id, "answer_id": f"{name}-{id}", "model_id": name}
        written.append(json.dumps(line | {"choices": choices, "tstamp": time.time()}))
    write_text(args.out, "\n".join(written))


def alpaca(args):
    """One array of what was asked and answered."""
    asked = [row for _, row in data.read_json(args.data)]
    rows = []
    for i, row in enumerate(asked):
        rows.append({"id": i, "prompt": row["instruction"]})
    answers = answer(args, "alpaca", rows, 0.0)
    outputs = []
    for i, row in enumerate(asked):
        found = {"dataset": row.get("dataset", ""), "instruction": row["instruction"]}
        outputs.append(found | {"output": answers[i], "generator": Path(args.model).name})
    write_text(args.out, json.dumps(outputs, indent=2, ensure_ascii=False))


def comet(args):
    """Three files of lines, and the command that reads them."""
    items = arms.read_ledger(args.data)
    files = {}
    for name in ("source", "hypothesis", "reference"):
        files[name] = args.out / f"{args.data.stem}.{name}.txt"
        lines = [" ".join(item[name].split()) for item in items]  # what is one line stays one
        args.out.mkdir(parents=True, exist_ok=True)
        files[name].write_text("\n".join(lines) + "\n", "utf-8")
    print(
        f"comet-score -s {files['source']} -t {files['hypothesis']} -r {files['reference']}"
        " --model Unbabel/wmt22-comet-da"
    )


JUDGES = {"mt-bench": mt_bench, "alpaca": alpaca, "comet": comet}


def main(args: argparse.Namespace):
    needs_model = args.judge != "comet"
    require(not needs_model or args.model, "judges.py", f"{args.judge} needs --model")
    JUDGES[args.judge](args)


def parser() -> argparse.ArgumentParser:
    p = data.Arguments(description="Files for MT-Bench, AlpacaEval and COMET.")
    add = p.add_argument
    add("judge", choices=JUDGES, help="whose files")
    add("--model", help="model folder")
    add("--data", type=Path, required=True, help="questions; for comet items of evaluate.py")
    add("--out", type=Path, required=True, help="file to write; for comet a folder")
    add("--max-new-tokens", type=int, default=1024, help="of an answer (default 1024)")
    add("--seed", type=int, default=0, help="of the samples (default 0)")
    add("--batch-size", type=int, default=32, help="rows at a time (default 32)")
    return p


if __name__ == "__main__":
    data.cli(main, parser())
