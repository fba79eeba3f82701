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
import torch.distributed as dist
from sentencepiece import SentencePieceProcessor

# ALMA's wording (Xu et al. 2024), as its code has it; the wording of the RaDis paper is not known
TEMPLATE = "Translate this from {source_lang} to {target_lang}:\n{source_lang}: {source}\n{target_lang}:"
FIELDS = ("source", "source_lang", "target_lang")  # what a template may name
NAMES = """
    ar Arabic bg Bulgarian ca Catalan cs Czech da Danish de German el Greek en English es Spanish et Estonian fa Persian
    fi Finnish fr French gu Gujarati ha Hausa he Hebrew hi Hindi hr Croatian hu Hungarian id Indonesian is Icelandic
    it Italian ja Japanese kk Kazakh km Khmer ko Korean lt Lithuanian lv Latvian ms Malay nl Dutch no Norwegian
    pl Polish ps Pashto pt Portuguese ro Romanian ru Russian sk Slovak sl Slovenian sr Serbian sv Swedish sw Swahili
    ta Tamil th Thai tr Turkish uk Ukrainian ur Urdu vi Vietnamese zh Chinese""".split()
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
        proto, names = file.read_bytes(), ("tokenizer_config.json", "added_tokens.json", "generation_config.json")
        config, added, generation = (read_object(self.folder / name) for name in names)
        if (self.folder / "chat_template.jinja").is_file():
            config["chat_template"] = read_text(self.folder / "chat_template.jinja")
        try:
            self.sp = SentencePieceProcessor(model_proto=proto)
            # the same model without the space that is put before each text: appended fields override (protobuf)
            self.sp_continue = SentencePieceProcessor(model_proto=proto + b"\x1a\x02\x18\x00")
            file = self.folder / names[0]  # at fault from here on
            self._read_config(config, added)
            file, stops = self.folder / names[2], generation.get("eos_token_id")
            stops = sorted({self.eos_id, *(stops if isinstance(stops, list) else [stops])} - {None})
        except (RuntimeError, AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(f"{file}: not understood; download it again") from None
        known = [name for mark, name in MARKS.items() if mark in self.template] if self.template else ["plain"]
        check(known or chat != "auto", self.folder, f"chat template not known here; give --chat {'|'.join(CHATS)}")
        self.chat_name = known[0] if chat == "auto" else chat
        tags = ("<|im_start|>", "<|im_end|>") if self.chat_name == "chatml" else ()
        self.start_id, self.end_id = [self._id(tag, -1) for tag in tags] or (self.eos_id, self.eos_id)
        ok = min(self.eos_id, self.start_id, self.end_id) >= 0
        check(ok, file, f"the vocabulary lacks {', '.join(tags) or 'EOS'}; give another --chat, or another tokenizer")
        self.eos_ids = sorted({self.end_id, *stops})
        self.hash = hashlib.sha256(proto + json.dumps(self.added).encode()).hexdigest()[:16]
        self.adds_space = self.sp.encode("a") != self.sp_continue.encode("a")

    def _read_config(self, config: dict, added: dict) -> None:
        """Added and control tokens, BOS, EOS and the chat template; any error means a broken file."""
        ids = {token["content"]: int(id) for id, token in (config.get("added_tokens_decoder") or {}).items()}
        self.ids = ids | added
        self.added = {id: text for text, id in sorted(self.ids.items(), key=lambda item: item[1])}
        self.control = {i for i in range(len(self.sp)) if self.sp.is_control(i)} | set(self.added) - {self.sp.unk_id()}
        tags = sorted({self.sp.id_to_piece(i).replace("▁", " ") for i in self.control if i < len(self.sp)}, key=len)
        self.tags = re.compile("|".join(f"(?={re.escape(tag)})" for tag in tags))
        self.vocab_size = max([len(self.sp), *(i + 1 for i in self.added)])
        self.bos_id = self._id(config.get("bos_token"), self.sp.bos_id())
        self.eos_id = self._id(config.get("eos_token"), self.sp.eos_id())
        self.legacy = bool(config.get("legacy"))  # SentencePiece's space before every text, not only the first
        template = config.get("chat_template") or ""  # or a list of several, by name
        template = json.dumps(template) if isinstance(template, list) else template
        self.template = template.replace("\\n", "\n")

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
        return "\n" in self.decode(ids[-1:]) and "\n" in self.decode(ids).lstrip()

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

        messages: {"role", "content"}, a system prompt if there is one, then user and assistant in turn, user last.
        """
        if messages and messages[0]["role"] == "system":
            system, messages = messages[0]["content"], messages[1:]
        roles, ids = [m["role"] for m in messages], []
        check(roles == [*TURNS * (len(roles) // 2), "user"], "roles", "wanted user, assistant, ..., user", roles)
        one_text = self.chat_name in ("zephyr", "chatml") and not self.legacy
        for part in self._parts([m["content"] for m in messages], system):
            if isinstance(part, str):
                ids += self.encode(part, within=one_text and len(ids) > 0)
            elif part >= 0:  # not every vocabulary has a BOS
                ids.append(part)
        return ids

    def _parts(self, texts: list[str], system: str | None) -> list[int | str]:
        """A conversation as its format has it: control tokens by id, and the texts between them.

        Sources: Meta's llama repository (llama2), mistral-common v1 and v3 (mistral), the models' own templates.
        """
        bos, eos, parts = self.bos_id, self.eos_id, []
        if self.chat_name == "plain":
            return [bos, "\n\n".join([system, *texts] if system else texts)]
        if self.chat_name == "llama2":
            texts[0] = f"<<SYS>>\n{system}\n<</SYS>>\n\n{texts[0]}" if system else texts[0]
            for user, answer in zip(texts[:-1:2], texts[1::2]):
                parts += [bos, f"[INST] {user.strip()} [/INST] {answer.strip()} ", eos]
            return [*parts, bos, f"[INST] {texts[-1].strip()} [/INST]"]
        if self.chat_name == "mistral":
            # in v1 the tags are text; from v3 on they are control tokens, and the system prompt moves to the last turn
            begin, end = self._id("[INST]", -1), self._id("[/INST]", -1)
            v3 = begin in self.control
            at = len(texts) - 1 if v3 else 0
            texts[at] = f"{system}\n\n{texts[at]}" if system else texts[at]
            for i, text in enumerate(texts):
                if i % 2:
                    parts += [text.rstrip(" ") if v3 else text, eos]
                else:
                    parts += [begin, text, end] if v3 else [f"[INST] {text} [/INST]"]
            return [bos, *parts]
        # chatml has each turn between two control tokens; in zephyr the tags are text, and EOS ends a turn
        chatml, turns = self.chat_name == "chatml", list(zip(itertools.cycle(TURNS), [*texts, ""]))
        if chatml and system is None:  # some templates put one in
            own = re.search(r"<\|im_start\|>system\n([^'\"{}<]+)<\|im_end\|>", self.template)
            system = own and own[1]
        for i, (role, text) in enumerate(turns if system is None else [("system", system), *turns]):
            between = "\n" if i else ""
            parts += [between, self.start_id, f"{role}\n{text}"] if chatml else [f"{between}<|{role}|>\n{text}"]
            parts.append(self.end_id)
        return [bos if "bos_token" in self.template else -1, *parts[:-1]]  # the answer, to come, does not end here


def read_text(path: str | Path) -> str:
    """Text of a UTF-8 file. ValueError if it can't be read or is blank."""
    try:
        data = Path(path).read_bytes()
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as e:
        raise ValueError(f"{path}: {e.strerror}; give a file that can be read") from None
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8 (byte 0x{data[e.start]:02x}); convert the file") from None
    check(text.strip(), path, "the file is empty")
    return text


def write_text(path: Path, text: str) -> None:
    """Writes a line-ended UTF-8 file that appears whole or not at all, and its folder. OSError where that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text + "\n", "utf-8")
    temporary.replace(path)


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
        line, start, end = 1, 0, 0
        for row in parse_json(text, path):  # each is decoded once more, to learn its line
            before, start = start, re.compile(r"\s*[\[,]\s*").match(text, end).end()
            line, end = line + text.count("\n", before, start), json.JSONDecoder().raw_decode(text, start)[1]
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
    columns, rows = [read_text(file).removesuffix("\n").split("\n") for file in files], []
    if len(files) == 2:
        languages, pairs, (n, m) = [Path(file).suffix[1:] for file in files], zip(*columns), map(len, columns)
        check(n == m, f"{files[0]}:{min(n, m) + 1}", f"{n} lines, each with its translation, but {files[1]} has {m}")
    else:
        languages, pairs = Path(files[0]).stem.split(".")[-1].split("-"), (line.split("\t") for line in columns[0])
    named = dict(zip(FIELDS[1:], languages)) if are_two_languages(languages) else {}
    for n, cells in enumerate(pairs, 1):
        where = f"{files[0]}:{n}"
        check(len(cells) == 2, where, f"wanted source, tab, reference; found {len(cells) - 1} tabs")
        rows.append((where, dict(source=cells[0], reference=cells[1]) | named))
    return rows


def group_files(files: list[str]) -> list[tuple[str, ...]]:
    """JSON and TSV files stand alone; other files are line files and come in pairs, `train.de train.en`."""
    groups, files = [], iter(files)
    for file in files:
        ending = Path(file).suffix[1:]
        alone = ending in ("json", "jsonl", "tsv") or (ending not in LANGUAGES and read_text(file).lstrip()[0] in "{[")
        groups.append((file,) if alone else (file, *itertools.islice(files, 1)))
        check(alone or len(groups[-1]) == 2, file, "a line file needs a second one, as in train.de train.en")
    return groups


def named_files(items: list[str]) -> dict[str, list[str]]:
    """`[NAME=]FILE ...` -> files by name; a file without a name goes by its own, line files come in pairs."""
    names, named = {file: name for name, _, file in (item.rpartition("=") for item in items)}, {}
    for group in group_files(list(names)):
        named.setdefault(names[group[0]] or Path(group[0]).stem, []).extend(group)
    return named


def are_two_languages(codes) -> bool:
    """Whether these are the codes of two languages that we know."""
    return len(codes) == 2 and codes[0] != codes[1] and all(code in list(LANGUAGES) for code in codes)


def read_rows(files: list[str], directions: list[str] = (), prompts: bool = False) -> list[dict]:
    """Reads pairs, conversations and ledgers (`prompts`: prompts alone) into one list, in order.

    A row is what its file says, with `id` (its place in the data if the file has none), `where` (FILE:LINE) and `meta`
    (the settings that a ledger was written with) added. A pair has source, reference, source_lang, target_lang; others
    have `messages`, the conversation before the answer, and `reference`, the answer. Several directions read each pair
    once for each. ValueError names file and line.
    """
    rows, ways = [], [tuple(direction.split("-")) for direction in dict.fromkeys(directions)]
    for way in ways:
        check(are_two_languages(way), f'--direction "{"-".join(way)}"', f"give two of {'|'.join(LANGUAGES)}, as de-en")
    for group in group_files(files):
        meta, lines = read_meta(group[0]), len(group) == 2 or Path(group[0]).suffix == ".tsv"
        found = read_lines(group) if lines else read_json(group[0])
        for way, (where, row) in itertools.product(ways or [None], found):
            row = row | {"where": where, "meta": meta if "reference_ids" in row else {}}
            first = way in (None, *ways[:1])
            if "translation" in row or "source" in row:
                read_pair(row, way, *ways[:1])
            elif first:  # a conversation has no direction
                read_conversation(row, prompts)
            else:
                continue
            id = row.get("id")
            check(id is None or type(id) in (int, str), where, '"id" must be a number or a string', id)
            row["id"] = len(rows) if id is None else id if first else f"{id} {'-'.join(way)}"
            rows.append(row)
    return rows


def as_text(value, where: str, name: str, may_be_blank: bool = False) -> str:
    """The value, if it is Unicode text and not blank."""
    ok = isinstance(value, str) and (value.strip() or may_be_blank) and not re.search(r"[\ud800-\udfff]", value)
    check(ok, where, f"{name} must be a Unicode string that is not blank; fill it in or take the row out", value)
    return value


def read_pair(row: dict, way: tuple[str, str] | None, default: tuple[str, str] = ("", "")) -> None:
    """Brings a two-way row (ALMA's `translation`), or one with source and reference, into the direction `way`."""
    where, ledger, own, texts = row["where"], "reference_ids" in row, way, row.pop("translation", None)
    if texts is None:
        own = tuple(row.get(name) or code for name, code in zip(FIELDS[1:], default))
        check(are_two_languages(own), where, 'needs "source_lang" and "target_lang", or --direction, as de-en', own)
        texts, way = {own[0]: row.get("source"), own[1]: row.get("reference")}, way or own
    check(way, where, "a two-way row; say which way by --direction, such as de-en")
    fits = isinstance(texts, dict) and set(way) <= set(texts) and (way == own or not ledger)
    check(fits, where, f"--direction {'-'.join(way)} needs both languages (a ledger has one direction)", texts)
    row["source_lang"], row["target_lang"] = way
    row["source"] = as_text(texts[way[0]], where, f"the {LANGUAGES[way[0]]} text")
    row["reference"] = as_text(texts[way[1]], where, f"the {LANGUAGES[way[1]]} text", may_be_blank=ledger)


def read_conversation(row: dict, prompts: bool) -> None:
    """Sets `messages`, the conversation before the answer, and `reference`, the answer (None where there is none)."""
    where, said, fields = row["where"], row.get("messages"), zip(TURNS, ("prompt", "response"))
    if isinstance(row.get("turns"), list):  # FastChat's questions: the first turn
        said = [dict(role="user", content=text) for text in row["turns"][:1]]
        row["id"] = row.get("id", row.get("question_id"))
    elif said is None:
        said = [dict(role=role, content=row[name]) for role, name in fields if name in row]
    ok = isinstance(said, list) and all(isinstance(m, dict) for m in said)
    roles = [m.get("role") for m in said] if ok else []
    answered = roles[-1:] == ["assistant"]
    before = roles[roles[:1] == ["system"] : len(roles) - answered]
    wanted = 'wanted "source", "translation", "prompt", "turns", or "messages" of user and assistant in turn'
    check(before == [*TURNS * (len(before) // 2), "user"], where, wanted, roles or [*row])
    check(answered or prompts, where, 'has no answer ("response"); prompts alone go with generate.py --task answer')
    mute = [answered and "reference_ids" in row and m is said[-1] for m in said]  # a model may have said nothing
    texts = [as_text(m.get("content"), where, f"the {m['role']}'s text", blank) for m, blank in zip(said, mute)]
    row["reference"] = texts.pop() if answered else None
    row["messages"] = [dict(role=role, content=text) for role, text in zip(roles, texts)]


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
    unknown = set(re.findall(r"\{([\w ]+)\}", text)) - set(FIELDS)
    ok = "{source}" in text and not unknown
    check(
        ok, f"--template {value}", f"must name {{source}}, and nothing but {{{'}, {'.join(FIELDS)}}}", *sorted(unknown)
    )
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
        meta, chat = row.get("meta", {}), self.tokenizer.chat_name
        mine = {"system": self.system, "template": None if "messages" in row else self.template}
        mine |= {"chat": chat} if meta.get("tokenizer_hash") == self.tokenizer.hash else {}
        for name, value in mine.items():
            fault = f"--{name} is {json.dumps(value)}, the ledger was written with {json.dumps(meta.get(name))}"
            check(not meta or value in (None, meta.get(name)), row["where"], fault)
        return self.tokenizer.chat(self.messages(row), self.system or meta.get("system"))

    def segments(self, row: dict) -> tuple[list[int], list[int]]:
        """Ids of reference and rationale: the ledger's, unless its tokenizer or, after an edit, its text is another."""
        t, text = self.tokenizer, row["reference"]
        more = as_text(row.get("rationale") or "", row["where"], "the rationale", may_be_blank=True)
        reference, rationale = row.get("reference_ids", []), row.get("rationale_ids", [])
        ours = row.get("meta", {}).get("tokenizer_hash") == t.hash
        limit = t.vocab_size if ours else math.inf
        for ids in (reference, rationale):
            ok = isinstance(ids, list) and all(type(i) is int and 0 <= i < limit for i in ids)
            check(ok, row["where"], f"*_ids must be token ids of the vocabulary (0 to {t.vocab_size - 1})", ids)
        if not ours or (t.decode(reference) != text and reference != t.answer(text)):
            reference, ours = t.answer(text), False
        if not ours or t.decode_after(reference, rationale) != more:
            rationale = t.continuation(text, reference, more) if more else []
        return reference, rationale

    def example(self, row: dict) -> Example:
        """A row whose rationale is left out trains on reference + EOS; a cut text gets no EOS."""
        (reference, rationale), note = self.segments(row), ""
        # in [0, 1) and from the id alone, so that a larger coverage contains a smaller one
        share = int.from_bytes(hashlib.sha256(str(row["id"]).encode()).digest()[:7]) / 2**56
        ledger = "rationale" in row  # elsewhere status and finish are somebody's own fields
        if ledger and not self.keep and row.get("status", "ok") != "ok":
            note = str(row["status"])
        elif rationale and share >= self.coverage:
            note = "outside coverage"
        # cut is what was sampled: the rationale if there is one, else the reference
        end = [] if ledger and row.get("finish") == "length" and not note else [self.tokenizer.end_id]
        if rationale and not note:
            rationale = rationale + end
        else:
            reference, rationale = reference + end, []
        return Example(row["id"], self.prompt(row), reference, rationale, note)


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
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, lambda number, _: sys.exit(128 + number))
    rank = int(os.environ.get("RANK", 0))
    try:
        main(parser.parse_args())
        if torch.cuda.is_available() and dist.is_initialized():
            dist.destroy_process_group()  # NCCL warns of one that is left behind
        return
    except BrokenPipeError:
        os._exit(141)
    except (ValueError, OSError, FloatingPointError) as e:
        message = str(e)
        if rank and isinstance(e, ValueError):  # a mistake in the data, which rank 0 tells
            sys.exit(2)
    except torch.OutOfMemoryError as e:
        message = f"rank {rank}: {str(e).split('.')[0]}; lower --micro-batch-size or --batch-size"
    except RuntimeError as e:
        if "gloo" not in str(e) and "NCCL" not in str(e):
            raise
        message = "lost another rank, which has ended; its own message says why"
    text = (f"rank {rank}: " if rank else "") + message.replace("\n", " ")
    sys.stderr.write(f"error: {text}\n")  # at once, or lines of several ranks would mix
    sys.exit(2)


def main(args: argparse.Namespace) -> None:
    tokenizer, rows = Tokenizer(args.model, args.chat), read_rows(args.data, args.direction)
    encoder = Encoder(tokenizer, read_template(args.template), args.system)
    examples = [encoder.example(row) for row in rows]
    check(args.show < len(rows), f"--show {args.show}", f"the data has rows 0 to {len(rows) - 1}")
    long, notes = sum(len(e) > args.max_length for e in examples), [e.note for e in examples if e.note]
    print(f"{len(rows)} rows, {long} longer than {args.max_length} tokens (left out){without_meta(rows)}")
    print(f"{len(notes)} rationales left out", *(f"({notes.count(note)} {note})" for note in sorted(set(notes))))
    shown = examples[args.show]
    print(f"row {shown.id}, chat {tokenizer.chat_name}: read (grey), reference (green), rationale (blue), EOS (red)\n")
    for name, colour in {"prompt": 90, "reference": 32, "rationale": 34}.items():
        lengths, ids, text = sorted(len(getattr(e, name)) for e in examples), getattr(shown, name), ""
        for i in ids:
            shade = 31 if name != "prompt" and i == tokenizer.end_id else colour
            piece = tokenizer.added.get(i) or tokenizer.sp.id_to_piece(i)
            text += f"\033[{shade}m{piece}\033[0m" if sys.stdout.isatty() else piece
        print(f"{name}: {sum(lengths):,} tokens, median {lengths[len(lengths) // 2]}, longest {lengths[-1]}")
        print(f"{len(ids)} here ({'no loss' if name == 'prompt' else 'loss'}): {text}\n", *ids, "\n")


def parser() -> argparse.ArgumentParser:
    p = Arguments(description="Checks training data and shows one example: which tokens are read, which are learnt.")
    p.add_argument("--model", required=True, help="model folder (only its tokenizer is read)")
    p.add_argument("--data", required=True, nargs="+", help="pairs, conversations or ledgers")
    common_arguments(p)
    p.add_argument("--max-length", type=number(2, kind=int), default=1024, help="tokens of a row (default 1024)")
    p.add_argument("--show", type=number(0, kind=int), default=0, metavar="N", help="row to show (default 0)")
    return p


if __name__ == "__main__":
    cli(main, parser())
