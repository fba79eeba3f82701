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
LANGUAGES = dict(
    ar="Arabic", cs="Czech", de="German", en="English", es="Spanish", et="Estonian", fi="Finnish", fr="French",
    hi="Hindi", is_="Icelandic", it="Italian", ja="Japanese", ko="Korean", lt="Lithuanian", lv="Latvian", nl="Dutch",
    pl="Polish", pt="Portuguese", ro="Romanian", ru="Russian", tr="Turkish", uk="Ukrainian", zh="Chinese",
)  # fmt: skip
CHATS = ("llama2", "mistral", "zephyr", "chatml", "plain")


class Tokenizer:
    """SentencePiece with the chat formats. Control tokens are placed by id; text of a user never becomes one.

    chat: a name of CHATS, or "auto" to find it from the chat template in the folder (none means plain).
    ValueError names the file that is missing, broken or not understood.
    """

    def __init__(self, folder: str | Path, chat: str = "auto"):
        self.folder = Path(folder)
        file = self.folder / "tokenizer.model"
        if not file.is_file():
            raise ValueError(f"{file}: no such file; a model folder needs its SentencePiece tokenizer.model")
        proto = file.read_bytes()
        try:
            self.sp = SentencePieceProcessor(model_proto=proto)
            # the same model without the space that is put before each text; appended fields override (protobuf)
            self.sp_continue = SentencePieceProcessor(model_proto=proto + b"\x1a\x02\x18\x00")
        except RuntimeError:
            raise ValueError(f"{file}: not a SentencePiece model; download it again") from None
        settings = self._read("tokenizer_config.json")
        added = {content: id for content, id in self._read("added_tokens.json").items() if isinstance(id, int)}
        for id, token in (settings.get("added_tokens_decoder") or {}).items():
            added[token["content"]] = int(id)
        self.added = {id: content for content, id in sorted(added.items(), key=lambda x: x[1])}
        pieces = range(self.sp.vocab_size())
        self.control = {i for i in pieces if self.sp.is_control(i)} | set(self.added)
        self.vocab_size = max([len(pieces), *(i + 1 for i in self.added)])
        names = settings.get("bos_token"), settings.get("eos_token")
        names = [n["content"] if isinstance(n, dict) else n for n in names]
        self.bos_id = self._id(names[0], self.sp.bos_id())
        self.eos_id = self._id(names[1], self.sp.eos_id())
        if self.eos_id < 0:
            raise ValueError(f"{file}: has no EOS token, so no answer could ever end")
        self.legacy = bool(settings.get("legacy", False))  # a space before every text, not only the first
        template_file = self.folder / "chat_template.jinja"
        template = template_file.read_text("utf-8") if template_file.is_file() else settings.get("chat_template") or ""
        if isinstance(template, list):  # several named templates
            template = next((t["template"] for t in template if t.get("name") == "default"), "")
        self.template = template.replace("\\n", "\n")
        self.chat_name = self._detect() if chat == "auto" else chat
        self.v3 = self.chat_name == "mistral" and self.sp.is_control(self._id("[INST]", self.sp.unk_id()))
        self.end_id = self._id("<|im_end|>", self.eos_id) if self.chat_name == "chatml" else self.eos_id
        stops = self._read("generation_config.json").get("eos_token_id") or []
        stops = [stops] if isinstance(stops, int) else stops
        self.eos_ids = sorted({self.end_id, self.eos_id, *stops})
        self.hash = hashlib.sha256(proto + json.dumps(self.added).encode()).hexdigest()[:16]
        self.adds_space = self.sp.encode("a") != self.sp_continue.encode("a")

    def _read(self, name: str) -> dict:
        path = self.folder / name
        try:
            return json.loads(path.read_text("utf-8")) if path.is_file() else {}
        except ValueError as e:
            raise ValueError(f"{path}:{getattr(e, 'lineno', 1)}: broken JSON; download it again") from None

    def _id(self, piece: str | None, default: int) -> int:
        id = next((i for i, content in self.added.items() if content == piece), None)
        id = self.sp.piece_to_id(piece) if id is None and piece else id
        return default if id is None or id == self.sp.unk_id() else id

    def _detect(self) -> str:
        marks = {"<|im_start|>": "chatml", "<|user|>": "zephyr", "<<SYS>>": "llama2", "[INST]": "mistral"}
        for mark, name in marks.items():
            if mark in self.template:
                return name
        if self.template:
            raise ValueError(f"{self.folder}: chat template not known here; give --chat {'|'.join(CHATS)}")
        return "plain"

    def encode(self, text: str) -> list[int]:
        """Text to ids, without BOS or EOS, never with a control token."""
        return self._text(text, self.sp)

    def _text(self, text: str, sp: SentencePieceProcessor) -> list[int]:
        ids = sp.encode(text)
        if self.control.isdisjoint(ids):
            return ids
        # a tag that is a piece of the vocabulary: split it, so that it is read as the characters it is made of
        tag = max((sp.id_to_piece(i) for i in ids if i in self.control), key=len)
        at = text.index(tag) + 1
        return self._text(text[:at], sp) + self._text(text[at:], self.sp_continue)

    def decode(self, ids: list[int]) -> str:
        """Ids to text; control and added tokens are left out."""
        return self.sp.decode([i for i in ids if i not in self.control and i < self.sp.vocab_size()])

    def decode_after(self, before: list[int], ids: list[int]) -> str:
        """The text of `ids` where they follow `before`: a piece decoded alone would lose its leading space."""
        start, whole = self.decode(before), self.decode(before + ids)
        return whole[len(start) :] if whole.startswith(start) else self.decode(ids)

    def first_line_ends(self, ids: list[int]) -> bool:
        """Whether the last of `ids` ends the first line that is not empty."""
        newline = "\n" in self.sp.decode([ids[-1]]) or self.sp.id_to_piece(ids[-1]) == "<0x0A>"
        return newline and "\n" in self.decode(ids).lstrip("\n ")

    def answer(self, text: str) -> list[int]:
        """Ids of an assistant's answer, as they follow `chat`, without EOS."""
        if self.chat_name in ("zephyr", "chatml"):  # goes on within the text that ends "assistant\n"
            return self._text(text, self.sp_continue)
        return self.encode(text if self.adds_space or self.chat_name != "plain" else " " + text)

    def continuation(self, before: str, ids: list[int], text: str) -> list[int]:
        """Ids of `text` after an answer's beginning `before`, whose ids stay `ids` even where both would merge."""
        whole = self.answer(before + text)
        return whole[len(ids) :] if whole[: len(ids)] == ids else self._text(text, self.sp_continue)

    def chat(self, messages: list[dict], system: str | None = None) -> list[int]:
        """Ids of a conversation, up to where the assistant's answer begins.

        messages: {"role": "system" (first only) | "user" | "assistant", "content"}, user and assistant in turn, user
        last. Sources: Meta's llama repository (llama2), mistral-common v1 and v3 (mistral), the models' own templates.
        """
        if messages and messages[0]["role"] == "system":
            system, messages = messages[0]["content"], messages[1:]
        roles = [m["role"] for m in messages]
        if len(roles) % 2 == 0 or roles != (["user", "assistant"] * len(roles))[: len(roles)]:
            raise ValueError(f"roles must be user, assistant, ..., user; found {', '.join(roles) or 'none'}")
        texts = [m["content"] for m in messages]
        return getattr(self, f"_{self.chat_name}")(texts, system)

    def _llama2(self, texts: list[str], system: str | None) -> list[int]:
        if system:
            texts = [f"<<SYS>>\n{system}\n<</SYS>>\n\n{texts[0]}", *texts[1:]]
        ids = []
        for user, answer in zip(texts[::2], texts[1::2]):
            ids += [self.bos_id, *self.encode(f"[INST] {user.strip()} [/INST] {answer.strip()} "), self.eos_id]
        return ids + [self.bos_id, *self.encode(f"[INST] {texts[-1].strip()} [/INST]")]

    def _mistral(self, texts: list[str], system: str | None) -> list[int]:
        # v1 tags are text; from v3 on they are control tokens, and the system prompt moves to the last turn
        begin, end = self._id("[INST]", 0), self._id("[/INST]", 0)
        ids, at = [self.bos_id], len(texts) - 1 if self.v3 else 0
        for i, text in enumerate(texts):
            if system and i == at:
                text = f"{system}\n\n{text}"
            if i % 2:
                ids += [*self.encode(text), self.eos_id]
            else:
                ids += [begin, *self.encode(text), end] if self.v3 else self.encode(f"[INST] {text} [/INST]")
        return ids

    def _zephyr(self, texts: list[str], system: str | None) -> list[int]:
        turns = [f"<|{'assistant' if i % 2 else 'user'}|>\n{text}" for i, text in enumerate(texts)]
        turns = ([f"<|system|>\n{system}"] if system is not None else []) + turns
        parts = [turns[0]]
        for turn in [*turns[1:], "<|assistant|>\n"]:
            parts += [self.eos_id, "\n" + turn]
        return self._join(parts)

    def _chatml(self, texts: list[str], system: str | None) -> list[int]:
        if system is None:  # some templates put one in
            found = re.search(r"<\|im_start\|>system\n([^'\"{}<]+)<\|im_end\|>", self.template)
            system = found and found[1]
        turns = [("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
        turns = ([("system", system)] if system is not None else []) + turns
        start, end, parts = self._id("<|im_start|>", -1), self._id("<|im_end|>", -1), []
        for role, text in turns:
            parts += [start, f"{role}\n{text}", end, "\n"]
        return self._join([*parts, start, "assistant\n"])

    def _plain(self, texts: list[str], system: str | None) -> list[int]:
        text = "\n\n".join([system, *texts] if system else texts)
        return ([self.bos_id] if self.bos_id >= 0 else []) + self.encode(text)

    def _join(self, parts: list[str | int]) -> list[int]:
        """Texts and control ids in turn; only the first text gets SentencePiece's space, or all under `legacy`."""
        ids, sp = ([self.bos_id] if "bos_token" in self.template else []), self.sp
        for part in parts:
            if part == -1:
                raise ValueError(f"{self.folder}: the vocabulary has no <|im_start|>, <|im_end|>; give another --chat")
            ids += [part] if isinstance(part, int) else self._text(part, sp)
            sp = self.sp if self.legacy else self.sp_continue
        return ids


def language(code: str) -> str:
    """German for de; a code that is not known stands for itself."""
    return LANGUAGES.get("is_" if code == "is" else code, code)


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
    text, rows, line = read_text(path), [], 1
    try:
        if not text.lstrip().startswith("["):
            for line, row in enumerate(text.split("\n"), 1):
                if row.strip():
                    rows.append((f"{path}:{line}", json.loads(row)))
        else:
            decoder, at, seen = json.JSONDecoder(), text.index("[") + 1, 0
            skip = re.compile(r"[\s,]*")
            while True:
                at = skip.match(text, at).end()
                line, seen = line + text.count("\n", seen, at), at
                if text[at : at + 1] == "]":
                    break
                row, at = decoder.raw_decode(text, at)
                rows.append((f"{path}:{line}", row))
    except json.JSONDecodeError as e:
        line = e.lineno if text.lstrip().startswith("[") else line
        raise ValueError(f"{path}:{line}: broken JSON: {e.msg}") from None
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f'{where}: wanted a JSON object, found {json.dumps(row)[:40]}')
    return rows


def group_files(files: list[str]) -> list[tuple[str, ...]]:
    """JSON and TSV files stand alone; other files are line files and come in pairs, `train.de train.en`."""
    groups, files = [], list(files)
    while files:
        file = files.pop(0)
        alone = Path(file).suffix in (".json", ".jsonl", ".tsv") or read_text(file).lstrip()[:1] in "{["
        if not alone and not files:
            raise ValueError(f"{file}: a line file needs a second one beside it, such as train.de train.en")
        groups.append((file,) if alone else (file, files.pop(0)))
    return groups


def named_files(items: list[str]) -> dict[str, list[str]]:
    """`[NAME=]FILE ...` -> files by name; a file without a name goes by its own, line files come in pairs."""
    named, files = {}, []
    for item in items:
        name, mark, file = item.partition("=")
        files.append((file, name) if mark else (item, Path(item).stem))
    given = dict(files)
    for group in group_files([file for file, _ in files]):
        named.setdefault(given[group[0]], []).extend(group)
    return named


def field(row: dict, name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(f'{where}: "{name}" must be a string, found {json.dumps(value)[:40]}')
    if not value.strip():
        raise ValueError(f'{where}: "{name}" is empty; take the row out or fill it in')
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f'{where}: "{name}" holds half of a surrogate pair, which is no character; mend the row')
    return value


def read_rows(files: list[str], directions: list[str] = (), prompts: bool = False) -> list[dict]:
    """Reads pairs, conversations and ledgers (`prompts`: prompts alone) into one list, in order.

    A row is what its file says, with `id` (its place in the data if the file has none) and `where` (FILE:LINE) added. A
    pair has source, reference, source_lang, target_lang; others have `messages`, the conversation before the answer, and
    `reference`, the answer. Several directions read each two-way row once for each. ValueError names file and line.
    """
    rows = []
    for group in group_files(files):
        for direction in directions or [None]:
            rows += read_lines(group, direction) if not is_json(group) else read_objects(group[0], direction, prompts)
    for i, row in enumerate(rows):
        row["id"] = i if row.get("id") is None else row["id"]
        if not isinstance(row["id"], (int, str)):
            raise ValueError(f'{row["where"]}: "id" must be a number or a string')
    return rows


def is_json(group: tuple[str, ...]) -> bool:
    return len(group) == 1 and Path(group[0]).suffix != ".tsv"


def read_lines(group: tuple[str, ...], direction: str | None) -> list[dict]:
    """A TSV file or two line files; languages by ending (x.de-en.tsv, x.de x.en) or by `direction`."""
    columns = [read_text(file).removesuffix("\n").split("\n") for file in group]
    if len(group) == 1:
        table = [line.rstrip("\r").split("\t") for line in columns[0]]
        langs = Path(Path(group[0]).stem).suffix[1:].split("-")
    else:
        if len(columns[0]) != len(columns[1]):
            short = min(map(len, columns))
            raise ValueError(
                f"{group[0]}:{short + 1}: {len(columns[0])} lines, but {group[1]} has {len(columns[1])}; "
                "line N of one must translate line N of the other"
            )
        table = [[a.rstrip("\r"), b.rstrip("\r")] for a, b in zip(*columns)]
        langs = [Path(file).suffix[1:] for file in group]
    known = len(langs) == 2 and all(language(lang) != lang for lang in langs)
    if direction is None and not known:
        raise ValueError(f"{group[0]}: languages unknown; give --direction, such as de-en")
    wanted = split_direction(direction) if direction else tuple(langs)
    if known and wanted not in (tuple(langs), tuple(langs[::-1])):
        raise ValueError(f'{group[0]}: --direction {direction} asks for other languages than {"-".join(langs)}')
    rows = []
    for n, cells in enumerate(table, 1):
        where = f"{group[0]}:{n}"
        if len(cells) != 2:
            raise ValueError(f"{where}: wanted source, tab, reference; found {len(cells) - 1} tabs")
        cells = cells[::-1] if known and wanted != tuple(langs) else cells
        row = dict(zip(("source", "reference"), cells))
        row = {name: field(row, name, where) for name in row}
        rows.append(row | {"source_lang": wanted[0], "target_lang": wanted[1], "where": where})
    return rows


def read_objects(path: str, direction: str | None, prompts: bool) -> list[dict]:
    """JSON in any of its forms. A ledger brings the settings it was written with, from NAME.meta.json beside it."""
    meta, rows = None, []
    for where, row in read_json(path):
        row = dict(row)
        if "translation" in row:
            pair, wanted = row.pop("translation"), split_direction(direction or "")if direction else None
            if wanted is None:
                raise ValueError(f"{where}: a two-way row; say which way by --direction, such as de-en")
            if not isinstance(pair, dict) or not set(wanted) <= set(pair):
                has = ", ".join(pair) if isinstance(pair, dict) else json.dumps(pair)[:40]
                raise ValueError(f'{where}: "translation" has {has}, but --direction is {direction}')
            row |= {"source": field(pair, wanted[0], where), "reference": field(pair, wanted[1], where)}
            row |= {"source_lang": wanted[0], "target_lang": wanted[1]}
        elif "source" in row:
            langs = row.get("source_lang"), row.get("target_lang")
            langs = split_direction(direction) if direction and langs == (None, None) else langs
            names = ["source", "reference"]
            if direction and langs == split_direction(direction)[::-1] and "reference_ids" not in row:
                langs, names = langs[::-1], names[::-1]
            elif direction and langs != split_direction(direction):
                raise ValueError(f"{where}: --direction is {direction}, the row goes from {langs[0]} to {langs[1]}")
            row |= {"source": field(row, names[0], where), "reference": field(row, names[1], where)}
            row |= dict(zip(("source_lang", "target_lang"), langs))
            for name in ("source_lang", "target_lang"):
                if not row[name]:
                    raise ValueError(f'{where}: no "{name}"; add it to the rows or give --direction, such as de-en')
                field(row, name, where)
        else:
            row["messages"], row["reference"] = conversation(row, where, prompts)
        if "reference_ids" in row:
            meta = read_meta(path) if meta is None else meta
            row["meta"] = meta
            check_ids(row, where)
        rows.append(row | {"where": where})
    if not rows:
        raise ValueError(f"{path}: holds no rows")
    return rows


def conversation(row: dict, where: str, prompts: bool) -> tuple[list[dict], str | None]:
    """-> (messages before the answer, the answer, or None where prompts alone are wanted)."""
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages) or not messages:
            raise ValueError(f'{where}: "messages" must be a list of {{"role", "content"}}')
        messages = [{"role": field(m, "role", where), "content": field(m, "content", where)} for m in messages]
    elif "turns" in row:
        turns = row["turns"]
        messages = [{"role": "user", "content": field({"turns": turns[0] if turns else None}, "turns", where)}]
        row.setdefault("id", row.get("question_id"))
    elif "prompt" in row:
        messages = [{"role": "user", "content": field(row, "prompt", where)}]
        if not prompts or "response" in row:
            messages.append({"role": "assistant", "content": field(row, "response", where)})
    else:
        keys = ", ".join(row) or "nothing"
        raise ValueError(f'{where}: has {keys}; wanted "translation", "source", "messages" or "prompt"')
    roles = [m["role"] for m in messages if m["role"] != "system" or m is not messages[0]]
    if roles != (["user", "assistant"] * len(roles))[: len(roles)] or not roles:
        raise ValueError(f'{where}: roles must be user and assistant in turn, found {", ".join(roles)}')
    if roles[-1] == "assistant":
        return messages[:-1], messages[-1]["content"]
    if not prompts:
        raise ValueError(f"{where}: has no answer to learn; the last message must be the assistant's")
    return messages, None


