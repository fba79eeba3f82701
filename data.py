"""From files to token ids: tokenizer, chat formats, pairs and ledgers, and which tokens carry loss.

    python data.py --model DIR --data train.de-en.json --direction de-en

checks the data, counts it, and shows one example in colour. A training sequence is

    prompt (no loss) | reference y | rationale r | EOS        L = -log P(y, r | I, x)

where I is the instruction and x the source. The segments are kept apart by ids, never found again by text: a tokenizer
may merge across any boundary of strings.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor

# ALMA's wording (Xu et al. 2024), as its code has it; the wording of the RaDis paper is not known
TEMPLATE = "Translate this from {source_lang} to {target_lang}:\n{source_lang}: {source}\n{target_lang}:"
FIELDS = ("source", "source_lang", "target_lang")  # what a template may name
NAMES = (
    "ar Arabic bg Bulgarian ca Catalan cs Czech da Danish de German el Greek en English es Spanish et Estonian fa "
    "Persian fi Finnish fr French gu Gujarati ha Hausa he Hebrew hi Hindi hr Croatian hu Hungarian id Indonesian is "
    "Icelandic it Italian ja Japanese kk Kazakh km Khmer ko Korean lt Lithuanian lv Latvian ms Malay nl Dutch no "
    "Norwegian pl Polish ps Pashto pt Portuguese ro Romanian ru Russian sk Slovak sl Slovenian sr Serbian sv "
    "Swedish sw Swahili ta Tamil th Thai tr Turkish uk Ukrainian ur Urdu vi Vietnamese zh Chinese"
).split()
LANGUAGES = dict(zip(NAMES[::2], NAMES[1::2]))
TURNS = ("user", "assistant")
CHATS = ("llama2", "mistral", "zephyr", "chatml", "plain")
MARKS = {"<|im_start|>": "chatml", "<|user|>": "zephyr", "<<SYS>>": "llama2", "[INST]": "mistral"}  # in chat templates


def check(ok, where: str | Path, message: str, *found) -> None:
    """ValueError `WHERE: MESSAGE, found VALUE` unless `ok`."""
    if not ok:
        raise ValueError(f"{where}: {message}" + "".join(f", found {json.dumps(value)[:40]}" for value in found))


class Tokenizer:
    """SentencePiece with the chat formats. Control tokens are placed by id; text of a user never becomes one.

    chat: a name of CHATS, or "auto" to find it from the chat template in the folder (no template means plain).
    ValueError names the file that is missing, broken or not understood.
    """

    def __init__(self, folder: str | Path, chat: str = "auto"):
        self.folder, file = Path(folder), Path(folder) / "tokenizer.model"
        check(file.is_file(), file, "no such file; a model folder needs its SentencePiece tokenizer.model")
        proto = file.read_bytes()
        try:
            self.sp = SentencePieceProcessor(model_proto=proto)
            # the same model without the space that is put before each text: appended fields override (protobuf)
            self.sp_continue = SentencePieceProcessor(model_proto=proto + b"\x1a\x02\x18\x00")
        except RuntimeError:
            raise ValueError(f"{file}: not a SentencePiece model; download it again") from None
        config_file = self.folder / "tokenizer_config.json"
        config = read_object(config_file)
        try:
            self._read_tokens(config)
            self._read_chat(config, chat)
        except (AttributeError, KeyError, TypeError):
            raise ValueError(f"{config_file}: not understood; download it again") from None
        check(self.eos_id >= 0, file, "has no EOS token, so no answer could ever end")
        self.hash = hashlib.sha256(proto + json.dumps(self.added).encode()).hexdigest()[:16]
        self.adds_space = self.sp.encode("a") != self.sp_continue.encode("a")

    def _read_tokens(self, config: dict) -> None:
        ids = {token["content"]: int(id) for id, token in (config.get("added_tokens_decoder") or {}).items()}
        self.ids = ids | read_object(self.folder / "added_tokens.json")
        self.added = {id: text for text, id in sorted(self.ids.items(), key=lambda item: item[1])}
        self.control = {i for i in range(len(self.sp)) if self.sp.is_control(i)} | set(self.added) - {self.sp.unk_id()}
        tags = sorted({self.sp.id_to_piece(i).replace("▁", " ") for i in self.control if i < len(self.sp)}, key=len)
        self.tags = re.compile("|".join(f"(?={re.escape(tag)})" for tag in tags))
        self.vocab_size = max([len(self.sp), *(i + 1 for i in self.added)])
        self.bos_id = self._id(config.get("bos_token"), self.sp.bos_id())
        self.eos_id = self._id(config.get("eos_token"), self.sp.eos_id())
        self.legacy = bool(config.get("legacy"))  # SentencePiece's space before every text, not only the first

    def _read_chat(self, config: dict, chat: str) -> None:
        template, file = config.get("chat_template") or "", self.folder / "chat_template.jinja"
        template = file.read_text("utf-8") if file.is_file() else template
        if isinstance(template, list):  # several, by name
            template = next((t["template"] for t in template if t.get("name") == "default"), "")
        self.template = template.replace("\\n", "\n")
        known = [name for mark, name in MARKS.items() if mark in self.template] if self.template else ["plain"]
        check(known or chat != "auto", self.folder, f"chat template not known here; give --chat {'|'.join(CHATS)}")
        self.chat_name = known[0] if chat == "auto" else chat
        self.end_id = self._id("<|im_end|>", self.eos_id) if self.chat_name == "chatml" else self.eos_id
        stops = read_object(self.folder / "generation_config.json").get("eos_token_id")
        self.eos_ids = sorted({self.end_id, self.eos_id, *(stops if isinstance(stops, list) else [stops])} - {None})

    def _id(self, piece: str | dict | None, default: int) -> int:
        """The id of an added token or a piece of the vocabulary."""
        piece = piece["content"] if isinstance(piece, dict) else piece
        id = self.ids.get(piece, self.sp.piece_to_id(piece or ""))
        return default if id == self.sp.unk_id() else id

    def encode(self, text: str, within: bool = False) -> list[int]:
        """Text to ids, without BOS or EOS, never with a control token. `within`: the text goes on from one before."""
        sp = self.sp_continue if within else self.sp
        ids = sp.encode(text)
        if self.control.isdisjoint(ids):
            return ids
        # the text holds tags that are pieces of the vocabulary: cut each after its first character, and none is left
        cuts = [0, *(max(m.start(), 1) for m in self.tags.finditer(" " + text)), len(text)]
        ids = [i for a, b in zip(cuts, cuts[1:]) for i in (self.sp_continue if a else sp).encode(text[a:b])]
        return [i for i in ids if i not in self.control]  # a tag of one character can't be cut: it is left out

    def decode(self, ids: list[int]) -> str:
        """Ids to text; control and added tokens are left out."""
        return self.sp.decode([i for i in ids if i not in self.control and i < len(self.sp)])

    def decode_after(self, before: list[int], ids: list[int]) -> str:
        """The text of `ids` where they follow `before`: a piece decoded alone would lose its leading space."""
        start, whole = self.decode(before), self.decode(before + ids)
        return whole[len(start) :] if whole.startswith(start) else self.decode(ids)

    def first_line_ends(self, ids: list[int]) -> bool:
        """Whether the last of `ids` ends the first line that is not empty."""
        newline = "\n" in self.decode(ids[-1:]) or ids[-1] == self.sp.piece_to_id("<0x0A>")
        return newline and "\n" in self.decode(ids).lstrip()

    def answer(self, text: str) -> list[int]:
        """Ids of an assistant's answer as they follow `chat`, without EOS."""
        if self.chat_name in ("zephyr", "chatml"):  # goes on within the text that ends "assistant\n"
            return self.encode(text, within=True)
        return self.encode(text if self.adds_space or self.chat_name != "plain" else " " + text)

    def continuation(self, before: str, ids: list[int], text: str) -> list[int]:
        """Ids of `text` after an answer's beginning `before`, whose ids stay `ids` even where both would merge."""
        whole = self.answer(before + text)
        return whole[len(ids) :] if whole[: len(ids)] == ids else self.encode(text, within=True)

    def chat(self, messages: list[dict], system: str | None = None) -> list[int]:
        """Ids of a conversation, up to where the assistant's answer begins.

        messages: {"role": "system" (first only) | "user" | "assistant", "content"}, user and assistant in turn, user
        last. Sources: Meta's llama repository (llama2), mistral-common v1 and v3 (mistral), the models' own templates.
        """
        if messages and messages[0]["role"] == "system":
            system, messages = messages[0]["content"], messages[1:]
        roles, texts = [m["role"] for m in messages], [m["content"] for m in messages]
        in_turn = all(role == TURNS[i % 2] for i, role in enumerate(roles))
        check(in_turn and len(roles) % 2, "roles", "wanted user, assistant, ..., user", roles)
        formats = {"llama2": self._llama2, "mistral": self._mistral, "plain": self._plain}
        return formats.get(self.chat_name, self._tagged)(texts, system)

    def _llama2(self, texts: list[str], system: str | None) -> list[int]:
        if system:
            texts[0] = f"<<SYS>>\n{system}\n<</SYS>>\n\n{texts[0]}"
        ids = []
        for user, answer in zip(texts[::2], texts[1::2]):
            ids += [self.bos_id, *self.encode(f"[INST] {user.strip()} [/INST] {answer.strip()} "), self.eos_id]
        return [*ids, self.bos_id, *self.encode(f"[INST] {texts[-1].strip()} [/INST]")]

    def _mistral(self, texts: list[str], system: str | None) -> list[int]:
        # in v1 the tags are text; from v3 on they are control tokens, and the system prompt moves to the last turn
        begin, end = self._id("[INST]", -1), self._id("[/INST]", -1)
        v3 = begin in self.control
        if system:
            at = len(texts) - 1 if v3 else 0
            texts[at] = f"{system}\n\n{texts[at]}"
        ids = [self.bos_id]
        for user, answer in zip(texts[::2], [*texts[1::2], None]):
            ids += [begin, *self.encode(user), end] if v3 else self.encode(f"[INST] {user} [/INST]")
            if answer is not None:
                ids += [*self.encode(answer.rstrip(" ") if v3 else answer), self.eos_id]
        return ids

    def _tagged(self, texts: list[str], system: str | None) -> list[int]:
        """ChatML (each turn between two control tokens) and Zephyr (tags are text, EOS ends a turn)."""
        chatml, start = self.chat_name == "chatml", self._id("<|im_start|>", -1)
        found = min(start, self._id("<|im_end|>", -1)) >= 0
        check(found or not chatml, self.folder, "the vocabulary has no <|im_start|>, <|im_end|>; give another --chat")
        if chatml and system is None:  # some templates put one in
            own = re.search(r"<\|im_start\|>system\n([^'\"{}<]+)<\|im_end\|>", self.template)
            system = own and own[1]
        opening = [("system", system)] if system is not None else []
        parts = [self.bos_id] if "bos_token" in self.template else []
        for i, (role, text) in enumerate([*opening, *zip(itertools.cycle(TURNS), [*texts, ""])]):
            between = "\n" if i else ""
            parts += [between, start, f"{role}\n{text}"] if chatml else [f"{between}<|{role}|>\n{text}"]
            parts.append(self.end_id)
        ids = []
        for part in parts[:-1]:  # the answer, which is to come, does not end here
            within = len(ids) > 0 and not self.legacy
            ids += [part] if isinstance(part, int) else self.encode(part, within)
        return ids

    def _plain(self, texts: list[str], system: str | None) -> list[int]:
        return [self.bos_id] * (self.bos_id >= 0) + self.encode("\n\n".join([system, *texts] if system else texts))


