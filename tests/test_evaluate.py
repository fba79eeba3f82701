"""Scores against their originals, drift against an independent recomputation, and a comparison that can be trusted."""

import contextlib
import importlib
import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import torch
import torch.nn.functional as F
from conftest import PAIRS, read_jsonl, write_jsonl, write_model
from walk import walk

import evaluate
import generate
from data import Encoder, Tokenizer, cli, read_rows
from model import Transformer

ROOT = Path(evaluate.__file__).parent


def run(*arguments) -> None:
    evaluate.main(evaluate.parser().parse_args(list(map(str, arguments))))


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    """A folder with pairs, and a ledger of the tiny model's own answers."""
    place = tmp_path_factory.mktemp("evaluate")
    write_jsonl(place / "pairs.jsonl", PAIRS)
    write_jsonl(place / "prompts.jsonl", [{"prompt": pair["source"]} for pair in PAIRS])
    return place


@pytest.fixture(scope="module")
def ledger(at, folder):
    file = at / "answers.jsonl"
    options = ["--task", "answer", "--max-new-tokens", "12", "--out", str(file)]
    generate.main(generate.parser().parse_args(["--model", str(folder), "--data", str(at / "prompts.jsonl"), *options]))
    return file


@pytest.fixture(scope="module")
def results(at, ledger, folder):
    command = ["--translation", at / "pairs.jsonl", "--drift", ledger, "--max-new-tokens", "20"]
    run("--model", folder, "--out", at / "base", *command)
    other = write_model(at / "other", seed=1)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (other / name).write_bytes((folder / name).read_bytes())
    run("--model", other, "--out", at / "tuned", *command)
    return (
        command,
        json.loads((at / "base/results.json").read_text()),
        json.loads((at / "tuned/results.json").read_text()),
    )


def test_bleu_and_chrf_equal_the_sacrebleu_command_to_the_last_digit(tmp_path):
    hypotheses = [p["reference"].replace("the ", "a ", i % 2) for i, p in enumerate(PAIRS)]
    items = [
        dict(hypothesis=h, cut=False, tokens_after_cut=0) | evaluate.faults(p, h) for h, p in zip(hypotheses, PAIRS)
    ]
    found = evaluate.translation(items)
    (tmp_path / "ref").write_text("\n".join(p["reference"] for p in PAIRS) + "\n", "utf-8")
    (tmp_path / "hyp").write_text("\n".join(hypotheses) + "\n", "utf-8")
    command = [
        sys.executable,
        "-m",
        "sacrebleu",
        "ref",
        "-i",
        "hyp",
        "-m",
        "bleu",
        "chrf",
        "--chrf-word-order",
        "2",
        "-w",
        "12",
    ]
    theirs = json.loads(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout)
    for name, mine in zip(("bleu", "chrf++"), theirs):
        m = found[name].measure()
        assert round(m["value"], 12) == mine["score"] and found[name].signature == mine["signature"]
        assert m["low"] < m["value"] < m["high"]


@pytest.mark.parametrize("language, tok", [("en", "13a"), ("zh", "zh"), ("ja", "char"), ("ko", "char")])
def test_bleu_takes_the_tokenizer_of_the_target_language_and_says_so(language, tok):
    try:
        sacrebleu.BLEU(tokenize=f"{language}-mecab")
        tok = f"{language}-mecab"
    except (ImportError, RuntimeError, KeyError):
        pass
    score = evaluate.metrics_for(language)["bleu"]
    score.corpus_score(["x"], [["x"]])
    assert f"tok:{tok}" in str(score.get_signature())


def test_the_interval_of_a_mean_is_that_of_theory():
    values = np.random.default_rng(0).normal(3, 2, 400)
    m = evaluate.mean(list(values)).measure()
    half = 1.96 * values.std() / 20  # normal theory; the bootstrap's own noise at 1,000 draws is about 4 %
    assert m["n"] == 400 and m["value"] == pytest.approx(values.mean())
    assert m["value"] - m["low"] == pytest.approx(half, rel=0.12) and m["high"] - m["value"] == pytest.approx(
        half, rel=0.12
    )


def test_drift_equals_likelihoods_computed_one_by_one(at, ledger, folder, results):
    model, encoder = Transformer.from_pretrained(folder), Encoder(Tokenizer(folder))
    total = count = 0
    for row, item in zip(read_rows([ledger]), read_jsonl(at / "base/items/drift_nll/answers.jsonl")):
        ids = row["reference_ids"] + [encoder.tokenizer.end_id] * (row["finish"] == "eos")
        tokens = torch.tensor([encoder.prompt(row) + ids])
        with torch.no_grad():
            nll = F.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:], reduction="none")[-len(ids) :]
        assert item["nll"] == pytest.approx(nll.sum().item(), rel=1e-4) and item["tokens"] == len(ids)  # float32 sums
        total, count = total + nll.sum().item(), count + len(ids)
    assert results[1]["measures"]["drift_nll/answers"]["value"] == pytest.approx(total / count, rel=1e-5)


def test_a_model_has_not_drifted_from_itself_and_answers_as_it_did(at, ledger, results):
    base, tuned = (r["measures"] for r in results[1:])
    assert abs(base["drift_kl/answers"]["value"]) < 1e-3  # the ledger keeps four digits
    assert tuned["drift_kl/answers"]["low"] > 0.1
    own = {item["id"]: item for item in read_jsonl(at / "base/items/drift_length/answers.jsonl")}
    assert all(own[row["id"]]["output"] == row["response"] for row in read_jsonl(ledger))


