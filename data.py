"""From files to token ids: what of a row is read, what is learnt, and where it is kept.

    python data.py --model DIR --data train.de-en.json --direction de-en

checks the data, counts it, and shows one example in colour. A training sequence is

    prompt (no loss) | reference y | rationale r | EOS      L = -log P(y, r | I, x)

where I is the instruction and x the source. The segments are kept apart as ids, never found again
in the text: a tokenizer may merge across any boundary of strings.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it, also while torch is imported

import argparse
import fcntl
import hashlib
import itertools
import json
import os
import re
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from sentencepiece import SentencePieceProcessor

from model import (
    ModelConfig,
    blaming,
    parse_json,
    read_object,
    read_text,
    require,
    write_text,
)

# ALMA's wording (Xu et al. 2024), as its code has it; the RaDis paper's wording is not known
TEMPLATE = (
    "Translate this from {source_lang} to {target_lang}:\n{source_lang}: {source}\n{target_lang}:"
)
LANGUAGE_NAMES = """
    ar Arabic bg Bulgarian ca Catalan cs Czech da Danish de German el Greek en English es Spanish
    et Estonian fa Persian fi Finnish fr French gu Gujarati ha Hausa he Hebrew hi Hindi hr Croatian
    hu Hungarian id Indonesian is Icelandic it Italian ja Japanese kk Kazakh km Khmer ko Korean
    lt Lithuanian lv Latvian ms Malay nl Dutch no Norwegian pl Polish ps Pashto pt Portuguese
    ro Romanian ru Russian sk Slovak sl Slovenian sr Serbian sv Swedish sw Swahili ta Tamil th Thai
    tr Turkish uk Ukrainian ur Urdu vi Vietnamese zh Chinese""".split()
LANGUAGES = dict(zip(LANGUAGE_NAMES[::2], LANGUAGE_NAMES[1::2]))
# a string in a model's chat template by which its format is known
MARKS = {
    "<|im_start|>": "chatml",
    "<|user|>": "zephyr",
    "<<SYS>>": "llama2",
    "[INST]": "mistral",
}
NOT_COMPARED = ("model", "versions")  # settings that are recorded, but decide nothing


# 1. From rows to examples


@dataclass
class Example:
    """Ids of one row. EOS stands at the end of the segment that it ends, and counts there."""

    id: int | str
    prompt: list[int]
    reference: list[int]
    rationale: list[int]
    left_out: str = ""  # why the rationale is left out, if it is

    @property
    def tokens(self):
        return self.prompt + self.reference + self.rationale

    def __len__(self):
        return len(self.tokens)


@dataclass
class Encoder:
    """Turns rows into prompts and examples, under one instruction template and system prompt.

    A ledger brings its own; others that are given are refused, since its rationales would then
    answer a prompt that the model never saw.
    """

    tokenizer: "Tokenizer"
    template: str | None = None
    system: str | None = None
    coverage: float = 1.0  # share of the rows that keep their rationale
    only_ok: bool = False  # leave out the rationales of another status

    def example(self, row):
        """prompt | reference | rationale. A row without rationale trains on reference + EOS."""
        reference, rationale = self.segments(row)
        left_out = self.why_left_out(row) if rationale else ""
        if left_out:
            rationale = []
        end = [self.tokenizer.end_id]
        cut = "reference_ids" in row and row.get("finish") == "length"
        if rationale or not reference:
            # what was cut did not want to end there; of what is left out nothing is to be learnt
            rationale = rationale + ([] if cut or left_out else end)
        else:
            reference = reference + end
        return Example(row["id"], self.prompt(row), reference, rationale, left_out)

    def why_left_out(self, row):
        """The reason to train without this row's rationale; empty if there is none."""
        if self.only_ok and row.get("status", "ok") != "ok":
            return f"status {row['status']}"
        # in [0, 1) and from the id alone: a larger coverage contains a smaller one
        digest = hashlib.sha256(str(row["id"]).encode()).digest()
        if int.from_bytes(digest[:7]) / 2**56 >= self.coverage:
            return "outside coverage"
        return ""

    def segments(self, row):
        """Ids of reference and rationale: the ledger's own, or the text's where they differ.

        They differ if the ledger is of another tokenizer, or if a row was edited by hand.
        """
        tokenizer = self.tokenizer
        text = row["reference"]
        rationale_text = row["rationale"]
        reference = row.get("reference_ids", [])
        rationale = row.get("rationale_ids", [])
        if row["meta"].get("tokenizer_hash") != tokenizer.hash:
            reference = tokenizer.answer(text)
            return reference, tokenizer.continuation(text, reference, rationale_text)
        check_ids(reference + rationale, tokenizer.vocab_size, row["where"])
        if tokenizer.decode(reference) != text:
            reference = tokenizer.answer(text)
        if tokenizer.decode_after(reference, rationale) != rationale_text:
            rationale = tokenizer.continuation(text, reference, rationale_text)
        return reference, rationale

    def prompt(self, row):
        """Ids up to where the answer begins. ValueError if the ledger had another prompt."""
        meta = row["meta"]
        given = {"system": self.system, "template": self.template}
        if meta.get("tokenizer_hash") == self.tokenizer.hash:
            given["chat"] = self.tokenizer.chat_name
        for name, value in given.items():
            same = not meta or value in (None, meta.get(name))
            was = json.dumps(meta.get(name))[:60]
            require(same, row["where"], f"--{name} is {value!r}, the ledger has {was}")
        return self.tokenizer.chat(self.messages(row), self.system or meta.get("system"))

    def settings(self):
        """What a prompt depends on, besides the row."""
        return {
            "chat": self.tokenizer.chat_name,
            "system": self.system,
            "template": self.template or TEMPLATE,
            "tokenizer_hash": self.tokenizer.hash,
        }

    def messages(self, row):
        """The conversation before the answer; of a pair, one turn that the template makes."""
        if "messages" in row:
            return row["messages"]
        values = {"source": row["source"]}
        for name in ("source_lang", "target_lang"):
            values[name] = LANGUAGES.get(row[name], row[name])
        template = self.template or row["meta"].get("template") or TEMPLATE
        # in one pass: braces in the source are never read as a name
        text = re.sub(r"\{(\w+)\}", lambda m: values.get(m[1], m[0]), template)
        return [{"role": "user", "content": text}]


