"""A row depends on the seed and its id alone, follows the distribution, and survives any stop."""

import json
import math
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import (
    LINES,
    ODD,
    PAIRS,
    error_of,
    last_line,
    odd_row,
    read_jsonl,
    write_config,
    write_jsonl,
    write_model,
    write_tokenizer,
)
from safetensors.torch import load_file, save_file

import data
import generate as script
from data import Encoder, Tokenizer, read_rows
from generate import Sampling, Sequence, choose, generate, main, parser, sample, status_of
from model import ModelConfig, Transformer

SCRIPT = str(Path(script.__file__))
TEMPLATE = "Put this from {source_lang} into {target_lang}: {source}"
CUE = ["--cue", "\\n"]
ONE = ["--batch-size", 1]  # what is computed alone is computed the same, to the last bit
ASKED = [
    {"prompt": "What grows in the garden?"},
    {"question_id": 81, "turns": ["Name a colour.", "And another."]},
]


def arguments(folder, pairs, out, *more) -> list:
    given = ["--model", folder, "--data", pairs, "--out", out]
    fixed = ["--max-new-tokens", 12, "--template", TEMPLATE, "--dtype", "float32"]
    return [str(word) for word in [*given, *fixed, *more]]


def run(folder, pairs, out, *more) -> Path:
    main(parser().parse_args(arguments(folder, pairs, out, *more)))
    return out


def contents(folder: Path) -> dict:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


class Killed(BaseException):
    pass


def interrupt(after: int, monkeypatch, *words):
    """A run that ends when so many rows are written."""
    finished = []
    ledger_row = script.ledger_row

    def dying(*args):
        if len(finished) == after:
            raise Killed
        finished.append(1)
        return ledger_row(*args)

    with monkeypatch.context() as patch:
        patch.setattr(script, "ledger_row", dying)
        with pytest.raises(Killed):
            run(*words)


def with_ends(folder: Path, model: Path, ends: list) -> Path:
    """A model of other weights, for which these ids end a text."""
    write_model(folder, seed=1)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).write_bytes((model / name).read_bytes())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


@pytest.fixture(scope="module")
def mute(folder, tmp_path_factory) -> Path:
    """Every token ends the text."""
    return with_ends(tmp_path_factory.mktemp("mute"), folder, [*range(480)])


@pytest.fixture(scope="module")
def terse(folder, tmp_path_factory) -> Path:
    """Every twentieth token ends the text."""
    return with_ends(tmp_path_factory.mktemp("terse"), folder, [*range(0, 480, 20)])


@pytest.fixture(scope="module")
def wanted(folder, tmp_path_factory) -> bytes:
    """The ledger of the seven pairs, from an undisturbed run."""
    place = tmp_path_factory.mktemp("wanted")
    file = write_jsonl(place / "pairs.jsonl", PAIRS)
    return run(folder, file, place / "l.jsonl", *CUE, *ONE).read_bytes()


# 1. Sampling


@torch.no_grad()
def constant_model(folder: Path, logits: torch.Tensor) -> Transformer:
    """A model that gives these logits after any tokens."""
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    model = Transformer.from_pretrained(
        write_model(folder, vocab_size=len(logits), **small, **heads)
    )
    for p in model.parameters():
        p.zero_()
    model.get_parameter("model.embed_tokens.weight").fill_(1)
    model.get_parameter("model.norm.weight").fill_(1)
    model.get_parameter("lm_head.weight")[:, 0] = logits
    return model


def fits(counts: list, probs: list) -> bool:
    """Pearson's chi-square, by Wilson and Hilferty's approximation at four standard deviations."""
    n = sum(counts)
    cells = []
    rest = [0, 0]  # what is expected less than five times, together
    for count, p in zip(counts, probs, strict=True):
        if p * n >= 5:
            cells.append((count, p * n))
        else:
            rest[0] += count
            rest[1] += p * n
    if rest[1] >= 5:
        cells.append(rest)
    else:
        assert rest[0] <= 20
    chi_square = sum((count - wanted) ** 2 / wanted for count, wanted in cells)
    freedom = max(len(cells) - 1, 1)
    spread = 2 / (9 * freedom)
    return chi_square <= freedom * (1 - spread + 4 * math.sqrt(spread)) ** 3


