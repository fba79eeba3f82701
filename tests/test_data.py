"""From files to ids: prompts as the official encoders make them, every mistake told by place."""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import (
    CHATML,
    LINES,
    ODD,
    PAIRS,
    error_of,
    last_line,
    odd_row,
    write_jsonl,
    write_tokenizer,
)
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

import data
from data import Encoder, Tokenizer, collate, read_json, read_rows, read_template

WORDS = "The harbour|waits|Ärger,|naïve|港は静かだ|你好|🚀|\n|\n\n|\t|don't|3.14|привет".split("|")
WORDS.append("👩\u200d🚀")  # one letter of three code points
TAGS = "[INST] [/INST] </s> <s> <<SYS>> <|user|> <|im_start|> <0x0A> <unk>".split()
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}"
)
MENDER = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{'<|im_start|>system\nYou mend boats.<|im_end|>\n'}}{% endif %}"
)
BOS = "{{ bos_token }}"
V1 = "tokenizer.model.v1"
V3 = "mistral_instruct_tokenizer_240323.model.v3"
MARKS = {
    "llama2": "<<SYS>>",
    "mistral": "[INST]",
    "mistral_v3": "[INST]",
    "zephyr": ZEPHYR,
    "chatml": CHATML,
    "plain": "",
}


def write(path: Path, content) -> str:
    """A file of bytes, of text, or of JSON."""
    if isinstance(content, dict):
        content = json.dumps(content)
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content)
    return str(path)


def said(role: str, text) -> dict:
    return {"role": role, "content": text}


# 1. Prompts and answers


def random_text(r: random.Random, words: list) -> str:
    parts = []
    for _ in range(r.randint(1, 8)):
        parts += [r.choice(words), r.choice(["", " ", " ", "  "])]
    text = "".join(parts)
    if not text.strip():
        return "A boat."
    return r.choice(["", "", " ", "\n"]) + text


def conversations(words: list):
    """Seeded ones of one to three turns, each with an answer; half of them with a system prompt."""
    for seed in range(100):
        r = random.Random(seed)
        messages = []
        if seed % 2:
            messages.append(said("system", random_text(r, words)))
        for i in range(2 * r.randint(1, 3) - 1):
            role = "assistant" if i % 2 else "user"
            messages.append(said(role, random_text(r, words)))
        yield messages, random_text(r, words)


@pytest.mark.parametrize("file", [V1, V3], ids=["v1", "v3"])
def test_mistral_prompts_and_answers_equal_the_official_encoder(tmp_path, file):
    common = pytest.importorskip("mistral_common")
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    proto = Path(common.__file__).parent / "data" / file
    write(tmp_path / "tokenizer.model", proto.read_bytes())
    write(tmp_path / "tokenizer_config.json", {"chat_template": "[INST]"})
    t = Tokenizer(tmp_path)
    official = getattr(MistralTokenizer, file[-2:])()
    for messages, answer in conversations(WORDS + TAGS):
        forced = said("assistant", answer.rstrip(" ")) | {"prefix": True}
        asked = ChatCompletionRequest(messages=[*messages, forced])
        wanted = official.encode_chat_completion(asked).tokens
        assert t.chat(messages) + t.answer(forced["content"]) == wanted, messages


def test_llama2_prompts_follow_the_recipe_of_meta(tmp_path):
    common = pytest.importorskip("mistral_common")
    proto = Path(common.__file__).parent / "data" / V1
    write(tmp_path / "tokenizer.model", proto.read_bytes())
    write(tmp_path / "tokenizer_config.json", {"chat_template": "<<SYS>>"})
    t = Tokenizer(tmp_path)
    assert t.chat_name == "llama2"
    for messages, _ in conversations(WORDS + TAGS):
        texts = [message["content"] for message in messages]
        if messages[0]["role"] == "system":
            first = f"<<SYS>>\n{texts[0]}\n<</SYS>>\n\n{texts[1]}"
            texts = [first, *texts[2:]]
        ids = []
        for user, answer in zip(texts[::2], texts[1::2]):
            turn = f"[INST] {user.strip()} [/INST] {answer.strip()} "
            ids += [1, *t.sp.encode(turn), 2]
        ids += [1, *t.sp.encode(f"[INST] {texts[-1].strip()} [/INST]")]
        assert t.chat(messages) == ids, messages