def share(rows: list[list[int]], device="cpu"):
    """Rows of ids -> tokens [1, U], and `shared`, by which `Transformer.forward` reads each once.

    Rows that begin alike, as under one instruction, have that beginning in common: of the rows
    A B C and A B D the tokens are A B C D. shared: `new` [U], the places in B * T where these
    stand first, here 0 1 2 5; and `same` [B, T], which of the U stands at each place, here 0 1 2
    and 0 1 3. T is the longest row; pads, on the right, repeat the first of the tokens.
    """
    T = max(map(len, rows))
    tree = {}  # (which of U stands before, the token) -> which of U
    new = []
    same = torch.zeros(len(rows), T, dtype=torch.long)
    for b, row in enumerate(rows):
        branch = [-1]
        for place, token in enumerate(row, b * T):
            branch.append(tree.setdefault((branch[-1], token), len(tree)))
            if len(tree) > len(new):
                new.append(place)
        same[b, : len(row)] = torch.tensor(branch[1:])
    tokens = torch.tensor([[token for _, token in tree]], device=device)
    return tokens, (torch.tensor(new, device=device), same.to(device))


def collate(examples: list[Example], device="cpu"):
    """-> tokens [1, U] and `shared`, as of `share`; places [N] in B * T whose logits predict a
    supervised token; targets [N].

    The last token of a row is predicted and never read. The N supervised tokens are first those
    of all references, then those of all rationales.
    """
    rows = [example.tokens[:-1] for example in examples]
    tokens, shared = share(rows or [[0]], device)
    T = shared[1].shape[1]
    references = []  # (place, target)
    rationales = []
    for b, example in enumerate(examples):
        start = b * T + len(example.prompt) - 1  # this place predicts the answer's first token
        references += enumerate(example.reference, start)
        rationales += enumerate(example.rationale, start + len(example.reference))
    pairs = torch.tensor(references + rationales, dtype=torch.long).view(-1, 2).to(device)
    return tokens, shared, pairs[:, 0], pairs[:, 1]


def check_ids(ids, limit, where):
    """ValueError unless these are token ids below `limit`."""
    for i in ids:
        fits = type(i) is int and 0 <= i < limit
        require(fits, where, f"wanted token ids below {limit}, found {json.dumps(i)[:40]}")


# 2. The tokenizer and the chat formats


