"""generate.py equals plain.py; a row depends on the seed and its id alone; no kill loses a row."""

import gc
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import weakref
from dataclasses import asdict, fields
from pathlib import Path

import plain
import pytest
import torch
from conftest import (
    LINES,
    ODD,
    PAIRS,
    error_of,
    read_jsonl,
    write_jsonl,
    write_model,
    write_tokenizer,
)

import data
import generate as script
from data import Encoder, Tokenizer, read_rows
from generate import (
    Sampling,
    choose,
    exponential_noise,
    generate,
    noise_key,
    status_of,
)
from model import Transformer, UserError, start_processes

TEMPLATE = "Put this from {source_lang} into {target_lang}: {source}"


FINISHED = {"pairs.jsonl", "l.jsonl", "l.meta.json"}  # what a run leaves


class Killed(BaseException):
    """In place of a kill."""


class Place:
    """A folder with seven pairs, where generate.py runs. Options are as in a shell."""

    def __init__(self, path, model, monkeypatch=None, capsys=None):
        self.path = path
        self.model = model
        self.monkeypatch = monkeypatch
        self.capsys = capsys
        self.data = write_jsonl(path / "pairs.jsonl", PAIRS)
        self.out = path / "l.jsonl"
        self.meta = path / "l.meta.json"
        self.parts = path / "l.jsonl.parts"

    def words(self, options="") -> list[str]:
        paths = f"--model {self.model} --data {self.data} --out {self.out}"
        # what is computed alone has the same bits every time
        fixed = "--max-new-tokens 8 --dtype float32 --batch-size 1"
        return shlex.split(f"{paths} {fixed} {options}")

    def run(self, options="") -> bytes:
        script.main(script.parser().parse_args(self.words(options)))
        return self.out.read_bytes()

    def rows(self, options="") -> list[dict]:
        self.run(options)
        return read_jsonl(self.out)

    def error(self, options="") -> str:
        """The one line of an error, which changes nothing."""
        before = self.contents()
        words = self.words(options)
        line = error_of(script, words, self.monkeypatch, self.capsys)
        assert self.contents() == before
        return line

    def contents(self) -> dict:
        """Every path below the folder, and what is there."""
        found = {}
        for path in self.path.rglob("*"):
            name = str(path.relative_to(self.path))
            found[name] = path.read_bytes() if path.is_file() else None
        return found

    def before_each_row(self, action):
        ledger_row = script.ledger_row

        def acting(*row):
            action()
            return ledger_row(*row)

        self.monkeypatch.setattr(script, "ledger_row", acting)

    def stop(self, after: int, options=""):
        """A run that is killed when this many rows are written."""
        countdown = [*range(after)]

        def die_at_the_end():
            if not countdown:
                raise Killed
            countdown.pop()

        with self.monkeypatch.context():
            ledger_row = script.ledger_row
            self.before_each_row(die_at_the_end)
            with pytest.raises(Killed):
                self.run(options)
            script.ledger_row = ledger_row


@pytest.fixture
def place(tmp_path, folder, monkeypatch, capsys) -> Place:
    return Place(tmp_path, folder, monkeypatch, capsys)


def write_ends(path: Path, folder: Path, ids) -> Path:
    """A model of other weights, for which these ids end a text."""
    write_model(path, seed=1)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(folder / name, path)
    ends = {"eos_token_id": list(ids)}
    (path / "generation_config.json").write_text(json.dumps(ends))
    return path


@pytest.fixture(scope="module")
def mute(folder, tmp_path_factory) -> Path:
    """Every token ends the text."""
    return write_ends(tmp_path_factory.mktemp("mute"), folder, range(480))


@pytest.fixture(scope="module")
def terse(folder, tmp_path_factory) -> Path:
    """Every twentieth token ends the text."""
    return write_ends(tmp_path_factory.mktemp("terse"), folder, range(0, 480, 20))


# 1. The method

CUES = {"no cue": "", "cue": "\n"}


