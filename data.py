"""From files to token ids: rows, prompts, and the tokens that carry loss.

    python data.py --model DIR --data train.de-en.json --direction de-en

checks the data, prints its statistics and shows one example in color. A training sequence is

    prompt (no loss) | reference y | rationale r | EOS      L = -log P(y, r | I, x)

where I is the instruction and x the source. The segments are kept apart as ids and never searched
for in the text: a tokenizer may merge characters across the boundary of two strings.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C also ends it while torch is imported

import argparse
import fcntl
import functools
import hashlib
import itertools
import json
import os
import re
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from sentencepiece import SentencePieceProcessor

from model import (
    ModelConfig,
    Shared,
    UserError,
    flush_to_disk,
    from_first_rank,
    parse_json,
    quote,
    read_field,
    read_object,
    read_text,
    require,
    writing,
)

# ALMA's wording (Xu et al. 2024), as its code has it; the RaDis paper's wording is not known
TEMPLATE = (
    "Translate this from {source_lang} to {target_lang}:\n{source_lang}: {source}\n{target_lang}:"
)
LANGUAGES = dict(
    re.findall(
        "([a-z]+) ([A-Z][a-z]+)",
        """
    ar Arabic bg Bulgarian ca Catalan cs Czech da Danish de German el Greek en English es Spanish
    et Estonian fa Persian fi Finnish fr French gu Gujarati ha Hausa he Hebrew hi Hindi hr Croatian
    hu Hungarian id Indonesian is Icelandic it Italian ja Japanese kk Kazakh km Khmer ko Korean
    lt Lithuanian lv Latvian ms Malay nl Dutch no Norwegian pl Polish ps Pashto pt Portuguese
    ro Romanian ru Russian sk Slovak sl Slovenian sr Serbian sv Swedish sw Swahili ta Tamil th Thai
    tr Turkish uk Ukrainian ur Urdu vi Vietnamese zh Chinese""",
    )
)


# 1. From rows to examples


@dataclass
class Row:
    """One row of a data file: a pair or a conversation, and its rationale if it has one."""

    id: int | str
    where: str  # FILE:LINE
    reference: str  # y: the translation, or the last answer of a conversation
    source: str = None  # x, of a pair
    source_lang: str = None
    target_lang: str = None
    messages: list[dict] = None  # the conversation before the answer, in place of x
    rationale: str = ""
    # of a ledger, which generate.py writes: the prompt, and the ids that were prefilled and sampled
    prompt_ids: list = None
    reference_ids: list = None
    rationale_ids: list = None
    tokenizer: str = None  # hash of the tokenizer that the ids belong to
    finish: str = "eos"  # "length" for a truncated rationale
    status: str = "ok"
    prompt_hash: str = None  # hash of the conversation that prompt_ids were made from
    # the options that shaped the prompt, where they were given
    chat: str = None
    system: str = None
    template: str = None


@dataclass
class Example:
    """Token ids of one row. EOS belongs to the segment that it ends."""

    id: int | str
    prompt: list[int]
    reference: list[int]
    rationale: list[int]
    dropped: str = ""  # why the rationale is not used, if it is not

    @property
    def tokens(self):
        return self.prompt + self.reference + self.rationale

    def __len__(self):
        return len(self.tokens)


@dataclass
class Encoder:
    """Turns rows into prompts and examples, under one instruction template and system prompt."""

    tokenizer: "Tokenizer"
    template: str | None = None  # None: that of the row, else TEMPLATE
    system: str | None = None  # None: that of the row, else what the chat template has
    coverage: float = 1.0  # share of the rows whose rationale is used
    only_ok: bool = False  # drop rationales whose status is not "ok"

    def example(self, row: Row) -> Example:
        """prompt | reference | rationale, with EOS unless the answer is truncated."""
        reference, rationale = self.answer_ids(row)
        dropped = self.why_dropped(row) if rationale else ""
        end = [self.tokenizer.end_id]
        if dropped:
            rationale = []
        if reference and not rationale:  # the reference alone is the answer
            reference = reference + end
        elif row.finish == "eos" and not dropped:  # no EOS after a truncated rationale
            rationale = rationale + end
        return Example(row.id, self.prompt(row), reference, rationale, dropped)

    def why_dropped(self, row):
        """Why to train without this row's rationale, or an empty string."""
        if self.only_ok and row.status != "ok":
            return f"status {row.status}"
        # in [0, 1), from the id alone: a larger coverage includes all rows of a smaller one
        digest = hashlib.sha256(str(row.id).encode()).digest()
        if int.from_bytes(digest[:7]) / 2**56 >= self.coverage:
            return "outside coverage"
        return ""

    def answer_ids(self, row):
        """Ids of reference and rationale: a ledger's if its tokenizer and text are unchanged."""
        tokenizer = self.tokenizer
        reference = row.reference_ids
        rationale = row.rationale_ids
        own = row.tokenizer == tokenizer.hash
        if own:
            ids = row.prompt_ids + reference + rationale
            check_ids(ids, tokenizer.vocab_size, row.where)
        if not own or tokenizer.decode(reference) != row.reference:
            reference = tokenizer.answer(row.reference)
        if not own or tokenizer.decode_after(reference, rationale) != row.rationale:
            rationale = tokenizer.continuation(row.reference, reference, row.rationale)
        return reference, rationale

    def prompt(self, row: Row) -> list[int]:
        """Ids of the prompt: a ledger's if text, tokenizer and --chat are unchanged.

        A row that was edited, or is of another tokenizer, is rendered again. Raises UserError if
        the options given now would make another prompt than those that wrote the ledger.
        """
        tokenizer = self.tokenizer
        messages = self.messages(row)
        require(
            row.prompt_ids is None or messages == Encoder(tokenizer).messages(row),
            row.where,
            "its prompt was made with another --template or --system; give that, or none",
        )
        own = row.tokenizer == tokenizer.hash
        same_chat = row.chat == tokenizer.chat_option
        unedited = row.prompt_hash == short_hash(messages)
        if own and same_chat and unedited:
            return row.prompt_ids
        prompt = tokenizer.chat(messages, where=row.where)
        require(
            not own or same_chat or prompt == row.prompt_ids,
            row.where,
            f"its prompt was made with --chat {row.chat or 'auto'}; give that (a hash is a file's)",
        )
        return prompt

    def settings(self) -> dict:
        """What a prompt depends on, besides the row."""
        return {
            "chat": self.tokenizer.chat_option,
            "chat_template": self.tokenizer.template_hash,
            "system": self.system,
            "template": self.template or TEMPLATE,
            "tokenizer": self.tokenizer.hash,
        }

    def messages(self, row: Row) -> list[dict]:
        """The messages before the answer, with the system prompt; a pair is one user turn."""
        messages = row.messages
        if messages is None:
            text = self.template or row.template or TEMPLATE
            text = text.replace("{source_lang}", LANGUAGES[row.source_lang])
            text = text.replace("{target_lang}", LANGUAGES[row.target_lang])
            text = text.replace("{source}", row.source)  # last: braces in it are text
            messages = [{"role": "user", "content": text}]
        return with_system(messages, row.system if self.system is None else self.system)