class Tokenizer:
    """SentencePiece with the chat formats. Text of a user never becomes a control token.

    chat: a name of --chat, or "auto" to find it from the chat template (none means plain).
    ValueError names the file that is missing, broken or not understood.
    """

    def __init__(self, folder: str | Path, chat: str = "auto"):
        self.folder = Path(folder)
        file = self.folder / "tokenizer.model"
        require(file.is_file(), file, "no such file; a model folder needs a SentencePiece model")
        proto = file.read_bytes()
        try:
            self.sp = SentencePieceProcessor(model_proto=proto)
            # the same with normalizer_spec.add_dummy_prefix = false: no space before each text
            self.sp_within = SentencePieceProcessor(model_proto=proto + b"\x1a\x02\x18\x00")
        except RuntimeError:
            raise ValueError(f"{file}: not a SentencePiece model; get the file anew") from None
        self.size = len(self.sp)
        self.adds_space = self.sp.encode("a") != self.sp_within.encode("a")
        config = self._read("tokenizer_config.json")
        self.added = self._read_added_tokens(config)  # id -> text
        self.vocab_size = max([self.size, *(id + 1 for id in self.added)])
        self.ids = {text: id for id, text in self.added.items()}
        self.control = {*self.added, *filter(self.sp.is_control, range(self.size))}
        self.control.discard(self.sp.unk_id())
        tags = [self.sp.id_to_piece(i) for i in self.control if i < self.size]
        tags = [re.escape(tag.replace("▁", " ")) for tag in sorted(tags, key=len)]
        self.tags = re.compile("|".join(f"(?={tag})" for tag in tags))
        self.hash = short_hash([proto.hex(), self.added])

        self.bos_id = self._id(config.get("bos_token"), self.sp.bos_id())
        self.eos_id = self._id(config.get("eos_token"), self.sp.eos_id())
        self.legacy = config.get("legacy") is True  # a space before every text, not only the first
        self.chat_template = self._read_template(config)
        known = [name for mark, name in MARKS.items() if mark in self.chat_template]
        found = chat != "auto" or known or not self.chat_template
        require(found, self.folder, "its chat template is not known here; give --chat")
        self.chat_name = [*known, "plain"][0] if chat == "auto" else chat
        tags = ("<|im_start|>", "<|im_end|>") if self.chat_name == "chatml" else ()
        self.start_id, self.end_id = [self._id(tag, -1) for tag in tags] or [self.eos_id] * 2
        fits = min(self.eos_id, self.start_id, self.end_id) >= 0
        require(fits, self.folder, f"the vocabulary lacks EOS, or {tags}; give another --chat")
        stops = self._read("generation_config.json").get("eos_token_id") or []
        stops = stops if isinstance(stops, list) else [stops]
        check_ids(stops, 2**31, self.folder / "generation_config.json")
        self.eos_ids = sorted({self.eos_id, self.end_id, *stops})

    def _read(self, name):
        file = self.folder / name
        return read_object(file) if file.exists() else {}

    def _read_added_tokens(self, config):
        """id -> text, in the order of the ids."""
        with blaming(f"{self.folder}: the added tokens"):
            found = {id: text for text, id in self._read("added_tokens.json").items()}
            for id, token in (config.get("added_tokens_decoder") or {}).items():
                require(id.isdecimal(), self.folder, f"the added token {id[:20]} has no id")
                found[int(id)] = token["content"]
            check_ids(found, 2**31, f"{self.folder}: the added tokens")
            return {id: str(found[id]) for id in sorted(found)}

    def _read_template(self, config):
        file = self.folder / "chat_template.jinja"
        template = read_text(file) if file.is_file() else config.get("chat_template") or ""
        if not isinstance(template, str):  # a list of several, by name
            template = json.dumps(template)
        return template.replace("\\n", "\n")

    def _id(self, piece, default):
        """The id of an added token or of a piece of the vocabulary."""
        if isinstance(piece, dict):
            piece = piece.get("content")
        id = self.sp.unk_id()
        if isinstance(piece, str):
            id = self.ids.get(piece, self.sp.piece_to_id(piece))
        return default if id == self.sp.unk_id() else id

    def encode(self, text, within=False):
        """Text to ids, without BOS or EOS. `within`: it goes on from a text before it."""
        sp = self.sp_within if within else self.sp
        ids = sp.encode(text)
        if self.control.isdisjoint(ids):
            return ids
        # the text holds tags that are pieces of the vocabulary: each is cut after its first
        # character, and none is left
        cuts = [max(match.start(), 1) for match in self.tags.finditer(" " + text)]
        ids = []
        for start, end in itertools.pairwise([0, *cuts, len(text)]):
            sp = self.sp_within if start else sp
            ids += sp.encode(text[start:end])
        return [i for i in ids if i not in self.control]  # a tag of one character can't be cut

    def decode(self, ids):
        """Ids to text; control and added tokens are left out."""
        return self.sp.decode([i for i in ids if i not in self.control and i < self.size])

    def decode_after(self, before, ids):
        """The text of `ids` after `before`: a piece decoded alone would lose its space."""
        start = self.decode(before)
        whole = self.decode(before + ids)
        return whole[len(start) :] if whole.startswith(start) else self.decode(ids)

    def first_line_ends(self, ids):
        """Whether the last of `ids` ends the first line that is not empty."""
        return "\n" in self.decode(ids[-1:]) and "\n" in self.decode(ids).lstrip()

    def answer(self, text):
        """Ids of an assistant's answer as they follow `chat`, without EOS."""
        if not text:
            return []
        if self.chat_name in ("zephyr", "chatml"):  # it goes on from "assistant\n"
            return self.encode(text, within=True)
        if self.chat_name == "plain" and not self.adds_space:
            text = " " + text
        return self.encode(text)

    def continuation(self, before, ids, text):
        """Ids of `text` after an answer's beginning `before`, whose ids stay what they are."""
        if not text:
            return []
        whole = self.answer(before + text)
        return whole[len(ids) :] if whole[: len(ids)] == ids else self.encode(text, within=True)

    def chat(self, messages: list[dict], system: str | None = None) -> list[int]:
        """Ids of a conversation, up to where the assistant's answer begins.

        messages: {"role", "content"}, a system prompt if there is one, then user and assistant in
        turn, the user last.
        """
        check_turns(messages, "messages")
        texts = [message["content"] for message in messages]
        if messages[0]["role"] == "system":
            system = texts.pop(0)
        make = {"llama2": self._llama2, "mistral": self._mistral, "plain": self._plain}
        parts = make.get(self.chat_name, self._tagged)(texts, system)
        one_text = self.chat_name in ("zephyr", "chatml") and not self.legacy
        ids = []
        for part in parts:
            if isinstance(part, str):
                ids += self.encode(part, within=one_text and len(ids) > 0)
            elif part >= 0:  # not every vocabulary has a BOS
                ids.append(part)
        return ids

    # Each format as control tokens by id, and the texts between them. Sources: Meta's llama
    # repository, mistral-common v1 and v3, the chat templates of Zephyr, TinyLlama and ChatML.

    def _plain(self, texts, system):
        return [self.bos_id, "\n\n".join([system, *texts] if system else texts)]

    def _llama2(self, texts, system):
        if system:
            texts[0] = f"<<SYS>>\n{system}\n<</SYS>>\n\n{texts[0]}"
        parts = []
        for user, answer in zip(texts[:-1:2], texts[1::2]):
            turn = f"[INST] {user.strip()} [/INST] {answer.strip()} "
            parts += [self.bos_id, turn, self.eos_id]
        return [*parts, self.bos_id, f"[INST] {texts[-1].strip()} [/INST]"]

    def _mistral(self, texts, system):
        # in v1 the tags are text; from v3 on they are control tokens, and the system prompt
        # stands in the last turn
        begin = self._id("[INST]", -1)
        end = self._id("[/INST]", -1)
        v3 = begin in self.control
        if system:
            turn = len(texts) - 1 if v3 else 0
            texts[turn] = f"{system}\n\n{texts[turn]}"
        parts = [self.bos_id]
        for i, text in enumerate(texts):
            if i % 2:
                parts += [text.rstrip(" ") if v3 else text, self.eos_id]
            elif v3:
                parts += [begin, text, end]
            else:
                parts.append(f"[INST] {text} [/INST]")
        return parts

    def _tagged(self, texts, system):
        # chatml: a turn stands between two control tokens; zephyr: the tags are text, EOS ends it
        chatml = self.chat_name == "chatml"
        if chatml and system is None:  # some templates put one in
            own = re.search(r"<\|im_start\|>system\n([^'\"{}<]+)<\|im_end\|>", self.chat_template)
            system = own and own[1]
        turns = list(zip(itertools.cycle(["user", "assistant"]), [*texts, ""]))
        if system is not None:
            turns.insert(0, ("system", system))
        parts = [self.bos_id if "bos_token" in self.chat_template else -1]
        for i, (role, text) in enumerate(turns):
            between = "\n" if i else ""
            if chatml:
                parts += [between, self.start_id, f"{role}\n{text}", self.end_id]
            else:
                parts += [f"{between}<|{role}|>\n{text}", self.end_id]
        return parts[:-1]  # the answer, which is to come, does not end here