@pytest.mark.parametrize("cue", CUES)
@pytest.mark.parametrize("temperature", [0, 1])
def test_every_row_is_that_of_the_plain_version(place, terse, temperature, cue):
    place.model = terse
    text = CUES[cue]
    ledger = place.rows(f"--seed 5 --temperature {temperature} --cue '{text}'")
    tokenizer = Tokenizer(terse)
    model = Transformer.from_pretrained(terse)
    finishes = set()
    for row, given in zip(ledger, read_rows([place.data]), strict=True):
        prompt = tokenizer.chat(Encoder(tokenizer).messages(given))
        reference = tokenizer.answer(given.reference)
        rationale, finish = plain.write_rationale(
            model,
            prompt,
            reference,
            cue=tokenizer.encode(text, within=True),
            eos_ids=tokenizer.eos_ids,
            max_new_tokens=8,
            temperature=temperature,
            seed=5,
            id=given.id,
        )
        assert row["prompt_ids"] == prompt
        assert row["reference_ids"] == reference
        assert row["rationale_ids"] == rationale
        assert row["finish"] == finish
        finishes.add(finish)
    assert finishes == {"eos", "length"}


def test_a_ledger_row_holds_the_pair_the_options_and_the_log_probability(place):
    options = f"--system 'Be brief.' --template '{TEMPLATE}' --cue '\n'"
    tokenizer = Tokenizer(place.model)
    model = Transformer.from_pretrained(place.model)
    for n, row in enumerate(place.rows(options)):
        assert row.items() >= PAIRS[n].items()
        assert row["id"] == n
        assert row["tokenizer"] == tokenizer.hash
        assert row["system"] == "Be brief."
        assert row["template"] == TEMPLATE
        answer = row["reference_ids"] + row["rationale_ids"]
        assert tokenizer.decode(answer) == row["reference"] + row["rationale"]
        if row["finish"] == "length":  # the score of an EOS: below
            ids = torch.tensor([row["prompt_ids"] + answer])
            with torch.no_grad():
                logprobs = model(ids)[0].log_softmax(-1)
            sampled = ids[0, -8:]  # without the cue
            scores = logprobs[-9:-1].gather(1, sampled[:, None])
            assert row["logprob"] == pytest.approx(scores.mean().item(), abs=1e-3)