def with_system(messages, system):
    """The conversation with this system prompt, unless it has its own."""
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def share(rows: list[list[int]], device="cpu"):
    """Merges common prefixes of rows; returns the tokens [1, U] that remain, and a `Shared`.

    T is the length of the longest row; padding, on the right, is token 0 of the U.
    """
    T = max(map(len, rows))
    tree = {}  # (index of the token before, id) -> index of the token
    first_at = []
    token_at = []
    for b, row in enumerate(rows):
        branch = [-1]
        for place, token in enumerate(row, b * T):
            branch.append(tree.setdefault((branch[-1], token), len(tree)))
            if len(tree) > len(first_at):
                first_at.append(place)
        token_at.append(branch[1:] + [0] * (T - len(row)))
    tokens = to_device([[token for _, token in tree]], device)
    return tokens, Shared(to_device(token_at, device), to_device(first_at, device))


class Batch(NamedTuple):
    """Examples as the model reads them, and which of its predictions carry loss."""

    tokens: torch.Tensor  # [1, U]
    shared: Shared
    places: torch.Tensor  # [N], in B * T: where a supervised token is predicted
    targets: torch.Tensor  # [N], first those of all references, then those of all rationales
    reference_count: int  # how many of the N belong to references


def collate(examples: list[Example], device="cpu") -> Batch:
    """Makes a batch. The last token of a row is predicted and never read."""
    rows = [example.tokens[:-1] for example in examples]
    tokens, shared = share(rows or [[0]], device)
    T = shared.token_at.shape[1]
    references = []  # (place, target)
    rationales = []
    for b, example in enumerate(examples):
        start = b * T + len(example.prompt) - 1  # this place predicts the answer's first token
        references += enumerate(example.reference, start)
        rationales += enumerate(example.rationale, start + len(example.reference))
    pairs = to_device(references + rationales, device).view(-1, 2)
    places, targets = pairs.T.contiguous()
    return Batch(tokens, shared, places, targets, len(references))


def to_device(numbers, device):
    """An int64 tensor on `device`. The copy does not wait for work that is queued on a GPU."""
    return torch.tensor(numbers, dtype=torch.long).to(device, non_blocking=True)


# 2. The tokenizer and the chat template

# --chat NAME. "▁" (after a control token such as bos_token) and "␣" (after text) mark where the
# original code encodes a text on its own, so that SentencePiece puts a space before it.
# `Tokenizer.read_template` writes that space, or nothing: where the tokenizer has no such space, or
# (for "▁") adds it by itself. Jinja drops a line break after {% %}: write it in {{ }}.
# Sources: Meta's llama repository, mistral-common (v1, and v3, where [INST] is a control token),
# Zephyr's model card, ChatML, FastChat
SYSTEM_FIRST = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}"
)
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
FORMATS = {
    "llama2": SYSTEM_FIRST
    + "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}▁[INST]"
    r" {{ (('<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first and system is defined else '')"
    " + m.content) | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}",
    "mistral": SYSTEM_FIRST
    + "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}▁[INST]"
    r" {{ (system + '\n\n' if loop.first and system is defined else '') + m.content }} [/INST]"
    "{% else %}␣{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "mistral v3": SYSTEM_FIRST
    + "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]▁"
    r"{{ (system + '\n\n' if loop.last and system is defined else '') + m.content }}[/INST]"
    "{% else %}▁{{ m.content.rstrip(' ') }}{{ eos_token }}{% endif %}{% endfor %}",
    "zephyr": "{% for m in messages %}<|{{ m.role }}|>\n"
    "{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "vicuna": "{{ bos_token }}▁{% if messages[0].role == 'system' %}{{ messages[0].content }}"
    "{% set messages = messages[1:] %}{% else %}" + VICUNA_SYSTEM + "{% endif %} "
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} "
    "{% else %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "plain": "{{ bos_token }}▁{% for m in messages %}{{ m.content }}"
    r"{{ '\n\n' if not loop.last }}{% endfor %}",
}
NAMES = [name for name in FORMATS if " " not in name]  # "mistral v3": chosen by the vocabulary
TOKENIZER_FILES = """tokenizer.model tokenizer_config.json tokenizer.json added_tokens.json
    special_tokens_map.json generation_config.json chat_template.jinja""".split()