def require_vocabulary(folder, tokenizer, config):
    """ValueError unless the model in `folder` has the same tokens as these."""
    same = Tokenizer(folder, tokenizer.chat_name).hash == tokenizer.hash
    same = same and ModelConfig.from_file(folder).vocab_size == config.vocab_size
    require(same, folder, "its vocabulary is another than that of --model")


# 3. Files and their rows


def short_hash(value):
    """16 hex digits of a value's sha256."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def read_json(path):
    """Objects of a JSON array, or one a line, each with where it stands, `FILE:LINE`."""
    text = read_text(path)
    rows = []
    if text.lstrip().startswith("["):
        separator = re.compile(r"[\s,]*")
        line = 1
        start = 0
        end = text.index("[") + 1
        for row in parse_json(text, path):  # each is decoded once more, to learn its line
            before = start
            start = separator.match(text, end).end()
            end = json.JSONDecoder().raw_decode(text, start)[1]
            line += text.count("\n", before, start)
            rows.append((f"{path}:{line}", row))
    else:
        for line, content in enumerate(text.split("\n"), 1):
            if content.strip():
                rows.append((f"{path}:{line}", parse_json(content, path, line)))
    for where, row in rows:
        require(isinstance(row, dict), where, f"wanted an object, found {json.dumps(row)[:40]}")
    require(rows, path, "holds no rows")
    return rows


def read_rows(files: list[str], directions=(), prompts: bool = False) -> list[dict]:
    """Reads pairs, conversations and ledgers (`prompts`: prompts alone too) into one list.

    A row is what its file says, with `id` (its place in the data if the file has none), `where`
    (FILE:LINE) and `meta` (of a ledger its settings, else {}) added. A pair has source, reference,
    source_lang, target_lang; others have `messages`, the conversation before the answer, and
    `reference`, the answer. Several directions read each pair once for each. ValueError names
    file and line.
    """
    ways = [tuple(direction.split("-")) for direction in dict.fromkeys(directions)]
    for way in ways:
        check_languages(way, "--direction")
    rows = []
    for file in files:
        meta = read_meta(file)
        found = read_json(file)
        known = set()
        for way in ways or [None]:
            first_way = way in (None, *ways[:1])
            for where, content in found:
                row = content | {"where": where}
                row["meta"] = meta if "reference_ids" in row else {}
                conversation = is_conversation(row)
                if conversation and not first_way:  # it has no direction
                    continue
                with blaming(where):
                    check_ledger_fields(row)
                    if conversation:
                        read_conversation(row, prompts)
                    else:
                        read_pair(row, way, *ways[:1])
                    row["id"] = read_id(row, len(rows))
                if not first_way and "id" in content:
                    row["id"] = f"{row['id']} {'-'.join(way)}"
                require(row["id"] not in known, where, f"id {row['id']} stands twice in {file}")
                known.add(row["id"])
                rows.append(row)
    return rows


def is_conversation(row):
    """Whether a row has messages or a prompt; it may have a `source` of its own beside them."""
    said = row.keys() & {"messages", "response", "turns"}
    return "translation" not in row and (bool(said) or "source" not in row)


def check_languages(way, where):
    """ValueError unless these are two languages that are known here."""
    fits = len(way) == 2 and way[0] != way[1] and set(way) <= LANGUAGES.keys()
    require(fits, where, f"found {str(way)[:40]}; give two of {'|'.join(LANGUAGES)}, as de-en")


def read_id(row, place):
    """The row's own id, or its place in the data."""
    id = row.get("id")
    fits = id is None or type(id) in (int, str)
    require(fits, row["where"], '"id" must be a whole number or a string')
    return place if id is None else id


