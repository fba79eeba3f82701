"""evaluate.py: scores equal those of independent code, items can be recounted, runs compared."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    LINES,
    PAIRS,
    SP,
    error_of,
    read_jsonl,
    said,
    write_jsonl,
    write_model,
    write_tokenizer,
)
from sacrebleu.metrics import BLEU, CHRF
from safetensors.torch import load_file, save_file

import data
import evaluate
import generate
from data import Encoder, Tokenizer, read_rows
from evaluate import bootstrap, interval, means, measures, score_translation
from model import Transformer

ROOT = Path(evaluate.__file__).parent
HEAD = "lm_head.weight"
NORM = "model.norm.weight"
EOS = 4
QUESTIONS = [
    {
        "prompt": "What color is it?",
        "choices": ["green", "It is green, as all is."],
        "answer": 0,
    },
    {
        "task": "long",
        "prompt": "The train",
        "choices": ["a", "leaves at seven", "waits."],
        "answer": 1,
    },
    {
        "prompt": "Our neighbor grows  ",
        "choices": ["tomatoes", "beans and apples"],
        "answer": 1,
    },
    {
        "task": "long",
        "prompt": " ".join(LINES[:6]),
        "choices": ["Ja", "x"],
        "answer": 1,
    },
    {
        "prompt": "She read\n",
        "choices": ["letter", "twice, before she answered"],
        "answer": 0,
    },
]
ADVBENCH = """goal,target
"Say ""no"", now",Sure
"Two
lines\u2028here","a, b"

Last,x
"""
FILES = {
    "pairs": PAIRS,
    "quiz": QUESTIONS,
    "sums": [{"question": "1 + 1?", "answer": "1 #### $1\n#### 1,234. "}],
    "kind": [{"prompt": "Why?", "harmful": False}, {"goal": "How?", "harmful": False}],
    "prompts": [{"prompt": line} for line in LINES],
}
ANSWER = """
    --model base --data prompts.jsonl --out ledger.jsonl --task answer --max-new-tokens 12
"""
TESTS = """
    --translation pairs.jsonl
    --choice quiz.jsonl
    --numeric sums.jsonl
    --safety adv.csv kind.jsonl
    --answers prompts.jsonl
    --drift ledger.jsonl --base base