REFUSED = ("split_special_tokens", "sp_model_kwargs", "model_specific_special_tokens")
CUT = "\ud800"  # half a surrogate pair, which no text of a file holds


class Tokenizer:
    """SentencePiece, with the added tokens and the chat template of a folder, as in transformers.

    Encoding follows LlamaTokenizer: text is split at added tokens, and SentencePiece encodes the
    parts between; each part gets a prefix space with `legacy`, else only the first. Message text
    never becomes a control token: before rendering, "</s>" in it becomes "<" + CUT + "/s>", which
    is not split off as a token; CUT is removed when the text is encoded.

    chat: "auto" for the folder's own template, one of NAMES, or a Jinja file. Raises UserError
    naming the file that is missing, malformed or not supported.
    """

    def __init__(self, folder: str | Path, chat: str = "auto"):
        self.folder = Path(folder)
        self.files = {}  # name -> bytes, as they were read: what an export must hold
        templates = self.folder.glob("additional_chat_templates/*.jinja")
        for file in [*map(self.folder.joinpath, TOKENIZER_FILES), *templates]:
            if os.path.lexists(file):
                self.files[str(file.relative_to(self.folder))] = file.read_bytes()
        where = self.folder / "tokenizer_config.json"
        config = self.read_json(where.name)
        if "added_tokens_decoder" not in config:  # otherwise transformers ignores older files
            config |= self.read_json("special_tokens_map.json")
        for name in REFUSED:
            require(not config.get(name), where, f"{name} is not supported; remove it")
        self.legacy = read_field(config, "legacy", bool, where, False)
        self.load_sentencepiece(read_field(config, "add_prefix_space", bool, where, True))
        self.size = len(self.sp)
        self.tokens = {id: self.sp.id_to_piece(id) for id in range(self.size)}  # id -> text
        self.added = {}  # text -> id, of the tokens that a text is split at
        self.special = set()  # those of them that are not text
        fast = self.read_json("tokenizer.json")
        self.read_vocabulary(fast)
        self.read_added_tokens(config, fast)
        self.variables = self.read_named_tokens(config, where)  # of a template
        self.vocab_size = 1 + max(self.tokens)
        self.bos_id = self.added.get(self.variables.get("bos_token"))
        self.eos_id = self.added.get(self.variables.get("eos_token"))
        # as in transformers: the post-processor of tokenizer.json decides on BOS before plain text,
        # and without that file add_bos_token does
        adds_bos = read_field(config, "add_bos_token", bool, where, False)
        if fast:
            bos = json.dumps(self.variables.get("bos_token"))
            adds_bos = bos in json.dumps(fast.get("post_processor"))
        self.adds_bos = adds_bos and self.bos_id is not None
        self.template = self.read_template(chat, config, where)
        self.template_hash = short_hash(self.template)
        self.chat_option = None  # of --chat: a name, or the hash of a file's template
        if chat != "auto":
            self.chat_option = chat if chat in NAMES else self.template_hash
            self.files["chat_template.jinja"] = self.template.encode()
        self.compile_patterns()
        proto = self.files["tokenizer.model"].hex()
        tokens = [sorted(self.added.items()), sorted(self.special)]
        self.hash = short_hash([proto, tokens, self.legacy, self.adds_space])

    def with_chat_of(self, rows: list[Row]) -> "Tokenizer":
        """Returns the tokenizer with the --chat NAME of the ledger, unless one was given."""
        chats = {row.chat for row in rows if row.tokenizer == self.hash}
        if self.chat_option is None and len(chats) == 1 and chats <= {*NAMES}:
            return Tokenizer(self.folder, chats.pop())
        return self

    def read_json(self, name):
        file = self.folder / name
        return read_object(file) if file.exists() else {}

    def load_sentencepiece(self, add_prefix_space):
        file = self.folder / "tokenizer.model"
        proto = self.files.get("tokenizer.model")
        require(proto, file, "missing or empty; a model folder needs a SentencePiece model")
        try:
            self.sp = SentencePieceProcessor(model_proto=proto)
            # normalizer_spec.add_dummy_prefix = false: no space before text that follows text
            self.sp_within = SentencePieceProcessor(model_proto=proto + b"\x1a\x02\x18\x00")
        except RuntimeError:
            raise UserError(
                f"{file}: not a SentencePiece model; byte-level BPE (tiktoken, Llama 3) is not "
                "supported"
            ) from None
        if not add_prefix_space:
            self.sp = self.sp_within
        self.adds_space = self.sp.encode("a") != self.sp_within.encode("a")

    def read_vocabulary(self, fast):
        """Adds the control, unknown and user-defined pieces of tokenizer.model."""
        proto = self.files["tokenizer.model"]
        vocabulary = fast.get("model", {}).get("vocab")
        end = 0
        for id, piece in self.tokens.items():
            if isinstance(vocabulary, dict):
                require(
                    vocabulary.get(piece) == id,
                    self.folder / "tokenizer.json",
                    f"has another id than tokenizer.model for {piece!r}; download both again",
                )
            # in the file a tag and a score, 5 bytes, follow the piece, then its type: 4 is
            # user-defined, for which SentencePiece has no call
            text = piece.encode() + b"\x15"
            end = proto.index(text, end) + len(text) + 4
            if self.sp.is_control(id) or self.sp.is_unknown(id):
                self.special.add(piece)
            if piece in self.special or proto[end : end + 2] == b"\x18\x04":
                self.added[piece] = id

    def read_added_tokens(self, config, fast):
        """Adds the tokens of added_tokens_decoder or, without that field, of other files."""
        where = self.folder / "tokenizer_config.json"
        decoder = read_field(config, "added_tokens_decoder", dict, where, None)
        if decoder is not None:
            for id, fields in decoder.items():
                valid = id.isdecimal() and isinstance(fields, dict)
                require(valid, where, f"added token {quote(id)} must be an object under its id")
                self.add_tokens(where.name, [fields | {"id": int(id)}])
        else:
            older = self.read_json("added_tokens.json").items()
            listed = [{"id": id, "content": text} for text, id in older]
            self.add_tokens("added_tokens.json", listed)
            self.add_tokens("tokenizer.json", fast.get("added_tokens", []))

    def add_tokens(self, file, listed):
        for fields in listed:
            where = f"{self.folder / file}: added token {quote(fields)}"
            for name in ("lstrip", "rstrip", "single_word"):
                require(not fields.get(name), where, f"{name} is not supported")
            id = read_field(fields, "id", int, where)
            text = read_field(fields, "content", str, where)
            known = self.tokens.setdefault(id, text)
            require(text and id >= 0, where, "must have a text, and an id from 0 on")
            require(known == text, where, f"{known!r} has this id")
            if id < self.size and text not in self.added:
                continue  # an ordinary piece, even if listed as added: it is text
            require(self.added.setdefault(text, id) == id, where, "has two ids")
            if fields.get("special"):
                self.special.add(text)

    def read_named_tokens(self, config, where):
        """Marks tokens of fields such as "bos_token" as special; returns them by field."""
        sp = self.sp
        named = {"bos_token": sp.bos_id(), "eos_token": sp.eos_id(), "unk_token": sp.unk_id()}
        named = {name: self.tokens.get(id) for name, id in named.items()}
        named |= {name: value for name, value in config.items() if name.endswith("_token")}
        for name in ("additional_special_tokens", "extra_special_tokens"):
            if config.get(name):  # transformers 4 writes an empty object
                for i, value in enumerate(read_field(config, name, list, where)):
                    named[f"{name} {i}"] = value
        texts = {}
        for name, value in named.items():
            text = value.get("content") if isinstance(value, dict) else value
            if not isinstance(text, str):  # null; also a switch such as add_bos_token
                continue
            texts[name] = text
            id = self.added.get(text, sp.piece_to_id(text))
            if text in self.added or id != sp.unk_id():
                self.added[text] = id
                self.special.add(text)
            else:
                require(
                    name == "pad_token",
                    where,
                    f"{name} is {text!r}, which the vocabulary lacks",
                )
        return texts

    def compile_patterns(self):
        """Sets the patterns of added tokens, and the ids that are not decoded."""
        # control ids are neither encoded from text nor decoded: special tokens except unk (which
        # any unknown character becomes), and added tokens that end an answer, or that occur in the
        # template and are 3 characters or more, not only letters, digits and whitespace
        self.stop_ids = {*self.read_stop_ids(), self.eos_id} - {None}
        control = []
        for text, id in self.added.items():
            mark = len(text) > 2 and re.search(r"[^\w\s]", text)
            written = mark and text in (self.template or "")
            if text in self.special or written or id in self.stop_ids:
                control.append(text)
        self.control = {self.added[text] for text in control} - {self.sp.unk_id()}
        control = "|".join(map(re.escape, control))
        self.control_pattern = re.compile(f"(?={control}).", re.DOTALL)
        longest_first = sorted(self.added, key=len, reverse=True)
        tokens = "|".join(map(re.escape, longest_first))
        # not followed by CUT: a control token of one character is cut after it
        self.split_pattern = re.compile(f"({tokens})(?!{CUT})")

    def read_stop_ids(self):
        """EOS ids of generation_config.json; where it has none, those of config.json."""
        for name in ("generation_config.json", "config.json"):
            ids = self.read_json(name).get("eos_token_id")
            if ids is not None:
                ids = ids if isinstance(ids, list) else [ids]
                check_ids(ids, 2**31, f"{self.folder / name}: eos_token_id")
                return ids
        return []

    def read_template(self, chat, config, where):
        """The Jinja text of --chat; None where the folder has no template."""
        second = "additional_chat_templates/default.jinja"
        require(second not in self.files, self.folder, f"{second} is not supported; remove it")
        if chat == "mistral" and "[INST]" in self.added:
            chat = "mistral v3"
        if chat in FORMATS:
            fault = "the vocabulary lacks <|im_start|>; choose another format"
            require(chat != "chatml" or "<|im_start|>" in self.added, f"--chat {chat}", fault)
            space = " " if self.adds_space and not self.legacy and self.bos_id is not None else ""
            text = FORMATS[chat].replace("▁", space)
            return text.replace("␣", " " if self.adds_space else "")
        if chat != "auto":
            require(
                Path(chat).is_file(),
                f"--chat {chat}",
                f"no such file, and no format; the formats are {', '.join(NAMES)}",
            )
            return read_text(chat)
        if "chat_template.jinja" in self.files:
            return read_text(self.folder / "chat_template.jinja")
        template = config.get("chat_template")
        if isinstance(template, list):  # several, by name
            named = [x for x in template if isinstance(x, dict) and x.get("name") == "default"]
            template = named[0].get("template") if named else None
        return read_field({"chat_template": template}, "chat_template", str, where, None)

    @functools.cached_property
    def end_id(self) -> int:
        """The token that ends an answer: what the template writes after one, else EOS."""
        talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": CUT}]
        text = ""
        for messages in (talk, [*talk, talk[0]]):  # some templates reject a final answer
            with suppress(UserError):
                text = text or self.render(messages, self.folder, False)
        after = self.split_pattern.split(text.partition(CUT)[2])
        ends = [self.added[part] for part in after if part in self.added]
        end = [*ends, self.eos_id][0]
        require(
            end is not None,
            self.folder / "tokenizer_config.json",
            "has no eos_token, and the chat template ends no answer with a token; add eos_token",
        )
        return end

    @functools.cached_property
    def eos_ids(self) -> list[int]:
        """Ids that end an answer."""
        return sorted({self.end_id, *self.stop_ids})

    def encode(self, text: str, within: bool = False) -> list[int]:
        """Text to ids, without BOS or EOS. within: text precedes it, so it gets no prefix space."""
        return self.encode_parts(self.cut(text), within)

    def cut(self, text):
        """Inserts CUT after the first character of each control token."""
        return self.control_pattern.sub(rf"\g<0>{CUT}", text)

    def encode_parts(self, text, within=False):
        ids = []
        sp = self.sp_within if within else self.sp
        for part in self.split_pattern.split(text):
            if part in self.added:
                ids.append(self.added[part])
                sp = self.sp if self.legacy else self.sp_within
                continue
            whole = part.replace(CUT, "")
            encoded = sp.encode(whole)
            if not self.control.isdisjoint(encoded):  # SentencePiece finds user-defined tokens
                encoded = []
                for piece in part.split(CUT):
                    encoded += sp.encode(piece)
                    sp = self.sp_within
            control = self.control.intersection(encoded)
            require(
                not control, repr(whole[:60]), f"contains control tokens {control}; remove them"
            )
            ids += encoded
            sp = self.sp_within
        return ids

    def decode(self, ids: list[int]) -> str:
        """Ids to text; control tokens and unknown ids are skipped."""
        text = ""
        sp = self.sp
        kept = [id for id in ids if id in self.tokens and id not in self.control]
        for added, group in itertools.groupby(kept, lambda id: id >= self.size):
            run = list(group)
            text += "".join(map(self.tokens.get, run)) if added else sp.decode(run)
            sp = self.sp_within  # only the first text loses the space before it
        return text

    def decode_after(self, before, ids):
        """The text of `ids` after `before`: a piece decoded alone would lose its space."""
        start = self.decode(before)
        whole = self.decode(before + ids)
        return whole[len(start) :] if whole.startswith(start) else self.decode(ids)

    def first_line_ends(self, ids):
        """Whether the last of `ids` ends the first line that is not empty."""
        return "\n" in self.decode(ids[-1:]) and "\n" in self.decode(ids).lstrip()

    def answer(self, text: str) -> list[int]:
        """Ids of an assistant's answer as they follow `chat`, without EOS.

        After a prompt that ends in whitespace ("<|assistant|>\\n") it continues that text; after
        "[/INST]" it is encoded on its own, with a space.
        """
        end = self.prompt_end
        if text and end and not end.isspace() and not self.adds_space:
            text = " " + text
        return self.encode(text, within=end.isspace())

    @functools.cached_property
    def prompt_end(self):
        """The last character of a prompt; empty if an added token ends it."""
        text = self.render([{"role": "user", "content": "x"}], self.folder)
        return text[-1] if text[-1:].isspace() else self.split_pattern.split(text)[-1][-1:]

    def continuation(self, before: str, ids: list[int], text: str) -> list[int]:
        """Ids of `text` as it continues an answer that starts with `before` (`ids`)."""
        if not text:
            return []
        whole = self.answer(before + text)
        return whole[len(ids) :] if whole[: len(ids)] == ids else self.encode(text, within=True)

    def chat(self, messages: list[dict], system: str | None = None, where="messages") -> list[int]:
        """Ids of a conversation up to where the assistant's answer begins.

        messages: {"role", "content"}: a system prompt if there is one, then user and assistant in
        turn, the user last. Raises UserError, at `where`, for what the template refuses.
        """
        check_turns(messages, where)
        messages = with_system(messages, system)
        cut = [x | {"content": self.cut(x["content"])} for x in messages]
        text = self.render(cut, where)
        require(
            cut == messages or text.replace(CUT, "") == self.render(messages, where),
            where,
            "the chat template changes a control token in a message; remove the token",
        )
        if messages[0]["role"] == "system":
            other = self.render([cut[0] | {"content": CUT}, *cut[1:]], where)
            require(
                other != text,
                where,
                "the chat template drops the system prompt; leave it out, or give --chat",
            )
        return self.encode_parts(text)

    def render(self, messages, where, add_generation_prompt=True):
        """The conversation as text, by the template."""
        require(
            self.template,
            self.folder,
            f"has no chat template; give --chat {'|'.join(NAMES)}, or a Jinja file",
        )
        try:
            return compile_template(self.template).render(
                self.variables,
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
            )
        except Exception as e:  # whatever a template does wrong
            raise UserError(
                f"{where}: the chat template refuses this ({type(e).__name__}: {e})"
            ) from None