def check_ids(row: dict, where: str) -> None:
    for name in ("reference_ids", "rationale_ids"):
        ids = row.get(name)
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError(f'{where}: "{name}" must be a list of token ids')
    if not isinstance(row.get("rationale", ""), str) or row.get("finish") not in ("eos", "length"):
        raise ValueError(f'{where}: a ledger row needs "rationale" (text) and "finish" ("eos" or "length")')


def meta_path(ledger: str | Path) -> Path:
    path = Path(ledger)
    return path.with_name(path.name.removesuffix(".jsonl") + ".meta.json")


def read_meta(ledger: str | Path) -> dict:
    path = meta_path(ledger)
    return dict(read_json(path)[0][1]) if path.exists() else {}


def fill(template: str, row: dict) -> str:
    """The instruction of a pair. One pass: braces in the source are never read as a name."""
    values = {"source": row["source"]} | {k: language(row[k]) for k in ("source_lang", "target_lang")}
    return re.sub(r"\{(source|source_lang|target_lang)\}", lambda m: values[m[1]], template)


def read_template(value: str | None) -> str | None:
    """--template: a file's text, or the text itself with \\n for a line break. ValueError on names it does not know."""
    if value is None:
        return None
    file = len(value) < 256 and "{source}" not in value and Path(value).is_file()
    text = read_text(value).removesuffix("\n") if file else unescape(value)
    names = set(re.findall(r"\{(\w+)\}", text)) - {"source", "source_lang", "target_lang"}
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