def test_a_rationale_without_a_word_is_empty_and_keeps_its_cue(place, mute):
    place.model = mute
    model = Transformer.from_pretrained(mute)
    for row in place.rows("--temperature 0 --cue '\n'"):
        assert row["finish"] == "eos"
        assert row["status"] == "empty"
        assert row["rationale"] == "\n"
        ids = row["prompt_ids"] + row["reference_ids"] + row["rationale_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1]
        expected = logits.log_softmax(-1).max().item()  # of the EOS
        assert row["logprob"] == pytest.approx(expected, abs=1e-3)


STATUSES = {
    "": "empty",
    " \n\t ": "empty",
    "and so on and on " * 8: "repetitive",
    "这个词的意思是房子。" * 3: "repetitive",
    "...": "ok",
    "Because. " * 6: "ok",
    "12 + 3 = 15": "ok",
    "这个词的意思是房子": "ok",
    "Here the word barn was chosen because a stable holds horses.": "ok",
}


@pytest.mark.parametrize("text", STATUSES)
def test_a_status_names_the_fault(text):
    assert status_of(text) == STATUSES[text]


def test_a_cue_that_the_vocabulary_swallows_is_refused(place, folder):
    place.model = place.path / "model"
    shutil.copytree(folder, place.model)
    file = place.model / "tokenizer.model"
    # normalizer_spec.remove_extra_whitespaces = true: white space at the end vanishes
    file.write_bytes(file.read_bytes() + b"\x1a\x02\x20\x01")
    assert "--cue: ' ' has no tokens" in place.error("--cue ' '")


def test_an_answer_is_a_rationale_after_an_empty_reference(place, terse):
    place.model = terse
    asked = [
        {"prompt": "What grows in the garden?", "source": "web"},
        {"turns": ["Name a colour.", "And another."], "question_id": 81},
    ]
    write_jsonl(place.data, asked)
    ledger = place.rows("--task answer")
    assert [row["id"] for row in ledger] == [0, 81]
    assert [row["prompt"] for row in ledger] == [asked[0]["prompt"], "Name a colour."]
    tokenizer = Tokenizer(terse)
    for row, written in zip(read_rows([place.out]), ledger):
        assert written["response"] == ""
        assert written["reference_ids"] == []
        assert written["rationale"] == tokenizer.decode(row.rationale_ids)
        assert row.prompt_ids == tokenizer.chat(row.messages)


def test_the_answer_to_a_conversation_follows_all_of_it(place):
    talk = [
        {"role": "user", "content": LINES[0]},
        {"role": "assistant", "content": LINES[2]},
        {"role": "user", "content": "Why?"},
    ]
    write_jsonl(place.data, [{"messages": talk}])
    place.run("--task answer")
    [row] = read_rows([place.out])
    assert row.messages == talk
    assert row.prompt_ids == Tokenizer(place.model).chat(talk)


def test_of_a_ledger_only_the_pairs_are_read(place):
    expected = place.run()
    place.out = place.path / "first.jsonl"
    place.run(f"--template '{TEMPLATE}' --system 'Be brief.' --chat plain")
    place.data = place.out
    place.out = place.path / "second.jsonl"
    assert place.run() == expected
    place.data = place.out
    place.out = place.path / "third.jsonl"
    assert place.run() == expected


def speak(place, texts: list, finish="eos"):
    """The model's continuations are these -> their ids, and the prompts that it will have read."""
    tokenizer = Tokenizer(place.model)
    sampled = [tokenizer.encode(text, within=True) for text in texts]
    read = []

    def say(model, sequences, *more, **options):
        for sequence, ids in zip(sequences, sampled):
            read.append(sequence.prefix)
            sequence.ids = ids
            sequence.finish = finish
            sequence.logprobs = [-1.0]
            yield sequence

    place.monkeypatch.setattr(script, "sample", say)
    return sampled, read


def test_a_translation_is_the_models_own_first_line(place):
    texts = ["\nOne boat.\nBecause", "A boat", " "]
    sampled, _ = speak(place, texts)
    ledger = place.rows("--task translation --limit 3")
    originals = [pair["reference"] for pair in PAIRS[:3]]
    assert [row["reference"] for row in ledger] == ["One boat.", "A boat", originals[2]]
    assert ledger[1]["reference_ids"] == sampled[1]  # the very tokens
    tokenizer = Tokenizer(place.model)
    for row, written in zip(read_rows([place.out]), ledger):
        example = Encoder(tokenizer).example(row)
        assert example.reference == written["reference_ids"] + [tokenizer.end_id]
        assert tokenizer.decode(example.reference) == written["reference"]
        assert example.rationale == []


@pytest.mark.parametrize("task", ["translation", "paraphrase"])
def test_a_truncated_text_does_not_replace_the_original(place, task):
    speak(place, ["A boat"], "length")
    [row] = place.rows(f"--task {task} --limit 1")
    assert row["reference"] == PAIRS[0]["reference"]


def test_a_paraphrase_is_asked_with_the_reference_and_trained_without(place):
    texts = ["A boat\nwaits.", "My response: a boat.", ""]
    _, read = speak(place, texts)
    ledger = place.rows("--task paraphrase --limit 3")
    originals = [pair["reference"] for pair in PAIRS[:3]]
    assert [row["reference"] for row in ledger] == texts[:1] + originals[1:]
    tokenizer = Tokenizer(place.model)
    for row, original, prompt in zip(ledger, originals, read):
        assert original in tokenizer.decode(prompt)
        assert original not in tokenizer.decode(row["prompt_ids"])


def test_a_translation_needs_a_source(place):
    write_jsonl(place.data, [{"prompt": "Why?", "response": "So."}])
    assert f"{place.data}:1: " in place.error("--task translation")


# 2. The sampler: its distribution

# of each option a value that changes the rows: a new option needs one here
CHANGES = {
    "--model": "{terse}",
    "--task": "paraphrase",
    "--cue": "'\n'",
    "--max-new-tokens": "5",
    "--temperature": "0.5",
    "--top-p": "0.5",
    "--seed": "5",
    "--dtype": "bfloat16",
    "--chat": "plain",
    "--system": "'Be brief.'",
    "--template": "'Put {{source}} into another language'",
}
NUMBERS = [field.name for field in fields(Sampling) if field.type is float]
SETTINGS = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 3},
    "nucleus": {"temperature": 0.7, "top_p": 0.8},
}
for name in NUMBERS:
    value = float(CHANGES["--" + name.replace("_", "-")])
    SETTINGS[name] = {"temperature": 1.0, name: value}


def is_distributed(counts, probs) -> bool:
    """Pearson's chi-square test at four standard deviations, of cells expected five times."""
    expected = counts.sum() * probs
    terms = (counts - expected).square() / expected
    cells = expected >= 5
    degrees = cells.sum()
    return terms.where(cells, 0).sum() <= degrees + 4 * (2 * degrees).sqrt()