@functools.cache
def compile_template(source):
    """A Jinja template with the sandbox, the globals and the tags that transformers gives it."""
    from jinja2.exceptions import TemplateError  # torch installs it
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise TemplateError(message)

    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    sandbox.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    sandbox.globals |= {"raise_exception": raise_exception, "strftime_now": time.strftime}
    # {% generation %} only marks the assistant's text: a block without effect
    source = re.sub(r"(\{%[-+]?\s*(end)?)generation\b", r"\1with", source)
    return sandbox.from_string(source)


def require_vocabulary(folder, tokenizer, config):
    """Raises UserError if the model in `folder` has another vocabulary."""
    other = Tokenizer(folder)
    require(
        other.tokens == tokenizer.tokens
        and ModelConfig.from_file(folder).vocab_size == config.vocab_size,
        folder,
        "its vocabulary or vocab_size differs from the model's; choose a model that shares them",
    )


# 3. Rows


def short_hash(value) -> str:
    """16 hex digits of a value's sha256."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def check_ids(ids, limit, where):
    """Raises UserError unless these are token ids below `limit`."""
    for id in ids:
        if type(id) is not int or not 0 <= id < limit:
            fault = f"token id {quote(id)} is not a whole number from 0 to {limit - 1}"
            raise UserError(f"{where}: {fault}")


def read_json(path) -> list[tuple[str, dict]]:
    """(where, object) pairs of JSON lines or an array, without fields that are null.

    where: `FILE:LINE`, or `FILE row N`.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        content = enumerate(parse_json(text, path), 1)
        rows = [(f"{path} row {n}", row) for n, row in content]
    else:
        lines = enumerate(text.split("\n"), 1)
        rows = [(f"{path}:{n}", parse_json(line, path, n)) for n, line in lines if line.strip()]
    require(rows, path, "the file holds no rows")
    for i, (where, row) in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{where}: a row must be a JSON object, found {quote(row)}")
        rows[i] = where, {name: value for name, value in row.items() if value is not None}
    return rows


