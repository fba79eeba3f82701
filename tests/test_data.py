"""From files to ids: prompts as the official encoders make them, every file format, one line for every mistake."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHATML, LINES, PAIRS, write_tokenizer
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

import data
from data import Encoder, Tokenizer, collate, read_rows, read_template

WORDS = "The harbour|waits|Ärger,|naïve|港は静かだ|你好|🚀|👩‍🚀|\n|\n\n|\t|don't|3.14|привет".split("|")
TAGS = ["[INST]", "[/INST]", "</s>", "<s>", "<<SYS>>", "<|user|>", "<|im_start|>", "<0x0A>", "<unk>"]
ZEPHYR = "{% for message in messages %}\n{% if message['role'] == 'user' %}\n" + (
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
MENDER = "{% if messages[0]['role'] != 'system' %}{{'<|im_start|>system\nYou mend boats.<|im_end|>\n'}}{% endif %}"
BOS, V1, V3 = "{{ bos_token }}", "tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"
MARKS = dict(llama2="<<SYS>>", mistral="[INST]", mistral_v3="[INST]", zephyr=ZEPHYR, chatml=CHATML, plain="")


def write(path: Path, content) -> str:
    if not isinstance(content, (str, bytes)):
        content = "".join(json.dumps(row) + "\n" for row in ([content] if isinstance(content, dict) else content))
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def conversations(words: list[str]):
    """Seeded conversations of one to three turns with an answer; half of them have a system prompt."""
    for seed in range(100):
        r, texts = random.Random(seed), []
        for _ in range(2 * r.randint(1, 3) + 1):
            text = "".join(r.choice(words) + r.choice(["", " ", " ", "  "]) for _ in range(r.randint(1, 8)))
            texts.append(r.choice(["", "", " ", "\n"]) + text if text.strip() else "A boat.")
        talk = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts[2:])]
        yield [{"role": "system", "content": texts[0]}] * (seed % 2) + talk, texts[1]


@pytest.mark.parametrize("file, mark", [(V1, "[INST]"), (V3, "[INST]"), (V1, "<<SYS>>")])
def test_mistral_and_llama2_prompts_and_answers_equal_the_official_encoders(tmp_path, file, mark):
    common = pytest.importorskip("mistral_common")
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    write(tmp_path / "tokenizer.model", (Path(common.__file__).parent / "data" / file).read_bytes())
    write(tmp_path / "tokenizer_config.json", {"chat_template": mark})
    t, official = Tokenizer(tmp_path), getattr(MistralTokenizer, file[-2:])()
    for messages, answer in conversations(WORDS + TAGS):
        if mark == "[INST]":
            forced = {"role": "assistant", "content": answer.rstrip(" "), "prefix": True}
            ids = official.encode_chat_completion(ChatCompletionRequest(messages=[*messages, forced])).tokens
            assert t.chat(messages) + t.answer(forced["content"]) == ids, messages
        else:  # Meta's recipe
            texts, ids = [m["content"] for m in messages], []
            if messages[0]["role"] == "system":
                texts = [f"<<SYS>>\n{texts[0]}\n<</SYS>>\n\n{texts[1]}", *texts[2:]]
            for user, said in zip(texts[::2], texts[1::2]):
                ids += [1, *t.sp.encode(f"[INST] {user.strip()} [/INST] {said.strip()} "), 2]
            assert t.chat(messages) == [*ids, 1, *t.sp.encode(f"[INST] {texts[-1].strip()} [/INST]")], messages


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("template", [ZEPHYR, BOS + ZEPHYR, CHATML, BOS + CHATML, MENDER + CHATML])
def test_zephyr_and_chatml_prompts_and_answers_equal_transformers(tmp_path, template, legacy):
    names = dict(bos_token="<s>", eos_token="</s>", tokenizer_class="LlamaTokenizer")
    t = Tokenizer(write_tokenizer(tmp_path, chat_template=template, legacy=legacy, **names))
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    for messages, answer in conversations(WORDS):
        ids = t.chat(messages)
        assert ids == theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False), messages
        ids += [*t.answer(answer), t.end_id]
        whole = theirs.apply_chat_template([*messages, {"role": "assistant", "content": answer}], return_dict=False)
        assert ids == whole[: len(ids)], answer


def user_defined(folder: Path, pieces: list[str], template: str, byte_fallback: bool = True) -> Tokenizer:
    """A vocabulary that itself finds `pieces` in any text; the config marks them, and two ids beyond it, as special."""
    SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_prefix=str(folder / "tokenizer"), model_type="bpe", character_coverage=1.0,
        normalization_rule_name="identity", remove_extra_whitespaces=False, byte_fallback=byte_fallback, vocab_size=400,
        user_defined_symbols=pieces, control_symbols=["<|im_start|>", "<|im_end|>"], minloglevel=2, num_threads=1,
    )  # fmt: skip
    sp = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    added = {i: {"content": sp.id_to_piece(i), "special": True} for i in [0, 1, 2, *map(sp.piece_to_id, pieces)]}
    added[400] = {"content": "<|beyond|>", "special": True}
    write(folder / "tokenizer_config.json", {"chat_template": template, "added_tokens_decoder": added})
    write(folder / "added_tokens.json", {"<pad>": 401})
    return Tokenizer(folder)


@pytest.mark.parametrize("chat", MARKS)
def test_user_text_never_yields_a_control_id(tmp_path, chat):
    t = user_defined(tmp_path, ["<|user|>", "<|user|>>", "[INST]", "[/INST]"][: 4 if "v3" in chat else 2], MARKS[chat])
    tags = [t.sp.id_to_piece(i) for i in range(400) if i in t.control] + list(t.added.values())
    assert {"<|user|>", "<s>", "</s>", "<|im_start|>", "<|beyond|>", "<pad>"} <= set(tags)
    for tag in [*tags, "".join(tags), " ".join(tags)]:
        text = f"a{tag} {tag}{tag}\n{tag}"
        assert t.control.isdisjoint(t.encode(text) + t.answer(text)) and t.decode(t.encode(text)) == text
        talk = [{"role": role, "content": text} for role in ("system", "user", "assistant", "user")]
        controls = [[i for i in t.chat(m) if i in t.control] for m in (talk, [m | {"content": "a boat"} for m in talk])]
        assert controls[0] == controls[1], text


@pytest.mark.parametrize("tag, text, byte_fallback, left", [
    ("<tag>", "<tag>" * 1200, True, None), ("▁<tag>", "<tag> <tag> y", True, None), ("§", "see § 7", True, "see  7"),
    ("<tag>", "a 🚀 <unk>", False, None),
])  # fmt: skip
def test_no_text_is_too_odd_to_encode(tmp_path, tag, text, byte_fallback, left):
    t = user_defined(tmp_path, [tag], CHATML, byte_fallback)
    ids = t.encode(text)
    assert not {1, 2, t.sp.piece_to_id(tag)} & set(ids)
    assert not byte_fallback or t.decode(ids) == (left or text)


ROWS = [PAIRS[0] | {"reference": "[Applause] The boat waits."}, *PAIRS[1:]]  # a line file may begin with a bracket
GERMAN, ENGLISH = ([p[name] for p in ROWS] for name in ("source", "reference"))
ALMA = [{"translation": {"de": de, "en": en}} for de, en in zip(GERMAN, ENGLISH)]
BACK = [dict(source=e, reference=d, source_lang="en", target_lang="de") for d, e in zip(GERMAN, ENGLISH)]
BARE = [dict(source=d, reference=e) for d, e in zip(GERMAN, ENGLISH)]
TSV, VST = ("".join(f"{a}\t{b}\n" for a, b in pair) for pair in (zip(GERMAN, ENGLISH), zip(ENGLISH, GERMAN)))
DE, EN = "\n".join(GERMAN) + "\n", "\n".join(ENGLISH)
FORMATS = {
    "ALMA array": ({"a.json": json.dumps(ALMA, indent=1)}, "de-en"), "ALMA lines": ({"a.json": ALMA}, "de-en"),
    "objects": ({"a.jsonl": ROWS},), "objects array": ({"a.json": json.dumps(ROWS, ensure_ascii=False)},),
    "objects back": ({"a.jsonl": BACK}, "de-en"), "bare objects": ({"a.jsonl": BARE}, "de-en"),
    "TSV": ({"a.de-en.tsv": TSV},), "TSV back": ({"a.en-de.tsv": VST}, "de-en"), "bare TSV": ({"a.tsv": TSV}, "de-en"),
    "lines": ({"a.de": DE, "a.en": EN},), "lines back": ({"a.en": EN, "a.de": DE}, "de-en"),
    "bare lines": ({"in.txt": DE, "out.txt": EN}, "de-en"),
}  # fmt: skip


@pytest.mark.parametrize("ending, bom", [("\n", ""), ("\r\n", ""), ("\n", "\ufeff")], ids=["LF", "CRLF", "BOM"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows_one_way_and_both(tmp_path, name, ending, bom):
    files, *directions = FORMATS[name]
    paths = [write(tmp_path / file, content) for file, content in files.items()]
    for path in map(Path, paths):
        path.write_bytes((bom + path.read_text("utf-8").replace("\n", ending)).encode())
    one, both = read_rows(paths, directions), read_rows(paths, ["de-en", "en-de"])
    assert [row.pop("id") for row in one + both] == [*range(7), *range(14)]
    assert all(row.pop("where").startswith(paths[0] + ":") and row.pop("meta") == {} for row in one + both)
    assert one == ROWS and all(both.count(row) == 1 for row in ROWS + BACK)


def test_conversations_read_alike_once_and_ids_are_kept_or_the_place_in_the_data(tmp_path):
    ask, say = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
    rows = [{"prompt": "Why?", "response": "So."}, {"messages": [ask, say], "id": "x"}, {"messages": [ask, say]}]
    files = [write(tmp_path / f"{i}.jsonl", [row]) for i, row in enumerate(rows)]
    rows = {"question_id": 81, "turns": ["Why?", "And then?"]}, {"prompt": "Why?"}
    files.append(write(tmp_path / "asked.jsonl", rows))
    got = [(r["messages"], r["reference"], r["id"]) for r in read_rows(files, prompts=True)]
    assert got == [([ask], *x) for x in [("So.", 0), ("So.", "x"), ("So.", 2), (None, 81), (None, 4)]]
    got_two = read_rows(files[:3], ["de-en", "en-de"])  # a conversation has no direction
    assert [(r["messages"], r["reference"], r["id"]) for r in got_two] == got[:3]


GOOD, LINE, SAID = json.dumps(PAIRS[0]) + "\n", "Tor\tgate\n", [{"role": "user", "content": "Why?"}]
FORCED = dict(reference_ids=[5], rationale_ids=[5], finish="eos")
SECOND = {
    "English Unicode string null": {"reference": None}, "German 7": {"source": 7}, '"id"': {"id": [1]},
    'German blank ""': {"source": ""}, "German blank": {"source": "\u3000\n"}, "\\ud800": {"source": "\ud800x"},
    "source_lang": {"source_lang": None}, "source_lang xx": {"source_lang": "xx"}, "_lang 1": {"source_lang": [1]},
}  # fmt: skip
FIRST = {
    '"user", "user"': {"messages": SAID * 2}, "answer": {"messages": SAID}, '"messages" turn': {"messages": []},
    '"messages"': {"messages": [SAID]}, '"response"': {"prompt": "Why?"}, '"turns"': {"turns": "Why?"}, "object": [1],
    "--direction": BARE[0], "two-way --direction": ALMA[0], "wanted text": {"text": "x"},
    "source_lang": {"translation": None}, '"assistant"': {"response": "x"},
    "user's null": {"prompt": None, "response": "x"},
    "assistant's 7": {"messages": [*SAID, {"role": "assistant", "content": 7}]},
}  # fmt: skip
BAD = [
    *[("a.jsonl", [PAIRS[0], PAIRS[1] | fields], ":2: " + words) for words, fields in SECOND.items()],
    *[("a.jsonl", [row], ":1: " + words) for words, row in FIRST.items()],
    ("a.jsonl", "", ": empty"), ("a.de-en.tsv", " \n \n", ": empty"), ("a.json", "[]", ": no"),
    ("a.jsonl", None, ": No such file"), ("a.txt", None, ": No such file"), ("a.de", "Tor\n", ": second"),
    ("a.jsonl", GOOD + "\n{1}", ":3: JSON"), ("a.json", f"[{GOOD},{GOOD},{{1}}]", ":3: JSON"),
    ("a.json", f"[{GOOD},{GOOD},", ":3: JSON"), ("a.json", f"[{GOOD}{GOOD}]", ":2: JSON"),
    ("a.json", f"[{GOOD}]\n[{GOOD}]", ":3: JSON"), ("a.de-en.tsv", LINE + "a\tb\tc\n", ":2: 2 tabs"),
    ("a.de-en.tsv", "Tor\tgate\nTür\tdoor\n".encode("latin-1"), ":2: UTF-8 0xfc"), ("a.tsv", LINE, ": --direction"),
    ("a.de-en.tsv", LINE + "\n" + LINE, ":2:"), ("a.de-en.tsv", LINE, ": fr-en de-en", "fr-en"),
    ("a.json", ALMA, ":1: de fr-en", "fr-en"), ("a.jsonl", PAIRS, ":1: de fr-en", "fr-en"),
    ("a.json", {"translation": "Tor"}, ":1: Tor", "de-en"), ("a.tsv", LINE, '"xx-de"', "xx-de"),
    ("a.tsv", LINE, '"german"', "german"), ("a.tsv", LINE, '"de-de"', "de-de"),
]  # fmt: skip


@pytest.mark.parametrize("case", BAD, ids=lambda case: case[0] + case[2])
def test_a_mistake_in_a_file_is_told_by_place(tmp_path, case):
    file, content, words, *directions = case
    path = str(tmp_path / file) if content is None else write(tmp_path / file, content)
    with pytest.raises(ValueError) as e:
        read_rows([path], directions)
    words = words if directions and words[0] == '"' else path + words
    assert all(word in str(e.value) for word in words.split()) and "\n" not in str(e.value), e.value


def test_templates_know_three_names_and_leave_the_braces_of_a_source_alone(folder, tmp_path):
    for text, words in (("{source} {text}", 'source_lang}, .*, found "text"'), ("Translate it.", "must name {source}")):
        with pytest.raises(ValueError, match=words):
            read_template(text)
    row = PAIRS[0] | {"source": "{target_lang} {x} {"}
    for text in (write(tmp_path / "t.txt", "{target_lang}:\n{source}\n"), "{target_lang}:\\n{source}"):
        [message] = Encoder(Tokenizer(folder), read_template(text)).messages(row)
        assert message["content"] == "English:\n{target_lang} {x} {"


CUT, COPY, MUTE = dict(finish="length"), dict(status="copy"), dict(rationale="", rationale_ids=[])


def ledger(t: Tokenizer, folder: Path, meta: dict | None = None, **fields) -> dict:
    """One row as generate.py writes it, with some fields changed afterwards, read back."""
    row, first, why = dict(PAIRS[0], id=0, finish="eos", status="ok"), PAIRS[0]["reference"], "\n\nThe wind turns."
    row |= dict(rationale=why, reference_ids=t.answer(first), rationale_ids=t.continuation(first, t.answer(first), why))
    meta = dict(tokenizer_hash=t.hash, chat=t.chat_name, template=data.TEMPLATE, system=None) | (meta or {})
    write(folder / "l.meta.json", meta)
    return read_rows([write(folder / "l.jsonl", [row | fields])])[0]


def test_targets_are_reference_rationale_and_eos_and_no_prompt_token_carries_loss(folder):
    t = Tokenizer(folder)
    rows = [p | {"id": i, "where": "", "rationale": f"\n\n{p['source']}" * (i % 3)} for i, p in enumerate(PAIRS)]
    examples = [Encoder(t).example(row) for row in rows]
    tokens, select, targets, rationale = collate(examples)
    at, T = 0, tokens.shape[1]
    for b, (e, row) in enumerate(zip(examples, rows)):
        first, n = len(e.prompt), len(e) - len(e.prompt)
        mine, places, marks = (x[at : at + n].tolist() for x in (targets, select - b * T, rationale))
        assert t.decode(mine) == row["reference"] + row["rationale"] and t.decode(e.reference) == row["reference"]
        assert mine[-1] == t.end_id and mine.count(t.end_id) == 1 and places == [*range(first - 1, len(e) - 1)]
        assert e.prompt + mine[:-1] == tokens[b, : len(e) - 1].tolist() == collate([e])[0][0].tolist()
        assert marks == [i >= len(e.reference) for i in range(n)] and any(marks) == bool(row["rationale"])
        at += n
    assert at == len(targets) == len(select) == len(rationale)


@pytest.mark.parametrize("fields, coverage, rationale, eos", [
    ({}, 1, True, True), (CUT, 1, True, False), (COPY, 1, False, True), (CUT | COPY, 1, False, True),
    ({}, 0, False, True), (CUT, 0, False, True), (MUTE, 1, False, True), (MUTE | CUT, 1, False, False),
    (MUTE | CUT | COPY, 1, False, True),
])  # fmt: skip
def test_eos_ends_what_ended_and_nothing_that_was_cut(folder, tmp_path, fields, coverage, rationale, eos):
    t = Tokenizer(folder)
    row = ledger(t, tmp_path, **fields)
    e, end = Encoder(t, coverage=coverage).example(row), [t.end_id] * eos
    assert e.rationale == (row["rationale_ids"] + end if rationale else [])
    assert e.reference == row["reference_ids"] + ([] if rationale else end)


@pytest.mark.parametrize("fields, coverage, eos", [(COPY, 1, True), (COPY | CUT, 1, False), (COPY, 0, None)])
def test_rationales_of_any_status_are_kept_on_request(folder, tmp_path, fields, coverage, eos):
    t = Tokenizer(folder)
    row = ledger(t, tmp_path, **fields)
    e = Encoder(t, coverage=coverage, keep=True).example(row)
    assert e.rationale == ([] if eos is None else row["rationale_ids"] + [t.end_id] * eos)
    assert e.reference == row["reference_ids"] + [t.end_id] * (eos is None)
    assert e.note == ("outside coverage" if eos is None else "")


def test_validation_files_go_by_a_name_or_by_their_own(tmp_path):
    de, en, txt = (write(tmp_path / name, text) for name, text in (("a.de", DE), ("a.en", EN), ("b.txt", GOOD)))
    assert data.named_files([f"x={de}", en, txt, f"x={tmp_path}/c.jsonl"]) == {
        "x": [de, en, f"{tmp_path}/c.jsonl"], "b": [txt]}  # fmt: skip


def test_a_row_with_an_id_of_its_own_gets_another_for_each_direction(tmp_path):
    file = write(tmp_path / "a.jsonl", [PAIRS[0] | {"id": 0}, PAIRS[1] | {"id": "x"}, PAIRS[2]])
    ids = [row["id"] for row in read_rows([file], ["de-en", "en-de"])]
    assert ids == [0, "x", 2, "0 en-de", "x en-de", 5]


def test_a_larger_coverage_contains_a_smaller(folder):
    t, row = Tokenizer(folder), PAIRS[0] | {"where": "", "rationale": "\nSo."}
    shares = [Encoder(t, "{source}", coverage=c) for c in (0, 0.25, 0.5, 0.9, 1)]
    kept = [{i for i in range(1000) if share.example(row | {"id": i}).rationale} for share in shares]
    assert all(a < b for a, b in zip(kept, kept[1:])) and len(kept[0]) == 0 and len(kept[-1]) == 1000
    assert abs(len(kept[2]) - 500) < 80  # five standard deviations


def test_a_ledger_trains_on_its_own_ids_and_edited_or_foreign_rows_by_text(folder, tmp_path):
    t, first, text = Tokenizer(folder), PAIRS[0]["reference"], "\nboat"
    pieces = [t.sp.piece_to_id(p) for p in ("<0x0A>", "b", "o", "a", "t")]
    by_text = t.continuation(first, t.answer(first), text)
    sampled = dict(rationale=text, rationale_ids=pieces)
    learnt = lambda *meta, **fields: Encoder(t).example(ledger(t, tmp_path, *meta, **fields))  # noqa: E731
    assert by_text != pieces and learnt(**sampled).rationale == [*pieces, t.end_id]
    assert learnt({"tokenizer_hash": "other", "chat": "llama2"}, **sampled).rationale == [*by_text, t.end_id]
    assert t.decode(learnt(rationale="\nship", rationale_ids=pieces).rationale) == "\nship"
    e = learnt(reference="The ship waits.")
    assert t.decode(e.reference) == "The ship waits." and t.decode(e.rationale) == "\n\nThe wind turns."


@pytest.mark.parametrize("settings, meta, fields, words", [
    ({}, {}, dict(rationale_ids=[480]), "0 to 479.*480"), ({}, {"chat": "llama2"}, {}, "--chat"),
    ({}, {}, dict(reference_ids=[5, -1]), "_ids"), ({}, {"tokenizer_hash": "other"}, dict(rationale_ids="5"), "_ids"),
    ({}, {}, dict(rationale=7), "rationale"), ({}, {}, dict(rationale="\ud800"), "rationale"),
    ({"template": "{source}"}, {}, {}, "--template"), ({"system": "Be brief."}, {}, {}, "--system"),
    ({"template": "{source}"}, {"tokenizer_hash": "other"}, {}, "--template"),
])  # fmt: skip
def test_a_ledger_of_other_settings_is_refused_by_place(folder, tmp_path, settings, meta, fields, words):
    t = Tokenizer(folder)
    with pytest.raises(ValueError, match=rf"l\.jsonl:1: .*{words}"):
        Encoder(t, **settings).example(ledger(t, tmp_path, meta, **fields))


@pytest.mark.parametrize("file, content, words", [
    ("tokenizer.model", None, "tokenizer.model: no such file"), ("tokenizer.model", "x", ".model: not understood"),
    ("tokenizer_config.json", '{\n"a": }', "config.json:2: "), ("generation_config.json", "{", "config.json:1: "),
    ("tokenizer_config.json", "[]", "config.json"), ("tokenizer_config.json", {"chat_template": "x"}, "--chat"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<a>"}}}, "config.json: not understood"),
    ("chat_template.jinja", b"<|im_start|>\n\xfc", "chat_template.jinja:2: not UTF-8"),
    ("generation_config.json", {"eos_token_id": ["x"]}, "generation_config.json: not understood"),
    ("tokenizer_config.json", {"chat_template": "<|im_start|>"}, "lacks <|im_start|>, <|im_end|>"),
])  # fmt: skip
def test_a_broken_tokenizer_folder_is_told_by_file(folder, tmp_path, file, content, words):
    proto = (folder / "tokenizer.model").read_bytes()
    proto = proto.replace(b"<|im_", b"<|IM_") if "lacks" in words else proto
    write(tmp_path / "tokenizer.model", proto)
    (tmp_path / file).unlink() if content is None else write(tmp_path / file, content)
    with pytest.raises(ValueError, match=re.escape(words)):
        Tokenizer(tmp_path)


def test_the_command_shows_an_example_in_colour_and_a_mistake_in_one_line(folder, pairs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    data.main(data.parser().parse_args(["--model", str(folder), "--data", str(pairs), "--show", "2"]))
    out, e = capsys.readouterr().out, Encoder(Tokenizer(folder)).example(read_rows([str(pairs)])[2])
    assert out.startswith("7 rows") and "row 2" in out and "\033[31m<|im_end|>\033[0m" in out
    for ids, code in ((e.prompt, 90), (e.reference, 32)):
        assert " ".join(map(str, ids)) in out and f"\033[{code}m" in out
    files = [write(tmp_path / "a.de", "eins\nzwei\ndrei\n"), write(tmp_path / "a.en", "one\ntwo\n")]
    command = [sys.executable, data.__file__, "--model", folder, "--data", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(rf"error: {files[0]}:3: 3 lines, .*{files[1]} has 2.*\n", done.stderr), done.stderr
