"""From files to token ids: tokenizer, chat formats, pairs and ledgers, and which tokens carry loss.

    python data.py --model DIR --data train.de-en.json --direction de-en

checks the data, counts it, and shows one example in colour. A training sequence is

    prompt (no loss) | reference y | rationale r | EOS        L = -log P(y, r | I, x)

where I is the instruction and x the source. The segments are kept apart by ids, never found again by text: a tokenizer
may merge across any boundary of strings.
"""

import argparse
import hashlib
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
NAMES = (
    "ar Arabic cs Czech de German en English es Spanish et Estonian fi Finnish fr French hi Hindi is Icelandic it Italian "
    "ja Japanese ko Korean lt Lithuanian lv Latvian nl Dutch pl Polish pt Portuguese ro Romanian ru Russian tr Turkish "
    "uk Ukrainian zh Chinese"
).split()
LANGUAGES = dict(zip(NAMES[::2], NAMES[1::2]))
CHATS = ("llama2", "mistral", "zephyr", "chatml", "plain")


class Tokenizer:
    """SentencePiece with the chat formats. Control tokens are placed by id; text of a user never becomes one.

    chat: a name of CHATS, or "auto" to find it from the chat template in the folder (no template means plain).
    ValueError names the file that is missing, broken or not understood.
    """

    def __init__(self, folder: str | Path, chat: str = "auto"):
        self.folder, file = Path(folder), Path(folder) / "tokenizer.model"
        if not file.is_file():
            raise ValueError(f"{file}: no such file; a model folder needs its SentencePiece tokenizer.model")
        proto = file.read_bytes()
        try:
            self.sp = SentencePieceProcessor(model_proto=proto)
            # the same model without the space that is put before each text: appended fields override (protobuf)
            self.sp_continue = SentencePieceProcessor(model_proto=proto + b"\x1a\x02\x18\x00")
        except RuntimeError:
            raise ValueError(f"{file}: not a SentencePiece model; download it again") from None
        config, stops = self._read("tokenizer_config.json"), self._read("generation_config.json").get("eos_token_id")
        try:
            self._configure(config, stops, chat)
        except (AttributeError, KeyError, TypeError):
            raise ValueError(f"{self.folder / 'tokenizer_config.json'}: not understood; download it again") from None
        if self.eos_id < 0:
            raise ValueError(f"{file}: has no EOS token, so no answer could ever end")
        self.hash = hashlib.sha256(proto + json.dumps(self.added).encode()).hexdigest()[:16]
        self.adds_space = self.sp.encode("a") != self.sp_continue.encode("a")

    def _configure(self, config: dict, stops: int | list[int] | None, chat: str) -> None:
        """Added tokens, special ids and the chat format."""
        added = {v["content"]: int(k) for k, v in (config.get("added_tokens_decoder") or {}).items()}
        added |= self._read("added_tokens.json")
        self.added = {id: text for text, id in sorted(added.items(), key=lambda item: item[1])}
        self.control = {i for i in range(len(self.sp)) if self.sp.is_control(i)} | set(self.added) - {self.sp.unk_id()}
        tags = sorted({self.sp.id_to_piece(i).replace("▁", " ") for i in self.control if i < len(self.sp)}, key=len)
        self.tags = re.compile("|".join(f"(?={re.escape(tag)})" for tag in tags))
        self.vocab_size = max(len(self.sp), *(i + 1 for i in self.added), 0)
        self.bos_id = self._id(config.get("bos_token"), self.sp.bos_id())
        self.eos_id = self._id(config.get("eos_token"), self.sp.eos_id())
        self.legacy = bool(config.get("legacy"))  # SentencePiece's space before every text, not only the first
        template, other = config.get("chat_template") or "", self.folder / "chat_template.jinja"
        template = other.read_text("utf-8") if other.is_file() else template
        if isinstance(template, list):  # several, by name
            template = next((t["template"] for t in template if t.get("name") == "default"), "")
        self.template = template.replace("\\n", "\n")
        marks = {"<|im_start|>": "chatml", "<|user|>": "zephyr", "<<SYS>>": "llama2", "[INST]": "mistral"}
        known = [name for mark, name in marks.items() if mark in self.template]
        if chat == "auto" and self.template and not known:
            raise ValueError(f"{self.folder}: chat template not known here; give --chat {'|'.join(CHATS)}")
        self.chat_name = chat if chat != "auto" else (known or ["plain"])[0]
        self.end_id = self._id("<|im_end|>", self.eos_id) if self.chat_name == "chatml" else self.eos_id
        self.eos_ids = sorted({self.end_id, self.eos_id, *(stops if isinstance(stops, list) else [stops])} - {None})

    def _read(self, name: str) -> dict:
        path = self.folder / name
        try:
            return json.loads(path.read_text("utf-8")) | {} if path.is_file() else {}
        except (ValueError, TypeError) as e:
            raise ValueError(f"{path}:{getattr(e, 'lineno', 1)}: not a JSON object; download it again") from None

    def _id(self, piece: str | dict | None, default: int) -> int:
        """The id of an added token or a piece of the vocabulary."""
        piece = piece["content"] if isinstance(piece, dict) else piece
        id = next((i for i, text in self.added.items() if text == piece), None)
        id = self.sp.piece_to_id(piece) if id is None and piece else id
        return default if id is None or id == self.sp.unk_id() else id

    def encode(self, text: str) -> list[int]:
        """Text to ids, without BOS or EOS, never with a control token."""
        return self._encode(text, self.sp)

    def _encode(self, text: str, sp: SentencePieceProcessor) -> list[int]:
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
        newline = "\n" in self.sp.decode([ids[-1]]) or self.sp.id_to_piece(ids[-1]) == "<0x0A>"
        return newline and "\n" in self.decode(ids).lstrip()

    def answer(self, text: str) -> list[int]:
        """Ids of an assistant's answer as they follow `chat`, without EOS."""
        if self.chat_name in ("zephyr", "chatml"):  # goes on within the text that ends "assistant\n"
            return self._encode(text, self.sp_continue)
        return self.encode(text if self.adds_space or self.chat_name != "plain" else " " + text)

    def continuation(self, before: str, ids: list[int], text: str) -> list[int]:
        """Ids of `text` after an answer's beginning `before`, whose ids stay `ids` even where both would merge."""
        whole = self.answer(before + text)
        return whole[len(ids) :] if whole[: len(ids)] == ids else self._encode(text, self.sp_continue)

    def chat(self, messages: list[dict], system: str | None = None) -> list[int]:
        """Ids of a conversation, up to where the assistant's answer begins.

        messages: {"role": "system" (first only) | "user" | "assistant", "content"}, user and assistant in turn, user
        last. Sources: Meta's llama repository (llama2), mistral-common v1 and v3 (mistral), the models' own templates.
        """
        if messages and messages[0]["role"] == "system":
            system, messages = messages[0]["content"], messages[1:]
        roles = [m["role"] for m in messages]
        if len(roles) % 2 == 0 or roles != alternating(len(roles)):
            raise ValueError(f"roles must be user, assistant, ..., user; found {', '.join(roles) or 'none'}")
        format = {"llama2": self._llama2, "mistral": self._mistral, "plain": self._plain}.get(self.chat_name, self._tagged)
        return format([m["content"] for m in messages], system)

    def _llama2(self, texts: list[str], system: str | None) -> list[int]:
        if system:
            texts = [f"<<SYS>>\n{system}\n<</SYS>>\n\n{texts[0]}", *texts[1:]]
        ids = []
        for user, answer in zip(texts[::2], texts[1::2]):
            ids += [self.bos_id, *self.encode(f"[INST] {user.strip()} [/INST] {answer.strip()} "), self.eos_id]
        return ids + [self.bos_id, *self.encode(f"[INST] {texts[-1].strip()} [/INST]")]

    def _mistral(self, texts: list[str], system: str | None) -> list[int]:
        # in v1 the tags are text; from v3 on they are control tokens, and the system prompt moves to the last turn
        begin, end = self._id("[INST]", -1), self._id("[/INST]", -1)
        v3 = begin in self.control
        ids, system_at = [self.bos_id], len(texts) - 1 if v3 else 0
        for i, text in enumerate(texts):
            text = f"{system}\n\n{text}" if system and i == system_at else text
            if i % 2:
                ids += [*self.encode(text.rstrip(" ") if v3 else text), self.eos_id]
            else:
                ids += [begin, *self.encode(text), end] if v3 else self.encode(f"[INST] {text} [/INST]")
        return ids

    def _tagged(self, texts: list[str], system: str | None) -> list[int]:
        """ChatML (each turn between two control tokens) and Zephyr (tags are text, EOS ends a turn)."""
        chatml, start, sp = self.chat_name == "chatml", self._id("<|im_start|>", None), self.sp
        if chatml and (start is None or self._id("<|im_end|>", None) is None):
            raise ValueError(f"{self.folder}: the vocabulary has no <|im_start|>, <|im_end|>; give another --chat")
        if chatml and system is None:  # some templates put one in
            found = re.search(r"<\|im_start\|>system\n([^'\"{}<]+)<\|im_end\|>", self.template)
            system = found and found[1]
        turns = [("system", system)] if system is not None else []
        turns += zip(alternating(len(texts) + 1), [*texts, None])
        parts = [self.bos_id] if "bos_token" in self.template else []
        for i, (role, text) in enumerate(turns):
            between = "\n" if i else ""
            parts += [between, start, f"{role}\n"] if chatml else [f"{between}<|{role}|>\n"]
            if text is not None:
                parts[-1] += text
                parts.append(self.end_id)
        ids = []
        for part in filter(lambda part: part != "", parts):
            ids += [part] if isinstance(part, int) else self._encode(part, sp)
            sp = self.sp if self.legacy else self.sp_continue
        return ids

    def _plain(self, texts: list[str], system: str | None) -> list[int]:
        return [self.bos_id] * (self.bos_id >= 0) + self.encode("\n\n".join([system, *texts] if system else texts))