def as_text(value, where, name, may_be_blank=False):
    """The value, if it is Unicode text and not blank."""
    fits = isinstance(value, str) and (may_be_blank or value.strip())
    require(fits, where, f"{name} must be text that is not blank; fill it in or take the row out")
    return value


def read_pair(row, way, unmarked=None):
    """Brings ALMA's two-way `translation`, or a source and its reference, into direction `way`.

    unmarked: the direction of rows that do not say theirs.
    """
    where = row["where"]
    ledger = "reference_ids" in row
    texts = row.pop("translation", None)
    if texts is None:
        own = (row.get("source_lang"), row.get("target_lang"))
        if own == (None, None) and unmarked:
            own = unmarked
        check_languages(own, f"{where}: source_lang, target_lang")
        texts = {own[0]: row.get("source"), own[1]: row.get("reference")}
        way = way or own
        require(way == own or not ledger, where, f"this ledger is {'-'.join(own)} alone")
    require(way, where, "a two-way row; say which way by --direction, such as de-en")
    fits = isinstance(texts, dict) and set(way) <= texts.keys()
    require(fits, where, f"--direction {'-'.join(way)} needs a text in both languages")
    row["source_lang"], row["target_lang"] = way
    row["source"] = as_text(texts[way[0]], where, f"the {LANGUAGES[way[0]]} text")
    row["reference"] = as_text(texts[way[1]], where, f"the {LANGUAGES[way[1]]} text", ledger)