def nucleus(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """The distribution, in float64, by its definition."""
    probs = (logits.double() / temperature).softmax(-1)
    most, order = probs.sort(descending=True)
    outside = most.cumsum(-1) - most >= top_p
    probs[order[outside]] = 0
    return probs / probs.sum()


SAMPLINGS = [(1, 1), (0.5, 1), (1, 0.9), (0.7, 0.5), (2, 0.999), (1, 1e-6)]


@pytest.mark.parametrize("temperature, top_p", SAMPLINGS)
@pytest.mark.parametrize("size", [12, 600])
def test_tokens_follow_the_nucleus_of_the_softmax(tmp_path, size, temperature, top_p):
    logits = 2 * torch.randn(size, generator=torch.Generator().manual_seed(size))
    model = constant_model(tmp_path, logits)
    how = {"max_new_tokens": 50, "temperature": temperature, "top_p": top_p}
    rows = generate(model, [[1]] * 200, batch_size=200, **how)
    counts = Counter()
    for row in rows:
        counts.update(row)
    probs = nucleus(logits, temperature, top_p).tolist()
    assert sum(counts.values()) == 10_000
    assert all(probs[token] > 0 for token in counts)
    assert fits([counts[token] for token in range(size)], probs)


def test_draws_are_independent_over_places_rows_and_seeds(tmp_path):
    model = constant_model(tmp_path, torch.zeros(8))
    how = {"max_new_tokens": 100, "temperature": 1.0, "batch_size": 200}
    drawn = torch.tensor(generate(model, [[1]] * 200, **how))  # [rows, places]
    other = torch.tensor(generate(model, [[1]] * 200, seed=1, **how))
    couples = {
        "places": (drawn[:, ::2], drawn[:, 1::2]),
        "rows": (drawn[::2], drawn[1::2]),
        "row and place": (drawn[:-1, 1:], drawn[1:, :-1]),
        "seeds": (drawn, other),
    }
    for name, (a, b) in couples.items():
        table = torch.bincount((8 * a + b).flatten(), minlength=64)
        assert fits(table.tolist(), [1 / 64] * 64), name


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4], [0, 1, 2, 600, 1199]], ids=str)
def test_noise_is_independent_over_tokens(ids):
    n = 6000
    logits = torch.full((n, ids[-1] + 1), -torch.inf)
    logits[:, ids] = 0
    keys = torch.arange(n)
    order = []
    for _ in range(4):  # the one that comes first is taken out, and so on
        tokens = choose(logits, keys, Sampling(temperature=1.0))[0].long()
        logits[keys, tokens] = -torch.inf
        order.append(tokens.tolist())
    orders = Counter(zip(*order))
    assert set(order[0]) == set(ids)
    assert len(orders) == 120
    assert fits([*orders.values()], [1 / 120] * 120)


def test_a_rare_token_comes_as_rarely_as_it_should():
    logits = torch.tensor([0.999, 0.001]).log().expand(200_000, 2)
    tokens = choose(logits, torch.arange(200_000), Sampling(temperature=1.0))[0]
    assert abs(tokens.sum() - 200) < 60  # four standard deviations


def test_greedy_is_the_most_probable_token_and_every_score_is_the_models_own():
    logits = 3 * torch.randn(64, 500, generator=torch.Generator().manual_seed(0))
    keys = torch.arange(64)
    tokens, _ = choose(logits, keys, Sampling())
    assert tokens.equal(logits.argmax(-1).double())
    for how in (Sampling(), Sampling(temperature=0.5, top_p=0.7), Sampling(temperature=2.0)):
        tokens, scores = choose(logits, keys, how)
        wanted = logits.double().log_softmax(-1).gather(-1, tokens.long()[:, None])[:, 0]
        torch.testing.assert_close(scores, wanted, atol=1e-5, rtol=0)  # float32


EDGES = {
    # temperature, top_p -> the tokens that may come
    (0, 1.0): {2},
    (1.0, 0.0): {2},
    (1.0, 1e-6): {2},
    (1.0, 0.6): {2},
    (1.0, 0.8): {2, 3},
    (1.0, 0.95): {1, 2, 3, 5},  # token 5 ties with token 1
    (1.0, 1.0): {1, 2, 3, 5},
    (1e-30, 1.0): {2},
    (1e-46, 1.0): {2},  # zero in float32
    (1e30, 1.0): {1, 2, 3, 4, 5},
}


@pytest.mark.parametrize("temperature, top_p", EDGES)
def test_only_tokens_of_the_nucleus_come_and_each_of_them_does(temperature, top_p):
    logits = torch.tensor([[-torch.inf, 1.0, 3.0, 2.0, -200.0, 1.0]]).expand(5000, -1)
    how = Sampling(temperature=temperature, top_p=top_p)
    tokens = choose(logits, torch.arange(5000), how)[0]
    assert set(tokens.tolist()) == EDGES[temperature, top_p]


def test_tied_logits_are_chosen_alike_beside_any_other_row():
    # bfloat16 logits tie often; a flat neighbour has a wide nucleus
    generator = torch.Generator().manual_seed(0)
    peaked = (4 * torch.randn(1000, generator=generator)).round().expand(50, -1)
    flat = torch.zeros(1, 1000)
    keys = torch.arange(51)
    how = Sampling(temperature=1.0, top_p=0.9)
    together = choose(torch.cat([peaked, flat]), keys, how)
    assert together[:, :50].equal(choose(peaked, keys[:50], how))


@pytest.mark.parametrize("temperature, top_p", [(0, 1.0), (1.0, 1.0), (1.0, 0.5)])
def test_an_id_that_the_tokenizer_does_not_know_is_never_chosen(temperature, top_p):
    logits = torch.zeros(64, 10)
    logits[:, 7:] = 9.0
    how = Sampling(temperature=temperature, top_p=top_p, vocab_size=7)
    tokens, scores = choose(logits, torch.arange(64), how)
    assert tokens.max() < 7
    wanted = logits.log_softmax(-1)[:, 0].double()
    torch.testing.assert_close(scores, wanted, atol=1e-5, rtol=0)  # float32