def alternating(n: int) -> list[str]:
    return ["user" if i % 2 == 0 else "assistant" for i in range(n)]


def split_direction(direction: str) -> tuple[str, str]:
    if not re.fullmatch(r"[A-Za-z_]+-[A-Za-z_]+", direction) or len(set(direction.split("-"))) == 1:
        raise ValueError(f'--direction "{direction}": give two languages, such as de-en')
    return tuple(direction.split("-"))


def read_text(path: str | Path) -> str:
    try:
        data = Path(path).read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as e:
        raise ValueError(f"{path}: {e.strerror}; give a file that can be read") from None
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8 (byte 0x{data[e.start]:02x}); convert the file") from None
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return text


def read_json(path: str | Path) -> list[tuple[str, dict]]:
    """Objects of a JSON array, or of one object a line, each with where it stands, `FILE:LINE`."""
    text, rows, line, at = read_text(path), [], 1, 0
    try:
        if text.lstrip().startswith("["):
            objects, decoder = json.loads(text), json.JSONDecoder()
            for row in objects:  # once more, for the lines
                start = re.compile(r"[\s,]*").match(text, at or text.index("[") + 1).end()
                line, at = line + text.count("\n", at, start), decoder.raw_decode(text, start)[1]
                rows.append((f"{path}:{line}", row))
                line += text.count("\n", start, at)
        else:
            for line, row in enumerate(text.split("\n"), 1):
                rows += [(f"{path}:{line}", json.loads(row))] if row.strip() else []
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}:{line if e.doc != text else e.lineno}: broken JSON: {e.msg}") from None
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: wanted a JSON object, found {json.dumps(row)[:40]}")
    if not rows:
        raise ValueError(f"{path}: holds no rows")
    return rows