def nucleus(logits, temperature, top_p):
    """The distribution, in float64, by its definition."""
    probs = (logits.double() / temperature).softmax(-1)
    largest, order = probs.sort(descending=True)
    outside = largest.cumsum(-1) - largest >= top_p
    probs[order[outside]] = 0
    return probs / probs.sum()


def draw(logits, rows, places, temperature=1.0, top_p=1.0, seed=0):
    """Tokens [rows, places] of rows that have these logits at every place."""
    keys = torch.tensor([noise_key(seed, id) for id in range(rows)])
    sampling = Sampling(temperature=temperature, top_p=top_p)
    logits = logits.expand(rows, -1)
    tokens = []
    for count in range(places):
        counts = torch.full_like(keys, count)
        chosen, _ = choose(logits, keys, counts, sampling)
        tokens.append(chosen.long())
    return torch.stack(tokens, dim=1)


SAMPLINGS = [
    (1, 1),
    (0.5, 1),
    (1, 0.9),
    (0.7, 0.5),
    (2, 0.999),
]


@pytest.mark.parametrize("temperature, top_p", SAMPLINGS)
@pytest.mark.parametrize("size", [12, 600])
def test_tokens_follow_the_nucleus_of_the_softmax(size, temperature, top_p):
    generator = torch.Generator().manual_seed(size)
    logits = 2 * torch.randn(size, generator=generator)
    drawn = draw(logits, 200, 50, temperature, top_p)
    counts = drawn.flatten().bincount(minlength=size)
    probs = nucleus(logits, temperature, top_p)
    assert counts[probs == 0].sum() == 0
    assert is_distributed(counts, probs)


def test_draws_are_independent_over_places_rows_and_seeds():
    drawn = draw(torch.zeros(8), 200, 100)
    other_seed = draw(torch.zeros(8), 200, 100, seed=1)
    couples = {
        "places": (drawn[:, ::2], drawn[:, 1::2]),
        "rows": (drawn[::2], drawn[1::2]),
        "row and place": (drawn[:-1, 1:], drawn[1:, :-1]),
        "seeds": (drawn, other_seed),
    }
    for name, (one, two) in couples.items():
        counts = (8 * one + two).flatten().bincount(minlength=64)
        assert is_distributed(counts, torch.full([64], 1 / 64)), name


def test_noise_stays_as_it_is():
    # other values would mean other rows for the same seed
    keys = torch.tensor([noise_key(0, 0), noise_key(7, "x")])
    assert keys.tolist() == [-6108749488097515556, 6222478016872593892]
    noise = exponential_noise(keys, torch.tensor([0, 300]), 50_000)
    expected = [[0.0056225, 0.0394921, 1.1968902], [1.2906703, 0.0687288, 2.1935112]]
    found = noise[:, [0, 1, 49_999]]
    # the expected values have seven digits
    torch.testing.assert_close(found, torch.tensor(expected), atol=0, rtol=1e-5)


EDGES = {
    # temperature, top_p -> the tokens that may come
    (0, 1.0): {2},
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
    logits = torch.tensor([-math.inf, 1, 3, 2, -200, 1])
    drawn = draw(logits, 500, 10, temperature, top_p)
    assert {*drawn.flatten().tolist()} == EDGES[temperature, top_p]


@pytest.mark.parametrize("name", SETTINGS)
def test_an_id_that_the_tokenizer_lacks_is_never_chosen(name):
    logits = torch.zeros(64, 10)
    logits[:, 7:] = 9.0
    keys = torch.arange(64)
    tokens, scores = choose(logits, keys, keys, Sampling(**SETTINGS[name]), vocab_size=7)
    assert tokens.max() < 7
    expected = logits.double().log_softmax(-1)[:, 0]  # of the model's whole vocabulary
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)  # float32


# 3. The sampler: its batches