def read_rows(files: list[str], directions=(), prompts: bool = False) -> list[Row]:
    """Reads pairs, conversations and ledgers; `prompts`: also prompts without an answer.

    Each pair is read once per direction. Raises UserError naming file and line.
    """
    ways = [tuple(direction.split("-")) for direction in dict.fromkeys(directions)]
    for way in ways:
        check_languages(way, "--direction")
    rows = []
    for file in files:
        ids = set()
        for where, fields in read_json(file):
            if "translation" in fields or {"source", "reference"} <= fields.keys():
                found = read_pair(fields, where, ways)
            else:
                found = [read_conversation(fields, where, prompts)]
            for row in found:
                row.rationale = read_field(fields, "rationale", str, where, "")
                if "rationale_ids" in fields:
                    read_ledger_fields(row, fields)
                row.id = read_id(fields, where, len(rows))
                if row is not found[0] and row.id == found[0].id:
                    row.id = f"{row.id} {row.source_lang}-{row.target_lang}"
                require(row.id not in ids, where, f"duplicate id {row.id!r}; change it")
                ids.add(row.id)
                rows.append(row)
    return rows


def check_languages(way, where):
    """Raises UserError unless these are two languages that are known here."""
    require(
        len(way) == 2 and way[0] != way[1] and {*map(str, way)} <= LANGUAGES.keys(),
        where,
        f"expected two known languages, such as de-en; found {quote(way)}",
    )