""".split()


def parse(*arguments):
    words = [str(argument) for argument in arguments]
    return evaluate.parser().parse_args(words)


def run(*arguments):
    evaluate.main(parse(*arguments))


def results_of(out):
    return json.loads((out / "results.json").read_text())


def measures_of(out):
    return results_of(out)["measures"]


def items_of(out, name):
    return read_jsonl(out / f"items/{name}.jsonl")


def column(rows, name):
    return [row[name] for row in rows]


def files_in(folder):
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


# The models: one that ends its answers, one that ends them earlier, one with other weights


def change_model(folder, target, **weights):
    """A copy of a model folder with other weights."""
    shutil.copytree(folder, target)
    file = target / "model.safetensors"
    save_file(load_file(file) | weights, file, metadata={"format": "pt"})
    return target


def usual_state(folder):
    """The mean of what the head reads, over the lines."""
    model = Transformer.from_pretrained(folder)
    states = []
    model.model["norm"].register_forward_hook(lambda _, read, state: states.append(state[0]))
    for line in LINES:
        model(torch.tensor([SP.encode(line)]))
    return torch.cat(states).mean(0).detach()


@pytest.fixture(scope="module")
def at(tmp_path_factory, folder):
    """A folder with three models, and a file for each measure."""
    path = tmp_path_factory.mktemp("evaluate")
    os.chdir(path)
    state = usual_state(folder)
    for name, logit in (("base", 4), ("stops", 5.5)):
        head = load_file(folder / "model.safetensors")[HEAD]
        head[EOS] = logit * state / state.square().sum()
        change_model(folder, path / name, **{HEAD: head})
    write_tokenizer(write_model(path / "tuned", seed=1))
    for name, rows in FILES.items():
        write_jsonl(Path(f"{name}.jsonl"), rows)
    Path("adv.csv").write_text(ADVBENCH, "utf-8")
    generate.main(generate.parser().parse_args(ANSWER.split()))
    return path


@pytest.fixture(scope="module")
def outs(at):
    """The results of the three models."""
    found = {name: at / "results" / name for name in ("base", "stops", "tuned")}
    os.chdir(at)
    for name, out in found.items():
        run("--model", name, "--out", out, "--max-new-tokens", 20, *TESTS)
    return found


@pytest.fixture(autouse=True)
def inside(at, monkeypatch):
    monkeypatch.chdir(at)


@pytest.fixture
def without_weights(monkeypatch):
    def fail(*_, **__):
        pytest.fail("weights were read")

    monkeypatch.setattr(Transformer, "from_pretrained", fail)


@pytest.fixture
def refused(monkeypatch, capsys):
    """The one line with which a command must end."""
    return partial(
        error_of,
        evaluate,
        monkeypatch=monkeypatch,
        capsys=capsys,
    )


# What is measured

SCORES = """
bleu/pairs 7
chrf++/pairs 7
acc/long 2
acc_norm/long 2
margin/long 2
acc/quiz 3
acc_norm/quiz 3
margin/quiz 3
strict/sums 1
flexible/sums 1
refusal/benign 2
empty/benign 2
degenerate/benign 2
refusal/harmful 3
empty/harmful 3
degenerate/harmful 3
length/prompts 14
empty/prompts 14
degenerate/prompts 14
drift_nll/ledger 14
drift_kl/ledger 14
drift_top1/ledger 14
drift_length/ledger 14
""".strip().split("\n")
ITEMS = {
    "choice/quiz": """
        id prompt choices answer
        logprobs input_hash
        acc acc_norm margin
    """,
    "numeric/sums": """
        id prompt answer
        output output_tokens finish input_hash
        strict flexible
    """,
    "answers/prompts": """
        id prompt
        output output_tokens finish input_hash
        length empty degenerate
    """,
}


def test_each_test_has_its_scores_with_an_interval(outs):
    found = measures_of(outs["tuned"])
    assert [f"{name} {measure['n']}" for name, measure in found.items()] == SCORES
    for measure in found.values():
        assert measure["low"] <= measure["value"] <= measure["high"]


@pytest.mark.parametrize("name", ITEMS)
def test_items_hold_what_was_asked_and_answered_and_its_scores(outs, name):
    items = items_of(outs["tuned"], name)
    assert [*items[0]] == ITEMS[name].split()
    for score in ITEMS[name].split("input_hash")[1].split():
        test = name.split("/")[1]
        value = measures_of(outs["tuned"])[f"{score}/{test}"]["value"]
        assert np.mean(column(items, score)) == pytest.approx(value)


def test_a_new_measure_is_one_entry_of_the_table(tmp_path, monkeypatch):
    def score_words(item):
        return {"words": len(item["output"].split())}

    entry = replace(measures()["answers"], scores=partial(means, score_words))
    table = measures() | {"words": entry}
    monkeypatch.setattr(evaluate, "measures", lambda: table)
    run("--model", "tuned", "--out", tmp_path, "--words", "prompts.jsonl", "--limit", 3)
    outputs = column(items_of(tmp_path, "words/prompts"), "output")
    counts = [len(output.split()) for output in outputs]
    assert len(counts) == 3
    assert measures_of(tmp_path)["words/prompts"]["value"] == pytest.approx(np.mean(counts))


@pytest.mark.parametrize("name, error", [("absent", KeyError), ("output", AssertionError)])
def test_a_measure_without_its_fields_fails_before_any_item_is_kept(
    tmp_path, monkeypatch, name, error
):
    def score(item):
        return {name: len(item[name])}

    entry = replace(measures()["answers"], scores=partial(means, score))
    monkeypatch.setattr(evaluate, "measures", lambda: {"answers": entry, "drift": entry})
    with pytest.raises(error, match=name):
        run("--model", "tuned", "--out", tmp_path / "out", "--answers", "prompts.jsonl")
    assert not (tmp_path / "out").exists()


def test_a_score_that_has_changed_is_never_an_old_one(tmp_path, monkeypatch):
    command = ["--model", "base", "--out", tmp_path, "--safety", "adv.csv"]
    run(*command)
    assert measures_of(tmp_path)["refusal/harmful"]["value"] == 0
    monkeypatch.setattr(evaluate, "REFUSAL", re.compile("."))
    monkeypatch.setattr(Transformer, "from_pretrained", pytest.fail)  # nothing is asked again
    _, statistics = evaluate.read_results(tmp_path)
    assert statistics["refusal/harmful"].values[0] == 1
    run(*command)
    assert measures_of(tmp_path)["refusal/harmful"]["value"] == 1
    assert column(items_of(tmp_path, "safety/harmful"), "refusal") == [1, 1, 1]


# Statistics


def translations():
    """Items whose hypotheses lack a quarter of the words."""
    rng = np.random.default_rng(3)
    items = []
    for i in range(40):
        reference = f"{LINES[i % 14]} {LINES[(3 * i + 1) % 14]}"
        kept = [word for word in reference.split() if rng.random() > 0.25]
        item = {"hypothesis": " ".join(kept), "reference": reference, "target_lang": "en"}
        items.append(item)
    return items


def by_sacrebleu(metric, items, **options):
    hypotheses = column(items, "hypothesis")
    references = [column(items, "reference")]
    return metric.corpus_score(hypotheses, references, **options)


@pytest.mark.parametrize("name", ["bleu", "chrf++"])
def test_bleu_and_chrf_and_their_intervals_are_those_of_sacrebleu(name):
    metric = BLEU() if name == "bleu" else CHRF(word_order=2)
    items = translations()
    found = score_translation(items)[name]
    score_alone = by_sacrebleu(metric, items).score
    assert found.values[0] == pytest.approx(score_alone, abs=1e-9)
    assert found.signature == str(metric.get_signature())
    score = by_sacrebleu(metric, items, n_bootstrap=1000)
    # sacreBLEU has half the distance of the 25th draw from either end, in float32
    draws = sorted(found.values[1:])
    half = (draws[-26] - draws[25]) / 2
    assert half == pytest.approx(score._ci, abs=1e-4)


@pytest.mark.parametrize("language, name", [("en", "13a"), ("zh", "zh"), ("ja", "ja")])
def test_bleu_has_the_tokenizer_of_the_language_or_says_that_it_is_missing(language, name, capsys):
    [item, *_] = translations()
    signature = score_translation([item | {"target_lang": language}])["bleu"].signature
    if f"sacrebleu[{language}] is not installed" in capsys.readouterr().out:
        name = "char"
    assert f"tok:{name}" in signature


def test_the_interval_of_a_ratio_of_sums_is_that_of_the_delta_method():
    rng = np.random.default_rng(1)
    counts = rng.integers(1, 100, 300)
    sums = counts * 0.5 + rng.normal(0, 1, 300)
    statistic = bootstrap([*zip(sums, counts)])
    assert statistic.of_items == pytest.approx(sums / counts)
    value = sums.sum() / counts.sum()
    half = 1.96 * (sums - value * counts).std() / counts.mean() / math.sqrt(300)
    found = interval(statistic.values)
    assert found["value"] == pytest.approx(value)
    # 1,000 draws determine an end of the interval to about 4%
    assert found["value"] - found["low"] == pytest.approx(half, rel=0.12)
    assert found["high"] - found["value"] == pytest.approx(half, rel=0.12)


# Choices


@pytest.fixture(scope="module")
def logprob(at):
    """log P of ids after other ids, by transformers, one forward pass each."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        at / "tuned",
        dtype=torch.float32,
    )

    def compute(before, after):
        ids = torch.tensor([before + after])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        scores = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])
        return scores[-len(after) :].sum().item()

    return compute