TEMPLATES = {
    "zephyr": ZEPHYR,
    "zephyr with BOS": BOS + ZEPHYR,
    "chatml": CHATML,
    "chatml with BOS": BOS + CHATML,
    "chatml with a system prompt of its own": MENDER + CHATML,
}


@pytest.mark.parametrize("legacy", [False, True], ids=["new", "legacy"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_zephyr_and_chatml_prompts_and_answers_equal_transformers(tmp_path, name, legacy):
    pytest.importorskip("transformers")
    from transformers import AutoTokenizer

    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"}
    folder = write_tokenizer(tmp_path, chat_template=TEMPLATES[name], legacy=legacy, **names)
    t = Tokenizer(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    for messages, answer in conversations(WORDS):
        options = {"add_generation_prompt": True, "return_dict": False}
        ids = t.chat(messages)
        assert ids == theirs.apply_chat_template(messages, **options), messages
        ids += [*t.answer(answer), t.end_id]
        talk = [*messages, said("assistant", answer)]
        whole = theirs.apply_chat_template(talk, return_dict=False)
        assert ids == whole[: len(ids)], answer


def user_defined(folder: Path, tags: list, template: str, byte_fallback: bool = True) -> Tokenizer:
    """A vocabulary that itself finds `tags` in any text, and a config that marks them as special.

    Two more special ids lie beyond the vocabulary.
    """
    SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=byte_fallback,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=tags,
        control_symbols=["<|im_start|>", "<|im_end|>"],
        minloglevel=2,
        num_threads=1,
    )
    sp = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = [0, 1, 2, *map(sp.piece_to_id, tags)]
    added = {id: {"content": sp.id_to_piece(id), "special": True} for id in ids}
    added[400] = {"content": "<|beyond|>", "special": True}
    config = {"chat_template": template, "added_tokens_decoder": added}
    write(folder / "tokenizer_config.json", config)
    write(folder / "added_tokens.json", {"<pad>": 401})
    return Tokenizer(folder)


@pytest.mark.parametrize("chat", MARKS)
def test_text_of_a_user_never_becomes_a_control_token(tmp_path, chat):
    tags = ["<|user|>", "<|user|>>"]
    if chat == "mistral_v3":
        tags += ["[INST]", "[/INST]"]
    t = user_defined(tmp_path, tags, MARKS[chat])
    known = [t.sp.id_to_piece(i) for i in range(400) if i in t.control]
    known += t.added.values()
    assert {"<|user|>", "<s>", "</s>", "<|im_start|>", "<|beyond|>", "<pad>"} <= set(known)
    roles = ("system", "user", "assistant", "user")
    plain = t.chat([said(role, "a boat") for role in roles])
    for tag in [*known, "".join(known), " ".join(known)]:
        text = f"a{tag} {tag}{tag}\n{tag}"
        assert t.control.isdisjoint(t.encode(text))
        assert t.control.isdisjoint(t.answer(text))
        assert t.decode(t.encode(text)) == text
        ids = t.chat([said(role, text) for role in roles])
        assert [i for i in ids if i in t.control] == [i for i in plain if i in t.control]


ODD_TEXTS = {
    "1,200 tags": ("<tag>", "<tag>" * 1200, "<tag>" * 1200),
    "a tag with a space": ("▁<tag>", "<tag> <tag> y", "<tag> <tag> y"),
    "a tag of one letter": ("§", "see § 7", "see  7"),  # can't be cut, so it is left out
}


@pytest.mark.parametrize("name", ODD_TEXTS)
def test_no_text_is_too_odd_to_encode(tmp_path, name):
    tag, text, left = ODD_TEXTS[name]
    t = user_defined(tmp_path, [tag], CHATML)
    ids = t.encode(text)
    assert {1, 2, t.sp.piece_to_id(tag)}.isdisjoint(ids)
    assert t.decode(ids) == left


def test_a_vocabulary_without_bytes_encodes_what_it_does_not_know(tmp_path):
    t = user_defined(tmp_path, ["<tag>"], CHATML, byte_fallback=False)
    assert {1, 2, t.sp.piece_to_id("<tag>")}.isdisjoint(t.encode("a 🚀 <unk> <tag>"))


# 2. Rows

GERMAN = [pair["source"] for pair in PAIRS]
ENGLISH = [pair["reference"] for pair in PAIRS]
BACK = [
    {"source": pair["reference"], "reference": pair["source"]}
    | {"source_lang": "en", "target_lang": "de"}
    for pair in PAIRS
]
BARE = [{"source": de, "reference": en} for de, en in zip(GERMAN, ENGLISH)]
ALMA = [{"translation": {"de": de, "en": en}} for de, en in zip(GERMAN, ENGLISH)]


def lines(rows: list) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


FORMATS = {
    "ALMA array": (json.dumps(ALMA, indent=1), ["de-en"]),
    "ALMA lines": (lines(ALMA), ["de-en"]),
    "objects": (lines(PAIRS), []),
    "objects in an array": (json.dumps(PAIRS, ensure_ascii=False), []),
    "objects the other way": (lines(BACK), ["de-en"]),
    "objects without languages": (lines(BARE), ["de-en"]),
    "blank lines": ("\n" + lines(PAIRS).replace("\n", "\n \n"), []),
    "fields of somebody": (lines([pair | {"score": [1]} for pair in PAIRS]), []),
}
ENDINGS = {"LF": ("\n", ""), "CRLF": ("\r\n", ""), "BOM": ("\n", "\ufeff")}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows_one_way_and_both(tmp_path, name, ending):
    content, one = FORMATS[name]
    end, mark = ENDINGS[ending]
    path = write(tmp_path / "a.json", mark + content.replace("\n", end))
    both = ["de-en", "en-de"]
    for directions, wanted in ((one, PAIRS), (both, [*PAIRS, *BACK])):
        rows = read_rows([path], directions)
        assert [row["id"] for row in rows] == [*range(len(wanted))]
        found = [{key: row[key] for key in PAIRS[0]} for row in rows]
        assert sorted(found, key=str) == sorted(wanted, key=str)
    first = {"ALMA array": 2, "blank lines": 2}.get(name, 1)
    assert rows[0]["where"] == f"{path}:{first}"


def test_conversations_are_read_alike_and_ids_are_kept_or_the_place_in_the_data(tmp_path):
    asked = said("user", "Why?")
    answered = said("assistant", "So.")
    rows = [
        {"prompt": "Why?", "response": "So."},
        {"messages": [asked, answered], "id": "x"},
        {"messages": [asked, answered], "source": "a textbook"},
        {"question_id": 81, "turns": ["Why?", "And then?"]},
        {"prompt": "Why?"},
    ]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    found = read_rows([file], prompts=True)
    assert [row["messages"] for row in found] == [[asked]] * 5
    assert [row["reference"] for row in found] == ["So.", "So.", "So.", "", ""]
    assert [row["id"] for row in found] == [0, "x", 2, 81, 4]
    file = write_jsonl(tmp_path / "b.jsonl", rows[:3])
    twice = read_rows([file], ["de-en", "en-de"])  # a conversation has no direction
    assert [row["id"] for row in twice] == [0, "x", 2]


def test_a_row_with_an_id_of_its_own_gets_another_for_each_direction(tmp_path):
    rows = [PAIRS[0] | {"id": 0}, PAIRS[1] | {"id": "x"}, PAIRS[2]]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    ids = [row["id"] for row in read_rows([file], ["de-en", "en-de"])]
    assert ids == [0, "x", 2, "0 en-de", "x en-de", 5]


SAME_ID = {
    "numbers": ({"id": 7}, {"id": 7}),
    "texts": ({"id": "a"}, {"id": "a"}),
    "the place of a row without": ({}, {"id": 0}),
}


@pytest.mark.parametrize("array", [False, True], ids=["lines", "array"])
@pytest.mark.parametrize("name", SAME_ID)
def test_an_id_that_stands_twice_is_refused_by_place(tmp_path, name, array):
    first, second = SAME_ID[name]
    rows = [PAIRS[0] | first, PAIRS[1], PAIRS[2] | second]
    content = json.dumps(rows, indent=None).replace("}, {", "},\n{") if array else lines(rows)
    path = write(tmp_path / "a.json", content)
    with pytest.raises(ValueError, match=f"{path}:3: .*twice"):
        read_rows([path])


GOOD = json.dumps(PAIRS[0])
ASKED = [said("user", "Why?")]
BAD_FIELDS = {
    "no reference": {"reference": None},
    "a source of another type": {"source": 7},
    "a blank source": {"source": "\u3000\n"},
    "an empty reference": {"reference": ""},
    "a lone surrogate": {"source": "\ud800x"},
    "an id that is a list": {"id": [1]},
    "an id that is half a number": {"id": 1.5},
    "an id that is a truth": {"id": True},
    "an id with a surrogate": {"id": "\ud800"},
    "no language": {"source_lang": None},
    "an unknown language": {"source_lang": "xx"},
    "a language that is a list": {"source_lang": [1]},
    "one language twice": {"source_lang": "en"},
    "a source beside broken messages": {"messages": 3},
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_a_bad_field_is_told_by_line(tmp_path, name):
    rows = [PAIRS[0], PAIRS[1] | BAD_FIELDS[name]]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=rf"^{path}:2: [^\n]*$"):
        read_rows([path])


BAD_ROWS = {
    "two users": {"messages": ASKED * 2},
    "no answer": {"messages": ASKED},
    "no turn": {"messages": []},
    "messages in a list": {"messages": [ASKED]},
    "a prompt alone": {"prompt": "Why?"},
    "turns that are text": {"turns": "Why?"},
    "turns of objects": {"turns": [{}]},
    "a list": [1],
    "a number": 5,
    "no direction": BARE[0],
    "a two-way row": ALMA[0],
    "a translation that is null": {"translation": None},
    "another field": {"text": "x"},
    "a response alone": {"response": "x"},
    "a prompt that is null": {"prompt": None, "response": "x"},
    "a blank response": {"prompt": "Why?", "response": " "},
    "an answer that is a number": {"messages": [*ASKED, said("assistant", 7)]},
    "a role that is a list": {"messages": [said([1], "Why?")]},
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_that_is_none_is_told_by_line(tmp_path, name):
    path = write(tmp_path / "a.jsonl", json.dumps(BAD_ROWS[name]) + "\n")
    with pytest.raises(ValueError, match=rf"^{path}:1?[^\n]*$"):
        read_rows([path])


BAD_FILES = {
    "empty": ("", ""),
    "blank": (" \n \n", ""),
    "an array of nothing": ("[]", ""),
    "a broken line": (f"{GOOD}\n\n{{1}}", ":3"),
    "a broken array": (f"[{GOOD}\n,{GOOD}\n,{{1}}]", ":3"),
    "a torn array": (f"[{GOOD}\n,{GOOD}\n,", ":3"),
    "no comma": (f"[{GOOD}\n{GOOD}]", ":2"),
    "two arrays": (f"[{GOOD}]\n[{GOOD}]", ":2"),
    "an array with a number": (f"[{GOOD}\n,3]", ":2"),
    "Latin-1": (GOOD.encode() + b"\n\xfc", ":2"),
    "UTF-16": (GOOD.encode("utf-16"), ":1"),
    "a number of 5,000 digits": ('{"id": ' + "9" * 5000 + "}", ":1"),
    "nesting": (f'{GOOD}\n{{"x": ' + "[" * 100_000, ":2"),
    "a nested array": ("[" * 100_000, ":1"),
    "no file": (None, ""),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_broken_file_is_told_by_place(tmp_path, name):
    content, place = BAD_FILES[name]
    path = str(tmp_path / "a.json")
    if content is not None:
        write(tmp_path / "a.json", content)
    with pytest.raises(ValueError, match=rf"^{path}{place}: [^\n]*$"):
        read_json(path)
    with pytest.raises(ValueError, match=rf"^{path}{place}: [^\n]*$"):
        read_rows([path])


BAD_DIRECTIONS = {
    "another language": ("fr-en", ALMA, "a.jsonl:1: .*fr-en"),
    "another language of pairs": ("fr-en", PAIRS, "a.jsonl:1: .*fr-en"),
    "a translation that is text": ("de-en", [{"translation": "Tor"}], "a.jsonl:1: .*de-en"),
    "no language": ("xx-de", PAIRS, "--direction.*xx"),
    "a word": ("german", PAIRS, "--direction.*german"),
    "one language": ("de-de", PAIRS, "--direction.*de"),
}


@pytest.mark.parametrize("name", BAD_DIRECTIONS)
def test_a_direction_that_does_not_fit_is_refused(tmp_path, name):
    direction, rows, words = BAD_DIRECTIONS[name]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=words):
        read_rows([file], [direction])


def test_templates_know_three_names_and_leave_the_braces_of_a_source_alone(folder, tmp_path):
    for text in ("{source} {text}", "Translate it.", "{source} {target lang}"):
        with pytest.raises(ValueError, match="--template"):
            read_template(text)
    source = {"source": "{target_lang} {x} {"}
    [row] = read_rows([write_jsonl(tmp_path / "a.jsonl", [PAIRS[0] | source])])
    file = write(tmp_path / "t.txt", "{target_lang}:\n{source}\n")
    for text in (file, "{target_lang}:\\n{source}"):
        encoder = Encoder(Tokenizer(folder), read_template(text))
        [message] = encoder.messages(row)
        assert message["content"] == "English:\n{target_lang} {x} {"


# 3. Examples

WHY = "\n\nThe wind turns."


def ledger(t: Tokenizer, folder: Path, meta: dict | None = None, **fields) -> dict:
    """One row as generate.py writes it, with some fields changed afterwards, read back."""
    first = PAIRS[0]["reference"]
    row = PAIRS[0] | {"id": 0, "finish": "eos", "status": "ok", "rationale": WHY}
    row["reference_ids"] = t.answer(first)
    row["rationale_ids"] = t.continuation(first, row["reference_ids"], WHY)
    settings = {"tokenizer_hash": t.hash, "chat": t.chat_name, "system": None}
    settings["template"] = data.TEMPLATE
    write(folder / "l.meta.json", settings | (meta or {}))
    file = write(folder / "l.jsonl", json.dumps(row | fields))
    return read_rows([file])[0]


def test_targets_are_reference_rationale_and_eos_and_no_prompt_token_carries_loss(folder, tmp_path):
    t = Tokenizer(folder)
    encoder = Encoder(t)
    rows = []
    for i, pair in enumerate(PAIRS):
        rationale = f"\n\n{pair['source']}" * (i % 3)
        rows.append(pair | {"rationale": rationale})
    rows = read_rows([write_jsonl(tmp_path / "a.jsonl", rows)])
    examples = [encoder.example(row) for row in rows]
    tokens, (_, same), places, targets = collate(examples)
    read = tokens[0][same]  # [B, T]
    T = read.shape[1]
    assert T == max(len(example) for example in examples) - 1
    of_row = {}  # row -> the (place, target) that carry loss
    for place, target in zip(places.tolist(), targets.tolist(), strict=True):
        of_row.setdefault(place // T, []).append((place % T, target))
    for b, example in enumerate(examples):
        learnt = sorted(of_row[b])
        ids = [target for _, target in learnt]
        assert t.decode(ids) == rows[b]["reference"] + rows[b]["rationale"]
        assert t.decode(example.reference) == rows[b]["reference"]
        assert ids[-1] == t.end_id
        assert ids.count(t.end_id) == 1
        first = len(example.prompt) - 1  # it predicts the first token of the answer
        assert [place for place, _ in learnt] == [*range(first, len(example) - 1)]
        assert read[b, : len(example) - 1].tolist() == example.prompt + ids[:-1]
        assert not same[b, len(example) - 1 :].any()
    n = sum(len(example.reference) for example in examples)
    references = [example.reference for example in examples]
    assert targets[:n].tolist() == [*itertools.chain(*references)]


def test_a_batch_without_examples_has_no_target():
    tokens, _, places, targets = collate([])
    assert tokens.numel() > 0
    assert len(places) == len(targets) == 0


CUT = {"finish": "length"}
COPY = {"status": "copy"}
MUTE = {"rationale": "", "rationale_ids": []}
ENDS = {
    # fields, options -> whether the rationale is learnt, whether EOS is
    "ended": ({}, {}, True, True),
    "cut": (CUT, {}, True, False),
    "any status by default": (COPY, {}, True, True),
    "any status, cut": (COPY | CUT, {}, True, False),
    "left out by status": (COPY, {"only_ok": True}, False, True),
    "cut, and left out by status": (COPY | CUT, {"only_ok": True}, False, True),
    "kept by status": ({}, {"only_ok": True}, True, True),
    "outside coverage": ({}, {"coverage": 0}, False, True),
    "cut, and outside coverage": (CUT, {"coverage": 0}, False, True),
    "nothing said": (MUTE, {}, False, True),
    "nothing said in time": (MUTE | CUT, {}, False, True),
}


@pytest.mark.parametrize("name", ENDS)
def test_eos_ends_what_ended_and_nothing_that_was_cut(folder, tmp_path, name):
    fields, options, learnt, ended = ENDS[name]
    t = Tokenizer(folder)
    row = ledger(t, tmp_path, **fields)
    example = Encoder(t, **options).example(row)
    end = [t.end_id] if ended else []
    if learnt:
        assert example.reference == row["reference_ids"]
        assert example.rationale == row["rationale_ids"] + end
        assert example.left_out == ""
    else:
        assert example.reference == row["reference_ids"] + end
        assert example.rationale == []


def test_a_pair_may_have_a_field_finish_of_its_own_and_ends_with_eos(folder, tmp_path):
    t = Tokenizer(folder)
    rows = [PAIRS[0] | {"finish": "length", "status": "draft"}]
    [row] = read_rows([write_jsonl(tmp_path / "a.jsonl", rows)])
    example = Encoder(t).example(row)
    assert example.reference == [*t.answer(row["reference"]), t.end_id]
    assert example.rationale == []


def test_a_rationale_that_is_left_out_says_why(folder, tmp_path):
    t = Tokenizer(folder)
    row = ledger(t, tmp_path, status="copy")
    assert "copy" in Encoder(t, only_ok=True).example(row).left_out
    assert "coverage" in Encoder(t, coverage=0).example(row).left_out


@pytest.mark.parametrize("finish", ["eos", "length"])
@pytest.mark.parametrize("said_nothing", [False, True])
def test_an_answer_is_a_rationale_after_an_empty_reference(folder, tmp_path, finish, said_nothing):
    t = Tokenizer(folder)
    answer = "" if said_nothing else "Tomatoes."
    ids = t.answer(answer)
    fields = {"reference": "", "reference_ids": [], "rationale": answer, "rationale_ids": ids}
    example = Encoder(t).example(ledger(t, tmp_path, finish=finish, **fields))
    end = [t.end_id] if finish == "eos" else []
    assert example.reference == []
    assert example.rationale == ids + end


def test_a_larger_coverage_contains_a_smaller(folder, tmp_path):
    t = Tokenizer(folder)
    row = {"prompt": "Why?", "response": "So.", "rationale": "\nThus."}
    rows = read_rows([write_jsonl(tmp_path / "a.jsonl", [row] * 1000)])
    kept = []
    for coverage in (0, 0.25, 0.5, 0.9, 1):
        encoder = Encoder(t, coverage=coverage)
        kept.append({row["id"] for row in rows if encoder.example(row).rationale})
    for smaller, larger in itertools.pairwise(kept):
        assert smaller < larger
    assert len(kept[0]) == 0
    assert len(kept[-1]) == 1000
    assert abs(len(kept[2]) - 500) < 80  # five standard deviations


def test_a_ledger_trains_on_its_own_ids_and_edited_or_foreign_rows_by_text(folder, tmp_path):
    t = Tokenizer(folder)
    encoder = Encoder(t)
    first = PAIRS[0]["reference"]
    pieces = [t.sp.piece_to_id(piece) for piece in ("<0x0A>", "b", "o", "a", "t")]
    by_text = t.continuation(first, t.answer(first), "\nboat")
    assert by_text != pieces
    sampled = {"rationale": "\nboat", "rationale_ids": pieces}
    own = encoder.example(ledger(t, tmp_path, **sampled))
    assert own.rationale == [*pieces, t.end_id]
    foreign = ledger(t, tmp_path, {"tokenizer_hash": "other", "chat": "llama2"}, **sampled)
    assert encoder.example(foreign).rationale == [*by_text, t.end_id]
    edited = encoder.example(ledger(t, tmp_path, rationale="\nship", rationale_ids=pieces))
    assert t.decode(edited.rationale) == "\nship"
    edited = encoder.example(ledger(t, tmp_path, reference="The ship waits."))
    assert t.decode(edited.reference) == "The ship waits."
    assert t.decode(edited.rationale) == WHY


OTHERS = {
    # options, settings of the ledger, fields of its row -> what is named
    "an id beyond the vocabulary": ({}, {}, {"rationale_ids": [480]}, "480"),
    "a negative id": ({}, {}, {"reference_ids": [5, -1]}, "-1"),
    "an id that is a truth": ({}, {}, {"reference_ids": [True]}, "true"),
    "ids that are text": ({}, {"tokenizer_hash": "x"}, {"rationale_ids": "5"}, ""),
    "a rationale that is a number": ({}, {}, {"rationale": 7}, "rationale"),
    "a rationale of a surrogate": ({}, {}, {"rationale": "\ud800"}, ""),
    "another chat": ({}, {"chat": "llama2"}, {}, "--chat.*llama2"),
    "another template": ({"template": "{source}"}, {}, {}, "--template"),
    "another system prompt": ({"system": "Be brief."}, {}, {}, "--system"),
    "another template, and tokenizer": (
        {"template": "{source}"},
        {"tokenizer_hash": "x"},
        {},
        "--template",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_ledger_of_other_settings_is_refused_by_place(folder, tmp_path, name):
    options, meta, fields, words = OTHERS[name]
    t = Tokenizer(folder)
    with pytest.raises(ValueError, match=rf"l\.jsonl:1: .*{words}"):
        Encoder(t, **options).example(ledger(t, tmp_path, meta, **fields))


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_file_of_settings_is_told_by_its_name(folder, tmp_path, odd):
    t = Tokenizer(folder)
    ledger(t, tmp_path)
    meta = write(tmp_path / "l.meta.json", ODD[odd])
    if odd == "object":  # settings of no tokenizer and no prompt: the row is read by its text
        assert Encoder(t).example(read_rows([str(tmp_path / "l.jsonl")])[0]).rationale
        return
    with pytest.raises(ValueError, match=rf"^{meta}:1: [^\n]*$"):
        read_rows([str(tmp_path / "l.jsonl")])


@pytest.mark.parametrize("name", ["system", "template"])
def test_a_setting_that_must_be_text_is_told_by_file(folder, tmp_path, name):
    with pytest.raises(ValueError, match=rf"l\.meta\.json: {name}"):
        ledger(Tokenizer(folder), tmp_path, {name: 3})


# 4. Odd input: one line, whatever a file holds

BROKEN_FOLDERS = {
    "no tokenizer": ("tokenizer.model", None, "tokenizer.model: "),
    "no SentencePiece": ("tokenizer.model", "x", "tokenizer.model: "),
    "an empty tokenizer": ("tokenizer.model", "", "tokenizer.model: "),
    "broken JSON": ("tokenizer_config.json", '{\n"a": }', "tokenizer_config.json:2: "),
    "half a file": ("generation_config.json", "{", "generation_config.json:1: "),
    "a list": ("tokenizer_config.json", "[]", "tokenizer_config.json:1: "),
    "an unknown chat": ("tokenizer_config.json", {"chat_template": "x"}, "--chat"),
    "an id that is no number": (
        "tokenizer_config.json",
        {"added_tokens_decoder": {"x": {"content": "<a>"}}},
        "added token",
    ),
    "an id of -5": ("added_tokens.json", {"<a>": -5}, "-5"),
    "a template in Latin-1": ("chat_template.jinja", b"x\n\xfc", "chat_template.jinja:2: "),
    "an EOS of letters": ("generation_config.json", {"eos_token_id": ["x"]}, "generation_config"),
    "an EOS of -1": ("generation_config.json", {"eos_token_id": -1}, "generation_config"),
}


@pytest.mark.parametrize("name", BROKEN_FOLDERS)
def test_a_broken_tokenizer_folder_is_told_by_file(folder, tmp_path, name):
    file, content, words = BROKEN_FOLDERS[name]
    write(tmp_path / "tokenizer.model", (folder / "tokenizer.model").read_bytes())
    if content is None:
        (tmp_path / file).unlink()
    else:
        write(tmp_path / file, content)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        Tokenizer(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))


def test_a_vocabulary_without_the_tags_of_its_chat_is_told(folder, tmp_path):
    proto = (folder / "tokenizer.model").read_bytes()
    write(tmp_path / "tokenizer.model", proto.replace(b"<|im_", b"<|IM_"))
    write(tmp_path / "tokenizer_config.json", {"chat_template": CHATML})
    with pytest.raises(ValueError, match="--chat"):
        Tokenizer(tmp_path)


READ = {
    "tokenizer_config.json": ["bos_token", "eos_token", "chat_template", "added_tokens_decoder"],
    "generation_config.json": ["eos_token_id"],
    "added_tokens.json": ["<new>", "<|im_end|>"],
}


@pytest.mark.parametrize("file", READ)
def test_an_odd_value_in_a_tokenizer_file_is_one_line_or_does_no_harm(
    folder, pairs, tmp_path, monkeypatch, capsys, file
):
    write(tmp_path / "tokenizer.model", (folder / "tokenizer.model").read_bytes())
    write(tmp_path / "tokenizer_config.json", {"chat_template": CHATML})
    shapes = ["{}", "[{}]", '{{"content": {}}}', '{{"7": {{"content": {}}}}}']
    for name, shape, odd in itertools.product(READ[file], shapes, ODD.values()):
        value = shape.format(odd)
        write(tmp_path / file, f'{{"chat_template": "<|im_start|>", "{name}": {value}}}')
        last_line(data, ["--model", tmp_path, "--data", pairs], monkeypatch, capsys)


SYSTEM = "<|im_start|>system\\n\\ud800<|im_end|>"


def test_a_surrogate_within_a_chat_template_is_one_line(
    folder, pairs, tmp_path, monkeypatch, capsys
):
    write(tmp_path / "tokenizer.model", (folder / "tokenizer.model").read_bytes())
    write(tmp_path / "tokenizer_config.json", f'{{"chat_template": "{SYSTEM}"}}')
    last_line(data, ["--model", tmp_path, "--data", pairs], monkeypatch, capsys)


@pytest.mark.parametrize("part", range(4))
def test_an_odd_row_is_one_line_with_its_place_or_does_no_harm(
    folder, tmp_path, monkeypatch, capsys, part
):
    file = tmp_path / "odd.jsonl"
    refused = 0
    for seed in range(75 * part, 75 * (part + 1)):
        write(file, f"{GOOD}\n{odd_row(seed)}\n")
        line = last_line(data, ["--model", folder, "--data", file], monkeypatch, capsys)
        if line:
            assert line.startswith(f"error: {file}:2: ")
            refused += 1
    assert 0 < refused < 75


# 5. The command


def test_the_command_counts_and_shows_an_example_in_colour(folder, pairs, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    words = ["--model", str(folder), "--data", str(pairs), "--show", "2"]
    data.main(data.parser().parse_args(words))
    out = capsys.readouterr().out
    t = Tokenizer(folder)
    examples = [Encoder(t).example(row) for row in read_rows([pairs])]
    assert out.startswith("7 rows")
    for name in ("prompt", "reference"):
        total = sum(len(getattr(example, name)) for example in examples)
        assert f"{name}: {total} tokens" in out
    assert "row 2" in out
    shown = re.sub("\033.*?m", "", out)
    for ids in (examples[2].prompt, examples[2].reference):
        pieces = [t.sp.id_to_piece(i) for i in ids]
        assert "".join(pieces) in shown
    assert re.search(r"\033\[90m<s>|\033\[90m<\|im_start\|>", out)
    assert re.search(r"\033\[32m▁?Please", out)


def test_the_command_counts_the_statuses_and_openings_of_a_ledger(folder, tmp_path, capsys):
    t = Tokenizer(folder)
    row = json.dumps(ledger(t, tmp_path))
    rows = [json.loads(row) | {"id": i} for i in range(3)]
    rows[1] |= {"status": "copy", "finish": "length"}
    write_jsonl(tmp_path / "l.jsonl", rows)
    words = ["--model", str(folder), "--data", str(tmp_path / "l.jsonl")]
    data.main(data.parser().parse_args(words))
    out = capsys.readouterr().out
    assert re.search("2 .*ok", out)
    assert re.search("1 .*copy", out)
    assert re.search("3 .*The wind turns.", out)


def test_a_mistake_on_the_command_line_is_one_line(folder, pairs, tmp_path, monkeypatch, capsys):
    given = ["--model", folder, "--data", pairs]
    assert "--show" in error_of(data, [*given, "--show", -1], monkeypatch, capsys)
    assert "--colour" in error_of(data, [*given, "--colour"], monkeypatch, capsys)
    assert "absent" in error_of(data, [*given, "--model", "absent"], monkeypatch, capsys)
    line = error_of(data, [*given, "--direction", "fr-en"], monkeypatch, capsys)
    assert line.startswith(f"error: {pairs}:1: ")
    for option in ("--system", "--template"):  # a byte that is no UTF-8 reaches Python like this
        error_of(data, [*given, option, "{source}\udcff"], monkeypatch, capsys)


def test_the_command_itself_ends_with_status_2_and_one_line(folder, tmp_path):
    file = write(tmp_path / "a.jsonl", f'{GOOD}\n{{"source": "x"}}\n')
    command = [sys.executable, data.__file__, "--model", str(folder), "--data", file]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(rf"error: {file}:2: [^\n]*\n", done.stderr), done.stderr


IMPORTED = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"


@pytest.mark.parametrize("name", ["data", "generate", "train", "evaluate"])
def test_ctrl_c_while_torch_is_imported_ends_a_script_without_a_word(tmp_path, name):
    write(tmp_path / "torch.py", IMPORTED)  # it comes in place of the true one
    script = Path(data.__file__).with_name(f"{name}.py")
    variables = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, script], env=variables, capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGINT
    assert done.stdout == done.stderr == b""