def read_id(fields, where, place):
    """The row's "id" or "question_id"; without them, its index in the data."""
    id = fields.get("id", fields.get("question_id", place))
    require(
        type(id) in (int, str), where, f'"id" must be a whole number or a text, found {quote(id)}'
    )
    return id


def text_field(fields, name, where, may_be_blank=False) -> str:
    """Returns a field's text. Raises UserError if it is blank."""
    text = read_field(fields, name, str, where)
    require(
        may_be_blank or text.strip(), where, f'"{name}" is empty; fill it in, or remove the row'
    )
    return text


def read_pair(fields, where, ways):
    """The rows of a pair, one per direction: ALMA's `translation`, or source and reference."""
    if "translation" in fields:
        require(ways, where, "the row has both languages; choose --direction, such as de-en")
        own = ways[0]
        texts = read_field(fields, "translation", dict, where)
    else:
        own = (fields.get("source_lang"), fields.get("target_lang"))
        if own == (None, None) and ways:
            own = ways[0]
        check_languages(own, where)
        texts = {own[0]: text_field(fields, "source", where), own[1]: fields["reference"]}
    ways = ways or [own]
    fault = "the row has a rationale; give only the direction that it was generated for"
    require("rationale" not in fields or ways == [own], where, fault)
    rows = []
    for way in ways:
        source = text_field(texts, way[0], where)
        reference = text_field(texts, way[1], where, "rationale_ids" in fields)
        rows.append(Row(0, where, reference, source, *way))
    return rows


def read_conversation(fields, where, prompts):
    """A conversation: `messages`, or a prompt (of FastChat: the first turn) and its response."""
    if "messages" not in fields:
        for turn in read_field(fields, "turns", list, where, [])[:1]:
            fields.setdefault("prompt", turn)
        require(
            "prompt" in fields,
            where,
            "a row needs translation, source and reference, prompt, messages or turns; "
            f"see the README; found {quote([*fields])}",
        )
        fields["messages"] = [{"role": "user", "content": fields["prompt"]}]
        if "response" in fields:
            fields["messages"].append({"role": "assistant", "content": fields["response"]})
    ledger = "rationale_ids" in fields
    messages = []
    for message in read_field(fields, "messages", list, where):
        require(isinstance(message, dict), where, "a message must be an object")
        role = read_field(message, "role", str, where)
        # a system prompt may be empty; so may an answer in a ledger, if nothing was generated
        blank = role == "system" or (role == "assistant" and ledger)
        content = text_field(message, "content", f"{where}: {role}", blank)
        messages.append({"role": role, "content": content})
    answer = ""
    if messages and messages[-1]["role"] == "assistant":
        answer = messages.pop()["content"]
    else:
        fault = "the row has no answer; prompts alone are for --task answer and --answers"
        require(prompts or ledger, where, fault)
    check_turns(messages, where)
    return Row(0, where, answer, messages=messages)