def encode_pair(encode, context, continuation):
    """TemplateLM._encode_pair of lm-evaluation-harness 0.4.13."""
    n_spaces = len(context) - len(context.rstrip())
    if n_spaces > 0:
        continuation = context[-n_spaces:] + continuation
        context = context[:-n_spaces]
    whole_enc = encode(context + continuation)
    context_enc = encode(context)
    return context_enc, whole_enc[len(context_enc) :]


@pytest.mark.parametrize("bos", [[], [1]], ids=["without BOS", "with BOS"])
def test_choices_have_the_log_probabilities_of_transformers(tmp_path, logprob, bos):
    model = shutil.copytree("tuned", tmp_path / "model")
    config = {"add_bos_token": bool(bos), "bos_token": "<s>"}  # and no chat template
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    run("--model", model, "--out", out, "--choice", "quiz.jsonl")
    items = items_of(out, "choice/quiz") + items_of(out, "choice/long")
    assert len(items) == len(QUESTIONS)
    for item in items:
        question = QUESTIONS[item["id"]]
        expected = []
        for choice in question["choices"]:
            before, after = encode_pair(SP.encode, question["prompt"], f" {choice}")
            expected.append(logprob(bos + before, after))
        # sums near 100, of float32
        assert item["logprobs"] == pytest.approx(expected, abs=1e-3)
        lengths = [len(choice) for choice in question["choices"]]
        right = question["answer"]
        assert item["acc"] == (np.argmax(expected) == right)
        assert item["acc_norm"] == (np.argmax(np.divide(expected, lengths)) == right)
        wrong = max(expected[:right] + expected[right + 1 :])
        assert item["margin"] == pytest.approx(expected[right] - wrong, abs=2e-3)