def read_conversation(row, prompts):
    """Sets `messages`, what stands before the answer, and `reference`, the answer or ""."""
    where = row["where"]
    said = row.get("messages")
    if said is None:
        texts = [row.get("prompt"), row["response"]] if "response" in row else [row.get("prompt")]
        if isinstance(row.get("turns"), list):  # FastChat's questions: the first turn
            texts = row["turns"][:1]
            row.setdefault("id", row.get("question_id"))
        said = [{"role": role, "content": x} for role, x in zip(("user", "assistant"), texts)]
    ledger = "reference_ids" in row
    row["messages"] = []
    for i, message in enumerate(said):
        blank = ledger and i == len(said) - 1  # a model may have said nothing
        text = as_text(message.get("content"), where, "a prompt, response or message", blank)
        row["messages"].append({"role": message.get("role"), "content": text})
    row["reference"] = ""
    if said and said[-1].get("role") == "assistant":
        row["reference"] = row["messages"].pop()["content"]
    elif not ledger:
        require(prompts, where, "has no answer; prompts alone go with generate.py --task answer")
    check_turns(row["messages"], where)


def check_turns(messages, where):
    """ValueError unless user and assistant speak in turn, after a system prompt if there is one."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    fits = turns == ["user", "assistant"] * (len(turns) // 2) + ["user"]
    require(fits, where, f"wanted user, assistant, ..., user; found {json.dumps(roles)[:60]}")


def check_ledger_fields(row):
    """ValueError where what `generate.py` adds to a row is of another kind."""
    ids = row.get("reference_ids", []) + row.get("rationale_ids", [])
    check_ids(ids, 2**31, row["where"])
    text = row.get("rationale")
    row["rationale"] = "" if text is None else as_text(text, row["where"], "the rationale", True)


def read_template(value):
    """--template: a file's text, or the text itself with \\n for a line break."""
    if value is None:
        return None
    text = unescape(value)
    if "{source}" not in value and len(value) < 256 and Path(value).is_file():
        text = read_text(value).removesuffix("\n")
    unknown = set(re.findall(r"\{([\w ]+)\}", text)) - {"source", "source_lang", "target_lang"}
    fault = "must name {source}, and no more than {source_lang} and {target_lang}"
    require("{source}" in text and not unknown, f"--template {value[:60]}", fault)
    return text


def unescape(text):
    """A shell's "\\n" and "\\t" are two characters each; here they mean line break and tab."""
    text.encode()  # ValueError where the shell's bytes were not UTF-8
    return text.replace("\\n", "\n").replace("\\t", "\t")


# 4. Ledgers: rows that survive a kill, written by any number of ranks


def meta_path(ledger):
    """Where the settings of a ledger stand: beside it, as NAME.meta.json."""
    return Path(str(ledger).removesuffix(".jsonl") + ".meta.json")


def read_meta(ledger):
    """The settings that a ledger was written with; {} for other files."""
    file = meta_path(ledger)
    meta = read_object(file) if file.exists() else {}
    for name in ("system", "template"):
        fits = isinstance(meta.get(name), str | None)
        require(fits, file, f"{name} must be text or null; put the old file back")
    return meta


def require_same(path, old, new, free=NOT_COMPARED):
    """ValueError names the first of the `new` settings that was another in the `old`."""
    for name, value in new.items():
        if name not in free and old.get(name) != value:
            was = json.dumps(old.get(name))[:60]
            now = json.dumps(value)[:60]
            fault = f"{name} was {was}, now {now}; give the old value, or choose another --out"
            raise ValueError(f"{path}: {fault}")