def group_files(files: list[str]) -> list[tuple[str, ...]]:
    """JSON and TSV files stand alone; other files are line files and come in pairs, `train.de train.en`."""
    groups, files = [], list(files)
    while files:
        file = files.pop(0)
        ending = Path(file).suffix
        begins = "" if ending[1:] in LANGUAGES else read_text(file).lstrip()[0]
        alone = ending in (".json", ".jsonl", ".tsv") or begins in ("{", "[")
        if not alone and not files and read_text(file):
            raise ValueError(f"{file}: a line file needs a second one beside it, such as train.de train.en")
        groups.append((file,) if alone else (file, files.pop(0)))
    return groups


def named_files(items: list[str]) -> dict[str, list[str]]:
    """`[NAME=]FILE ...` -> files by name; a file without a name goes by its own, line files come in pairs."""
    names = {item.partition("=")[2] or item: item.partition("=")[0] if "=" in item else Path(item).stem for item in items}
    named = {}
    for group in group_files(list(names)):
        named.setdefault(names[group[0]], []).extend(group)
    return named


def read_rows(files: list[str], directions: list[str] = (), prompts: bool = False) -> list[dict]:
    """Reads pairs, conversations and ledgers (`prompts`: prompts alone) into one list, in order.

    A row is what its file says, with `id` (its place in the data if the file has none) and `where` (FILE:LINE) added. A
    pair has source, reference, source_lang, target_lang; others have `messages`, the conversation before the answer, and
    `reference`, the answer. A ledger's row has `meta`, the settings it was written with. Several directions read each row
    once for each. ValueError names file and line.
    """
    rows, directions = [], [split_direction(d) for d in dict.fromkeys(directions)] or [None]
    for group in group_files(files):
        meta = read_meta(group[0])
        for direction in directions:
            lines = len(group) == 2 or group[0].endswith(".tsv")
            # where nothing names the languages, the first direction does
            for where, row in read_lines(group, directions[0]) if lines else read_json(group[0]):
                row = dict(row, where=where)
                if "reference_ids" in row:
                    check_ids(row)
                    row["meta"] = meta
                if "translation" in row or "source" in row:
                    read_pair(row, direction, directions[0])
                elif direction is directions[0]:  # a conversation has no direction
                    read_conversation(row, prompts)
                else:
                    continue
                row["id"] = len(rows) if row.get("id") is None else row["id"]
                if type(row["id"]) not in (int, str):
                    raise ValueError(f'{where}: "id" must be a number or a string, found {json.dumps(row["id"])[:40]}')
                rows.append(row)
    return rows