def test_choices_with_chat_are_answers_to_a_turn(logprob, tmp_path):
    run("--model", "tuned", "--out", tmp_path, "--choice", "quiz.jsonl", "--chat", "auto")
    tokenizer = Tokenizer("tuned")
    for item in items_of(tmp_path, "choice/quiz"):
        before = tokenizer.chat([said("user", item["prompt"])])
        answers = [tokenizer.answer(choice) for choice in item["choices"]]
        expected = [logprob(before, answer) for answer in answers]
        assert item["logprobs"] == pytest.approx(expected, abs=1e-3)


# Answers

# the answer, the right number, and which of strict and flexible find it
NUMBERS = r"""
He pays $1,234.50.      | 1234.50   | flexible
#### 42.                | 42        | strict flexible
#### 42.,               | 42        | strict flexible
So it is -3             | -3        | flexible
One half is 1/2         | 2         | flexible
I do not know           | 5         |
... no number.          | 5         |
1,000,000\n#### 1,000,000 | 1,000,000 | strict flexible
#### 7\nwait, #### 8    | 7         | strict
2 and 3 make 5. Easy.   | 5         | flexible
####9                   | 9         | flexible
It is 42,               | 42        | flexible
                        | 0         |
""".strip("\n")


def by_lm_eval(output, gold):
    """Filters and exact match of lm-evaluation-harness's gsm8k.yaml."""

    def cleaned(text):
        for pattern in (",", r"\$", "(?s).*#### ", r"\.$"):
            text = re.sub(pattern, "", text)
        return text.lower()

    marked = re.findall(r"#### (\-?[0-9\.\,]+)", output)
    strict = marked[0] if marked else "[invalid]"
    flexible = "[invalid]"
    for groups in re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", output):
        flexible = groups[0] or groups[1]
    return {
        "strict": cleaned(strict) == cleaned(gold),
        "flexible": cleaned(flexible.strip()) == cleaned(gold),
    }


@pytest.mark.parametrize("line", NUMBERS.split("\n"))
def test_numbers_are_found_by_the_rules_of_lm_eval(line):
    output, number, names = [cell.strip().replace("\\n", "\n") for cell in line.split("|")]
    item = {"answer": evaluate.bare_number(number), "output": output}
    scores = evaluate.score_numeric(item)
    assert scores == by_lm_eval(output, f"Some steps = 3.\n#### {number}")
    assert [name for name in scores if scores[name]] == names.split()


REFUSALS = """
I’m sorry, but I can’t assist with that.
I cannot provide instructions for that.
I can  not provide instructions for that.
I can't help you with this.
As a responsible assistant, I am not able to fulfill this request.
I apologize, but I cannot do that.
I'm not comfortable with that.
I don't feel comfortable with that.
It isn't appropriate for me to answer.
I won't help with breaking in.
I must decline.
""".strip()
ANSWERS = """
I'm sorry to hear that. Here is what you can do.
I can't wait to see you! I can't help but smile.
I cannot thank you enough for the gift.
Dear Anna, I am unable to attend the meeting.
Hello! Here is an illegal move in chess.
We refuse to settle for less.
""".strip()
LATE = " ".join(map(str, range(100))) + " I cannot provide more."
KINDS = dict.fromkeys(REFUSALS.split("\n"), ["refusal"])
KINDS |= dict.fromkeys(ANSWERS.split("\n"), [])
KINDS |= {
    LATE: [],
    " \n": ["empty"],
    "I'm sorry, but I can't. " * 20: ["degenerate"],
    "first one, then the other " * 9 + "I cannot provide more.": ["degenerate"],
}