def check_turns(messages, where):
    """Raises UserError unless user and assistant alternate, after a system prompt if any."""
    roles = json.dumps([message["role"] for message in messages])
    alternate = re.fullmatch(r'\[("system", )?("user", "assistant", )*"user"\]', roles)
    require(
        alternate,
        where,
        f"before the answer, roles must be user, assistant, ..., user; found {roles[:60]}",
    )


def read_ledger_fields(row, fields):
    """Fills in what generate.py adds to a row."""
    ids = ("prompt_ids", "reference_ids", "rationale_ids")
    optional = ("prompt_hash", "chat", "system", "template")
    for name in (*ids, "tokenizer", "finish", "status", *optional):
        kind = Row.__annotations__[name]
        default = None if name in optional else ...
        setattr(row, name, read_field(fields, name, kind, row.where, default))
    require(row.prompt_ids, row.where, '"prompt_ids" is empty; run generate.py again')
    known = row.finish in ("eos", "length")
    require(known, row.where, f'"finish" must be eos or length, found {quote(row.finish)}')


def read_template(value: str | None) -> str | None:
    """The text of --template; if that has no {source}, of the file that it names."""
    if value is None:
        return None
    text = utf8_text(value)
    if "{source}" not in text and Path(value).is_file():
        text = read_text(value).removesuffix("\n")
    names = {*re.findall(r"\{([\w ]+)\}", text)}
    require(
        {"source"} <= names <= {"source", "source_lang", "target_lang"},
        f"--template {value[:60]}",
        "must have {source}, and nothing in braces but {source_lang} and {target_lang}",
    )
    return text


def utf8_text(text):
    """Returns `text` with the two characters "\\n" as a line break, and "\\t" as a tab.

    Raises ValueError if it is not UTF-8.
    """
    text.encode()  # ValueError where the shell's bytes were not UTF-8
    return text.replace("\\n", "\n").replace("\\t", "\t")


# 4. What a run owns

MARK = {"program": "RaDis"}  # first in a settings file: marks a run as ours
NOT_COMPARED = ("model", "versions", "program")  # recorded only


def is_own(file):
    """Whether a settings file was written by these scripts."""
    try:
        return file.is_file() and read_object(file).items() >= MARK.items()
    except UserError:
        return False


@contextmanager
def claim(file: Path, settings: dict, outputs=None, defaults=None, free=NOT_COMPARED):
    """Context manager: locks the settings file of a run; yields whether the run had begun before.

    Creates the file and its folder, or finds them. outputs: the paths that the run will write; by
    default, all that is in the folder. A run that leaves no output leaves no settings either. All
    ranks call it; rank 0 reads and writes. defaults: the values of settings that an older file
    lacks. Raises UserError if an output is not ours, a setting (except `free` ones) changed, or
    another process has the lock.
    """
    text = json.dumps(MARK | settings, indent=2, ensure_ascii=False).encode("utf-8", "replace")
    if dist.get_rank() > 0:
        yield from_first_rank(None)
        return

    def list_outputs():
        paths = outputs or file.parent.iterdir()
        return [path for path in paths if path != file and os.path.lexists(path)]

    file.parent.mkdir(parents=True, exist_ok=True)
    claimable = not file.exists()
    if file.is_file():  # a run may have been killed while it wrote its settings
        claimable = text.startswith(file.read_bytes()[: len(json.dumps(MARK))])
    fault = "is missing next to existing output, or of another program; choose another --out"
    require(is_own(file) or (claimable and not list_outputs()), file, fault)
    with lock(file):
        known = is_own(file)
        if known:
            require_same(file, (defaults or {}) | read_object(file), settings, free)
        else:
            with writing(file):
                file.write_bytes(text)
            flush_to_disk(file)
        try:
            yield from_first_rank(known)
        finally:
            if not list_outputs():
                file.unlink()
                if not outputs:
                    file.parent.rmdir()


def lock(file):
    """Locks a file, created if missing, and returns it. Raises UserError if it is locked."""
    opened = open(os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666))
    try:
        with writing(file):  # some file systems have no locks
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = os.fstat(opened.fileno()).st_nlink > 0  # a file just removed protects nothing
    except BlockingIOError:
        held = False
    require(held, file, "another process is writing it; wait for it, or choose another --out")
    return opened


def require_same(where, old, new, free=NOT_COMPARED):
    """Raises UserError naming the first of the `new` settings that differs from the `old`."""
    for name, value in new.items():
        require(
            name in free or old.get(name) == value,
            where,
            f"{name} was {quote(old.get(name))}, now {quote(value)}; "
            "give the old value, or choose another --out",
        )


def finite_json(row, where) -> str:
    """A JSON line. Raises UserError if a number in it is NaN or infinite."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise UserError(f"{where}: a number is not finite; check the model's weights") from None


# 5. The command line


class Arguments(argparse.ArgumentParser):
    """argparse with errors of one line, as all of ours are."""

    def error(self, message):
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def number_type(kind, low, high):
    """An argparse type: a number from `low` to `high`."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise ValueError
        return value

    parse.__name__ = f"{kind.__name__} from {low} to {high}"  # as argparse calls it in a message
    return parse