PROMPTS = [[1, 40 + n, *range(100, 100 + 3 * n)] for n in (0, 1, 0, 3, 4)]  # two are the same
HOWS = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 3},
    "nucleus": {"temperature": 0.7, "top_p": 0.8},
}


@pytest.mark.parametrize("name", HOWS)
def test_a_row_depends_on_seed_and_place_but_not_on_batch_size_or_other_rows(folder, name):
    model = Transformer.from_pretrained(folder)
    how = {"max_new_tokens": 12, "eos_ids": [2]} | HOWS[name]
    wanted = generate(model, PROMPTS, batch_size=1, **how)
    other = generate(model, PROMPTS, batch_size=1, **(how | {"seed": 9}))
    assert (wanted == other) == (name == "greedy")
    assert (wanted[0] == wanted[2]) == (name == "greedy")
    for batch_size in (2, 3, 32):
        assert generate(model, PROMPTS, batch_size=batch_size, **how) == wanted
    assert generate(model, PROMPTS[:2], **how) == wanted[:2]


def test_what_prompts_begin_with_is_read_once_and_changes_nothing(folder):
    model = Transformer.from_pretrained(folder)
    prompts = [[1, *range(50, 90), n, n + 1] for n in range(100, 110)]
    how = Sampling(max_new_tokens=8, temperature=1.0)
    read = []
    model.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].shape))
    together = [Sequence(n, prompt) for n, prompt in enumerate(prompts)]
    for _ in sample(model, together, how):
        pass
    assert read[0] == (1, 41 + 2 * len(prompts))
    for n, prompt in enumerate(prompts):
        [alone] = sample(model, [Sequence(n, prompt)], how)
        assert alone.ids == together[n].ids
        # float32 sums of other shapes
        assert alone.logprobs == pytest.approx(together[n].logprobs, abs=1e-4)