def read_text(path: str | Path) -> str:
    """Text of a UTF-8 file. ValueError if it can't be read or is blank."""
    try:
        data = Path(path).read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as e:
        raise ValueError(f"{path}: {e.strerror}; give a file that can be read") from None
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8 (byte 0x{data[e.start]:02x}); convert the file") from None
    check(text.strip(), path, "the file is empty")
    return text


def parse_json(text: str, path: str | Path, line: int = 1):
    """The value that `text`, which begins in this line of the file, holds."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}:{line + e.lineno - 1}: broken JSON: {e.msg}") from None


def read_object(path: Path) -> dict:
    """The JSON object that is the whole file; {} if there is no file."""
    value = parse_json(read_text(path), path) if path.exists() else {}
    check(isinstance(value, dict), path, "wanted a JSON object", value)
    return value


def read_json(path: str | Path) -> list[tuple[str, dict]]:
    """Objects of a JSON array, or of one object a line, each with where it stands, `FILE:LINE`."""
    text, rows = read_text(path), []
    if text.lstrip().startswith("["):
        decoder, line, start, end = json.JSONDecoder(), 1, 0, text.index("[") + 1
        for row in parse_json(text, path):  # each is decoded once more, to learn its line
            before, start = start, re.compile(r"[\s,]*").match(text, end).end()
            end = decoder.raw_decode(text, start)[1]
            line += text.count("\n", before, start)
            rows.append((f"{path}:{line}", row))
    else:
        lines = enumerate(text.split("\n"), 1)
        rows = [(f"{path}:{n}", parse_json(line, path, n)) for n, line in lines if line.strip()]
    for where, row in rows:
        check(isinstance(row, dict), where, "wanted a JSON object", row)
    check(rows, path, "holds no rows")
    return rows


def read_lines(files: tuple[str, ...]) -> list[tuple[str, dict]]:
    """Rows of a TSV file or of two line files. Endings may name the languages: x.de-en.tsv, x.de x.en."""
    columns = [[line.removesuffix("\r") for line in read_text(file).removesuffix("\n").split("\n")] for file in files]
    if len(files) == 2:
        languages, pairs, (n, m) = [Path(file).suffix[1:] for file in files], zip(*columns), map(len, columns)
        check(n == m, f"{files[0]}:{min(n, m) + 1}", f"{n} lines, each with its translation, but {files[1]} has {m}")
    else:
        languages, pairs = Path(files[0]).stem.split(".")[-1].split("-"), (line.split("\t") for line in columns[0])
    named = len(languages) == 2 and set(languages) <= set(LANGUAGES)
    fields, rows = ("source", "reference", "source_lang", "target_lang"), []
    for n, cells in enumerate(pairs, 1):
        check(len(cells) == 2, f"{files[0]}:{n}", f"wanted source, tab, reference; found {len(cells) - 1} tabs")
        rows.append((f"{files[0]}:{n}", dict(zip(fields, [*cells, *languages] if named else cells))))
    return rows


def group_files(files: list[str]) -> list[tuple[str, ...]]:
    """JSON and TSV files stand alone; other files are line files and come in pairs, `train.de train.en`."""
    groups, files = [], iter(files)
    for file in files:
        ending = Path(file).suffix
        alone = ending in (".json", ".jsonl", ".tsv")
        if not alone:
            alone = read_text(file).lstrip()[0] in "{[" and ending[1:] not in LANGUAGES
        groups.append((file,) if alone else (file, *itertools.islice(files, 1)))
        check(alone or len(groups[-1]) == 2, file, "a line file needs a second one, as in train.de train.en")
    return groups


def named_files(items: list[str]) -> dict[str, list[str]]:
    """`[NAME=]FILE ...` -> files by name; a file without a name goes by its own, line files come in pairs."""
    parts, named = [item.partition("=") for item in items], {}
    names = {file or name: name if file else Path(name).stem for name, _, file in parts}
    for group in group_files(list(names)):
        named.setdefault(names[group[0]], []).extend(group)
    return named


def read_rows(files: list[str], directions: list[str] = (), prompts: bool = False) -> list[dict]:
    """Reads pairs, conversations and ledgers (`prompts`: prompts alone) into one list, in order.

    A row is what its file says, with `id` (its place in the data if the file has none) and `where` (FILE:LINE) added.
    A pair has source, reference, source_lang, target_lang; others have `messages`, the conversation before the answer,
    and `reference`, the answer. A ledger's row has `meta`, the settings it was written with. Several directions read
    each row once for each. ValueError names file and line.
    """
    rows, directions = [], [split_direction(d) for d in dict.fromkeys(directions)] or [None]
    for group in group_files(files):
        meta, lines = read_meta(group[0]), len(group) == 2 or Path(group[0]).suffix == ".tsv"
        found = read_lines(group) if lines else read_json(group[0])
        for direction, (where, row) in itertools.product(directions, found):
            row = {name: value for name, value in row.items() if name != "meta"} | {"where": where}
            if "reference_ids" in row:
                check_ledger(row)
                row["meta"] = meta
            if "translation" in row or "source" in row:
                read_pair(row, direction, directions[0])
            elif direction is directions[0]:
                read_conversation(row, prompts)
            else:
                continue  # a conversation has no direction
            own = (
                row.get("id") if direction is directions[0] else row.get("id") and f"{row['id']} {'-'.join(direction)}"
            )
            row["id"] = len(rows) if own is None else own
            check(type(row["id"]) in (int, str), where, '"id" must be a number or a string', row["id"])
            rows.append(row)
    return rows


def split_direction(direction: str) -> tuple[str, str]:
    """de-en -> (de, en): source and target language."""
    found = re.fullmatch(r"([A-Za-z_]+)-([A-Za-z_]+)", direction)
    check(found and found[1] != found[2], f'--direction "{direction}"', "give two languages, such as de-en")
    return found.groups()


def check_ledger(row: dict) -> None:
    """ValueError where a row that has token ids lacks what a ledger's row must have."""
    ok = isinstance(row.get("rationale", ""), str) and row.get("finish") in ("eos", "length")
    check(ok, row["where"], 'a ledger row needs "rationale" (text) and "finish" ("eos" or "length")')
    for name in ("reference_ids", "rationale_ids"):
        ok = isinstance(row.get(name), list) and all(type(i) is int and i >= 0 for i in row[name])
        check(ok, row["where"], f'"{name}" must be a list of token ids')