PROMPTS = [
    [1, 40],
    [1, 41, *range(100, 109)],
    [1, 40],
    [1, 43, *range(100, 127)],
    [1, 44, *range(100, 136)],
    [1, 49, *range(100, 181)],
]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_row_depends_on_seed_and_id_but_not_on_its_batch(folder, name):
    model = Transformer.from_pretrained(folder)
    settings = SETTINGS[name] | {"max_new_tokens": 12, "eos_ids": [2]}
    expected = generate(model, PROMPTS, batch_size=1, **settings)
    for batch_size in (2, 3, 32):
        assert generate(model, PROMPTS, batch_size=batch_size, **settings) == expected
    other_seed = generate(model, PROMPTS, **settings | {"seed": 9})
    assert (expected == other_seed) == (name == "greedy")
    assert (expected[0] == expected[2]) == (name == "greedy")


class StandIn:
    """In place of a CUDA graph: it computes again from the inputs that it was made with."""

    def __init__(self, step, inputs):
        self.step = step
        self.inputs = inputs
        self.output = step(inputs)

    def replay(self):
        self.output.copy_(self.step(self.inputs))


@pytest.mark.parametrize("name", SETTINGS)
def test_steps_as_graphs_sample_the_same_sequences(folder, monkeypatch, name):
    model = Transformer.from_pretrained(folder)
    prompts = [[1, *range(n)] for n in range(3, 93, 10)]
    settings = SETTINGS[name] | {"max_new_tokens": 30, "eos_ids": range(0, 480, 40)}
    expected = generate(model, prompts, batch_size=1, **settings)
    graphs = []

    def capture(step, inputs, others):
        graph = StandIn(step, inputs)
        graphs.append(weakref.ref(graph))
        return graph, inputs, graph.output

    monkeypatch.setattr(script, "GRAPH_DEVICES", ("cpu",))
    monkeypatch.setattr(script, "capture", capture)
    gc.disable()
    assert generate(model, prompts, batch_size=3, **settings) == expected
    assert len(graphs) == 2  # lengths are rounded up to 64, or to all of the cache
    # they died with the call: graphs that outlive it would break those of the next
    assert not any(graph() for graph in graphs)
    gc.enable()


def test_a_step_of_the_nucleus_waits_for_no_number():
    # as within a CUDA graph: tensors of the meta device have none
    logits = torch.empty(4, 100, device="meta")
    keys = torch.empty(4, dtype=torch.int64, device="meta")
    sampling = Sampling(temperature=1.0, top_p=0.9)
    assert choose(logits, keys, keys, sampling).shape == (2, 4)