BAD_PROMPTS = {
    "empty": [],
    "too long": [5] * 505,
    "an id beyond the vocabulary": [5, 480],
    "a negative id": [5, -1],
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_a_prompt_that_the_model_cannot_read_is_refused_by_its_place(folder, name):
    model = Transformer.from_pretrained(folder)
    with pytest.raises(ValueError, match="row 1: "):
        generate(model, [[5], BAD_PROMPTS[name]], max_new_tokens=8)
    sequences = [Sequence("x", BAD_PROMPTS[name], "a.jsonl:7")]
    with pytest.raises(ValueError, match="a.jsonl:7: "):
        list(sample(model, sequences, Sampling(max_new_tokens=8)))


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_told_by_the_row(tmp_path, bad, temperature):
    model = constant_model(tmp_path, torch.full((8,), bad))
    sequences = [Sequence("x", [5])]
    with pytest.raises(FloatingPointError, match="row x: "):
        list(sample(model, sequences, Sampling(temperature=temperature)))


@pytest.mark.parametrize("how", [{"max_new_tokens": 0}, {"batch_size": 0}], ids=str)
def test_no_tokens_or_no_rows_at_a_time_are_refused(folder, how):
    with pytest.raises(ValueError, match=next(iter(how))):
        generate(Transformer.from_pretrained(folder), [[5]], **how)


# 2. Rows

JUDGED = {
    "empty": ["", " \n\t "],
    "repetitive": ["and so on and on " * 8, "这个词的意思是房子。" * 3],
    "copy": [
        "The small owl sleeps by day in the old barn.",
        "in the OLD  barn.",
        "barn.",
        'Translated: "The small owl sleeps by day in the old barn".',
    ],
    "wrong_script": ["Это слово значит дом.", "这个词的意思是房子"],
    "ok": [
        "...",
        "Here the word barn was chosen because a stable holds horses.",
        "Because. " * 6,
        "12 + 3 = 15",
        "Ja",
    ],
}


@pytest.mark.parametrize("status", JUDGED)
def test_a_status_names_the_fault(status):
    german = "Die kleine Eule schläft am Tag in der alten Scheune."
    given = [german, "The small owl sleeps by day in the old barn."]
    for text in JUDGED[status]:
        assert status_of(text, given) == status
        with_scripts = "ok" if status == "wrong_script" else status
        assert status_of(text, [*given, "это", "这"]) == with_scripts


@pytest.mark.parametrize("cue", ["", "\\n"], ids=["no cue", "cue"])
@pytest.mark.parametrize("temperature", [0, 1])
def test_ledger_rows_hold_what_the_interface_promises(terse, pairs, tmp_path, temperature, cue):
    options = ["--cue", cue, "--temperature", temperature, "--system", "Be brief."]
    rows = read_jsonl(run(terse, pairs, tmp_path / "l.jsonl", *options))
    t = Tokenizer(terse)
    model = Transformer.from_pretrained(terse)
    for n, (row, pair) in enumerate(zip(rows, PAIRS, strict=True)):
        assert row["id"] == n
        assert {name: row[name] for name in pair} == pair
        assert row["status"] in JUDGED
        forced = row["reference_ids"]
        rationale = row["rationale_ids"]
        assert t.decode(forced) == row["reference"]
        assert t.decode(forced + rationale) == row["reference"] + row["rationale"]
        own = len(cue) // 2  # the cue is one token
        assert rationale[:own] == t.encode("\n", within=True)[:own]
        assert set(t.eos_ids).isdisjoint(rationale)
        assert row["finish"] == ("length" if len(rationale) == 12 + own else "eos")
        sampled = rationale[own:]
        asked = f"Put this from German into English: {row['source']}"
        read = t.chat([{"role": "user", "content": asked}], "Be brief.") + forced + rationale[:own]
        logits = model(torch.tensor([read + sampled]))[0, len(read) - 1 :]
        scores = logits.log_softmax(-1)
        if temperature == 0:
            assert scores.argmax(-1).tolist()[: len(sampled)] == sampled
        of_text = scores[range(len(sampled)), sampled].tolist()
        # without the cue; with that EOS which was drawn, where one was; written with three digits
        candidates = [of_text]
        if row["finish"] == "eos":
            candidates = [[*of_text, scores[-1, eos].item()] for eos in t.eos_ids]
        means = [sum(candidate) / len(candidate) for candidate in candidates]
        assert min(abs(mean - row["logprob"]) for mean in means) < 1e-3
    assert {"eos", "length"} == {row["finish"] for row in rows}
    meta = json.loads((tmp_path / "l.meta.json").read_text("utf-8"))
    assert meta["tokenizer_hash"] == t.hash
    assert meta["template"] == TEMPLATE
    assert meta["cue"] == cue.replace("\\n", "\n")
    settings = "task system seed temperature top_p max_new_tokens dtype model_hash versions".split()
    assert set(settings) < set(meta)


@pytest.mark.parametrize("cue", ["", "\\n"], ids=["no cue", "cue"])
def test_a_rationale_without_a_word_is_empty_keeps_its_cue_and_scores_its_eos(
    mute, pairs, tmp_path, cue
):
    for row in read_jsonl(run(mute, pairs, tmp_path / "l.jsonl", "--cue", cue)):
        assert row["finish"] == "eos"
        assert row["status"] == "empty"
        assert row["rationale"] == cue.replace("\\n", "\n")
        assert len(row["rationale_ids"]) == len(cue) // 2
        assert row["logprob"] < 0


@pytest.mark.parametrize("ends", ["in time", "at once"])
@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("task", ["rationale", "translation", "paraphrase", "answer"])
def test_rows_of_every_task_can_be_read_again(terse, mute, tmp_path, task, ends, temperature):
    model = terse if ends == "in time" else mute
    given = ASKED if task == "answer" else PAIRS
    file = write_jsonl(tmp_path / "given.jsonl", given)
    options = ["--task", task, "--temperature", temperature, "--max-new-tokens", 30]
    out = run(model, file, tmp_path / "l.jsonl", *options)
    t = Tokenizer(model)
    for row, written, pair in zip(read_rows([out]), read_jsonl(out), given, strict=True):
        assert row["id"] == pair.get("question_id", given.index(pair))
        assert t.decode(written["reference_ids"]) == row["reference"]
        example = Encoder(t).example(row)
        assert example.reference[: len(written["reference_ids"])] == written["reference_ids"]
        if task == "answer":
            assert written["prompt"] == pair.get("prompt", pair.get("turns", [None])[0])
        else:
            assert row["source"] == pair["source"]
            assert task != "translation" or "\n" not in row["reference"]
            if ends == "at once":  # nothing is no translation
                assert row["reference"] == pair["reference"]


def test_an_answer_is_a_rationale_after_an_empty_reference(terse, tmp_path):
    file = write_jsonl(tmp_path / "given.jsonl", [{"prompt": line} for line in LINES])
    out = run(terse, file, tmp_path / "l.jsonl", "--task", "answer")
    t = Tokenizer(terse)
    finishes = set()
    for line, row, written in zip(LINES, read_rows([out]), read_jsonl(out), strict=True):
        assert written["response"] == ""
        assert written["reference_ids"] == []
        assert written["rationale"] == t.decode(written["rationale_ids"])
        end = [t.end_id] if written["finish"] == "eos" else []
        example = Encoder(t).example(row)
        assert example.prompt == t.chat([{"role": "user", "content": line}])
        assert example.reference == []
        assert example.rationale == written["rationale_ids"] + end
        finishes.add(written["finish"])
    assert finishes == {"eos", "length"}


def test_the_answer_to_a_conversation_comes_after_all_of_it(folder, tmp_path):
    talk = [{"role": role, "content": LINES[n]} for n, role in enumerate(["user", "assistant"])]
    talk = [{"role": "system", "content": "Be brief."}, *talk, {"role": "user", "content": "Why?"}]
    file = write_jsonl(tmp_path / "given.jsonl", [{"messages": talk, "id": "x"}])
    out = run(folder, file, tmp_path / "l.jsonl", "--task", "answer")
    [row] = read_rows([out])
    assert row["messages"] == talk
    t = Tokenizer(folder)
    assert Encoder(t).prompt(row) == t.chat(talk)


@pytest.mark.parametrize("task", ["rationale", "paraphrase", "answer"])
def test_a_conversation_may_have_a_source_of_its_own(folder, tmp_path, task):
    plain = {"prompt": "Why?", "response": "So."}
    own = [plain | {"source": "a textbook"}, plain | {"source": 7, "source_lang": "de"}]
    found = []
    for name, rows in (("plain", [plain] * 2), ("own", own)):
        file = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        written = read_jsonl(run(folder, file, tmp_path / f"{name}.out.jsonl", "--task", task))
        found.append([row | {"input_hash": ""} for row in written])
    assert found[0] == found[1]
    file = tmp_path / "own.jsonl"
    with pytest.raises(ValueError, match=f"{file}:1: "):
        run(folder, file, tmp_path / "l.jsonl", "--task", "translation")


@pytest.mark.parametrize("task", ["translation", "paraphrase"])
def test_a_fallback_keeps_the_original_and_has_no_log_probability(
    folder, mute, terse, tmp_path, task
):
    file = write_jsonl(tmp_path / "given.jsonl", PAIRS)
    faults = set()
    for name, model, more in [("mute", mute, 12), ("cut", folder, 1), ("terse", terse, 40)]:
        options = ["--task", task, "--max-new-tokens", more]
        rows = read_jsonl(run(model, file, tmp_path / f"{name}.jsonl", *options))
        for row, pair in zip(rows, PAIRS, strict=True):
            assert row["original"] == pair["reference"]
            assert row["rationale_ids"] == []
            assert (row["logprob"] is None) == (row["fallback"] is not None)
            assert (row["reference"] == pair["reference"]) == (row["fallback"] is not None)
            faults.add(row["fallback"])
    assert faults == {"empty", "cut", None}


# 3. The ledger appears whole, and a row is the same however it came about


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    rows = []
    for n in range(150):
        pair = PAIRS[n % len(PAIRS)]
        rows.append(pair | {"id": f"row {n}", "source": f"{n}. {pair['source']}"})
    return write_jsonl(tmp_path_factory.mktemp("many") / "many.jsonl", rows)


@pytest.fixture(scope="module")
def whole(folder, many) -> Path:
    return run(folder, many, many.parent / "whole.jsonl", *CUE, "--batch-size", 64)


def assert_same_rows(one: Path, other: Path):
    """All 150 of 150, all fields but the score."""
    for a, b in zip(read_jsonl(one), read_jsonl(other), strict=True):
        # float32 sums of other shapes, rounded to three digits
        assert a.pop("logprob") == pytest.approx(b.pop("logprob"), abs=1.1e-3)
        assert a == b


@pytest.mark.parametrize("batch_size", [1, 16])
def test_rows_are_the_same_at_every_batch_size(folder, many, whole, tmp_path, batch_size):
    out = run(folder, many, tmp_path / "l.jsonl", *CUE, "--batch-size", batch_size)
    assert_same_rows(out, whole)


def test_rows_do_not_depend_on_the_order_of_the_data(folder, many, whole, tmp_path):
    rows = read_jsonl(many)[::-1]
    out = run(folder, write_jsonl(tmp_path / "back.jsonl", rows), tmp_path / "l.jsonl", *CUE)
    found = read_jsonl(out)
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert_same_rows(write_jsonl(tmp_path / "turned.jsonl", found[::-1]), whole)


DRIVER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import generate
for words in json.loads(sys.argv[2]):
    generate.main(generate.parser().parse_args(words))
"""


def on_two_ranks(*jobs):
    """The runs, one after the other, each on two processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = os.environ | {name: str(value) for name, value in place.items()}
        root = str(Path(SCRIPT).parent)
        command = [sys.executable, "-c", DRIVER, root, json.dumps(jobs)]
        started.append(subprocess.Popen(command, env=variables))
    try:
        assert [process.wait(120) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()


def test_rows_are_the_same_on_two_ranks_and_from_part_files_of_any_number(
    folder, many, whole, tmp_path, monkeypatch
):
    left = tmp_path / "left.jsonl"
    interrupt(40, monkeypatch, folder, many, left, *CUE)
    [part] = tmp_path.glob("left.jsonl.*.rank0")
    lines = part.read_bytes().splitlines(keepends=True)
    for rank in (0, 1, 3):  # as if three ranks had been killed, each within a line
        torn = b"".join(lines[rank::4])[:-9]
        part.with_name(part.name.removesuffix("0") + str(rank)).write_bytes(torn)
    fresh = tmp_path / "fresh.jsonl"
    on_two_ranks(*[arguments(folder, many, out, *CUE) for out in (fresh, left)])
    for out in (fresh, left):
        assert_same_rows(out, whole)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"fresh.jsonl", "fresh.meta.json", "left.jsonl", "left.meta.json"}


def test_the_ledger_appears_when_all_rows_are_there(folder, pairs, tmp_path, monkeypatch):
    out = tmp_path / "l.jsonl"
    seen = []
    ledger_row = script.ledger_row

    def looking(*args):
        seen.append({file.name for file in tmp_path.glob("l.*")})
        return ledger_row(*args)

    monkeypatch.setattr(script, "ledger_row", looking)
    run(folder, pairs, out, *CUE, *ONE)
    assert len(seen) == len(PAIRS)
    for names in seen:
        assert not names & {"l.jsonl", "l.meta.json"}
        assert [name for name in names if name.endswith("rank0")]
    assert {file.name for file in tmp_path.glob("l.*")} == {"l.jsonl", "l.meta.json"}


@pytest.mark.parametrize("cut", [0, 1, 40], ids=["whole", "line end torn", "torn"])
@pytest.mark.parametrize("after", [0, 1, 6])
def test_a_run_that_was_stopped_ends_in_the_same_bytes(
    folder, pairs, wanted, tmp_path, monkeypatch, after, cut
):
    words = [folder, pairs, tmp_path / "a" / "l.jsonl", *CUE, *ONE]
    interrupt(after, monkeypatch, *words)
    [part] = (tmp_path / "a").iterdir()
    content = part.read_bytes()
    part.write_bytes(content[: max(len(content) - cut, 0)])
    for _ in range(2):  # the second time there is nothing to do
        out = run(*words)
        assert out.read_bytes() == wanted
        assert set(contents(out.parent)) == {"l.jsonl", "l.meta.json"}


def test_a_larger_limit_extends_a_ledger_and_keeps_rows_edited_by_hand(
    folder, pairs, wanted, tmp_path
):
    out = run(folder, pairs, tmp_path / "l.jsonl", *CUE, *ONE, "--limit", 3)
    assert out.read_bytes() == b"".join(wanted.splitlines(keepends=True)[:3])
    run(folder, pairs, out, *CUE, *ONE, "--limit", 5)
    rows = read_jsonl(out)
    assert len(rows) == 5
    rows[4]["rationale"] = "As I see it."
    text = write_jsonl(out, rows).read_text("utf-8")
    out.write_text(text.removesuffix("\n"), "utf-8")  # the editor ate the line break
    run(folder, pairs, out, *CUE, *ONE)
    assert len(read_jsonl(out)) == len(PAIRS)
    assert out.read_text("utf-8").startswith(text)
    assert out.read_bytes().splitlines()[5:] == wanted.splitlines()[5:]


# 4. What is refused, and what is left alone

SETTINGS = {
    "seed": ["--seed", 5],
    "temperature": ["--temperature", 0],
    "top_p": ["--top-p", 0.5],
    "dtype": ["--dtype", "bfloat16"],
    "template": ["--template", "{source}"],
    "system": ["--system", "Be brief."],
    "cue": ["--cue", "Note:"],
    "max_new_tokens": ["--max-new-tokens", 11],
    "chat": ["--chat", "plain"],
    "task": ["--task", "paraphrase"],
}


@pytest.mark.parametrize("name", [*SETTINGS, "model_hash"])
def test_a_ledger_of_other_settings_is_refused_by_name_and_stays(
    folder, mute, pairs, tmp_path, monkeypatch, capsys, name
):
    out = run(folder, pairs, tmp_path / "l.jsonl", "--limit", 4)
    before = contents(tmp_path)
    model = mute if name == "model_hash" else folder
    words = arguments(model, pairs, out, *SETTINGS.get(name, []))
    assert f" {name} " in error_of(script, words, monkeypatch, capsys)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", [*SETTINGS, "model_hash"])
def test_part_files_of_other_settings_are_not_read_nor_removed(
    folder, mute, pairs, tmp_path, monkeypatch, name
):
    out = tmp_path / "l.jsonl"
    interrupt(4, monkeypatch, folder, pairs, out)
    before = contents(tmp_path)
    model = mute if name == "model_hash" else folder
    run(model, pairs, out, *SETTINGS.get(name, []))
    fresh = run(model, pairs, tmp_path / "fresh.jsonl", *SETTINGS.get(name, []))
    assert out.read_bytes() == fresh.read_bytes()
    after = contents(tmp_path)
    assert {file: after[file] for file in before} == before


def test_a_backup_of_a_part_file_is_neither_read_nor_removed(
    folder, pairs, wanted, tmp_path, monkeypatch
):
    out = tmp_path / "l.jsonl"
    interrupt(4, monkeypatch, folder, pairs, out, *CUE, *ONE)
    [part] = tmp_path.glob("l.jsonl.*.rank0")
    content = part.read_bytes().replace(b'"rationale": "', b'"rationale": "Spoilt ')
    part.unlink()
    backups = [f"{part.name}.bak", f"{part.name}x", f"x{part.name}", "l.jsonl.rank0", "l.jsonl.bak"]
    for name in backups:
        (tmp_path / name).write_bytes(content)
    assert run(folder, pairs, out, *CUE, *ONE).read_bytes() == wanted
    for name in backups:
        assert (tmp_path / name).read_bytes() == content


CHANGES = {
    "source": {"source": "Das Tor."},
    "reference": {"reference": "The gate."},
    "language": {"target_lang": "fr"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_row_that_was_changed_since_is_refused_by_place(
    folder, pairs, tmp_path, monkeypatch, capsys, name
):
    out = run(folder, pairs, tmp_path / "l.jsonl", "--limit", 4)
    write_jsonl(pairs, [*PAIRS[:2], PAIRS[2] | CHANGES[name], *PAIRS[3:]])
    before = contents(tmp_path)
    line = error_of(script, arguments(folder, pairs, out), monkeypatch, capsys)
    assert line.startswith(f"error: {out}:3: ")
    assert contents(tmp_path) == before


OTHER_DATA = {
    "prompt": ("answer", {"prompt": "What grows here?"}, {"prompt": "What grows there?"}),
    "response": ("rationale", {"prompt": "Why?", "response": "So."}, {"response": "Thus."}),
    "reference": ("translation", PAIRS[0], {"reference": "The boat."}),
}


@pytest.mark.parametrize("name", OTHER_DATA)
def test_a_ledger_does_not_go_on_with_another_row_of_the_same_id(folder, tmp_path, name):
    task, row, change = OTHER_DATA[name]
    file = write_jsonl(tmp_path / "a.jsonl", [row])
    out = run(folder, file, tmp_path / "l.jsonl", "--task", task)
    before = contents(tmp_path)
    for other in (row | change, row | {"id": "another"}):
        write_jsonl(file, [other])
        with pytest.raises(ValueError, match=f"^{out}:1: "):
            run(folder, file, out, "--task", task)
    write_jsonl(file, [row])
    assert contents(tmp_path) == before


def test_part_files_do_not_give_a_row_that_was_changed_since(folder, pairs, tmp_path, monkeypatch):
    out = tmp_path / "l.jsonl"
    interrupt(5, monkeypatch, folder, pairs, out, *ONE)
    rows = [pair | {"reference": "The gate."} for pair in PAIRS]
    run(folder, write_jsonl(pairs, rows), out, *ONE)
    assert out.read_bytes() == run(folder, pairs, tmp_path / "fresh.jsonl", *ONE).read_bytes()


@pytest.mark.parametrize("files", [1, 2])
def test_an_id_that_stands_twice_is_refused_by_place(folder, tmp_path, monkeypatch, capsys, files):
    named = [pair | {"id": "x"} for pair in PAIRS[:2]]
    given = [write_jsonl(tmp_path / f"{n}.jsonl", named[n::files]) for n in range(files)]
    words = arguments(folder, given[0], tmp_path / "l.jsonl", "--data", *given)
    line = error_of(script, words, monkeypatch, capsys)
    assert line.startswith(f"error: {given[-1]}:{3 - files}: ")
    assert "twice" in line
    assert sorted(tmp_path.iterdir()) == given


ODD_LINES = [
    *("5", "[]", "{}", "null", '"x"', '{"id": 0}', '{"input_hash": null, "id": 77}'),
    *('{"input_hash": "x", "id": []}', '{"input_hash": [], "id": 0}', "[" * 99_999, "9" * 5000),
    *("\0" * 50, '{"id": 0, "input_hash": "x"', "\udcff"),
]


def test_odd_lines_in_a_part_file_do_no_harm(folder, pairs, wanted, tmp_path, monkeypatch):
    out = tmp_path / "l.jsonl"
    interrupt(4, monkeypatch, folder, pairs, out, *CUE, *ONE)
    [part] = tmp_path.glob("l.jsonl.*.rank0")
    odd = "\n".join(ODD_LINES) + "\n"
    part.write_bytes(part.read_bytes() + odd.encode("utf-8", "surrogateescape"))
    assert run(folder, pairs, out, *CUE, *ONE).read_bytes() == wanted


@pytest.mark.parametrize("odd", ODD)
def test_odd_settings_beside_a_ledger_are_one_line(
    folder, pairs, tmp_path, monkeypatch, capsys, odd
):
    out = run(folder, pairs, tmp_path / "l.jsonl", "--limit", 1, "--max-new-tokens", 2)
    meta = tmp_path / "l.meta.json"
    meta.write_text(ODD[odd])
    before = contents(tmp_path)
    line = error_of(script, arguments(folder, pairs, out), monkeypatch, capsys)
    assert line.startswith(f"error: {meta}")
    assert contents(tmp_path) == before


MISTAKES = {
    "no model": (["--model", "absent"], "absent"),
    "no data": (["--data", "absent.jsonl"], "absent.jsonl"),
    "temperature": (["--temperature", "-1"], "--temperature"),
    "no number": (["--temperature", "nan"], "--temperature"),
    "an endless number": (["--temperature", "1e400"], "--temperature"),
    "no tokens": (["--max-new-tokens", 0], "--max-new-tokens"),
    "half a row": (["--batch-size", 1.5], "--batch-size"),
    "no rows": (["--limit", 0], "--limit"),
    "no out": (["--out", ""], "--out"),
    "top_p": (["--top-p", "1.5"], "--top-p"),
    "seed": (["--seed", 2**64], "--seed"),
    "template": (["--template", "{text}"], "--template"),
    "direction": (["--direction", "en"], "--direction"),
    "context": (["--max-new-tokens", "500"], "pairs.jsonl:1: "),
    "cue": (["--task", "answer", "--cue", "So"], "--cue"),
    "out": (["--out", "/dev/null/l.jsonl"], "/dev/null"),
    "flag": (["--tempreature", "1"], "--tempreature"),
    "a cue that is no text": (["--cue", "\udcff"], ""),
    "a system prompt that is no text": (["--system", "\udcff"], ""),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_with_one_line_and_leaves_nothing(
    folder, pairs, tmp_path, monkeypatch, capsys, name
):
    more, message = MISTAKES[name]
    words = arguments(folder, pairs, tmp_path / "l.jsonl", *more)
    assert message in error_of(script, words, monkeypatch, capsys)
    assert list(tmp_path.iterdir()) == [pairs]


BROKEN_MODELS = {
    "NaN": (lambda t: t["model.norm.weight"].fill_(math.nan), "model.norm.weight"),
    "infinity": (lambda t: t["lm_head.weight"].fill_(math.inf), "lm_head.weight"),
    "weights too large": (lambda t: t["lm_head.weight"].fill_(3e38), "row "),
}


@pytest.mark.parametrize("name", BROKEN_MODELS)
def test_numbers_that_are_not_finite_are_told_by_name(
    folder, pairs, tmp_path, monkeypatch, capsys, name
):
    spoil, message = BROKEN_MODELS[name]
    broken = write_tokenizer(write_model(tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    spoil(tensors)
    save_file(tensors, broken / "model.safetensors")
    words = arguments(broken, pairs, tmp_path / "l.jsonl", *ONE)
    assert message in error_of(script, words, monkeypatch, capsys)
    assert not (tmp_path / "l.jsonl").exists()


@pytest.mark.parametrize("name", ["hidden_size", "rope_theta", "num_hidden_layers", "vocab_size"])
def test_a_config_without_sense_is_one_line_by_its_file(
    folder, pairs, tmp_path, monkeypatch, capsys, name
):
    broken = write_tokenizer(tmp_path / "broken")
    for value in (10**30, 10**400, -1, [], "x"):
        write_config(broken, **{name: value})
        words = arguments(broken, pairs, tmp_path / "l.jsonl")
        line = error_of(script, words, monkeypatch, capsys)
        assert line.startswith(f"error: {broken}/config.json: {name}")
    with pytest.raises(ValueError, match=name):
        ModelConfig.from_file(broken)


@pytest.mark.parametrize("task", ["rationale", "translation", "paraphrase", "answer"])
def test_an_odd_row_is_one_line_with_its_place_or_gives_a_ledger_that_can_be_read(
    folder, tmp_path, monkeypatch, capsys, task
):
    file = tmp_path / "odd.jsonl"
    for seed in range(25):
        file.write_text(f"{json.dumps(PAIRS[0])}\n{odd_row(1000 + seed)}\n")
        out = tmp_path / f"{seed}.jsonl"
        words = arguments(folder, file, out, "--task", task, "--max-new-tokens", 2)
        line = last_line(script, words, monkeypatch, capsys)
        if line:
            assert line.startswith(f"error: {file}:2: ")
            assert not out.exists()
        else:
            assert len(read_rows([out])) == 2


def test_a_second_process_with_the_same_out_is_told_so_and_the_first_goes_on(
    folder, pairs, wanted, tmp_path, monkeypatch
):
    out = tmp_path / "l.jsonl"
    words = arguments(folder, pairs, out, *CUE, *ONE)
    ledger_row = script.ledger_row
    ended = []

    def meanwhile(*args):
        if not ended:
            before = contents(tmp_path)
            command = [sys.executable, SCRIPT, *words]
            ended.append(subprocess.run(command, capture_output=True, text=True))
            assert contents(tmp_path) == before
        return ledger_row(*args)

    monkeypatch.setattr(script, "ledger_row", meanwhile)
    main(parser().parse_args(words))
    assert ended[0].returncode == 2
    assert ended[0].stderr.startswith(f"error: {out}: another process")
    assert ended[0].stderr.count("\n") == 1
    assert out.read_bytes() == wanted
    assert not list(tmp_path.glob("*.lock"))


def test_a_lock_is_gone_with_its_process_whatever_became_of_the_file(folder, pairs, tmp_path):
    out = tmp_path / "l.jsonl"
    (tmp_path / "l.jsonl.lock").write_text("")  # as a kill leaves it
    run(folder, pairs, out)
    with data.lock(out):
        with pytest.raises(ValueError, match="another process"):
            run(folder, pairs, out)
    run(folder, pairs, out)