def text_field(row: dict, name: str, where: str, may_be_empty: bool = False) -> str:
    """The text of a field; ValueError where it is no text, blank, or not Unicode."""
    value = row.get(name)
    check(isinstance(value, str), where, f'"{name}" must be a string', value)
    check(value.strip() or may_be_empty, where, f'"{name}" is empty; take the row out or fill it in')
    check(not re.search(r"[\ud800-\udfff]", value), where, f'"{name}" holds a lone surrogate, which is no character')
    return value


def read_pair(row: dict, direction: tuple[str, str] | None, default: tuple[str, str] | None) -> None:
    """Brings a two-way row (ALMA's `translation`), or one with source and reference, into `direction`."""
    where, own = row["where"], None
    if "translation" in row:
        texts = row.pop("translation")
        check(isinstance(texts, dict), where, '"translation" must be {"de": "...", "en": "..."}', texts)
        check(direction, where, "a two-way row; say which way by --direction, such as de-en")
        names = {language: language for language in texts}
    else:
        texts, own = row, default
        if {row.get("source_lang"), row.get("target_lang")} != {None}:
            own = text_field(row, "source_lang", where), text_field(row, "target_lang", where)
        wanted = 'wanted two languages, as "source_lang" and "target_lang" or by --direction de-en'
        check(own and own[0] != own[1], where, wanted)
        names = dict(zip(own, ("source", "reference")))
    languages = direction or own
    fits = set(languages) <= set(names) and ("reference_ids" not in row or languages == own)
    way = ", and a ledger goes one way" if "reference_ids" in row else ""
    check(fits, where, f"has {', '.join(names)}{way}, but --direction is {'-'.join(languages)}")
    for language in languages:
        check(language in LANGUAGES, where, f"unknown language; known are {', '.join(LANGUAGES)}", language)
    source = text_field(texts, names[languages[0]], where)
    reference = text_field(texts, names[languages[1]], where, may_be_empty="reference_ids" in row)
    row |= dict(source=source, reference=reference, source_lang=languages[0], target_lang=languages[1])