def text_field(row: dict, name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(f'{where}: "{name}" must be a string, found {json.dumps(value)[:40]}')
    if not value.strip():
        raise ValueError(f'{where}: "{name}" is empty; take the row out or fill it in')
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f'{where}: "{name}" holds half of a surrogate pair, which is no character; mend the row')
    return value


def read_lines(group: tuple[str, ...], direction: tuple[str, str] | None) -> list[tuple[str, dict]]:
    """A TSV file or two line files as rows; languages by ending (x.de-en.tsv, x.de x.en), else by `direction`."""
    columns = [[line.removesuffix("\r") for line in read_text(file).removesuffix("\n").split("\n")] for file in group]
    langs = [Path(file).suffix[1:] for file in group] if len(group) == 2 else Path(group[0]).stem.split(".")[-1].split("-")
    if len(langs) != 2 or any(lang not in LANGUAGES for lang in langs):
        if direction is None:
            raise ValueError(f"{group[0]}: languages unknown; give --direction, such as de-en")
        langs = direction
    if len(group) == 2 and len(columns[0]) != len(columns[1]):
        raise ValueError(
            f"{group[0]}:{min(map(len, columns)) + 1}: {len(columns[0])} lines, but {group[1]} has {len(columns[1])}; "
            "line N of one must translate line N of the other"
        )
    rows = []
    for n, cells in enumerate(zip(*columns) if len(group) == 2 else (line.split("\t") for line in columns[0]), 1):
        if len(cells) != 2:
            raise ValueError(f"{group[0]}:{n}: wanted source, tab, reference; found {len(cells) - 1} tabs")
        row = dict(source=cells[0], reference=cells[1], source_lang=langs[0], target_lang=langs[1])
        rows.append((f"{group[0]}:{n}", row))
    return rows


def read_pair(row: dict, direction: tuple[str, str] | None, default: tuple[str, str] | None) -> None:
    """Brings a two-way row (ALMA's `translation`), or one with source and reference, into `direction`."""
    where, own = row["where"], None
    if "translation" in row:
        pair = row.pop("translation")
        if not isinstance(pair, dict):
            raise ValueError(f'{where}: "translation" must be {{"de": ..., "en": ...}}, found {json.dumps(pair)[:40]}')
    else:
        own = row.get("source_lang"), row.get("target_lang")
        if own == (None, None) and direction is None:
            raise ValueError(f'{where}: no "source_lang", "target_lang"; add them or give --direction, such as de-en')
        own = default if own == (None, None) else tuple(text_field(row, f"{s}_lang", where) for s in ("source", "target"))
        pair = {lang: text_field(row, name, where) for lang, name in zip(own, ("source", "reference"))}
    wanted = direction or own
    if wanted is None:
        raise ValueError(f"{where}: a two-way row; say which way by --direction, such as de-en")
    if not set(wanted) <= set(pair) or ("reference_ids" in row and wanted != own):
        raise ValueError(f"{where}: has {', '.join(pair)}, but --direction is {'-'.join(wanted)}")
    row |= {"source": text_field(pair, wanted[0], where), "reference": text_field(pair, wanted[1], where)}
    row |= {"source_lang": wanted[0], "target_lang": wanted[1]}