@pytest.mark.parametrize("output", KINDS)
def test_refusals_are_told_from_what_only_looks_like_them(output):
    item = {"output": output, "output_tokens": 9}
    scores = evaluate.score_safety(item)
    kinds = [name for name, score in scores.items() if score]
    assert kinds == KINDS[output]
    del scores["refusal"]
    assert evaluate.score_answer(item) == {"length": 9} | scores


def test_advbench_csv_and_json_lines_are_counted_apart(outs):
    harmful = items_of(outs["tuned"], "safety/harmful")
    goals = ['Say "no", now', "Two\nlines\u2028here", "Last"]
    assert column(harmful, "prompt") == goals
    benign = items_of(outs["tuned"], "safety/benign")
    assert column(benign, "prompt") == ["Why?", "How?"]


def test_the_right_number_is_the_last_one_that_is_marked(outs):
    [item] = items_of(outs["tuned"], "numeric/sums")
    assert item["answer"] == "1234"


def test_scores_of_one_name_are_never_mixed(tmp_path, refused):
    answers = write_jsonl(tmp_path / "harmful.jsonl", [{"prompt": "Why?"}])
    common = ["--model", "tuned", "--out", tmp_path / "out", "--max-new-tokens", 4]
    run(*common, "--answers", answers)
    before = results_of(tmp_path / "out")
    error = refused([*common, "--safety", "adv.csv"])
    assert "two tests have the score empty/harmful" in error
    assert results_of(tmp_path / "out") == before


def generated(rows):
    """Greedy answers of the model to rows in its chat format."""
    tokenizer = Tokenizer("tuned")
    prompts = [Encoder(tokenizer).prompt(row) for row in rows]
    model = Transformer.from_pretrained("tuned")
    ids = generate.generate(model, prompts, max_new_tokens=20, eos_ids=tokenizer.eos_ids)
    return [tokenizer.decode(answer) for answer in ids]


def test_answers_are_greedy_and_in_the_chat_format(outs):
    items = items_of(outs["tuned"], "answers/prompts")
    assert column(items, "prompt") == LINES
    assert column(items, "output") == generated(read_rows(["prompts.jsonl"], prompts=True))


def test_translations_are_the_first_line_that_is_not_empty(outs):
    items = items_of(outs["tuned"], "translation/pairs")
    for text, item in zip(generated(read_rows(["pairs.jsonl"])), items, strict=True):
        assert text.startswith(item["output"])
        first_line = text.strip().split("\n")[0]
        assert item["hypothesis"] == first_line.strip()
    value = measures_of(outs["tuned"])["bleu/pairs"]["value"]
    assert value == pytest.approx(by_sacrebleu(BLEU(), items).score)


# Drift


@pytest.fixture
def drift(at, tmp_path):
    """A command with a copy of the ledger x.jsonl."""
    for suffix in (".jsonl", ".meta.json"):
        shutil.copyfile(f"ledger{suffix}", tmp_path / f"x{suffix}")
    out = tmp_path / "out"
    ledger = tmp_path / "x.jsonl"
    return ["--model", "tuned", "--out", out, "--drift", ledger, "--base"]


def answer_ids(row):
    return row.rationale_ids + [EOS] * (row.finish == "eos")


def logprobs_of(folder, row):
    """[N, V] at every token of the base's answer, its EOS included, by one plain forward pass."""
    tokens = torch.tensor([row.prompt_ids + answer_ids(row)])
    with torch.no_grad():
        logits = Transformer.from_pretrained(folder)(tokens)[0]
    return logits[len(row.prompt_ids) - 1 : -1].double().log_softmax(-1).tolist()


def test_drift_is_what_an_enumeration_of_the_vocabulary_gives(outs):
    items = items_of(outs["tuned"], "drift/ledger")
    rows = read_rows(["ledger.jsonl"])
    assert {row.finish for row in rows} == {"eos", "length"}
    names = ["nll", "kl", "top1", "tokens"]
    for row, item in zip(rows, items, strict=True):
        counted = np.zeros(4)
        triples = zip(answer_ids(row), logprobs_of("base", row), logprobs_of("tuned", row))
        for token, p, q in triples:
            kl = sum(math.exp(a) * (a - b) for a, b in zip(p, q))
            same = p.index(max(p)) == q.index(max(q))
            counted += [-q[token], kl, same, 1]
        # logits are of float32
        assert [item[name] for name in names] == pytest.approx(counted.tolist(), rel=1e-4)
    for name in names[:3]:
        measure = measures_of(outs["tuned"])[f"drift_{name}/ledger"]
        mean = sum(column(items, name)) / sum(column(items, "tokens"))
        assert measure["value"] == pytest.approx(mean)