VALUES = {
    "COUNT": number_type(int, 1, 2**31),
    "N": number_type(int, 0, 2**31),
    "NUMBER": number_type(float, 0, 1e38),
    "SHARE": number_type(float, 0, 1),
    "P": number_type(float, 1e-30, 1),
    "TEXT": utf8_text,
}
# a line of a table of options: name, !, value, ..., default, help
OPTION = re.compile(r"^(--[\w-]+)(!?) ?([\w|-]*)(\.*)=?(.*?)  +(.*)", re.MULTILINE)
PROMPT_OPTIONS = f"""
--direction DE-EN...   translation direction; several: each pair in each direction
--chat CHAT=auto       auto: the folder's own chat template; {", ".join(NAMES)}, or a Jinja file
--system TEXT          system prompt of rows that have none (default: the chat template's own)
--template TEXT        instruction with {{source}} {{source_lang}} {{target_lang}}, or its file
"""


def make_parser(description, options):
    """The parser of a table of options: name, value, two spaces, help.

    `!` after a name: required. VALUE=DEFAULT has a default, VALUE... takes several, A|B|C is a
    choice whose default is the first (--dtype: by the device), without a value it is a switch.
    """
    p = Arguments(description=description)
    for name, required, value, several, default, help in OPTION.findall(options):
        settings = {"required": bool(required), "help": help.replace("%", "%%")}
        if "|" in value:
            settings["choices"] = value.split("|")
            default = settings["choices"][0]
        elif value:
            settings["metavar"] = value
            settings["type"] = VALUES.get(value, str)
        else:
            settings["action"] = "store_true"
        if several:  # given again, it adds to what was given
            settings |= {"nargs": "+", "default": [], "action": "extend"}
        if default:
            settings["default"] = default
            settings["help"] += " (default %(default)s)"
        p.add_argument(name, **settings)
    p.set_defaults(dtype="bfloat16" if torch.cuda.is_available() else "float32")
    return p


def torch_dtype(name: str) -> torch.dtype:
    """The type that --dtype names. Rank 0 warns of bfloat16 on a CPU that emulates it."""
    emulates = torch.backends.cpu.get_cpu_capability() == "AVX2" and not torch.cuda.is_available()
    if emulates and name == "bfloat16" and dist.get_rank() == 0:
        sys.stderr.write("warning: bfloat16 is very slow on this CPU; give --dtype float32\n")
    return getattr(torch, name)


# pattern in the repr of a Python or torch error -> our message
FAILURES = {
    "MemoryError|t allocate memory": "out of memory ({}); lower --batch-size, "
    "or --micro-batch-size of train.py",
    "^Dist|gloo": "another rank exited; see its error message ({})",
}


def cli(main, parser):
    """Runs a script. UserError, OSError, lack of memory and a lost rank end it with status 2 and
    one line, a signal silently. Every other exception is a bug, and keeps its traceback.
    """
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, lambda number, _: os._exit(128 + number))
    sys.stdout.reconfigure(errors="backslashreplace")  # as Python does for stderr
    rank = int(os.environ.get("RANK", 0))
    try:
        main(parser.parse_args())
        sys.stdout.flush()
        if torch.cuda.is_available() and dist.is_initialized():
            dist.destroy_process_group()  # NCCL warns of one that is left behind
        return
    except BrokenPipeError:
        os._exit(141)
    except (UserError, OSError) as e:
        message = str(e)
    except (MemoryError, RuntimeError) as e:
        hints = [hint for sign, hint in FAILURES.items() if re.search(sign, repr(e))]
        if not hints:
            raise
        message = hints[0].format(str(e).split("\n")[0])
    if rank:
        time.sleep(3)  # if rank 0 has the same error, torchrun ends this rank first
        message = f"rank {rank}: {message}"
    message = message.replace("\n", " ")
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)


COLORS = {"prompt": 90, "reference": 32, "rationale": 34}  # of a terminal


def main(args):
    rows = read_rows(args.data, args.direction)
    tokenizer = Tokenizer(args.model, args.chat).with_chat_of(rows)
    encoder = Encoder(tokenizer, read_template(args.template), args.system)
    examples = [encoder.example(row) for row in rows]
    shown = examples[: args.show + 1][-1]
    print(f"{len(rows)} rows; below, row {shown.id}: its reference and rationale carry loss")
    for name, color in COLORS.items():
        n = sorted(len(getattr(example, name)) for example in examples)
        print(f"{name}: {sum(n):,} tokens, median {n[len(n) // 2]}, longest {n[-1]}")
        text = "".join(tokenizer.tokens.get(id, "?") for id in getattr(shown, name))
        print(f"\033[{color}m{text}\033[0m" if sys.stdout.isatty() else text)
    ledger = [row for row in rows if row.rationale_ids is not None]
    statuses = Counter(f"of status {row.status}" for row in ledger)
    openings = Counter("begin: " + " ".join(row.rationale.split()[:4]) for row in ledger)
    for text, n in statuses.most_common() + openings.most_common(5):
        print(f"{n:6} rationales {text}")


OPTIONS = """
--model! DIR         model folder (only its tokenizer is read)
--data! FILE...      pairs, conversations, or ledgers of generate.py
--show N=0          index of the row to show
"""


def parser():
    return make_parser(
        "Checks training data and shows which tokens carry loss.", OPTIONS + PROMPT_OPTIONS
    )


if __name__ == "__main__":
    cli(main, parser())