class Encoder:
    """Turns rows into prompts and examples under one instruction template, system prompt and chat format.

    A ledger was written under settings of its own; they must be these, or the rationale would answer another prompt.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None = None, system: str | None = None, coverage: float = 1):
        self.tokenizer, self.template, self.system, self.coverage = tokenizer, template, system, coverage

    def messages(self, row: dict) -> list[dict]:
        """The conversation before the answer; of a pair, one turn that the template makes."""
        template = self.template or (row.get("meta") or {}).get("template") or TEMPLATE
        return row.get("messages") or [{"role": "user", "content": fill(template, row)}]

    def prompt(self, row: dict) -> list[int]:
        meta = row.get("meta") or {}
        for name in ("template", "system"):
            mine, theirs = getattr(self, name), meta.get(name)
            if meta and mine is not None and mine != theirs:
                raise ValueError(f'{row["where"]}: the ledger was written with another --{name}; leave it out here')
        if meta.get("tokenizer_hash") == self.tokenizer.hash and meta.get("chat") != self.tokenizer.chat_name:
            raise ValueError(f'{row["where"]}: the ledger was written with --chat {meta.get("chat")}')
        try:
            return self.tokenizer.chat(self.messages(row), self.system or meta.get("system"))
        except ValueError as e:
            raise ValueError(f'{row["where"]}: {e}') from None

    def segments(self, row: dict) -> tuple[list[int], list[int]]:
        """Ids of reference and rationale: the ledger's own where its text and tokenizer are ours, else by text."""
        t, text = self.tokenizer, row["reference"]
        ours = (row.get("meta") or {}).get("tokenizer_hash") == t.hash
        reference, rationale = row.get("reference_ids") or [], row.get("rationale_ids") or []
        if ours and max([*reference, *rationale], default=0) >= t.vocab_size:
            raise ValueError(f'{row["where"]}: token id outside the vocabulary of {t.vocab_size}; write the ledger anew')
        if not ours or text not in (t.decode(reference), "" if reference != t.answer(text) else text):
            reference, ours = t.answer(text), False
        if not ours or row.get("rationale", "") != t.decode_after(reference, rationale):
            rationale = t.continuation(text, reference, row["rationale"]) if row.get("rationale") else []
        return reference, rationale

    def example(self, row: dict) -> Example:
        """Status other than `ok` and rows outside the coverage train on reference + EOS; a cut text gets no EOS."""
        reference, rationale = self.segments(row)
        note, end = "", [self.tokenizer.end_id]
        if row.get("rationale"):
            if row.get("status", "ok") != "ok":
                note = row["status"]
            elif draw(row["id"]) >= self.coverage:
                note = "outside coverage"
        cut = row.get("finish") == "length"
        if rationale and not note:
            rationale = rationale + (end if not cut else [])
        else:  # a forced reference is whole; a sampled one (no rationale in the row) may have been cut
            reference, rationale = reference + (end if row.get("rationale") or not cut else []), []
        return Example(row["id"], self.prompt(row), reference, rationale, note)