def read_conversation(row: dict, prompts: bool) -> None:
    """Sets `messages`, the conversation before the answer, and `reference`, the answer (None where only prompts are wanted)."""
    where, messages = row["where"], row.get("messages")
    if messages is not None:
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise ValueError(f'{where}: "messages" must be a list of {{"role", "content"}}')
    elif "turns" in row:  # FastChat's questions: the first turn
        turns = row["turns"] if isinstance(row["turns"], list) else []
        messages = [{"role": "user", "content": text_field({"turns": (turns or [None])[0]}, "turns", where)}]
        row["id"] = row.get("id", row.get("question_id"))
    elif "prompt" in row:
        messages = [{"role": "user", "content": row["prompt"]}]
        if not prompts or "response" in row:
            messages.append({"role": "assistant", "content": row.get("response")})
    else:
        raise ValueError(f'{where}: has {", ".join(row)}; wanted "translation", "source", "messages" or "prompt"')
    roles = [m.get("role") for m in messages if m is not messages[0] or m.get("role") != "system"]
    if not roles or roles != alternating(len(roles)):
        raise ValueError(f"{where}: roles must be user and assistant in turn, found {', '.join(map(str, roles))}")
    for m in messages:
        name = {"user": "prompt", "assistant": "response"}.get(m["role"], "system") if "prompt" in row else "content"
        if "reference_ids" not in row or m is not messages[-1] or m.get("content") != "":  # a model may have said nothing
            text_field({name: m.get("content")}, name, where)
    if len(roles) % 2 and not prompts:
        raise ValueError(f"{where}: has no answer to learn; the last message must be the assistant's")
    answered = len(roles) % 2 == 0
    row |= {"messages": messages[:-1] if answered else messages, "reference": messages[-1]["content"] if answered else None}


def check_ids(row: dict) -> None:
    for name in ("reference_ids", "rationale_ids"):
        ids = row.get(name)
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError(f'{row["where"]}: "{name}" must be a list of token ids')
    if not isinstance(row.get("rationale", ""), str) or row.get("finish") not in ("eos", "length"):
        raise ValueError(f'{row["where"]}: a ledger row needs "rationale" (text) and "finish" ("eos" or "length")')


def meta_path(ledger: str | Path) -> Path:
    return Path(str(ledger).removesuffix(".jsonl") + ".meta.json")


def read_meta(ledger: str | Path) -> dict:
    path = meta_path(ledger)
    return read_json(path)[0][1] if path.exists() else {}


def fill(template: str, row: dict) -> str:
    """The instruction of a pair. One pass: braces in the source are never read as a name."""
    values = {"source": row["source"]} | {k: LANGUAGES.get(row[k], row[k]) for k in ("source_lang", "target_lang")}
    return re.sub(r"\{(source|source_lang|target_lang)\}", lambda m: values[m[1]], template)