BAD_PROMPTS = {
    "empty": ([], "prompt 1: 0 tokens"),
    "too long": ([5] * 505, "prompt 1: 505 tokens .* 1 to 504; shorten"),
    "an id beyond the vocabulary": ([5, 480], "the model: .* id of prompt 1"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_a_prompt_that_the_model_cannot_read_is_refused(folder, name):
    prompt, message = BAD_PROMPTS[name]
    model = Transformer.from_pretrained(folder)
    with pytest.raises(UserError, match=message):
        generate(model, [[5], prompt], max_new_tokens=8)


@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
@pytest.mark.parametrize("name", NUMBERS)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(UserError, match="out of range"):
        Sampling(**{name: value})


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_logits_that_are_not_finite_are_an_error_of_the_row(folder, bad, name):
    model = Transformer.from_pretrained(folder)
    model.lm_head.weight.data.fill_(float(bad))
    with pytest.raises(UserError, match="prompt 0: .*NaN"):
        generate(model, [[5]], **SETTINGS[name])


# 4. Options: each changes the outcome; all that a row depends on is recorded and compared

# which rows, where they are written, how fast: a row does not depend on these
FREE = "--data --direction --limit --out --batch-size".split()
OPTIONS = []
for action in script.parser()._actions:
    if action.dest != "help":
        OPTIONS += action.option_strings
RECORDED = [option for option in OPTIONS if option not in FREE]


@pytest.fixture
def change(terse):
    """option -> the words that change it."""
    return lambda option: f"{option} {CHANGES[option].format(terse=terse)}"


@pytest.mark.parametrize("option", RECORDED)
def test_every_setting_changes_the_rows(place, change, option):
    before = place.rows()
    place.out.unlink()
    place.meta.unlink()
    assert place.rows(change(option)) != before


def test_every_setting_of_the_sampler_is_an_option():
    for name in asdict(Sampling()):
        assert "--" + name.replace("_", "-") in OPTIONS


@pytest.mark.parametrize("option", RECORDED)
def test_a_ledger_of_other_settings_is_refused_by_name(place, change, option):
    place.run("--limit 4")
    name = option.strip("-").replace("-", "_").replace("model", "model_hash")
    line = place.error(change(option))
    assert line.startswith(f"error: {place.meta}: {name} was ")


@pytest.mark.parametrize("option", ["--temperature", "--cue"])
def test_parts_of_other_settings_are_refused_by_name(place, change, option):
    place.stop(4)
    line = place.error(change(option))
    assert line.startswith(f"error: {place.meta}: {option[2:]} was ")


def test_a_setting_added_since_counts_as_its_default(place, change):
    place.run("--top-p 1 --limit 2")
    settings = json.loads(place.meta.read_text())
    del settings["top_p"]
    place.meta.write_text(json.dumps(settings))
    assert ": top_p was " in place.error(change("--top-p"))
    assert len(place.rows("--top-p 1 --limit 3")) == 3


# 5. The ledger: a row is the same however it came about


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory) -> bytes:
    """The ledger of the seven pairs, from a run that was not stopped."""
    return Place(tmp_path_factory.mktemp("expected"), folder).run()


def assert_same_rows(rows: list, expected: bytes):
    for row, line in zip(rows, expected.splitlines(), strict=True):
        other = json.loads(line)
        # float32 sums of other shapes, rounded to three digits
        assert row.pop("logprob") == pytest.approx(other.pop("logprob"), abs=1.1e-3)
        assert row == other


def test_rows_do_not_depend_on_the_order_of_the_data(place):
    pairs = [pair | {"id": n} for n, pair in enumerate(PAIRS)]
    write_jsonl(place.data, pairs)
    rows = place.rows()
    place.out.unlink()
    write_jsonl(place.data, pairs[::-1])
    assert place.rows() == rows[::-1]


def on_two_ranks(words):
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    subprocess.run([sys.executable, *launcher, script.__file__, *words], check=True, timeout=120)


def test_two_ranks_finish_what_five_have_left(place, expected):
    place.stop(5)
    part = place.parts / "rank0.jsonl"
    rows = part.read_text().split("\n\n")
    for rank, row in enumerate(rows):
        (place.parts / f"rank{rank}.jsonl").write_text(row)
    (place.parts / "rank4.jsonl").write_text(rows[4][:40])  # killed within a line
    on_two_ranks(place.words("--batch-size 2"))
    assert_same_rows(read_jsonl(place.out), expected)
    assert {*place.contents()} == FINISHED


def test_the_ledger_appears_when_all_rows_are_there(place):
    seen = []

    def look():
        names = [path.name for path in place.path.iterdir()]
        seen.append(sorted(names))

    place.before_each_row(look)
    place.run()
    before = ["l.meta.json", "pairs.jsonl"]
    assert seen == [before, *[["l.jsonl.parts", *before]] * 6]
    assert {*place.contents()} == FINISHED


@pytest.mark.parametrize("torn", [0, 1, 40])
@pytest.mark.parametrize("after", [0, 1, 6])
def test_a_run_that_was_stopped_ends_in_the_same_bytes(place, expected, after, torn):
    place.stop(after)
    for part in place.parts.glob("rank*"):
        size = part.stat().st_size
        os.truncate(part, size - torn)
    for _ in range(2):  # the second time there is nothing to do
        assert place.run() == expected
        assert {*place.contents()} == FINISHED


def test_a_larger_limit_extends_a_ledger_and_keeps_rows_edited_by_hand(place, expected):
    lines = expected.splitlines(keepends=True)
    assert place.run("--limit 3") == b"".join(lines[:3])
    rows = place.rows("--limit 5")
    rows[4]["rationale"] = "As I see it."
    edited = write_jsonl(place.out, rows).read_bytes()
    place.out.write_bytes(edited.removesuffix(b"\n"))  # the editor removed the line break
    assert place.run() == edited + b"".join(lines[5:])


def test_rows_of_parts_count_only_if_the_data_is_as_it_was(place):
    place.stop(5)
    changed = {"reference": "The gate."}
    write_jsonl(place.data, [pair | changed for pair in PAIRS])
    rows = place.run()
    place.out = place.path / "fresh.jsonl"
    assert place.run() == rows


# 6. What is refused, and what is left alone

OTHER_DATA = {
    # task, a row, and how it changes
    "source": ("rationale", PAIRS[0], {"source": "Das Tor."}),
    "language": ("rationale", PAIRS[0], {"target_lang": "fr"}),
    "reference": ("translation", PAIRS[0], {"reference": "The boat."}),
}


@pytest.mark.parametrize("name", OTHER_DATA)
def test_a_ledger_of_other_data_is_refused_by_its_line(place, name):
    task, row, change = OTHER_DATA[name]
    options = f"--task {task} --template '{{source}}'"
    write_jsonl(place.data, [row])
    place.run(options)
    write_jsonl(place.data, [row | change])
    assert place.error(options).startswith(f"error: {place.out}:1: ")


def test_an_id_that_two_files_have_is_refused_by_its_place(place):
    other = place.path / "other.jsonl"
    write_jsonl(other, [PAIRS[0] | {"id": 3}])
    line = place.error(f"--data {other}")
    assert line.startswith(f"error: {other}:1: duplicate id 3")


@pytest.mark.parametrize("finished", [False, True])
def test_a_foreign_meta_file_is_refused(place, finished):
    if finished:
        place.run("--limit 1")
    for text in [*ODD.values(), '{"temperature": 1.0}']:
        place.meta.write_text(text)
        assert place.error().startswith(f"error: {place.meta}: ")


def make_file(place):
    place.out.write_text('{"id": 0}\n')


def make_folder(place):
    place.out.mkdir()
    (place.out / "notes.txt").write_text("mine")


def make_parts(place):
    place.parts.mkdir()
    (place.parts / "notes.txt").write_text("mine")


FOREIGN = [make_file, make_folder, make_parts]


@pytest.mark.parametrize("make", FOREIGN)
def test_what_somebody_else_has_there_is_refused(place, make):
    make(place)
    assert place.error().startswith(f"error: {place.path}/l.")


def test_what_appears_at_its_place_meanwhile_is_not_replaced(place, expected):
    place.before_each_row(lambda: place.out.write_text("mine"))
    with pytest.raises(UserError, match="l.jsonl:1: "):
        place.run()
    assert place.out.read_text() == "mine"
    place.out.unlink()
    assert place.run() == expected


def test_notes_among_the_parts_are_kept(place, expected):
    place.stop(4)
    notes = place.parts / "rank0.jsonl.bak"
    notes.write_text("mine")
    assert place.run() == expected
    assert notes.read_text() == "mine"
    assert [*place.parts.iterdir()] == [notes]
    assert place.run() == expected


def test_a_link_is_the_ledger_that_it_points_to(place, expected):
    (place.path / "runs").mkdir()
    place.out.symlink_to("runs/1.jsonl")
    assert place.run() == expected
    assert place.out.is_symlink()
    runs = {"runs", "runs/1.jsonl", "runs/1.meta.json"}
    assert {*place.contents()} == {"pairs.jsonl", "l.jsonl", *runs}


def test_a_second_process_with_the_same_out_is_refused_and_the_first_continues(place, expected):
    def start_another():
        before = place.contents()
        with pytest.raises(UserError, match="another process"):
            place.run()
        assert place.contents() == before

    place.before_each_row(start_another)
    assert place.run() == expected


MISTAKES = {
    "--out ''": "--out",
    "--out ledger.json": "must end in .jsonl",
    "--out /dev/null/l.jsonl": "/dev/null",
    "--top-p 0": "argument --top-p",
    "--temperature nan": "--temperature",
    "--max-new-tokens 500": "pairs.jsonl:1: ",
    "--task answer --cue So": "--cue",
    "--limit 0": "--limit",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_a_mistake_is_one_line(place, options):
    assert MISTAKES[options] in place.error(options)


def test_weights_of_another_tokenizer_blame_the_model(place):
    place.model = place.path / "model"
    write_tokenizer(write_model(place.model, vocab_size=300))
    assert place.error().startswith(f"error: {place.model}: ")


# (capability, type, a warning is printed)
DTYPES = [("AVX2", "bfloat16", True), ("AVX2", "float32", False), ("AVX512", "bfloat16", False)]


@pytest.mark.parametrize("capability, name, warned", DTYPES)
def test_bfloat16_on_a_cpu_that_emulates_it_is_warned_of(
    monkeypatch, capsys, capability, name, warned
):
    start_processes()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert data.torch_dtype(name) is getattr(torch, name)
    assert ("--dtype float32" in capsys.readouterr().err) == warned