def draw(id: int | str) -> float:
    """A number in [0, 1) that hangs on the id alone, so that a larger coverage contains a smaller one."""
    return int.from_bytes(hashlib.sha256(str(id).encode()).digest()[:7]) / 2**56


def fit(examples: list[Example], max_length: int) -> tuple[list[Example], list[Example]]:
    """-> (those of at most `max_length` tokens, those longer): a long row is left out whole, and counted."""
    return [e for e in examples if len(e) <= max_length], [e for e in examples if len(e) > max_length]


def collate(examples: list[Example], device="cpu") -> tuple[torch.Tensor, ...]:
    """-> tokens [B, T] padded on the right with 0; and for the N supervised tokens: select [N], the places in B * T whose
    logits predict them; targets [N]; is_rationale [N], bool. Pads are known by length, never by their id."""
    T = max([len(e) - 1 for e in examples], default=1)
    tokens, select, targets, segment = torch.zeros(max(len(examples), 1), max(T, 1), dtype=torch.long), [], [], []
    for b, e in enumerate(examples):
        tokens[b, : len(e) - 1] = torch.tensor(e.tokens[:-1])
        first = len(e.prompt)
        select += range(b * T + first - 1, b * T + len(e) - 1)
        targets += e.tokens[first:]
        segment += [False] * len(e.reference) + [True] * len(e.rationale)
    out = tokens, torch.tensor(select, dtype=torch.long), torch.tensor(targets, dtype=torch.long), torch.tensor(segment)
    return tuple(x.to(device, torch.bool if i == 3 else None) for i, x in enumerate(out))


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
    except (ValueError, OSError) as e:
        if isinstance(e, BrokenPipeError):
            os._exit(141)
        if rank == 0:
            print("error: " + " ".join(str(e).split("\n")), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as e:
        if "gloo" not in str(e) and "NCCL" not in str(e):
            raise
        print(f"error: rank {rank}: lost the connection to another rank, which has ended; its own message says why", file=sys.stderr)
        sys.exit(2)


def main(args: argparse.Namespace) -> None:
    tokenizer = Tokenizer(args.model, args.chat)
    rows = read_rows(args.data, args.direction)
    encoder = Encoder(tokenizer, read_template(args.template), args.system)
    examples = [encoder.example(row) for row in rows]
    kept, long = fit(examples, args.max_length)
    count = {n: sum(len(getattr(e, n)) for e in examples) for n in ("prompt", "reference", "rationale")}
    print(f"{len(examples)} rows, {len(long)} longer than {args.max_length} tokens (left out); chat {tokenizer.chat_name}")
    for name, n in count.items():
        lengths = sorted(len(getattr(e, name)) for e in examples)
        print(f"{name:>10} {n:>10,} tokens  median {lengths[len(lengths) // 2]:>5}  longest {lengths[-1]:>5}")
    notes = [e.note for e in examples if e.note]
    print(f"{len(notes)} rationales left out " + str({n: notes.count(n) for n in sorted(set(notes))} or ""))
    if not 0 <= args.show < len(examples):
        raise ValueError(f"--show {args.show}: the data has rows 0 to {len(examples) - 1}")
    e, colour = examples[args.show], sys.stdout.isatty() or args.colour
    print(f"\nrow {e.id}: what is read (grey), learnt as reference (green), learnt as rationale (blue), EOS (red)")
    for name, code in [("prompt", 90), ("reference", 32), ("rationale", 34)]:
        ids = getattr(e, name)
        pieces = [tokenizer.added.get(i) or tokenizer.sp.id_to_piece(i) for i in ids]
        codes = [31 if name != "prompt" and i == tokenizer.end_id else code for i in ids]
        text = "".join(f"\033[{c}m{p}\033[0m" if colour else p for c, p in zip(codes, pieces))
        loss = "no loss" if name == "prompt" else "loss"
        print(f"{name} ({len(ids)} tokens, {loss}): {text}\n  ids {' '.join(map(str, ids))}")


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