def read_conversation(row: dict, prompts: bool) -> None:
    """Sets `messages`, the conversation before the answer, and `reference`, the answer (None where there is none)."""
    where, said = row["where"], row.get("messages")
    if said is not None:
        ok = isinstance(said, list) and said and all(isinstance(m, dict) for m in said)
        check(ok, where, '"messages" must be a list of {"role", "content"}')
        turns = [(m.get("role"), m, "content") for m in said]
    elif "turns" in row:  # FastChat's questions: the first turn
        first = row["turns"][0] if isinstance(row["turns"], list) and row["turns"] else None
        turns = [("user", {"turns": first}, "turns")]
        row["id"] = row.get("id", row.get("question_id"))
    else:
        check(
            "prompt" in row, where, 'wanted "translation", "source", "messages" or "prompt"', sorted({*row} - {"where"})
        )
        turns = [("user", row, "prompt")]
        check("response" in row or prompts, where, 'has no "response"; prompts alone go with generate.py --task answer')
        turns += [("assistant", row, "response")] if "response" in row else []
    roles = [role for role, _, _ in turns]
    answers = roles[1:] if roles[0] == "system" else roles
    in_turn = answers and all(role == TURNS[i % 2] for i, role in enumerate(answers))
    check(in_turn, where, "roles must be user and assistant in turn", roles)
    messages = []
    for role, holder, name in turns:
        mute = "reference_ids" in row and len(messages) == len(turns) - 1  # a model may have said nothing
        messages.append({"role": role, "content": text_field(holder, name, where, may_be_empty=mute)})
    answered = roles[-1] == "assistant"
    check(answered or prompts, where, "has no answer to learn; the last message must be the assistant's")
    row["reference"] = messages.pop()["content"] if answered else None
    row["messages"] = messages