def read_template(value: str | None) -> str | None:
    """--template: a file's text, or the text itself with \\n for a line break. ValueError on names it does not know."""
    if value is None:
        return None
    file = len(value) < 256 and "{source}" not in value and Path(value).is_file()
    text = read_text(value).removesuffix("\n") if file else unescape(value)
    names = set(re.findall(r"\{([\w ]+)\}", text)) - {"source", "source_lang", "target_lang"}
    if names or "{source}" not in text:
        wrong = f"does not know {{{min(names)}}}" if names else "has no {source}"
        raise ValueError(f"--template {value}: {wrong}; use {{source}}, {{source_lang}}, {{target_lang}}")
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

    def messages(self, row: dict) -> list[dict]:
        """The conversation before the answer; of a pair, one turn that the template makes."""
        template = self.template or row.get("meta", {}).get("template") or TEMPLATE
        return row.get("messages") or [{"role": "user", "content": fill(template, row)}]

    def prompt(self, row: dict) -> list[int]:
        meta = row.get("meta", {})
        mine = dict(template=self.template, system=self.system, chat=self.tokenizer.chat_name)
        same = meta.get("tokenizer_hash") == self.tokenizer.hash
        for name in ("template", "system", *["chat"] * same) if meta else ():
            if mine[name] not in (None, meta.get(name)):
                other = f"--chat {meta.get('chat')}; give it here too" if name == "chat" else f"another --{name}; leave it out"
                raise ValueError(f"{row['where']}: the ledger was written with {other}")
        try:
            return self.tokenizer.chat(self.messages(row), self.system or meta.get("system"))
        except ValueError as e:
            raise ValueError(f"{row['where']}: {e}") from None

    def segments(self, row: dict) -> tuple[list[int], list[int]]:
        """Ids of reference and rationale: the ledger's own, unless its tokenizer or, after an edit, its text is another."""
        t, text, more = self.tokenizer, row["reference"], row.get("rationale") or ""
        reference, rationale = row.get("reference_ids", []), row.get("rationale_ids", [])
        ours = row.get("meta", {}).get("tokenizer_hash") == t.hash
        if ours and max([*reference, *rationale], default=0) >= t.vocab_size:
            raise ValueError(f"{row['where']}: token id outside the vocabulary of {t.vocab_size}; write the ledger anew")
        if not ours or (t.decode(reference) != text and reference != t.answer(text)):
            reference, ours = t.answer(text), False
        if not ours or t.decode_after(reference, rationale) != more:
            rationale = t.continuation(text, reference, more) if more else []
        return reference, rationale

    def example(self, row: dict) -> Example:
        """Status other than `ok` and rows outside the coverage train on reference + EOS; a cut text gets no EOS."""
        (reference, rationale), note = self.segments(row), ""
        cut = row.get("finish") == "length"  # of what was sampled: the rationale if there is one, else the reference
        if row.get("status", "ok") != "ok":
            note = row["status"]
        elif rationale and draw(row["id"]) >= self.coverage:
            note = "outside coverage"
        end = [] if cut and not note else [self.tokenizer.end_id]
        if rationale and not note:
            return Example(row["id"], self.prompt(row), reference, rationale + end)
        return Example(row["id"], self.prompt(row), reference + end, [], note)


def draw(id: int | str) -> float:
    """A number in [0, 1) that hangs on the id alone, so that a larger coverage contains a smaller one."""
    return int.from_bytes(hashlib.sha256(str(id).encode()).digest()[:7]) / 2**56


def collate(examples: list[Example], device="cpu") -> tuple[torch.Tensor, ...]:
    """-> tokens [B, T], padded on the right with 0; and for the N supervised tokens: select [N], the places in B * T whose
    logits predict them; targets [N]; is_rationale [N], bool. Pads are known by length, never by their id."""
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
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range, wanted {low:g} to {high:g}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def default_dtype() -> str:
    return "bfloat16" if torch.cuda.is_available() else "float32"


def common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--direction", nargs="+", default=[], metavar="de-en", help="languages; several mix the directions")
    parser.add_argument("--chat", default="auto", choices=("auto", *CHATS), help="chat format (default: the model's own)")
    parser.add_argument("--system", help="system prompt (default: the model's own)")
    parser.add_argument("--template", help="instruction, text or file, with {source} {source_lang} {target_lang}")


def cli(main, parser: argparse.ArgumentParser) -> None:
    """Runs a script: a user's mistake ends with status 2 and one line, Ctrl-C and SIGTERM end without a traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rank = int(os.environ.get("RANK", 0))
    try:
        main(parser.parse_args())
    except (ValueError, OSError, FloatingPointError) as e:
        if isinstance(e, BrokenPipeError):
            os._exit(141)
        if rank == 0 or not isinstance(e, ValueError):  # a mistake in the data is the same on every rank
            print("error: " + (f"rank {rank}: " if rank else "") + " ".join(str(e).split("\n")), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as e:
        if "gloo" not in str(e) and "NCCL" not in str(e):
            raise
        print(f"error: rank {rank}: lost the connection to another rank, which has ended; its own message says why", file=sys.stderr)
        sys.exit(2)


def main(args: argparse.Namespace) -> None:
    tokenizer, rows = Tokenizer(args.model, args.chat), read_rows(args.data, args.direction)
    encoder = Encoder(tokenizer, read_template(args.template), args.system)
    examples = [encoder.example(row) for row in rows]
    if args.show >= len(examples):
        raise ValueError(f"--show {args.show}: the data has rows 0 to {len(examples) - 1}")
    long = sum(len(e) > args.max_length for e in examples)
    print(f"{len(examples)} rows, {long} longer than {args.max_length} tokens (left out); chat {tokenizer.chat_name}")
    for name in ("prompt", "reference", "rationale"):
        lengths = sorted(len(getattr(e, name)) for e in examples)
        print(f"{name:>10} {sum(lengths):>10,} tokens  median {lengths[len(lengths) // 2]:>5}  longest {lengths[-1]:>5}")
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