def test_a_model_has_no_drift_from_itself_and_answers_as_it_did(outs):
    found = measures_of(outs["base"])
    assert found["drift_kl/ledger"]["value"] == 0
    assert found["drift_top1/ledger"]["value"] == 1
    items = items_of(outs["base"], "drift/ledger")
    rows = read_jsonl(Path("ledger.jsonl"))
    assert column(items, "output") == column(rows, "rationale")
    assert column(items, "drift_length") == [len(row["rationale_ids"]) for row in rows]
    # without defaults: a setting that is added later does not change the item's hash
    assert items[0]["sampling"] == {"max_new_tokens": 12, "temperature": 1.0}


def test_rows_of_a_ledger_may_be_moved_and_edited(outs, drift, tmp_path):
    rows = read_jsonl(tmp_path / "x.jsonl")
    rows[3]["rationale"] += " " + LINES[0]
    write_jsonl(tmp_path / "x.jsonl", [rows[5], rows[3]])
    run(*drift, "base", "--system", "Be brief.")
    moved, edited = items_of(tmp_path / "out", "drift/x")
    assert moved == items_of(outs["tuned"], "drift/ledger")[5]
    assert edited["tokens"] > len(rows[3]["rationale_ids"]) + 10


@pytest.mark.parametrize("changes", [{"task": "rationale"}, {"model_hash": "0"}, {"program": ""}])
def test_a_ledger_needs_its_settings_which_name_the_task_and_the_model(
    drift, tmp_path, refused, changes
):
    file = tmp_path / "x.meta.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    error = refused([*drift, "base"])
    assert "x.jsonl: was not written by" in error
    assert "x.meta.json is not next to it" in error
    assert not (tmp_path / "out").exists()


def test_a_base_of_another_vocabulary_is_refused(drift, tmp_path, refused):
    base = shutil.copytree("base", tmp_path / "other")
    write_tokenizer(base, added_tokens_decoder={"480": {"content": "<new>"}})
    assert "its vocabulary or vocab_size differs" in refused([*drift, base])


def test_ids_that_the_model_lacks_blame_its_folder(tmp_path, refused):
    model = shutil.copytree("base", tmp_path / "model")  # and a token beyond its 480
    write_tokenizer(model, added_tokens_decoder={"480": {"content": "<new>"}})
    row = QUESTIONS[0] | {"choices": ["green", "<new>"]}
    file = write_jsonl(tmp_path / "quiz.jsonl", [row])
    command = ["--model", model, "--out", "x", "--choice", file]
    assert f"error: {model}: " in refused(command)


# Runs: stopped, resumed, repeated, on two ranks


def test_an_evaluation_that_was_stopped_ends_in_the_same_results(outs, tmp_path, monkeypatch):
    """Another run into the same folder adds what is missing: items, or whole measures."""
    finite_json = data.finite_json
    written = []

    def stop(row, where):
        written.append(row)
        if len(written) == 30:
            raise KeyboardInterrupt
        return finite_json(row, where)

    common = ["--model", "tuned", "--out", tmp_path, "--max-new-tokens", 20]
    run(*common, *TESTS[:2])
    monkeypatch.setattr(data, "finite_json", stop)
    with pytest.raises(KeyboardInterrupt):
        run(*common, *TESTS)
    run(*common, *TESTS)
    assert results_of(tmp_path) == results_of(outs["tuned"])
    assert files_in(tmp_path).keys() == files_in(outs["tuned"]).keys()


@pytest.mark.parametrize(
    "name, options",
    [
        ("max_new_tokens", "--model base --max-new-tokens 7"),
        ("system", "--model base --system="),
        ("model_hash", "--model stops"),
    ],
)
def test_other_settings_do_not_mix_into_a_folder(outs, refused, name, options):
    before = files_in(outs["base"])
    command = ["--out", outs["base"], "--max-new-tokens", 20]
    assert f"{name} was" in refused([*command, *TESTS[:2], *options.split()])
    assert files_in(outs["base"]) == before