@contextmanager
def lock(path):
    """Rank 0 holds PATH.lock within the block: a second process is told so, by a ValueError."""
    if dist.get_rank() > 0:
        yield
        return
    path = Path(path).absolute()
    file = path.with_name(path.name + ".lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # a file that the other process has just removed protects nothing
            busy = not file.exists() or not os.path.samestat(file.stat(), os.fstat(handle.fileno()))
        except BlockingIOError:
            busy = True
        require(not busy, path, "another process is writing it; wait for it, or change --out")
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def complete(path, settings, rows, produce):
    """Makes the ledger `path`: one line a row of `rows`, in their order. Every rank calls it.

    Each row has an `id` and an `input_hash`, over all that its outcome depends on besides the
    settings. `produce(rows)` yields what becomes of them, in any order. It goes to part files, from
    which a run that was killed goes on; the ledger itself appears whole.
    """
    rank = dist.get_rank()
    path.parent.mkdir(parents=True, exist_ok=True)
    by_id = {}
    for row in rows:
        require(row["id"] not in by_id, row["where"], f"id {row['id']} stands twice in the data")
        by_id[row["id"]] = row
    ledger = {}
    if path.exists():
        file = meta_path(path)
        require(file.exists(), path, f"has no {file.name} beside it; choose another --out")
        require_same(file, read_object(file), settings)
        ledger, strange = read_finished([path], by_id)
        fault = "is missing from the data, or differs there; choose another --out"
        require(not strange, "".join(strange[:1]), fault)
    finished = ledger | read_finished(part_files(path, settings), by_id)[0]
    dist.barrier()  # until all have read what is there
    missing = [row for row in rows if row["id"] not in finished]
    mine = missing[rank :: dist.get_world_size()]
    if mine:
        write_part(part_path(path, settings, str(rank)), produce(mine), by_id)
    dist.barrier()  # until all have written their part
    if rank == 0:
        parts = part_files(path, settings)
        if len(ledger) < len(rows):
            finished = ledger | read_finished(parts, by_id)[0]
            lines = [json.dumps(finished[id], ensure_ascii=False) for id in by_id]
            write_text(meta_path(path), json.dumps(settings, indent=2, ensure_ascii=False))
            write_text(path, "\n".join(lines))
        for part in parts:
            part.unlink()
    dist.barrier()


def read_finished(files, by_id):
    """Rows by id, and the places of lines that the data has not, or has otherwise."""
    found = {}
    strange = []
    for file in files:
        text = file.read_text("utf-8", errors="replace")
        for n, line in enumerate(text.split("\n"), 1):
            try:
                row = parse_json(line, file)
                wanted = by_id[row["id"]]["input_hash"]
                same = row["input_hash"] == wanted and row["id"] not in found
            except (ValueError, KeyError, TypeError):  # torn by a kill, blank, or somebody's own
                same = False
            if same:
                found[row["id"]] = row
            elif line:
                strange.append(f"{file}:{n}")
    return found, strange


def part_path(path, settings, rank):
    """What one rank writes towards a ledger; the settings' hash keeps runs apart."""
    compared = {name: x for name, x in settings.items() if name not in NOT_COMPARED}
    return path.with_name(f"{path.name}.{short_hash(compared)}.rank{rank}")


def part_files(path, settings):
    """The part files of a run with these settings, on however many ranks."""
    start = part_path(path, settings, "").name
    files = sorted(path.parent.iterdir())
    return [f for f in files if re.fullmatch(re.escape(start) + r"\d+", f.name)]


def write_part(file, produced, by_id):
    """Appends rows as they come."""
    with open(file, "ab") as f:
        f.write(b"\n")  # ends a line that a kill has torn
        for row in produced:
            row = row | {"input_hash": by_id[row["id"]]["input_hash"]}
            f.write(finite_json(row, f"row {row['id']}").encode() + b"\n")
            f.flush()


def finite_json(row, where):
    """One line. FloatingPointError if a number in it is NaN or infinite."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False)
    except ValueError:
        fault = "a number is not finite; look at the model's weights"
        raise FloatingPointError(f"{where}: {fault}") from None


# 5. The command line


class Arguments(argparse.ArgumentParser):
    """argparse whose mistakes are one line, as all our errors are."""

    def error(self, message):
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def number_type(kind, low, high):
    """An argparse type: a number from `low` to `high`."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    parse.__name__ = kind.__name__  # as argparse calls it in a message
    return parse


VALUES = {
    "COUNT": number_type(int, 1, 2**31),
    "N": number_type(int, 0, 2**31),
    "NUMBER": number_type(float, 0, 1e38),
    "SHARE": number_type(float, 0, 1),
    "TEXT": unescape,
}
PROMPT_OPTIONS = """
--direction DE-EN...   languages; several read two-way pairs in each
--chat auto|llama2|mistral|zephyr|chatml|plain   chat format; auto: the model's own
--system TEXT          system prompt (default: the model's own)
--template TEXT        instruction, a text or its file, with {source} {source_lang} {target_lang}
"""


def make_parser(description, options):
    """The parser of a table of options: name, value, two spaces, help.

    VALUE=DEFAULT has a default, VALUE... takes several, A|B|C is a choice whose default is the
    first, and without a value it is a switch.
    """
    p = Arguments(description=description)
    for line in filter(None, options.split("\n")):
        option, help = line.split("  ", 1)
        name, _, value = option.partition(" ")
        value, _, default = value.partition("=")
        settings = {"help": help.strip().replace("%", "%%")}
        if "|" in value:
            settings["choices"] = value.split("|")
            default = settings["choices"][0]
        elif value:
            settings["metavar"] = value.removesuffix("...")
            settings["type"] = VALUES.get(settings["metavar"], str)
        else:
            settings["action"] = "store_true"
        if value.endswith("..."):
            settings |= {"nargs": "+", "default": []}
        if default:
            settings["default"] = default
            settings["help"] += " (default %(default)s)"
        p.add_argument(name, **settings)
    p.set_defaults(dtype="bfloat16" if torch.cuda.is_available() else "float32")
    return p


def cli(main, parser):
    """Runs a script. A user's mistake ends with status 2 and one line; signals without a trace."""
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, lambda number, _: os._exit(128 + number))
    rank = int(os.environ.get("RANK", 0))
    try:
        main(parser.parse_args())
        if torch.cuda.is_available() and dist.is_initialized():
            dist.destroy_process_group()  # NCCL warns of one that is left behind
        return
    except BrokenPipeError:
        os._exit(141)
    except (ValueError, OSError, FloatingPointError, OverflowError, SafetensorError) as e:
        message = str(e)
    except torch.OutOfMemoryError as e:
        message = f"{str(e).split('.')[0]}; lower --micro-batch-size or --batch-size"
    except RuntimeError as e:
        if "gloo" not in str(e) and "NCCL" not in str(e):
            raise
        message = "lost another rank, which has ended; its own message says why"
    if rank:
        time.sleep(3)  # torchrun ends this rank before, if rank 0 has found the same
        message = f"rank {rank}: {message}"
    message = message.replace("\n", " ")
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)


