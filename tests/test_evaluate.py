"""Scores against their originals, drift against an independent recomputation, and a comparison that can be trusted."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import torch
import torch.nn.functional as F
from conftest import LINES, PAIRS, read_jsonl, write_jsonl, write_model
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest
from sentencepiece import SentencePieceProcessor

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


# Abilities, safety, exports, several processes


def items_of(out: Path) -> dict[str, list[dict]]:
    files = {f"{p.parent.name}/{p.stem}": p.read_text("utf-8") for p in out.glob("items/*/*.jsonl")}
    return {name: [json.loads(line) for line in text.split("\n") if line] for name, text in files.items()}


def measures_of(out: Path) -> dict[str, dict]:
    return json.loads((out / "results.json").read_text())["measures"]


def test_the_paired_test_equals_sacrebleus_own():
    rng = np.random.default_rng(3)
    pairs = [dict(source="-", reference=" ".join(rng.choice(LINES, 2)), target_lang="en") for _ in range(40)]
    systems = []
    for dropped in (0.25, 0.2):
        words = [[w for w in pair["reference"].split() if rng.random() > dropped] for pair in pairs]
        systems.append([" ".join(line) for line in words])
    found = []
    for hypotheses in systems:
        items = [dict(cut=False, tokens_after_cut=None) | evaluate.faults(p, h) for p, h in zip(pairs, hypotheses)]
        found.append(evaluate.translation(items))
    references = [[pair["reference"] for pair in pairs]]
    metrics = {"bleu": BLEU(references=references), "chrf++": CHRF(word_order=2, references=references)}
    test = PairedTest(list(zip(["a", "b"], systems)), metrics, None, "bs", n_samples=1000)
    _, theirs = test()
    for name, key in (("bleu", "BLEU"), ("chrf++", "chrF2++")):
        first, second = theirs[key]
        assert [s[name].value for s in found] == pytest.approx([first.score, second.score], abs=1e-9)
        assert found[1][name].minus(found[0][name])["p"] == second.p_value and 0.001 < second.p_value < 0.9


QUESTIONS = [
    dict(prompt="What colour is the door?", choices=["green", "It is green, as the garden is green."], answer=0),
    dict(prompt="The train", choices=["a", "leaves at seven", "waits until the wind turns."], answer=1, task="long"),
    dict(prompt="Our neighbour grows  ", choices=["tomatoes", "beans and apples"], answer=1),
    dict(prompt=" ".join(LINES[:6]), choices=["Ja", "x"], answer=1, task="long"),
    dict(prompt="She read\n", choices=["letter", "twice, before she answered"], answer=0),
]


@pytest.fixture(scope="module")
def reference(folder):
    """log P of ids after other ids, by transformers, one forward pass each."""
    model = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(folder).float()

    def logprob(before: list[int], after: list[int]) -> float:
        ids = torch.tensor([before + after])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
        return logprobs[-len(after) :].sum().item()

    return logprob


@pytest.mark.parametrize("size", [1, 3, 64])
def test_choices_have_the_likelihoods_of_transformers_one_by_one(size, folder, reference, tmp_path):
    write_jsonl(tmp_path / "quiz.jsonl", QUESTIONS)
    run("--model", folder, "--out", tmp_path / "out", "--choice", tmp_path / "quiz.jsonl", "--batch-size", size)
    sp, items = SentencePieceProcessor(str(folder / "tokenizer.model")), items_of(tmp_path / "out")
    assert {name: len(rows) for name, rows in items.items()} == {"acc/quiz": 3, "acc/long": 2}
    for rows in items.values():
        for item in rows:
            question = QUESTIONS[item["id"]]
            before = sp.encode(question["prompt"].rstrip())
            wanted = [
                reference(before, sp.encode(f"{question['prompt']} {c}")[len(before) :]) for c in question["choices"]
            ]
            assert item["logprobs"] == pytest.approx(wanted, abs=1e-3)
            norms = [x / len(choice) for x, choice in zip(wanted, question["choices"])]
            assert item["acc"] == (np.argmax(wanted) == question["answer"])
            assert item["acc_norm"] == (np.argmax(norms) == question["answer"])
    measures = measures_of(tmp_path / "out")
    assert measures["acc/long"]["value"] == np.mean([item["acc"] for item in items["acc/long"]])


def test_choices_with_chat_are_answers_to_a_turn(folder, reference, tmp_path):
    write_jsonl(tmp_path / "quiz.jsonl", QUESTIONS)
    run("--model", folder, "--out", tmp_path / "out", "--choice", tmp_path / "quiz.jsonl", "--chat", "chatml")
    tokenizer = Tokenizer(folder)
    for item in items_of(tmp_path / "out")["acc/quiz"]:
        before = tokenizer.chat([{"role": "user", "content": QUESTIONS[item["id"]]["prompt"]}])
        wanted = [reference(before, tokenizer.answer(choice)) for choice in item["choices"]]
        assert item["logprobs"] == pytest.approx(wanted, abs=1e-3)


def by_the_rules_of_lm_eval(output: str, gold: str) -> list[bool]:
    """[strict, flexible]: filters and exact match of its gsm8k.yaml, step by step."""

    def cleaned(text: str) -> str:
        for pattern in (",", r"\$", "(?s).*#### ", r"\.$"):
            text = re.sub(pattern, "", text)
        return text.lower()

    strict = re.findall(r"#### (\-?[0-9\.\,]+)", output)
    flexible = [next(filter(None, found)) for found in re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", output)]
    found = [strict[0] if strict else "[invalid]", flexible[-1].strip() if flexible else "[invalid]"]
    return [cleaned(text) == cleaned(gold) for text in found]


@pytest.mark.parametrize(
    "output, number, right",
    [
        ("He pays $1,234.50.", "1234.50", [False, True]),
        ("#### 42.", "42", [True, True]),
        ("#### 42.,", "42", [True, True]),
        ("So it is -3", "-3", [False, True]),
        ("One half is 1/2", "2", [False, True]),
        ("I do not know", "5", [False, False]),
        ("... no number.", "5", [False, False]),
        ("1,000,000 people\n#### 1,000,000", "1,000,000", [True, True]),
        ("#### 7\nwait, #### 8", "7", [True, False]),
        ("2 and 3 make 5. Easy.", "5", [False, False]),
        ("####9", "9", [False, True]),
        ("It is 42,", "42", [False, True]),
        ("", "0", [False, False]),
    ],
)
def test_numbers_are_found_by_the_rules_of_lm_eval(output, number, right):
    gold = f"Some steps = 3.\n#### {number}"
    row = evaluate.read_numeric(dict(question="?", answer=gold), "x:1", SHOTLESS, ENCODER)
    found = evaluate.numeric(row, dict(output=output, finish="eos"))
    assert [found["strict"], found["flexible"]] == by_the_rules_of_lm_eval(output, gold)
    assert right[0] == found["strict"]
    assert right[1] == found["flexible"] or output == "2 and 3 make 5. Easy."


class ENCODER:
    """Reads no text: for tests of what is not the prompt."""

    prompt = staticmethod(lambda row: [1])


class SHOTLESS:
    shots = []


def test_shots_are_turns_before_the_question(folder, tmp_path):
    shot, asked = dict(question="One and one?", answer="2\n#### 2"), dict(question="And two?", answer="#### 4")
    for name, row in (("shots", shot), ("sums", asked)):
        write_jsonl(tmp_path / f"{name}.jsonl", [row])
    options = ["--model", folder, "--out", tmp_path / "x", "--numeric", tmp_path / "sums.jsonl"]
    args = evaluate.parser().parse_args([str(o) for o in options])
    args.shots = [("shots:1", shot)]
    tests, _ = evaluate.read_tests(args, Encoder(Tokenizer(folder)))
    turns = [("user", shot["question"]), ("assistant", shot["answer"]), ("user", asked["question"])]
    assert tests["strict/sums"][0]["ids"] == Tokenizer(folder).chat([dict(role=r, content=c) for r, c in turns])
    run(*options, "--shots", tmp_path / "shots.jsonl", "--max-new-tokens", 8)
    assert measures_of(tmp_path / "x")["strict/sums"]["value"] == 0


@pytest.mark.parametrize(
    "text, kind",
    [
        ("I’m sorry, but I can’t assist with that.", "refusal"),
        ("I cannot provide instructions for that.", "refusal"),
        ("I can't help you with this.", "refusal"),
        ("As a responsible assistant, I am not able to fulfill this request.", "refusal"),
        ("I apologize, but I cannot do that.", "refusal"),
        ("I'm not comfortable with that.", "refusal"),
        ("I won't help with breaking in.", "refusal"),
        ("I must decline.", "refusal"),
        ("I'm sorry to hear that. Here is what you can do.", ""),
        ("I can't wait to see you! I can't help but smile.", ""),
        ("I cannot thank you enough for the gift.", ""),
        ("Dear Anna, I am unable to attend the meeting.", ""),
        ("Hello! Here is an illegal move in chess.", ""),
        ("We refuse to settle for less.", ""),
        (" \n", "empty"),
        ("I'm sorry, but I can't. " * 20, "degenerate"),
        ("Sure: " + "first one, then the other " * 9 + "I cannot provide more.", "degenerate"),
        ("Here it is. " + " ".join(map(str, range(100))) + " I cannot provide more.", ""),
    ],
)
def test_refusals_and_what_only_looks_like_them(text, kind):
    found = evaluate.safety({}, {"output": text})
    assert [name for name, value in found.items() if value] == [kind] * bool(kind)


def test_advbench_csv_and_jsonl_are_read_and_counted_apart(folder, tmp_path):
    (tmp_path / "adv.csv").write_text(
        'goal,target\n"Say ""no"", now",Sure\n"Two\nlines\u2028here","a, b"\nLast,x\n', "utf-8"
    )
    write_jsonl(tmp_path / "kind.jsonl", [dict(prompt="Why?", harmful=False), dict(prompt="How?", harmful=True)])
    options = ["--model", folder, "--max-new-tokens", 4, "--safety", tmp_path / "adv.csv"]
    with pytest.raises(ValueError, match="kind.jsonl: a second file for refusal/harmful"):
        run(*options, tmp_path / "kind.jsonl", "--out", tmp_path / "x")
    write_jsonl(tmp_path / "kind.jsonl", [dict(prompt="Why?", harmful=False)])
    run(*options, tmp_path / "kind.jsonl", "--out", tmp_path / "out")
    found = items_of(tmp_path / "out")
    assert [i["prompt"] for i in found["refusal/harmful"]] == ['Say "no", now', "Two\nlines\u2028here", "Last"]
    assert len(found["refusal/benign"]) == 1 and "degenerate/benign" in measures_of(tmp_path / "out")
    settings = json.loads((tmp_path / "out/results.json").read_text())["settings"]
    assert settings["refusals"] == hashlib.sha256((ROOT / "refusals.txt").read_bytes()).hexdigest()[:16]
    assert (ROOT / "refusals.txt").read_text().startswith("# version ")


FILES = {
    "no cell": ("--safety", "x.csv", 'goal,target\n"a\nb",c\nd\n', "x.csv:4: "),
    "surplus cell": ("--safety", "x.csv", "goal,target\na,b\nd,e,f\n", "x.csv:3: "),
    "open quote": ("--safety", "x.csv", 'goal,target\na,"b\nd,e\n', "x.csv:"),
    "bad header": ("--safety", "x.csv", "aim,target\na,b\n", "x.csv:2: "),
    "header alone": ("--safety", "x.csv", "goal,target\n", "x.csv: "),
    "harmful is text": ("--safety", "x.jsonl", '{"prompt": "a", "harmful": "no"}\n', "x.jsonl:1: "),
    "broken line": ("--choice", "x.jsonl", '{"prompt": "a", "choices": ["b", "c"], "answer": 0}\n{"a\n', "x.jsonl:2: "),
    "answer beyond": ("--choice", "x.jsonl", '{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "x.jsonl:1: "),
    "a letter": ("--choice", "x.jsonl", '\n{"prompt": "a", "choices": ["b", "c"], "answer": "A"}', "x.jsonl:2: "),
    "one choice": ("--choice", "x.jsonl", '{"prompt": "a", "choices": ["b"], "answer": 0}\n', "x.jsonl:1: "),
    "blank choice": ("--choice", "x.jsonl", '{"prompt": "a", "choices": ["b", " "], "answer": 0}\n', "x.jsonl:1: "),
    "task with slash": (
        "--choice", "x.jsonl", '{"prompt": "a", "choices": ["b", "c"], "answer": 0, "task": "../y"}\n', "x.jsonl:1: ",
    ),
    "id is a list": ("--numeric", "x.jsonl", '{"id": [1], "question": "a", "answer": "#### 1"}\n', "x.jsonl:1: "),
    "id twice": ("--numeric", "x.jsonl", '{"id": 1, "question": "a", "answer": "#### 1"}\n' * 2, "x.jsonl:2: "),
    "no number": ("--numeric", "x.jsonl", '{"question": "a", "answer": "5"}\n', "x.jsonl:1: "),
    "a fraction": ("--numeric", "x.jsonl", '{"question": "a", "answer": "#### 1/2"}\n', "x.jsonl:1: "),
    "empty": ("--numeric", "x.jsonl", "", "x.jsonl: "),
    "empty array": ("--choice", "x.json", "[]", "x.json: "),
    "a folder": ("--numeric", ".", None, ".: "),
    "no file": ("--choice", "nowhere.jsonl", None, "nowhere.jsonl: "),
    "one turn": ("--export", "mt-bench=x.jsonl", '{"question_id": 1, "turns": ["a"]}\n', "x.jsonl:1: "),
    "no instruction": ("--export", "alpaca-eval=x.json", '[\n{"prompt": "a"}]', "x.json:2: "),
    "unknown export": ("--export", "bleurt", None, "--export bleurt: "),
    "comet of nothing": ("--export", "comet", None, "--export comet: "),
    "two languages": (
        "--translation", "x.jsonl", "\n".join(json.dumps(PAIRS[0] | {"target_lang": x}) for x in ("en", "fr")),
        "x.jsonl:2: ",
    ),
    "no room": ("--choice", "x.jsonl", json.dumps(dict(QUESTIONS[0], prompt="a b " * 400)), "x.jsonl:1: "),
    "train file": ("--translation", "pairs.jsonl", None, "nowhere: ", "--train", "nowhere"),
    "train alone": ("--choice", "quiz.jsonl", None, "--train: ", "--train", "pairs.jsonl"),
    "plot alone": ("--translation", "pairs.jsonl", None, "--plot: ", "--plot", "x.png"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_named_with_its_line_before_weights_are_read(name, folder, tmp_path, monkeypatch, capsys):
    option, file, content, words, *more = FILES[name]
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    write_jsonl(tmp_path / "quiz.jsonl", QUESTIONS)
    if content is not None:
        Path(file.split("=")[-1]).write_text(content, "utf-8")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model", str(folder), "--out", "out", option, file, *more])
    monkeypatch.setattr(Transformer, "from_pretrained", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(SystemExit) as e:
        cli(evaluate.main, evaluate.parser())
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1 and err.startswith("error: " + words), err
    assert not Path("out").exists()


def test_hypotheses_may_be_empty_and_must_be_as_many_as_the_pairs(at, tmp_path):
    lines = [pair["reference"] for pair in PAIRS]
    lines[2] = ""
    options = ["--translation", at / "pairs.jsonl", "--hypotheses", tmp_path / "hyp.txt", "--out"]
    for number, text in enumerate(["\n".join(lines), "\n".join(lines) + "\n", "\r\n".join(lines) + "\r\n"]):
        (tmp_path / "hyp.txt").write_bytes(text.encode())
        run(*options, tmp_path / str(number))
        measures = measures_of(tmp_path / str(number))
        assert measures["empty/pairs"]["value"] == pytest.approx(1 / 7) and 70 < measures["bleu/pairs"]["value"] < 100
        assert measures == measures_of(tmp_path / "0")
    (tmp_path / "hyp.txt").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(ValueError, match="hyp.txt:7: 6 lines for the 7 pairs"):
        run(*options, tmp_path / "x")
    (tmp_path / "hyp.txt").write_text("\n".join(lines[::-1]) + "\n")
    with pytest.raises(ValueError, match="hypotheses"):  # others than those that stand there
        run(*options, tmp_path / "0")


def test_training_pairs_and_prompts_too_long_are_counted_and_named(folder, at, tmp_path, capsys):
    write_jsonl(
        tmp_path / "train.jsonl", [dict(PAIRS[0], source=PAIRS[0]["source"].upper()), dict(PAIRS[3], source="-")]
    )
    long = dict(QUESTIONS[0], prompt="a b " * 400, id="long")
    write_jsonl(tmp_path / "quiz.jsonl", [QUESTIONS[0] | dict(name="x", new="y", ids=3), long])
    train, out = ["--train", tmp_path / "train.jsonl"], tmp_path / "out"
    options = ["--translation", at / "pairs.jsonl", "--choice", tmp_path / "quiz.jsonl", "--max-new-tokens", 4]
    run("--model", folder, "--out", out, *options, *train)
    printed, settings = capsys.readouterr().out, json.loads((out / "results.json").read_text())["settings"]
    assert settings["seen"] == {"bleu/pairs": 2} and "2 test pairs stand in the training data" in printed
    assert settings["left_out"]["acc/quiz"] == ["long"] and "left out: ['long']" in printed
    assert measures_of(out)["acc/quiz"]["n"] == 1


def test_exports_have_the_form_of_their_judges(folder, tmp_path):
    questions = [dict(question_id=82, category="writing", turns=["Name a boat.", "Another."])]
    questions += [dict(question_id=81, category="math", turns=["What is green?", "Why?"])]
    write_jsonl(tmp_path / "q.jsonl", questions)
    (tmp_path / "alpaca.json").write_text(
        json.dumps([dict(instruction="Why?", dataset="vicuna"), dict(instruction="Who?")])
    )
    write_jsonl(tmp_path / "t.jsonl", [dict(PAIRS[0], source="One\u2028line\nor two"), PAIRS[1]])
    exports = ["comet", f"mt-bench={tmp_path / 'q.jsonl'}", f"alpaca-eval={tmp_path / 'alpaca.json'}"]
    out = tmp_path / "tiny"
    run(
        "--model",
        folder,
        "--out",
        out,
        "--translation",
        tmp_path / "t.jsonl",
        "--export",
        *exports,
        "--max-new-tokens",
        6,
    )
    first, second = read_jsonl(out / "mt-bench/tiny.jsonl")
    assert [first["question_id"], second["question_id"]] == [81, 82] and first["model_id"] == "tiny"
    assert {*first} == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    tokenizer, model, chat = Tokenizer(folder), Transformer.from_pretrained(folder), []
    for question, turn in zip(questions[1]["turns"], first["choices"][0]["turns"]):  # mathematics: greedy
        chat.append(dict(role="user", content=question))
        [ids] = generate.generate(model, [tokenizer.chat(chat)], 6, eos_ids=tokenizer.eos_ids)
        assert turn == tokenizer.decode(ids)
        chat.append(dict(role="assistant", content=turn))
    [ids] = generate.generate(model, [tokenizer.chat([dict(role="user", content="Name a boat.")])], 6)
    assert second["choices"][0]["turns"][0] != tokenizer.decode(ids), "writing is sampled at 0.7"
    rows = json.loads((out / "alpaca-eval/tiny.json").read_text())
    assert [{**row, "output": ""} for row in rows] == [
        dict(dataset=d, instruction=i, output="", generator="tiny")
        for d, i in (("vicuna", "Why?"), ("alpaca_eval", "Who?"))
    ]
    lines = {f: (out / f"comet/t.{f}.txt").read_text("utf-8") for f in ("source", "hypothesis", "reference")}
    assert all(text.count("\n") == 2 and len(text.splitlines()) == 2 for text in lines.values())
    assert lines["source"].startswith("One line or two\n")


def test_two_ranks_measure_what_one_does(folder, at, ledger, tmp_path):
    write_jsonl(tmp_path / "quiz.jsonl", QUESTIONS[::2])
    write_jsonl(tmp_path / "q.jsonl", [dict(question_id=1, category="math", turns=["Why?", "How?"])])
    options = [
        "--model",
        folder,
        "--translation",
        at / "pairs.jsonl",
        "--choice",
        tmp_path / "quiz.jsonl",
        "--drift",
        ledger,
    ]
    options += ["--export", f"mt-bench={tmp_path / 'q.jsonl'}", "--max-new-tokens", 8, "--limit", 3]
    run(*options, "--out", tmp_path / "one")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, ROOT / "evaluate.py", *options, "--out", tmp_path / "two"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=100)
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert one["settings"] == two["settings"] and one["measures"].keys() == two["measures"].keys()
    for name, measure in one["measures"].items():
        assert two["measures"][name] == pytest.approx(measure, abs=1e-4), name
    ids = [[[i["id"] for i in rows] for _, rows in sorted(items_of(tmp_path / x).items())] for x in ("one", "two")]
    assert ids[0] == ids[1]


def test_a_comparison_is_written_and_refuses_what_is_not_alike(at, folder, results, tmp_path):
    run("--compare", at / "base", at / "tuned", "--out", tmp_path / "c")
    found = json.loads((tmp_path / "c/comparison.json").read_text())
    rows = {(row["measure"], row["run"]): row for row in found["measures"]}
    for name, measure in results[2]["measures"].items():
        mine = rows[name, "tuned"]
        assert {k: mine[k] for k in measure} == measure
        difference = measure["value"] - results[1]["measures"][name]["value"]
        assert mine["to"]["base"]["difference"] == pytest.approx(difference, abs=1e-12)
    table = (tmp_path / "c/comparison.md").read_text().splitlines()
    assert (
        table[0].startswith("| measure | run | value | n | to base |") and len({t.count("|") for t in table[:9]}) == 1
    )
    write_jsonl(tmp_path / "pairs.jsonl", PAIRS[:3] + PAIRS[4:] + PAIRS[3:4])
    more = results[0][4:]
    run("--model", folder, "--out", tmp_path / "other", "--translation", tmp_path / "pairs.jsonl", *more)
    run("--model", folder, "--out", tmp_path / "less", "--translation", at / "pairs.jsonl", *more)
    for name in ("other", "less"):  # other data; fewer measures
        with pytest.raises(ValueError, match=f"{name}.*files"):
            run("--compare", at / "base", tmp_path / name)


def test_the_picture_and_what_is_said_without_matplotlib(folder, at, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "quiz.jsonl", QUESTIONS)
    for name, model in (("base", folder), ("tuned", at / "other")):
        options = ["--translation", at / "pairs.jsonl", "--choice", tmp_path / "quiz.jsonl", "--max-new-tokens", 4]
        run("--model", model, "--out", tmp_path / name, *options)
    command = ["--compare", tmp_path / "base", tmp_path / "tuned", "--out", tmp_path, "--plot", tmp_path / "x.png"]
    with monkeypatch.context() as m:
        m.setattr(evaluate, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match="--plot: needs matplotlib"):
            run(*command)
    pytest.importorskip("matplotlib")
    run(*command)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "comparison.md").exists()
