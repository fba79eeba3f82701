"""Sampling depends on seed and id alone and follows the distribution; the ledger survives any stop."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LINES, PAIRS, read_jsonl, write_jsonl, write_model, write_tokenizer

import data
from data import Tokenizer, read_rows
from generate import choose, generate, judge, main, parser, sample
from model import Transformer

SCRIPT = str(Path(__file__).parent.parent / "generate.py")
TEMPLATE, CUE, ONE = "Put this from {source_lang} into {target_lang}: {source}", ["--cue", "\\n"], ["--batch-size", 1]
PROMPTS = [[1, 40 + n, *range(100, 100 + 3 * n)] for n in (0, 1, 0, 3, 4)]  # two are the same
ASKED = [{"prompt": "What grows in the garden?"}, {"question_id": 81, "turns": ["Name a colour.", "And another."]}]
JUDGED = {
    "empty": ["", " \n\t "], "repetitive": ["and so on and on " * 8, "这个词的意思是房子。" * 3],
    "copy": [
        "The small owl sleeps by day in the old barn.", "in the OLD  barn.", "barn.",
        'Translated: "The small owl sleeps by day in the old barn".',
    ],
    "wrong_script": ["Это слово значит дом.", "这个词的意思是房子"],
    "ok": ["...", "Here the word barn was chosen because a stable holds horses.", "Because. " * 6, "12 + 3 = 15", "Ja"],
}  # fmt: skip
SETTINGS = dict(
    seed=["--seed", 5], temperature=["--temperature", 0], top_p=["--top-p", 0.5], dtype=["--dtype", "bfloat16"],
    template=["--template", "{source}"], system=["--system", "Be brief."], cue=["--cue", "Note:"],
    max_new_tokens=["--max-new-tokens", 11], chat=["--chat", "plain"], task=["--task", "paraphrase"],
)  # fmt: skip
MISTAKES = {
    "no model": (["--model", "absent"], "absent"), "no data": (["--data", "absent.jsonl"], "absent.jsonl"),
    "temperature": (["--temperature", "-1"], "--temperature"), "top_p": (["--top-p", "0"], "--top-p"),
    "template": (["--template", "{text}"], "--template"), "direction": (["--direction", "en"], "--direction"),
    "context": (["--max-new-tokens", "500"], "512"), "cue": (["--task", "answer", "--cue", "So"], "--cue"),
    "out": (["--out", "/dev/null/l.jsonl"], "/dev/null"), "flag": (["--tempreature", "1"], "--tempreature"),
}  # fmt: skip


def arguments(folder, pairs, out, *more):
    fixed = ["--max-new-tokens", 12, "--template", TEMPLATE, "--dtype", "float32"]
    return [str(x) for x in ["--model", folder, "--data", pairs, "--out", out, *fixed, *more]]


def run(folder, pairs, out, *more):
    main(parser().parse_args(arguments(folder, pairs, out, *more)))
    return out


@pytest.fixture(scope="module")
def mute(tmp_path_factory):
    """Other weights, and every token ends the text."""
    folder = write_tokenizer(write_model(tmp_path_factory.mktemp("mute"), seed=1))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [*range(480)]}))
    return folder


@pytest.mark.parametrize("settings", [{}, dict(temperature=1.0, seed=3), dict(temperature=0.7, top_p=0.8)], ids=str)
def test_row_depends_on_seed_and_place_but_not_on_batch_size_or_other_rows(folder, settings):
    model, greedy, seeds = Transformer.from_pretrained(folder), not settings, (settings, settings | {"seed": 9})
    wanted, other = (generate(model, PROMPTS, 20, eos_ids=[2], batch_size=1, **more) for more in seeds)
    assert (wanted == other) == (wanted[0] == wanted[2]) == greedy
    for count, batch_size in [(5, 1), (5, 2), (5, 3), (5, 32), (2, 32)]:
        assert generate(model, PROMPTS[:count], 20, eos_ids=[2], batch_size=batch_size, **settings) == wanted[:count]


@pytest.mark.parametrize("temperature, top_p", [(1, 1), (0.5, 1), (1, 0.9), (0.7, 0.5), (1, 1e-6), (2, 0.999)])
@pytest.mark.parametrize("size", [12, 600])
def test_sampling_follows_the_nucleus_of_the_softmax(size, temperature, top_p):
    logits, count = torch.randn(size, generator=torch.Generator().manual_seed(size)), 4000
    probs = np.exp(logits.double().numpy() / temperature)
    probs /= probs.sum()
    order = np.argsort(-probs)
    nucleus = order[: 1 + np.searchsorted(probs[order].cumsum(), top_p)] if top_p < 1 else order
    wanted = np.where(np.isin(np.arange(size), nucleus), probs, 0)
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens, logprobs = choose(logits.expand(count, -1), u, temperature, top_p)
    # evenly spaced numbers: each share is off by less than two of them
    assert np.abs(np.bincount(tokens, minlength=size) - wanted / wanted.sum() * count).max() < 2
    # whatever the temperature and the cut, scores are those of the model's own distribution; float32
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[tokens], atol=1e-5, rtol=0)


def test_extreme_random_numbers_never_leave_the_nucleus():
    logits, u = torch.tensor([[-torch.inf, 1.0, 3.0, 2.0, -200.0]] * 2), torch.tensor([0, np.nextafter(1, 0)])
    for settings, wanted in {(1.0, 1.0): {1, 3}, (1.0, 0.8): {2, 3}, (1.0, 1e-6): {2}, (0.0, 1.0): {2}}.items():
        assert set(choose(logits, u, *settings)[0].tolist()) == wanted


def test_tied_logits_are_chosen_alike_beside_any_other_row():
    # bfloat16 logits tie often; a flat neighbour, whose nucleus is wide, must not change what the ties become
    peaked, flat = (4 * torch.randn(1000, generator=torch.Generator().manual_seed(0))).round(), torch.zeros(1000)
    u, logits = (torch.arange(51, dtype=torch.float64) + 0.5) / 51, torch.cat([peaked.expand(50, -1), flat[None]])
    assert choose(logits, u, 1.0, 0.9)[0][:50].equal(choose(logits[:50], u[:50], 1.0, 0.9)[0])


@pytest.mark.parametrize("temperature", [0, 1])
def test_ledger_rows_hold_what_the_interface_promises(folder, pairs, tmp_path, temperature):
    ledger = run(folder, pairs, tmp_path / "l.jsonl", *CUE, "--temperature", temperature, "--system", "Be brief.")
    tokenizer, model, rows = Tokenizer(folder), Transformer.from_pretrained(folder), read_jsonl(ledger)
    for n, (row, pair) in enumerate(zip(rows, PAIRS, strict=True)):
        assert row["id"] == n and {name: row[name] for name in pair} == pair
        assert row["finish"] in ("eos", "length") and row["status"] in JUDGED
        reference, rationale = row["reference_ids"], row["rationale_ids"]
        assert tokenizer.decode(reference) == row["reference"] and rationale[0] == tokenizer.encode("a\n")[-1]
        assert tokenizer.decode(reference + rationale) == row["reference"] + row["rationale"]
        assert (row["finish"] == "length") == (len(rationale) == 12 + 1) and not {*tokenizer.eos_ids} & {*rationale}
        asked = [{"role": "user", "content": f"Put this from German into English: {row['source']}"}]
        ids, n = tokenizer.chat(asked, "Be brief.") + reference + rationale, len(rationale)
        scores = model(torch.tensor([ids[:-1]]))[0, -n:].log_softmax(-1)
        assert temperature or scores.argmax(-1).tolist()[1:] == rationale[1:]
        # written with four digits, and float32 summed in another order
        assert row["logprob"] == pytest.approx(scores[range(n), rationale].mean().item(), abs=1e-4)
    meta = json.loads((tmp_path / "l.meta.json").read_text("utf-8"))
    assert (meta["tokenizer_hash"], meta["cue"], meta["template"]) == (tokenizer.hash, "\n", TEMPLATE)


@pytest.mark.parametrize("cue", ["", "\\n"])
def test_rationale_without_a_word_is_empty_and_keeps_its_cue(mute, pairs, tmp_path, cue):
    for row in read_jsonl(run(mute, pairs, tmp_path / "l.jsonl", "--cue", cue)):
        assert (row["finish"], row["status"], row["rationale"].strip()) == ("eos", "empty", "")
        assert len(row["rationale_ids"]) == len(cue) // 2 and (row["logprob"] is None) == (cue == "")


def test_ledger_row_depends_neither_on_batch_size_nor_on_the_order_of_the_data(folder, tmp_path):
    named = [pair | {"id": f"row {n}"} for n, pair in enumerate(PAIRS)]
    ledgers = []
    for n, given in [(64, named), (1, named), (3, named[::-1])]:
        more = write_jsonl(tmp_path / "named.jsonl", given), tmp_path / f"{n}.jsonl", *CUE, "--batch-size", n
        ledgers.append(sorted(read_jsonl(run(folder, *more)), key=str))
    for rows in zip(*ledgers, strict=True):
        scores = [row.pop("logprob") for row in rows]
        assert rows[0] == rows[1] == rows[2]
        assert max(scores) - min(scores) < 1.1e-4  # one step of the last digit: float32 sums of other shapes


@pytest.mark.parametrize("kept", [-40, -1, 0, None], ids=["torn", "newline torn", "emptied", "whole"])
def test_stopped_ledger_goes_on_where_it_was_and_ends_the_same(folder, pairs, tmp_path, kept):
    whole = run(folder, pairs, tmp_path / "whole.jsonl", *CUE, *ONE).read_bytes()
    out = run(folder, pairs, tmp_path / "l.jsonl", *CUE, *ONE, "--limit", 3)
    first = out.read_bytes()
    assert first.count(b"\n") == 3 and whole.startswith(first)
    out.write_bytes(first[:kept])
    for more in ([], [], ["--limit", 2]):
        assert run(folder, pairs, out, *CUE, *ONE, *more).read_bytes() == whole


def test_killed_and_parallel_runs_end_in_the_same_bytes(folder, tmp_path):
    rows = [pair | {"source": f"{n}. {pair['source']}"} for n in range(10) for pair in PAIRS]
    few, many = write_jsonl(tmp_path / "few.jsonl", rows[:11]), write_jsonl(tmp_path / "many.jsonl", rows)

    def start(given, out, *launcher):
        command = [sys.executable, *launcher, SCRIPT, *arguments(folder, given, out, *ONE)]
        return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})  # as here: sums in the same order

    two, out = tmp_path / "two.jsonl", tmp_path / "killed.jsonl"
    parallel = start(few, two, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process = start(many, out)
    while process.poll() is None and not (out.exists() and b"\n" in out.read_bytes()):
        time.sleep(0.01)
    process.kill()
    _, before = process.wait(), out.read_bytes()
    assert 1 <= before.count(b"\n") < len(rows)
    whole = run(folder, many, tmp_path / "whole.jsonl", *ONE).read_bytes()
    assert whole.startswith(before) and run(folder, many, out, *ONE).read_bytes() == whole
    assert parallel.wait(100) == 0
    assert two.read_bytes().splitlines() == whole.splitlines()[:11]
    assert sorted(file.name for file in tmp_path.glob("two*")) == ["two.jsonl", "two.meta.json"]


@pytest.mark.parametrize("name", [*SETTINGS, "model_hash", "source", "reference", "id"])
def test_other_settings_or_pairs_are_refused_by_name_and_change_nothing(folder, mute, pairs, tmp_path, name):
    out, change = run(folder, pairs, tmp_path / "l.jsonl", "--limit", 4), {}
    if name in ("source", "reference", "id"):  # id 1 stands a line above already
        change, name = {name: 1 if name == "id" else "Other."}, f"pairs.jsonl:3: .*{name}"
    write_jsonl(pairs, [*PAIRS[:2], PAIRS[2] | change, *PAIRS[3:]])
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=name):
        run(mute if name == "model_hash" else folder, pairs, out, *SETTINGS.get(name, ()))
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("ends", ["in time", "at once"])
@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("task", ["rationale", "translation", "paraphrase", "answer"])
def test_rows_of_every_task_can_be_read_again(folder, mute, tmp_path, task, ends, temperature):
    chosen, given = folder if ends == "in time" else mute, ASKED if task == "answer" else PAIRS
    file, more = write_jsonl(tmp_path / "given.jsonl", given), ["--task", task, "--temperature", temperature]
    out, tokenizer = run(chosen, file, tmp_path / "l.jsonl", *more, "--max-new-tokens", 30), Tokenizer(chosen)
    for row, written, pair in zip(read_rows([str(out)]), read_jsonl(out), given, strict=True):
        assert row["id"] == pair.get("question_id", given.index(pair))
        assert row["reference"] == written.get("reference", written.get("response"))
        assert tokenizer.decode(written["reference_ids"]) == row["reference"]
        if task == "answer":
            assert written["prompt"] == pair.get("prompt", pair.get("turns", [None])[0])
        else:
            assert row["source"] == pair["source"] and (task != "translation" or "\n" not in row["reference"])
            assert ends == "in time" or row["reference"] == pair["reference"]  # nothing is no translation


@pytest.mark.parametrize("status, text", [(status, text) for status, texts in JUDGED.items() for text in texts])
def test_judge_names_the_fault(status, text):
    given = ["Die kleine Eule schläft am Tag in der alten Scheune.", "The small owl sleeps by day in the old barn."]
    assert judge(text, given) == status
    assert judge(text, [*given, "это", "这"]) == ("ok" if status == "wrong_script" else status)


@pytest.mark.parametrize("more, message", MISTAKES.values(), ids=MISTAKES)
def test_mistake_ends_with_one_line_and_leaves_nothing(folder, pairs, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.setattr(sys, "argv", ["generate.py", *arguments(folder, pairs, tmp_path / "l.jsonl", *more)])
    with pytest.raises(SystemExit) as ended:
        data.cli(main, parser())
    lines = [line for line in capsys.readouterr().err.split("\n") if line and not line.startswith("\r")]
    assert ended.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert list(tmp_path.iterdir()) == [pairs]


@pytest.mark.parametrize("task, row, change", [
    ("answer", {"prompt": "What grows in the garden?"}, {"prompt": "What grows in the wood?"}),
    ("rationale", {"prompt": "Name a colour.", "response": "Green."}, {"response": "Blue."}),
    ("rationale", PAIRS[0], {"target_lang": "fr"}), ("translation", PAIRS[0], {"reference": "The boat waits."}),
])  # fmt: skip
def test_a_ledger_does_not_go_on_with_other_data(folder, tmp_path, task, row, change):
    out = run(folder, write_jsonl(tmp_path / "a.jsonl", [row]), tmp_path / "l.jsonl", "--task", task)
    before = out.read_bytes()
    with pytest.raises(ValueError, match=rf"b\.jsonl:1: another {next(iter(change)).replace('response', 'reference')}"):
        run(folder, write_jsonl(tmp_path / "b.jsonl", [row | change]), out, "--task", task)
    assert out.read_bytes() == before


def test_a_last_row_edited_by_hand_stays_though_the_editor_ate_its_line_break(folder, pairs, tmp_path):
    out = run(folder, pairs, tmp_path / "l.jsonl")
    lines = out.read_text("utf-8").splitlines()
    lines[-1] = json.dumps(json.loads(lines[-1]) | {"rationale": "As I see it."})
    out.write_text("\n".join(lines), "utf-8")
    run(folder, pairs, out)
    assert out.read_text("utf-8") == "\n".join(lines) + "\n"


@pytest.mark.parametrize("temperature, top_p", [(0, 1.0), (1.0, 1.0), (1.0, 0.5)])
def test_an_id_that_the_tokenizer_does_not_know_is_never_chosen(temperature, top_p):
    logits = torch.zeros(64, 10)
    logits[:, 7:] = 9.0
    tokens, logprobs = choose(logits, torch.rand(64, dtype=torch.float64), temperature, top_p, limit=7)
    assert tokens.max() < 7 and torch.allclose(logprobs, logits.log_softmax(-1)[:, 0])


def test_an_answer_of_blank_lines_can_be_read_again(tmp_path):
    meta = {"task": "answer", "template": data.TEMPLATE, "system": None, "chat": "chatml", "tokenizer_hash": "x"}
    (tmp_path / "l.meta.json").write_text(json.dumps(meta))
    row = dict(
        id=0, prompt="Why?", response="\n\n", rationale="", reference_ids=[5, 5], rationale_ids=[], status="empty"
    )
    rows = read_rows([write_jsonl(tmp_path / "l.jsonl", [row | {"finish": "eos"}])])
    assert rows[0]["reference"] == "\n\n"


def test_two_steps_draw_what_one_sum_over_the_whole_vocabulary_would():
    logits, u = 3 * torch.randn(64, 5000, generator=torch.Generator().manual_seed(1)), torch.rand(64).double()
    tokens, mass = choose(logits, u, 1.0, 1.0)[0], logits.double().softmax(-1).cumsum(-1)
    below = torch.cat([torch.zeros(64, 1), mass], -1).gather(-1, tokens[:, None])[:, 0]
    above = mass.gather(-1, tokens[:, None])[:, 0]
    assert ((below - 1e-6 <= u) & (u <= above + 1e-6)).all()  # float32 probabilities


def test_what_prompts_begin_with_is_read_once_and_changes_nothing(folder):
    model, prompts = Transformer.from_pretrained(folder), [[1, *range(50, 90), n, n + 1] for n in range(100, 110)]
    read = []
    model.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].shape))
    together = [(ids, scores) for _, ids, scores, _ in sorted(sample(model, prompts, 8, 1.0, scored=[1] * 10))]
    assert read[0] == (1, 41) and max(T for _, T in read[1:]) == 2
    for n, prompt in enumerate(prompts):
        ((_, ids, scores, _),) = sample(model, [prompt], 8, 1.0, keys=[n], scored=[1])
        assert ids == together[n][0]
        torch.testing.assert_close(scores, together[n][1], atol=1e-4, rtol=0)  # float32 sums of other shapes


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_work_done_is_counted(folder, batch_size):
    spent, prompts = Counter(), [[1, 40 + n, 50] for n in range(20)]
    outputs = list(sample(Transformer.from_pretrained(folder), prompts, 5, 1.0, batch_size=batch_size, spent=spent))
    assert (
        spent["prefill tokens"] == 20 * 2 and spent["decode tokens"] == sum(len(ids) for _, ids, _, _ in outputs) - 20
    )
    assert min(spent["prefill seconds"], spent["decode seconds"]) > 0


@pytest.mark.parametrize("earlier", [True, False])
def test_a_ledger_does_not_go_on_with_another_conversation(folder, tmp_path, earlier):
    said = [dict(role=("user", "assistant")[n % 2], content=text) for n, text in enumerate(LINES[:4])]
    out = run(folder, write_jsonl(tmp_path / "a.jsonl", [dict(messages=said)]), tmp_path / "l.jsonl")
    said[0 if earlier else 3]["content"], before = "Other.", out.read_bytes()
    with pytest.raises(ValueError, match=r"b\.jsonl:1: another " + ("messages" if earlier else "reference")):
        run(folder, write_jsonl(tmp_path / "b.jsonl", [dict(messages=said)]), out)
    assert out.read_bytes() == before


@pytest.mark.parametrize("task", ["rationale", "translation", "paraphrase", "answer"])
def test_report_tells_what_a_ledger_holds(folder, tmp_path, capsys, task):
    given = write_jsonl(tmp_path / "given.jsonl", ASKED if task == "answer" else PAIRS)
    out = run(folder, given, tmp_path / "l.jsonl", "--task", task)
    assert "of what the matrix products alone would allow" in capsys.readouterr().out
    rows = read_jsonl(out)
    main(parser().parse_args(["--report", str(out), "--json"]))
    found = json.loads(capsys.readouterr().out)
    for name in ("status", "finish"):
        assert found[name] == {v: round(n / len(rows), 4) for v, n in Counter(row[name] for row in rows).items()}
    lengths = [len(row["rationale_ids"]) for row in rows]
    assert found["rationale tokens"]["mean"] == round(np.mean(lengths), 1) and found["rows"] == len(rows)
    assert [row["id"] for row in found["examples"]] == [row["id"] for row in rows]
    main(parser().parse_args(["--report", str(out)]))
    shown = capsys.readouterr().out
    assert "status  " in shown and all(row.get("source", "") in shown for row in rows)


def test_report_of_what_is_no_ledger_is_a_mistake(folder, pairs, tmp_path):
    out = run(folder, pairs, tmp_path / "l.jsonl")
    (tmp_path / "torn.jsonl").write_bytes(out.read_bytes()[:-9])
    for file, line in [(pairs, 1), (tmp_path / "torn.jsonl", 7), (tmp_path / "absent.jsonl", "")]:
        with pytest.raises(ValueError, match=rf"{file.name}:{line}"):
            main(parser().parse_args(["--report", str(file)]))
    with pytest.raises(ValueError, match="--model, --data and --out, or --report"):
        main(parser().parse_args([]))


def test_benchmark_runs_on_a_tiny_model():
    pytest.importorskip("transformers")
    script = Path(SCRIPT).parent / "benchmarks" / "generate.py"
    printed = subprocess.run([sys.executable, script, "--smoke"], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert "ratio" in printed and "while decoding" in printed