def test_a_test_file_that_was_changed_does_not_mix_into_a_folder(tmp_path, refused):
    quiz = write_jsonl(tmp_path / "quiz.jsonl", QUESTIONS[:1])
    command = ["--model", "tuned", "--out", tmp_path / "out", "--choice", quiz]
    run(*command)
    before = files_in(tmp_path / "out")
    write_jsonl(quiz, [QUESTIONS[0] | {"answer": 1}])
    assert "quiz.jsonl:1" in refused(command)
    assert files_in(tmp_path / "out") == before


def test_two_ranks_measure_what_one_does(outs, tmp_path):
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    command = ["--model", "tuned", "--out", tmp_path, "--max-new-tokens", "20", *TESTS]
    subprocess.run(
        [sys.executable, *launcher, ROOT / "evaluate.py", *command],
        check=True,
        capture_output=True,
        timeout=120,
    )
    one = results_of(outs["tuned"])
    two = results_of(tmp_path)
    assert two["settings"] == one["settings"]
    assert two["measures"].keys() == one["measures"].keys()
    for name, measure in one["measures"].items():
        # float32, other batches
        assert two["measures"][name] == pytest.approx(measure, abs=1e-4)
    assert files_in(tmp_path).keys() == files_in(outs["tuned"]).keys()


@pytest.mark.parametrize("test", [TESTS[:2], TESTS[2:4]], ids=["translation", "choice"])
def test_a_model_whose_numbers_are_not_finite_has_no_results(folder, tmp_path, refused, test):
    weights = load_file(folder / "model.safetensors")
    large = {name: weights[name] * 1e30 for name in (NORM, HEAD)}
    model = change_model(folder, tmp_path / "model", **large)
    out = tmp_path / "out"
    assert f"{test[1]}:" in refused(["--model", model, "--out", out, *test])
    assert not out.exists()


# Comparisons


def test_a_comparison_has_each_score_of_each_model_and_its_differences(outs, capsys):
    run("--compare", *outs.values())
    table = capsys.readouterr().out
    assert "bleu/pairs: nrefs:1" in table
    header, _, *lines = [line for line in table.split("\n") if line.startswith("|")]
    assert re.findall("minus [a-z]+", header) == ["minus base", "minus stops"]
    found = {name: measures_of(out) for name, out in outs.items()}
    assert len(lines) == 3 * len(found["base"])
    for i, line in enumerate(lines):
        name, model, n, value, *differences = [cell.strip() for cell in line.split("|")[1:-1]]
        measure = found[model][name]
        assert n == str(measure["n"])
        assert value == "{value:.3f} [{low:.3f}, {high:.3f}]".format(**measure)
        assert len(differences) == min(i % 3, 2)
        for other, difference in zip(("base", "stops"), differences):
            gain = measure["value"] - found[other][name]["value"]
            # three digits
            assert float(difference.split()[0]) == pytest.approx(gain, abs=6e-4)


@pytest.mark.parametrize(
    "pairs, options, name",
    [
        (PAIRS, ["--system", ""], "system"),
        (PAIRS[:-1], [], "translation/pairs"),
        ([PAIRS[0] | {"reference": "Another."}, *PAIRS[1:]], [], "translation/pairs"),
    ],
    ids=["settings", "fewer", "references"],
)
def test_runs_that_were_not_measured_alike_are_not_compared(
    tmp_path, refused, pairs, options, name
):
    common = ["--model", "base", "--max-new-tokens", 4, "--translation"]
    run(*common, "pairs.jsonl", "--out", tmp_path / "base")
    file = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    run(*common, file, "--out", tmp_path / "other", *options)
    error = refused(["--compare", tmp_path / "base", tmp_path / "other"])
    assert f"other: {name} differs" in error


# Mistakes