def print_statistics(rows, examples, max_length):
    """Counts of rows and tokens; of a ledger also how its rationales ended and began."""
    long = sum(len(example) > max_length for example in examples)
    print(f"{len(rows)} rows, {long} of them longer than {max_length} tokens")
    for name in ("prompt", "reference", "rationale"):
        n = sorted(len(getattr(example, name)) for example in examples)
        print(f"{name}: {sum(n):,} tokens, median {n[len(n) // 2]}, longest {n[-1]}")
    ledger = [row for row in rows if "reference_ids" in row]
    openings = Counter(" ".join(row["rationale"].split()[:4]) for row in ledger)
    statuses = Counter(str(row.get("status")) for row in ledger)
    for status, n in statuses.most_common():
        print(f"{n:6} rationales of status {status}")
    for text, n in openings.most_common(5):
        print(f"{n:6} rationales begin: {text}")


def print_example(example, tokenizer):
    """One example, piece by piece, in the colours of its segments."""
    print(f"row {example.id}: the prompt carries no loss, reference and rationale do")
    for name, colour in {"prompt": 90, "reference": 32, "rationale": 34}.items():
        pieces = ""
        for i in getattr(example, name):
            known = i < tokenizer.size and i not in tokenizer.added
            pieces += tokenizer.sp.id_to_piece(i) if known else tokenizer.added.get(i, "?")
        text = f"\033[{colour}m{pieces}\033[0m" if sys.stdout.isatty() else pieces
        print(f"{name}, {len(getattr(example, name))} tokens: {text}")


def main(args):
    require(args.model and args.data, "data.py", "give --model and --data")
    tokenizer = Tokenizer(args.model, args.chat)
    rows = read_rows(args.data, args.direction)
    encoder = Encoder(tokenizer, read_template(args.template), args.system)
    examples = [encoder.example(row) for row in rows]
    print_statistics(rows, examples, args.max_length)
    print_example(examples[: args.show + 1][-1], tokenizer)


OPTIONS = """
--model DIR         model folder (only its tokenizer is read)
--data FILE...      pairs, conversations or ledgers
--max-length COUNT=1024   tokens of a row, beyond which train.py leaves it out
--show N=0          the row to show, or the last
"""


def parser():
    return make_parser("Checks training data, and shows what is learnt.", OPTIONS + PROMPT_OPTIONS)


if __name__ == "__main__":
    cli(main, parser())