def test_translations_are_cut_at_the_first_line_whether_or_not_they_run_on(at, folder, monkeypatch, results):
    monkeypatch.setattr(evaluate, "RUN_ON", 0)
    run("--model", folder, "--out", at / "stopped", *results[0])
    pairs = zip(read_jsonl(at / "base/items/bleu/pairs.jsonl"), read_jsonl(at / "stopped/items/bleu/pairs.jsonl"))
    for whole, stopped in pairs:
        assert whole["hypothesis"] == stopped["hypothesis"] and "\n" not in whole["hypothesis"]
        assert whole["output"].startswith(stopped["output"]) and whole["tokens"] == stopped["tokens"]


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(at, folder, results, monkeypatch):
    items = at / "base/items/bleu/pairs.jsonl"
    before, lines = items.read_bytes(), items.read_bytes().splitlines(keepends=True)
    items.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    (at / "base/results.json").unlink()
    run("--model", folder, "--out", at / "base", *results[0])
    assert items.read_bytes() == before
    assert json.loads((at / "base/results.json").read_text()) == results[1]


def test_comparison_prints_each_measure_of_each_run(at, results, capsys):
    run("--compare", at / "base", at / "tuned")
    table = capsys.readouterr().out
    for name, m in results[2]["measures"].items():
        assert re.search(rf"^{re.escape(name)} +base .*\n +tuned +{m['value']:.3f} \[", table, re.M)
    assert "nrefs:1" in table


MISTAKES = {
    "no model": (["--out", "x", "--translation", "pairs.jsonl"], "--model"),
    "nothing to measure": (["--model", "MODEL", "--out", "x"], "--translation"),
    "missing file": (["--model", "MODEL", "--out", "x", "--translation", "nowhere.json"], "nowhere.json"),
    "prompts alone": (["--model", "MODEL", "--out", "x", "--translation", "chat.jsonl"], "chat.jsonl"),
    "no ledger": (["--model", "MODEL", "--out", "x", "--drift", "chat.jsonl"], "--task answer"),
    "no results": (["--compare", "nowhere"], "nowhere"),
    "measured otherwise": (["--compare", "base", "limited"], "limit"),
    "twice the same name": (
        ["--model", "MODEL", "--out", "x", "--translation", "pairs.jsonl", "twice/pairs.jsonl"],
        "second file",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(name, at, folder, results, monkeypatch, capsys):
    monkeypatch.chdir(at)
    write_jsonl(at / "chat.jsonl", [{"prompt": "Why?", "response": "So."}])
    (at / "twice").mkdir(exist_ok=True)
    write_jsonl(at / "twice/pairs.jsonl", PAIRS)
    arguments, words = MISTAKES[name]
    if name == "measured otherwise":
        run("--model", folder, "--out", at / "limited", *results[0], "--limit", "2")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *(str(folder) if a == "MODEL" else a for a in arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        cli(evaluate.main, evaluate.parser())
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1 and err.startswith("error: ") and words in err
    assert not (at / "x").exists()


def in_process(command: list[str], folder: Path) -> str:
    script = importlib.import_module(command[0].removesuffix(".py"))
    handlers, printed = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}, io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        script.main(script.parser().parse_args(command[1:]))
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return printed.getvalue()


def test_the_five_scripts_lead_from_random_weights_to_the_comparison(tmp_path):
    table = walk(tmp_path, in_process)
    cells, values = {}, re.findall(r"^(\S*) +(\w+) +(-?\d+\.\d+) \[", table, re.M)
    for name, _, value in values:
        measure = name or measure
        cells.setdefault(measure, []).append(float(value))
    base, vanilla, radis = cells["chrf++/pairs"]
    assert min(vanilla, radis) > base + 20, "fine-tuning on seven pairs learns them"
    assert cells["cut/pairs"][2] > cells["cut/pairs"][1], "RaDis goes on to explain, vanilla does not"
    assert abs(cells["drift_kl/answers"][0]) < 1e-3


def test_the_readme_counts_the_lines_of_the_scripts():
    readme = (ROOT / "README.md").read_text("utf-8")
    table = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", readme, re.M))
    lines = {name: len((ROOT / name).read_text("utf-8").splitlines()) for name in table}
    assert len(table) == 5 and {name: int(n) for name, n in table.items()} == lines


def test_a_template_for_translation_leaves_the_drift_ledger_as_it_was_written(at, folder, results, tmp_path):
    template = ["--template", "{source} in {target_lang}:"]
    run("--model", folder, "--out", tmp_path / "other", *results[0], *template)
    measures = json.loads((tmp_path / "other/results.json").read_text())["measures"]
    assert measures["drift_nll/answers"] == results[1]["measures"]["drift_nll/answers"]


def test_a_second_measurement_into_the_same_folder_joins_the_first(at, folder, results, tmp_path):
    (_, test, _, ledger, *more), out = results[0], tmp_path / "out"
    run("--model", folder, "--out", out, "--translation", test, *more)
    run("--model", folder, "--out", out, "--drift", ledger, *more)
    joined = json.loads((out / "results.json").read_text())
    assert joined["measures"] == results[1]["measures"] and joined["settings"] == results[1]["settings"]
    with pytest.raises(ValueError, match="max_new_tokens"):
        run("--model", folder, "--out", out, "--drift", ledger, "--max-new-tokens", "7")