def without_meta(rows: list[dict]) -> str:
    """What to tell of ledger rows whose settings are lost: their ids can't be trusted, so their text is tokenised."""
    lost = sum("reference_ids" in row and not row["meta"] for row in rows)
    return f", {lost} ledger rows tokenised anew (no meta.json beside them)" if lost else ""


def meta_path(ledger: str | Path) -> Path:
    """Where the settings of a ledger stand: beside it, as NAME.meta.json."""
    return Path(str(ledger).removesuffix(".jsonl") + ".meta.json")


def read_meta(ledger: str | Path) -> dict:
    """The settings that a ledger was written with; {} for other files."""
    return read_object(meta_path(ledger))


def read_template(value: str | None) -> str | None:
    """--template: a file's text, or the text itself with \\n for a line break. ValueError on names it does not know."""
    if value is None:
        return None
    file = len(value) < 256 and "{source}" not in value and Path(value).is_file()
    text = read_text(value).removesuffix("\n") if file else unescape(value)
    for name in re.findall(r"\{([\w ]+)\}", text):
        check(name in FIELDS, f"--template {value}", f"does not know {{{name}}}, only {{{'}, {'.join(FIELDS)}}}")
    check("{source}" in text, f"--template {value}", "has no {source}")
    return text


def unescape(text: str) -> str:
    """A shell's "\\n" and "\\t" are two characters each; here they mean the line break and the tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


@dataclass
class Example:
    """Ids of one row. EOS stands at the end of the segment that it ends, and counts there."""

    id: int | str
    prompt: list[int]
    reference: list[int]
    rationale: list[int]
    note: str = ""  # why the rationale is left out, if it is

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.reference + self.rationale

    def __len__(self) -> int:
        return len(self.prompt) + len(self.reference) + len(self.rationale)


@dataclass
class Encoder:
    """Turns rows into prompts and examples, under one instruction template and system prompt.

    A ledger brings its own; given ones must be the same, or its rationales would answer another prompt.
    """

    tokenizer: Tokenizer
    template: str | None = None
    system: str | None = None
    coverage: float = 1.0  # share of the rows that keep their rationale
    keep: bool = False  # also the rationales whose status is not ok

    def messages(self, row: dict) -> list[dict]:
        """The conversation before the answer; of a pair, one turn that the template makes."""
        if "messages" in row:
            return row["messages"]
        template = self.template or row.get("meta", {}).get("template") or TEMPLATE
        values = {name: LANGUAGES.get(row[name], row[name]) for name in FIELDS} | {"source": row["source"]}
        # in one pass: braces in the source are never read as a name
        return [{"role": "user", "content": re.sub(r"\{(\w+)\}", lambda m: values.get(m[1], m[0]), template)}]

    def prompt(self, row: dict) -> list[int]:
        """Ids up to where the answer begins. ValueError if the row's ledger was written with another prompt."""
        meta, mine = row.get("meta", {}), {"system": self.system}
        if "messages" not in row:
            mine["template"] = self.template
        if meta.get("tokenizer_hash") == self.tokenizer.hash:
            mine["chat"] = self.tokenizer.chat_name
        for name, value in mine.items():
            ok = not meta or value in (None, meta.get(name))
            written = f"the ledger was written with {json.dumps(meta.get(name))}"
            check(ok, row["where"], f"--{name} is {json.dumps(value)}, {written}")
        try:
            return self.tokenizer.chat(self.messages(row), self.system or meta.get("system"))
        except ValueError as e:
            raise ValueError(f"{row['where']}: {e}") from None

    def segments(self, row: dict) -> tuple[list[int], list[int]]:
        """Ids of reference and rationale: the ledger's, unless its tokenizer or, after an edit, its text is another."""
        t, text, more = self.tokenizer, row["reference"], row.get("rationale") or ""
        reference, rationale = row.get("reference_ids", []), row.get("rationale_ids", [])
        ours = row.get("meta", {}).get("tokenizer_hash") == t.hash
        known = not ours or max([*reference, *rationale], default=0) < t.vocab_size
        check(known, row["where"], f"token id outside the vocabulary of {t.vocab_size}; write the ledger anew")
        if not ours or (t.decode(reference) != text and reference != t.answer(text)):
            reference, ours = t.answer(text), False
        if not ours or t.decode_after(reference, rationale) != more:
            rationale = t.continuation(text, reference, more) if more else []
        return reference, rationale

    def example(self, row: dict) -> Example:
        """Status other than `ok` and rows outside the coverage train on reference + EOS; a cut text gets no EOS."""
        (reference, rationale), note = self.segments(row), ""
        # in [0, 1) and from the id alone, so that a larger coverage contains a smaller one
        share = int.from_bytes(hashlib.sha256(str(row["id"]).encode()).digest()[:7]) / 2**56
        ledger = "rationale" in row  # elsewhere status and finish are somebody's own fields
        if ledger and not self.keep and row.get("status", "ok") != "ok":
            note = row["status"]
        elif rationale and share >= self.coverage:
            note = "outside coverage"
        # cut is what was sampled: the rationale if there is one, else the reference
        end = [] if ledger and row.get("finish") == "length" and not note else [self.tokenizer.end_id]
        if rationale and not note:
            return Example(row["id"], self.prompt(row), reference, rationale + end)
        return Example(row["id"], self.prompt(row), reference + end, [], note)