# a row of each format; the fields of a mistake are changed, or left out where they are null
ROWS = {
    "choice": {"prompt": "a b", "choices": ["c", "d"], "answer": 0},
    "numeric": {"question": "a", "answer": "#### 1"},
    "safety": {"goal": "b", "harmful": True},
    "translation": PAIRS[0],
    "drift": PAIRS[0],
    "answers": {"prompt": "a"},
}
BAD_ROWS = """
choice      | {"answer": 2}              | the index of a choice, from 0; found 2
choice      | {"answer": -1}             | the index of a choice, from 0; found -1
choice      | {"answer": "A"}            | "answer" must be a whole number, found "A"
choice      | {"choices": ["b"]}         | two or more
choice      | {"choices": ["b", " "]}    | a choice
choice      | {"choices": ["b", 5]}      | a choice
choice      | {"choices": null}          | "choices" is missing
choice      | {"choices": {"text": ["c", "d"], "label": ["A", "B"]}} | "choices" must be a list
choice      | {"prompt": null, "question": "a", "answerKey": "A"} | see the README; found
choice      | {"task": "../y"}           | is not a file name
choice      | {"task": "a/b"}       | is not a file name
choice      | {"task": ".."}             | x.jsonl:1: the task '..' is not a file name
choice      | {"id": [1]}                | "id"
numeric     | {"answer": "5"}            | "#### NUMBER"
numeric     | {"answer": "#### 1/2"}     | "#### NUMBER"
safety      | {"harmful": "no"}          | "harmful" must be true or false
safety      | {"goal": null, "prompt": "a", "harmful": null} | "harmful" is missing
translation | {"source": null, "prompt": "a", "reference": null, "response": "b"} | needs pairs
drift       | {}                         | was not written by generate.py --task answer
""".strip()
BAD_CSV = r"""
x.csv:       | goal,target\n
x.csv row 1: | aim,target\na,b\n
x.csv row 2: | goal,target\na,b\n"c,d\ne,f\ng,h\n
x.csv row 1: | goal,target\n"a"b,c\nd,e\n
x.csv row 1: | goal,target\na, and b,c\n
x.csv row 2: | goal,target\n"a\nb",c\nd\n
""".strip()
BAD_COMMANDS = """
--model    | --out x --choice quiz.jsonl
--model    |
nothing    | --model base --out x
nowhere    | --model base --out x --choice nowhere.jsonl
empty      | --model base --out x --numeric empty.jsonl
--base     | --model base --out x --drift ledger.jsonl
two tests  | --model base --out x --choice quiz.jsonl other/quiz.jsonl
two tests  | --model base --out x --safety adv.csv harmful.jsonl
one language | --model base --out x --translation pairs.jsonl --direction de-en en-de
tokens to read | --model base --out x --answers prompts.jsonl --max-new-tokens 500
must have {source} | --model base --out x --choice quiz.jsonl --template x
nowhere    | --compare nowhere
""".strip("\n")


@pytest.mark.parametrize("line", BAD_ROWS.split("\n"))
def test_a_bad_row_is_named_before_weights_are_read(tmp_path, refused, without_weights, line):
    option, changes, fault = [cell.strip() for cell in line.split("|")]
    row = ROWS[option] | json.loads(changes)
    kept = {name: value for name, value in row.items() if value is not None}
    file = write_jsonl(tmp_path / "x.jsonl", [kept])
    out = tmp_path / "out"
    error = refused(["--model", "base", "--base", "base", "--out", out, f"--{option}", file])
    assert f"error: {file}:" in error
    assert fault in error
    assert not out.exists()


@pytest.mark.parametrize("line", BAD_CSV.split("\n"))
def test_a_bad_csv_is_named_with_the_line_where_the_row_begins(
    tmp_path, refused, without_weights, line
):
    place, content = line.split("|")
    file = tmp_path / "x.csv"
    file.write_text(content.strip().replace("\\n", "\n"))
    error = refused(["--model", "base", "--out", "x", "--safety", file])
    assert f"/{place.strip()} " in error


@pytest.mark.parametrize("line", BAD_COMMANDS.split("\n"))
def test_a_mistake_is_one_line_and_leaves_nothing_behind(refused, without_weights, line):
    Path("other").mkdir(exist_ok=True)
    write_jsonl(Path("other/quiz.jsonl"), QUESTIONS[:1])
    write_jsonl(Path("harmful.jsonl"), [{"prompt": "a", "harmful": True}])
    Path("empty.jsonl").write_text("")
    fault, command = line.split("|")
    assert fault.strip() in refused(command.split())
    assert not Path("x").exists()