def collate(examples: list[Example], device="cpu") -> tuple[torch.Tensor, ...]:
    """-> tokens [B, T], padded on the right with 0; and for the N supervised tokens: select [N], the places in B * T
    whose logits predict them; targets [N]; is_rationale [N], bool. Pads are known by length, never by their id."""
    T = max([2, *map(len, examples)]) - 1  # the last token is predicted, never read
    tokens, select, targets, segment = torch.zeros(max(len(examples), 1), T, dtype=torch.long), [], [], []
    for b, e in enumerate(examples):
        tokens[b, : len(e) - 1] = torch.tensor(e.tokens[:-1])
        select += range(b * T + len(e.prompt) - 1, b * T + len(e) - 1)
        targets += e.reference + e.rationale
        segment += [False] * len(e.reference) + [True] * len(e.rationale)
    long = [torch.tensor(x, dtype=torch.long, device=device) for x in (select, targets)]
    return tokens.to(device), *long, torch.tensor(segment, dtype=torch.bool, device=device)


class Arguments(argparse.ArgumentParser):
    """argparse whose mistakes are one line, as all our errors are."""

    def error(self, message: str):
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def number(low: float, high: float = math.inf, kind: type = float):
    """An argparse type: a number from `low` to `high`."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is out of range, wanted {low:g} to {high:g}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def default_dtype() -> str:
    """What computes fast here: bfloat16 on a GPU, float32 on a CPU."""
    return "bfloat16" if torch.cuda.is_available() else "float32"


def common_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every script that reads pairs."""
    parser.add_argument("--direction", nargs="+", default=[], metavar="de-en", help="languages; several mix directions")
    parser.add_argument("--chat", default="auto", choices=("auto", *CHATS), help="chat format (default: the model's)")
    parser.add_argument("--system", type=unescape, help="system prompt (default: the model's own)")
    parser.add_argument("--template", help="instruction, text or file, with {source} {source_lang} {target_lang}")


def cli(main, parser: argparse.ArgumentParser) -> None:
    """Runs a script: a user's mistake ends with status 2 and one line, Ctrl-C and SIGTERM end without a traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rank = int(os.environ.get("RANK", 0))
    try:
        main(parser.parse_args())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os._exit(141)
    except (ValueError, OSError, FloatingPointError) as e:
        common = isinstance(e, ValueError)  # a mistake in the data is the same on every rank
        message = (f"rank {rank}: " if rank else "") + str(e).replace("\n", " ") if not (rank and common) else ""
    except RuntimeError as e:
        if "gloo" not in str(e) and "NCCL" not in str(e):
            raise
        message = f"rank {rank}: lost another rank, which has ended; its own message says why"
    else:
        return
    sys.stderr.write(f"error: {message}\n" if message else "")  # at once, or lines of several ranks would mix
    sys.exit(2)


def main(args: argparse.Namespace) -> None:
    tokenizer, rows = Tokenizer(args.model, args.chat), read_rows(args.data, args.direction)
    encoder = Encoder(tokenizer, read_template(args.template), args.system)
    examples = [encoder.example(row) for row in rows]
    check(args.show < len(examples), f"--show {args.show}", f"the data has rows 0 to {len(examples) - 1}")
    long = sum(len(e) > args.max_length for e in examples)
    left_out = f"{long} longer than {args.max_length} tokens (left out){without_meta(rows)}"
    print(f"{len(examples)} rows, {left_out}; chat {tokenizer.chat_name}")
    for name in ("prompt", "reference", "rationale"):
        lengths = sorted(len(getattr(e, name)) for e in examples)
        median = lengths[len(lengths) // 2]
        print(f"{name:>10} {sum(lengths):>10,} tokens  median {median:>5}  longest {lengths[-1]:>5}")
    notes = [e.note for e in examples if e.note]
    print(f"{len(notes)} rationales left out", *(f"({notes.count(n)} {n})" for n in sorted(set(notes))))
    e, colour = examples[args.show], sys.stdout.isatty() or args.colour
    print(f"\nrow {e.id}: read (grey), learnt as reference (green), learnt as rationale (blue), EOS (red)")
    for name, code in [("prompt", 90), ("reference", 32), ("rationale", 34)]:
        ids, text = getattr(e, name), ""
        for i in ids:
            piece = tokenizer.added.get(i) or tokenizer.sp.id_to_piece(i)
            shade = 31 if name != "prompt" and i == tokenizer.end_id else code
            text += f"\033[{shade}m{piece}\033[0m" if colour else piece
        print(f"{name} ({len(ids)} tokens, {'no loss' if name == 'prompt' else 'loss'}): {text}\n  ids", *ids)


def parser() -> argparse.ArgumentParser:
    p = Arguments(description="Checks training data and shows one example: which tokens are read, which are learnt.")
    p.add_argument("--model", required=True, help="model folder (only its tokenizer is read)")
    p.add_argument("--data", required=True, nargs="+", help="pairs, conversations or ledgers")
    common_arguments(p)
    p.add_argument("--max-length", type=number(2, kind=int), default=1024, help="tokens of a row (default 1024)")
    p.add_argument("--show", type=number(0, kind=int), default=0, metavar="N", help="row to show (default 0)")
    p.add_argument("--colour", action="store_true", help="colour also where the output is no terminal")
    return p


if __name__ == "__main__":
    cli(main, parser())
