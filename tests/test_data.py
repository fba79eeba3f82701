"""What data.py does with rows, tokenizers, chat templates, folders and options.

Expected ids come from transformers, mistral-common or SentencePiece.
"""

import errno
import fcntl
import inspect
import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jinja2
import pytest
import torch
import torch.distributed as dist
from conftest import (
    CHATML,
    LINES,
    ODD,
    PAIRS,
    error_of,
    last_line,
    odd_row,
    write_config,
    write_jsonl,
    write_tokenizer,
    write_vocabulary,
)

import data
from data import Encoder, Tokenizer, claim, collate, make_parser, read_rows, read_template, share
from model import ModelConfig, UserError, start_processes

parametrize = pytest.mark.parametrize

WHY = "\n\nThe wind turns."
START = "<|im_start|>"
END = "<|im_end|>"
PROMPT = f"""{START}user
Translate this from German to English:
German: {LINES[1]}
English:{END}
{START}assistant
"""


def write(path: Path, content) -> Path:
    """A file of bytes or text, or of a value as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, str | bytes):
        content = json.dumps(content)
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content)
    return path


def said(role: str, text) -> dict:
    return {"role": role, "content": text}


ASKED = [said("user", "Why?")]


def fault_of(function, *arguments, **options) -> str:
    """The message of the UserError that a call must raise: one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def fault_at(place, function, *arguments, **options) -> str:
    """The same without the place at its beginning."""
    fault = fault_of(function, *arguments, **options)
    start = f"{place}: "
    assert fault.startswith(start)
    return fault.removeprefix(start)


def spell(tokenizer: Tokenizer, ids: list) -> str:
    """The text of `ids`, control tokens included."""
    pieces = tokenizer.list_tokens()
    text = "".join(pieces[id] for id in ids).replace("▁", " ")
    return re.sub(
        "(<0x..>)+",
        lambda match: bytes.fromhex(match[0].replace("<0x", "").replace(">", "")).decode(),
        text,
    )


@pytest.fixture(scope="session")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer(folder)


@pytest.fixture
def rows_of(tmp_path):
    """Reads the rows of a file that holds the given ones."""

    def read(rows, directions=(), prompts=False) -> list:
        file = write_jsonl(tmp_path / "rows.jsonl", rows)
        return read_rows([str(file)], directions, prompts)

    return read


@pytest.fixture
def examples_of(rows_of, tokenizer):
    """What is learned from rows, with options of Encoder."""

    def learn(rows, tokenizer=tokenizer, **options) -> list:
        encoder = Encoder(tokenizer, **options)
        return [encoder.example(row) for row in rows_of(rows)]

    return learn


@pytest.fixture
def example_of(examples_of):
    """What is learned from one row."""

    def learn(row, *tokenizer, **options):
        [example] = examples_of([row], *tokenizer, **options)
        return example

    return learn


@pytest.fixture
def ledger_of(rows_of, tokenizer):
    """Rows as generate.py writes them, with the options template and system."""

    def write_ledger(rows=PAIRS, tokenizer=tokenizer, rationale=WHY, **options) -> list:
        encoder = Encoder(tokenizer, **options)
        ledger = []
        for given, row in zip(rows, rows_of(rows)):
            ids = tokenizer.answer(row.reference)
            fields = {
                "id": row.id,
                "rationale": rationale,
                "prompt_ids": encoder.prompt(row),
                "reference_ids": ids,
                "rationale_ids": tokenizer.continuation(row.reference, ids, rationale),
                "tokenizer": tokenizer.hash,
                "finish": "eos",
                "status": "ok",
                "logprob": -1.5,
            }
            ledger.append(given | fields | options)
        return ledger

    return write_ledger


# 1. From a row to what is learned


def test_a_pair_becomes_prompt_reference_rationale_and_eos(tokenizer, example_of):
    example = example_of(PAIRS[0] | {"rationale": WHY})
    assert spell(tokenizer, example.prompt) == PROMPT
    assert spell(tokenizer, example.reference) == LINES[0]
    assert spell(tokenizer, example.rationale) == WHY + END
    assert example.tokens == example.prompt + example.reference + example.rationale
    assert len(example) == len(example.tokens)


def test_without_a_rationale_the_reference_ends_with_eos(tokenizer, example_of):
    example = example_of(PAIRS[0])
    assert spell(tokenizer, example.reference) == LINES[0] + END
    assert example.rationale == []


def test_the_reference_has_the_same_ids_whatever_rationale_follows(tokenizer, example_of):
    pair = PAIRS[0] | {"reference": "A tea"}
    alone = example_of(pair).reference[:-1]
    merged = tokenizer.answer("A teacher")
    assert merged[: len(alone)] != alone  # the texts together would be other tokens
    for rationale in ("cher", " cher", ".", "\n"):
        example = example_of(pair | {"rationale": rationale})
        assert example.reference == alone
        text = f"A tea{rationale}{END}"
        assert spell(tokenizer, example.reference + example.rationale) == text


def test_a_batch_predicts_exactly_reference_rationale_and_eos(tokenizer, examples_of):
    rows = [row | {"rationale": i % 3 * WHY} for i, row in enumerate(PAIRS)]
    examples = examples_of(rows)
    batch = collate(examples)
    T = batch.shared.token_at.shape[1]
    assert T == max(map(len, examples)) - 1
    answers = {}  # row -> place in the row -> the id to predict there
    for place, target in zip(batch.places.tolist(), batch.targets.tolist(), strict=True):
        answers.setdefault(place // T, {})[place % T] = target
    read = batch.tokens[0][batch.shared.token_at]  # [B, T]
    for b, example in enumerate(examples):
        first = len(example.prompt) - 1  # it predicts the first token of the answer
        assert sorted(answers[b]) == [*range(first, len(example) - 1)]
        learned = [answers[b][place] for place in sorted(answers[b])]
        text = rows[b]["reference"] + rows[b]["rationale"] + END
        assert spell(tokenizer, learned) == text
        assert read[b, : len(example) - 1].tolist() == example.tokens[:-1]
    references = [example.reference for example in examples]
    rationales = [example.rationale for example in examples]
    assert batch.references == sum(map(len, references))
    assert batch.targets.tolist() == [*itertools.chain(*references, *rationales)]


def test_a_batch_without_examples_has_no_target():
    batch = collate([])
    assert batch.tokens.numel() > 0
    assert batch.places.tolist() == batch.targets.tolist() == []
    assert batch.references == 0


def test_tokens_that_rows_share_at_their_beginning_are_read_once():
    tokens, shared = share([[7, 8, 9], [7, 8, 5, 6], [8]])
    assert tokens.tolist() == [[7, 8, 9, 5, 6, 8]]
    assert shared.token_at.tolist() == [[0, 1, 2, 0], [0, 1, 3, 4], [5, 0, 0, 0]]
    assert shared.first_at.tolist() == [0, 1, 2, 6, 7, 8]


def test_shared_tokens_unfold_to_the_rows_and_differ_in_what_comes_before_them():
    r = random.Random(0)
    for _ in range(50):
        rows = [r.choices([5, 6], k=r.randint(1, 6)) for _ in range(r.randint(1, 6))]
        tokens, shared = share(rows)
        before = {}  # index of a token -> the row up to it
        for b, row in enumerate(rows):
            indices = shared.token_at[b, : len(row)].tolist()
            assert tokens[0][indices].tolist() == row
            for t, index in enumerate(indices):
                assert before.setdefault(index, row[: t + 1]) == row[: t + 1]
        assert len(before) == tokens.numel()
        assert len({tuple(beginning) for beginning in before.values()}) == len(before)
        T = max(map(len, rows))
        for index, place in enumerate(shared.first_at.tolist()):
            assert rows[place // T][: place % T + 1] == before[index]


TRUNCATED = {"finish": "length"}
REPETITIVE = {"status": "repetitive"}
SILENT = {"status": "empty", "rationale": "", "rationale_ids": []}
ENDS = {
    # fields of the ledger row, options -> whether the rationale is learned, whether EOS is
    "by default": ({}, {}, True, True),
    "truncated": (TRUNCATED, {}, True, False),
    "repetitive": (REPETITIVE, {}, True, True),
    "repetitive and truncated": (REPETITIVE | TRUNCATED, {}, True, False),
    "ok with only_ok": ({}, {"only_ok": True}, True, True),
    "repetitive with only_ok": (REPETITIVE, {"only_ok": True}, False, True),
    "truncated, repetitive, only_ok": (REPETITIVE | TRUNCATED, {"only_ok": True}, False, True),
    "outside coverage": ({}, {"coverage": 0}, False, True),
    "truncated and outside coverage": (TRUNCATED, {"coverage": 0}, False, True),
    "empty": (SILENT, {}, False, True),
    "empty by length": (SILENT | TRUNCATED, {}, False, True),
    "empty with only_ok": (SILENT, {"only_ok": True}, False, True),
}


@parametrize("name", ENDS)
def test_eos_ends_what_the_model_ended_and_nothing_that_was_truncated(
    tokenizer, name, example_of, ledger_of
):
    fields, options, learned, ended = ENDS[name]
    [row, *_] = ledger_of()
    example = example_of(row | fields, **options)
    end = [tokenizer.end_id] if ended else []
    if learned:
        assert example.reference == row["reference_ids"]
        assert example.rationale == row["rationale_ids"] + end
        assert example.dropped == ""
    else:
        assert example.reference == row["reference_ids"] + end
        assert example.rationale == []


def test_an_example_says_why_its_rationale_was_dropped(example_of, ledger_of):
    [row, *_] = ledger_of()
    example = example_of(row | REPETITIVE, only_ok=True)
    assert "repetitive" in example.dropped
    assert "coverage" in example_of(row, coverage=0).dropped


def answer_row(tokenizer, text: str, **fields) -> dict:
    """A row of --task answer: a prompt, and what the model answered."""
    row = {
        "prompt": "Why?",
        "rationale": text,
        "prompt_ids": tokenizer.chat(ASKED),
        "reference_ids": [],
        "rationale_ids": tokenizer.answer(text),
        "tokenizer": tokenizer.hash,
        "finish": "eos",
        "status": "ok",
    }
    return row | fields


@parametrize("text", ["Tomatoes.", ""])
def test_an_answer_without_reference_ends_with_eos_if_the_model_ended_it(
    tokenizer, text, example_of
):
    for finish, end in (("eos", [tokenizer.end_id]), ("length", [])):
        row = answer_row(tokenizer, text, finish=finish)
        example = example_of(row)
        assert example.prompt == row["prompt_ids"]
        assert example.reference == []
        assert example.rationale == row["rationale_ids"] + end


def test_an_answer_that_is_dropped_leaves_nothing_to_learn(tokenizer, example_of):
    row = answer_row(tokenizer, "Tomatoes.", **REPETITIVE)
    example = example_of(row, only_ok=True)
    assert example.tokens == row["prompt_ids"]


def test_in_a_ledger_an_answer_may_be_empty_and_a_question_may_not(tokenizer, rows_of):
    row = answer_row(tokenizer, "Tomatoes.")
    [read] = rows_of([row | {"response": ""}])
    assert read.reference == ""
    for asked in ({"prompt": " "}, {"messages": [said("user", " ")]}):
        assert "is empty" in fault_of(rows_of, [row | asked])


def test_a_larger_coverage_keeps_the_rationales_of_a_smaller_one(tokenizer, rows_of):
    row = {"prompt": "Why?", "response": "So.", "rationale": "\nThus."}
    rows = rows_of([row] * 1000)
    kept = []
    for coverage in (0, 0.25, 0.5, 0.9, 1):
        encoder = Encoder(tokenizer, coverage=coverage)
        kept.append({row.id for row in rows if encoder.example(row).rationale})
    for smaller, larger in itertools.pairwise(kept):
        assert smaller < larger
    assert len(kept[0]) == 0
    assert len(kept[-1]) == 1000
    assert abs(len(kept[2]) - 500) < 80  # five standard deviations


# 2. Ledgers: rows that carry the ids of prompt, reference and rationale


@pytest.fixture
def sampled_ledger(tokenizer, ledger_of):
    """A ledger whose rationales were sampled as other pieces than their text is encoded to."""
    pieces = tokenizer.sp.piece_to_id(["▁", "b", "o", "a", "t"])
    rows = ledger_of(rationale=" boat")
    assert rows[0]["rationale_ids"] != pieces
    return [row | {"rationale_ids": pieces} for row in rows]


def test_a_ledger_trains_on_the_ids_that_were_sampled(tokenizer, example_of, sampled_ledger):
    row = sampled_ledger[0]
    example = example_of(row)
    assert example.prompt == row["prompt_ids"]
    assert example.reference == row["reference_ids"]
    assert example.rationale == row["rationale_ids"] + [tokenizer.end_id]


def test_rows_of_a_ledger_may_be_moved_split_joined_and_shuffled(
    tokenizer, tmp_path, examples_of, sampled_ledger
):
    examples = examples_of(sampled_ledger)
    order = [4, 0, 6, 2]
    parts = [[sampled_ledger[i] for i in order], [sampled_ledger[5]]]
    files = [write_jsonl(tmp_path / f"part{i}.jsonl", part) for i, part in enumerate(parts)]
    encoder = Encoder(tokenizer)
    found = [encoder.example(row) for row in read_rows([str(file) for file in files])]
    assert found == [examples[i] for i in [*order, 5]]


def test_a_ledger_of_another_tokenizer_is_encoded_by_its_text(
    tokenizer, example_of, sampled_ledger
):
    row = sampled_ledger[0]
    text = example_of(PAIRS[0] | {"rationale": " boat"})
    row["tokenizer"] = "another"
    row["prompt_ids"] = row["prompt_ids"][3:]  # of another chat format
    assert example_of(row) == text
    row["rationale_ids"] = [10**6]  # of a larger vocabulary
    assert example_of(row) == text


def test_an_edited_text_is_encoded_and_what_was_not_edited_keeps_its_ids(
    tokenizer, example_of, sampled_ledger
):
    row = sampled_ledger[0]
    edited = example_of(row | {"rationale": " ship"})
    assert spell(tokenizer, edited.rationale) == " ship" + END
    assert edited.prompt == row["prompt_ids"]
    assert edited.reference == row["reference_ids"]
    edited = example_of(row | {"reference": "The ship waits."})
    assert spell(tokenizer, edited.reference) == "The ship waits."
    assert edited.rationale == row["rationale_ids"] + [tokenizer.end_id]
    for source in ("Das Schiff.", LINES[1][:15]):
        edited = example_of(row | {"source": source})
        assert spell(tokenizer, edited.prompt) == PROMPT.replace(LINES[1], source)
        assert edited.rationale == row["rationale_ids"] + [tokenizer.end_id]


def test_a_prompt_that_was_not_edited_keeps_its_ids_whatever_the_template_is_now(
    tokenizer, tmp_path, example_of, ledger_of
):
    dated = "It is May. {{ messages[0].content | trim }}"
    may = Tokenizer(make_folder(tmp_path, chat_template=dated))
    june = Tokenizer(make_folder(tmp_path, chat_template=dated.replace("May", "June")))
    none = Tokenizer(make_folder(tmp_path, chat_template=None))
    pair = PAIRS[0] | {"source": " Das Schiff. "}
    [row] = ledger_of([pair], may, template="{source}")
    for now in (may, june, none):
        assert example_of(row, now).prompt == row["prompt_ids"]
    question = answer_row(may, "Tomatoes.")
    for now in (may, none):
        assert example_of(question, now).prompt == question["prompt_ids"]


BRIEF = "Be brief."
TO = "To {target_lang}: {source}"


@parametrize("options", [{"template": TO}, {"system": BRIEF}, {"system": ""}])
def test_an_edited_source_is_asked_by_the_options_of_its_row(options, example_of, ledger_of):
    [row, *_] = ledger_of(**options)
    edited = example_of(row | {"source": "Das Schiff."})
    new = example_of(PAIRS[0] | {"source": "Das Schiff."}, **options)
    assert edited.prompt == new.prompt
    assert edited.prompt != example_of(row).prompt


def test_an_edited_conversation_is_asked_as_it_is_now(tokenizer, example_of):
    row = answer_row(tokenizer, "Tomatoes.")
    assert example_of(row).prompt == row["prompt_ids"]
    for prompt in ("How?", "Wh"):
        ids = tokenizer.chat([said("user", prompt)])
        assert example_of(row | {"prompt": prompt}).prompt == ids


CHANGED_PROMPTS = {
    # options when the ledger was written, options now -> whether they give the same prompt
    "the same template": ({"template": TO}, {"template": TO}, True),
    "the default template": ({}, {"template": data.TEMPLATE}, True),
    "another template": ({}, {"template": TO}, False),
    "the default for another": ({"template": TO}, {"template": data.TEMPLATE}, False),
    "the same system prompt": ({"system": BRIEF}, {"system": BRIEF}, True),
    "a new system prompt": ({}, {"system": BRIEF}, False),
    "a new empty system prompt": ({}, {"system": ""}, False),
    "another system prompt": ({"system": BRIEF}, {"system": ""}, False),
}


@parametrize("edited", [False, True])
@parametrize("other", [False, True])
@parametrize("name", CHANGED_PROMPTS)
def test_an_option_that_gives_another_prompt_than_the_ledger_has_is_refused(
    tokenizer, tmp_path, name, other, edited, example_of, ledger_of
):
    written, now, same = CHANGED_PROMPTS[name]
    [row, *_] = ledger_of(**written)
    pair = PAIRS[0]
    if other:
        row["tokenizer"] = "another"
    if edited:
        row["source"] = "Das Schiff."
        pair = pair | {"source": "Das Schiff."}
    if same:
        prompt = example_of(row, **now).prompt
        assert prompt == example_of(pair, **now).prompt
    else:
        fault = fault_at(f"{tmp_path}/rows.jsonl:1", example_of, row, **now)
        assert "another --template or --system" in fault


def test_the_same_chat_format_by_another_name_is_accepted_and_another_is_refused(
    folder, tmp_path, example_of, ledger_of
):
    file = write(tmp_path / "chatml.jinja", CHATML)
    [row, *_] = ledger_of()
    for chat in (str(file), "chatml"):
        same = Tokenizer(folder, chat)
        assert example_of(row, same).prompt == row["prompt_ids"]
    for chat in ("plain", "vicuna"):
        fault = fault_at(f"{tmp_path}/rows.jsonl:1", example_of, row, Tokenizer(folder, chat))
        assert "--chat auto" in fault


def test_rows_that_were_written_with_chat_bring_their_format_along(
    folder, tokenizer, tmp_path, rows_of, example_of, ledger_of
):
    plain = Tokenizer(folder, "plain")
    [row, *_] = ledger_of(tokenizer=plain)
    row["chat"] = "plain"
    rows = rows_of([row])
    assert tokenizer.with_chat_of(rows).chat_option == "plain"
    assert plain.with_chat_of(rows) is plain
    pairs = rows_of(PAIRS)
    assert tokenizer.with_chat_of(pairs) is tokenizer
    foreign = rows_of([row | {"tokenizer": "another"}])
    assert tokenizer.with_chat_of(foreign) is tokenizer
    assert example_of(row, plain).prompt == row["prompt_ids"]
    assert "--chat plain" in fault_of(example_of, row)
    row["source"] = "Das Schiff."
    assert spell(plain, example_of(row, plain).prompt).endswith("Das Schiff.\nEnglish:")


def test_rows_of_several_formats_or_of_a_template_file_need_that_option(
    folder, tmp_path, rows_of, ledger_of
):
    tokenizer = Tokenizer(folder)
    [first, second, *_] = ledger_of()
    for one, other in (("plain", None), ("plain", "zephyr"), ("0123456789abcdef",) * 2):
        rows = rows_of([first | {"chat": one}, second | {"chat": other}])
        fault = fault_of(tokenizer.with_chat_of, rows)
        assert fault.startswith(f"{tmp_path}/rows.jsonl:")
        assert "--chat" in fault


def test_the_settings_of_a_prompt_are_what_it_depends_on(folder, tokenizer):
    settings = Encoder(tokenizer).settings()
    assert settings == Encoder(tokenizer, data.TEMPLATE).settings()
    assert json.loads(json.dumps(settings)) == settings
    for other in (
        Encoder(tokenizer, TO),
        Encoder(tokenizer, system=""),
        Encoder(Tokenizer(folder, "plain")),
    ):
        assert other.settings() != settings


def test_an_id_beyond_the_vocabulary_is_refused_by_row(tokenizer, tmp_path, examples_of, ledger_of):
    rows = ledger_of()
    for name in ("prompt_ids", "reference_ids", "rationale_ids"):
        rows[1] |= {name: [5, tokenizer.vocab_size]}
        fault = fault_at(f"{tmp_path}/rows.jsonl:2", examples_of, rows)
        assert fault.startswith(f"token id {tokenizer.vocab_size} ")
        rows[1] |= {name: [5]}


def test_a_ledger_row_without_one_of_its_fields_is_of_an_older_version(
    tmp_path, rows_of, ledger_of
):
    [row, *_] = ledger_of()
    for name in sorted(row.keys() - PAIRS[0].keys() - {"id", "logprob"}):
        fields = {field: value for field, value in row.items() if field != name}
        fault = fault_at(f"{tmp_path}/rows.jsonl:1", rows_of, [fields])
        assert f'"{name}"' in fault
        assert "generate.py" in fault


def test_a_pair_may_have_fields_that_only_a_ledger_needs(tokenizer, example_of):
    fields = {"finish": "length", "status": "draft", "tokenizer": 3, "system": ["x"]}
    example = example_of(PAIRS[0] | fields)
    assert example == example_of(PAIRS[0])


# 3. Chat templates: a folder's own is rendered as transformers renders it

# one construct each
TEMPLATES = {
    "a loop": """
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% else %}
{{ '<|assistant|>\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "a default system prompt in a variable": """
{%- if messages[0].role == 'system' -%}
    {%- set system = messages[0].content -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system = 'You mend boats.' -%}
    {%- set turns = messages -%}
{%- endif -%}
{{ bos_token + system }}
{%- for turn in turns -%}
    {{ ' ' + turn.role | upper + ': ' + turn.content }}
    {{- eos_token + '\n' if turn.role == 'assistant' }}
{%- endfor -%}
{{ ' ASSISTANT:' if add_generation_prompt }}""",
    "a namespace, and quotation marks": """
{%- set chat = namespace(system='You\\'re "Bo", who mends boats.') -%}
{%- for message in messages if message.role == 'system' -%}
{%- set chat.system = message.content -%}
{%- endfor -%}
<|im_start|>system
{{ chat.system }}<|im_end|>
{% for message in messages if message.role != 'system' %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}""",
    "a macro": """
{%- macro turn(role, text) -%}
<|im_start|>{{ role }}
{{ text }}<|im_end|>
{% endmacro -%}
{{ bos_token }}
{%- for message in messages -%}
{{ turn(message.role, message.content) }}
{%- endfor -%}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "filters": """
{%- for message in messages -%}
{{ bos_token if loop.first }}### {{ message.role | title }}:
{{ message.content | trim }}

{% endfor -%}
{{ '### Answer:' if add_generation_prompt }}""",
    "the system prompt in the last turn": """
{{- bos_token -}}
{% set start = namespace(system='') %}
{% if messages[0].role == 'system' %}
{% set start.system = messages[0].content + '\n\n' %}
{% set messages = messages[1:] %}
{% endif %}
{% for message in messages %}
{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate') }}
{% elif message.role == 'user' %}
{{ '[INST] ' + (start.system if loop.last else '') + message.content + ' [/INST]' }}
{%- else %}
{{ message.content + eos_token }}
{%- endif %}
{% endfor %}""",
    "a refusal": """
{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}
{{- raise_exception('No "system" role here') -}}
{%- endif -%}
{%- for message in messages -%}
<|im_start|>{{ 'model' if message.role == 'assistant' else message.role }}
{{ message.content | trim }}<|im_end|>
{% endfor -%}
<|im_start|>model
""",
    "loop controls": """
{%- for message in messages -%}
{%- if message.role == 'system' -%}
<|system|>{{ message.content }}
{%- continue -%}
{%- endif -%}
<|{{ message.role }}|>{{ message.content }}<|end|>
{%- if loop.last -%}
{%- break -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|assistant|>{% endif -%}""",
    "generation marks": """
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
<|im_start|>assistant
{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}

{% else -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif -%}
{%- endfor -%}
{{ '<|im_start|>assistant\n' if add_generation_prompt }}""",
    "JSON": """
{{- bos_token -}}
{% for message in messages %}
{{ {'role': message.role, 'text': message.content} | tojson }}
{% endfor %}
{{ messages[0] | tojson(indent=1, sort_keys=true) }}
{{ messages[-1].content | tojson(ensure_ascii=true) }}""",
    "the date": """
<|im_start|>system
Today is in {{ strftime_now('%B %Y') }}.
{%- for message in messages if message.role == 'system' %}
 {{ message.content }}
{%- endfor %}<|im_end|>
{% for message in messages if message.role != 'system' %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
<|im_start|>assistant
""",
    "tokens that take the space on their right": """
{{- bos_token -}}
{% for message in messages %}
{{ '<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>' + '\n' -}}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|assistant|>\n' -}}
{% else %}
{{ eos_token -}}
{% endif %}""",
    "what is defined": """
{%- if tools is none and documents is none -%}
NO TOOLS {{ pad_token is defined }} {{ unk_token is defined }} {{ tools }}
{%- endif -%}
{{ cls_token }}
{%- for message in messages -%}
{{ message.get('name', message['role']) }}> {{ message.content ~ eos_token }}
{%- endfor -%}
{{ 'assistant>' if add_generation_prompt is defined and add_generation_prompt }}""",
    "methods": """
{%- set names = dict(user='Q', assistant='A', system='S') -%}
{%- for message in messages[::-1] | reverse -%}
{{ names[message.role] ~ ': ' ~ message.content.replace('\n\n', '\n').strip() ~ '\n' }}
{%- endfor -%}
{{ 'A: '.rstrip() }}""",
    "a list by name": [
        {"name": "tool_use", "template": "TOOLS {{ messages[0].content }}"},
        {"name": "default", "template": CHATML},
    ],
}
TAGS = ("<|user|>", "<|system|>", "<|assistant|>", "<|end|>")
WORDS = [
    *("The harbour", "waits", "Ärger,", "naïve", "港は静かだ", "你好", "🚀", "\n", "\n\n"),
    *("\t", "don't", '"3.14"', "привет", "<b>", "👩\u200d🚀"),  # the last: one of three characters
]


def added_tokens(texts, start: int = 480, **flags) -> dict:
    """`added_tokens_decoder` of tokenizer_config.json; the vocabulary has 480 pieces."""
    return {str(id): {"content": text, **flags} for id, text in enumerate(texts, start)}


def make_folder(folder: Path, files=(), **config) -> Path:
    """A tokenizer folder: tokenizer.model, tokenizer_config.json and other files."""
    write_tokenizer(folder, **{"tokenizer_class": "LlamaTokenizer"} | config)
    for name, content in dict(files).items():
        write(folder / name, content)
    return folder


def theirs_of(folder: Path):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


def render_theirs(theirs, messages: list, prompt: bool = True) -> list:
    options = {"add_generation_prompt": prompt, "return_dict": False}
    return theirs.apply_chat_template(messages, **options)


def random_text(r: random.Random, words: list) -> str:
    """One to six words, never with two spaces in a row."""
    text = "".join(r.choice(words) + r.choice(["", " "]) for _ in range(r.randint(1, 6)))
    return text.strip() or "A boat."


def conversations(words: list = WORDS):
    """One turn and three, half of them with a system prompt; each with an answer."""
    for seed in range(24):
        r = random.Random(seed)
        roles = ["user", "assistant"] * (seed % 4 // 2) + ["user"]
        if seed % 2:
            roles = ["system", *roles]
        yield [said(role, random_text(r, words)) for role in roles], random_text(r, words)


LEGACY = {"legacy": {"legacy": True}, "not legacy": {"legacy": False}, "unspecified": {}}


@parametrize("legacy", LEGACY)
@parametrize("name", TEMPLATES)
def test_a_rendered_prompt_has_the_ids_of_transformers(tmp_path, name, legacy):
    strip = {"rstrip": "right" in name, "lstrip": name == "loop controls"}
    tags = added_tokens(TAGS, special=True, **strip)
    config = LEGACY[legacy] | {"chat_template": TEMPLATES[name]}
    folder = make_folder(tmp_path, added_tokens_decoder=tags, **config)
    tokenizer = Tokenizer(folder)
    theirs = theirs_of(folder)
    for messages, _ in conversations():
        if name == "a refusal" and messages[0]["role"] == "system":
            with pytest.raises(jinja2.TemplateError, match='No "system" role here'):
                render_theirs(theirs, messages)
            fault = fault_at("a.jsonl:7", tokenizer.chat, messages, where="a.jsonl:7")
            assert 'No "system" role here' in fault
        else:
            assert tokenizer.chat(messages) == render_theirs(theirs, messages)


CONTINUED = [
    "a loop",
    "a default system prompt in a variable",
    "a macro",
    "generation marks",
]


@parametrize("legacy", LEGACY)
@parametrize("name", CONTINUED)
def test_prompt_answer_and_eos_have_the_ids_of_the_whole_conversation(tmp_path, name, legacy):
    config = LEGACY[legacy] | {"chat_template": TEMPLATES[name]}
    folder = make_folder(tmp_path, **config)
    tokenizer = Tokenizer(folder)
    theirs = theirs_of(folder)
    for messages, answer in conversations():
        ids = tokenizer.chat(messages) + tokenizer.answer(answer) + [tokenizer.end_id]
        whole = render_theirs(theirs, [*messages, said("assistant", answer)], prompt=False)
        assert ids == whole[: len(ids)]


def test_after_a_token_that_takes_the_space_an_answer_has_the_ids_of_the_conversation(tmp_path):
    tags = added_tokens(TAGS, special=True, rstrip=True)
    template = TEMPLATES["tokens that take the space on their right"]
    folder = make_folder(tmp_path, chat_template=template, added_tokens_decoder=tags)
    tokenizer = Tokenizer(folder)
    ids = tokenizer.chat(ASKED) + tokenizer.answer("So.") + [tokenizer.end_id]
    talk = [*ASKED, said("assistant", "So.")]
    assert render_theirs(theirs_of(folder), talk, prompt=False)[: len(ids)] == ids


def test_a_conversation_must_end_with_a_user(tokenizer):
    for roles in (["assistant"], ["user", "user"], ["user", "assistant"], ["user", "system"], []):
        messages = [said(role, "x") for role in roles]
        assert "roles must be" in fault_of(tokenizer.chat, messages)


def test_where_two_spaces_meet_sentencepiece_decides(tmp_path):
    folder = make_folder(tmp_path, chat_template="{{ bos_token + ' [INST]' }}", legacy=True)
    tokenizer = Tokenizer(folder)
    assert tokenizer.chat(ASKED) == [1, *tokenizer.sp.encode(" [INST]")]


REFUSED_TEMPLATES = {
    # a template -> the reason that transformers, too, gives
    "an undefined value": ("{{ chat.system }}", "'chat' is undefined"),
    "a syntax error": ("{% for %}", "Expected an expression"),
    "Python's classes": ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
    "a changed conversation": ("{{ messages.append(1) }}", "access to attribute 'append'"),
    "private names": ("{% set x = namespace() %}{% set x._y = 1 %}", "_y"),
    "a long range": ("{% for i in range(100001) %}{% endfor %}", "Range too big"),
    "its own text": ("{{ raise_exception('Only two turns') }}", "Only two turns"),
}


@parametrize("name", REFUSED_TEMPLATES)
def test_what_a_template_refuses_is_an_error_at_the_row_that_quotes_the_reason(
    tmp_path, name, rows_of
):
    template, reason = REFUSED_TEMPLATES[name]
    folder = make_folder(tmp_path, chat_template=template)
    [row] = rows_of(PAIRS[:1])
    with pytest.raises(Exception, match=re.escape(reason)):
        render_theirs(theirs_of(folder), ASKED)
    fault = fault_at(f"{tmp_path}/rows.jsonl:1", Encoder(Tokenizer(folder)).prompt, row)
    assert fault.startswith("the chat template refuses this")
    assert reason in fault


ENDLESS = {
    "over a million characters": (
        "{% for i in range(1001) %}{{ 'x' * 1000 }}{% endfor %}",
        "more than 1,000,000 characters",
    ),
    "endless recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "more memory than there is": ("{{ 'x' * 10 ** 15 }}", "MemoryError"),
}


@parametrize("name", ENDLESS)
def test_a_template_without_end_is_refused(tmp_path, name):
    template, reason = ENDLESS[name]
    tokenizer = Tokenizer(make_folder(tmp_path, chat_template=template))
    fault = fault_at("a.jsonl:7", tokenizer.chat, ASKED, where="a.jsonl:7")
    assert reason in fault


def test_a_prompt_of_a_million_characters_is_rendered(tmp_path):
    template = "{% for i in range(1000) %}{{ 'x' * 1000 }}{% endfor %}"
    tokenizer = Tokenizer(make_folder(tmp_path, chat_template=template))
    assert tokenizer.decode(tokenizer.chat(ASKED)) == "x" * 10**6


def test_jinja_with_a_sandbox_that_is_not_safe_is_refused(folder, monkeypatch):
    data.compile_template.cache_clear()
    monkeypatch.setattr(jinja2, "__version__", "3.1.5")
    fault = fault_of(Tokenizer(folder).chat, ASKED)
    assert fault == "jinja2: older than 3.1.6 its sandbox is not safe; pip install -U jinja2"
    monkeypatch.setattr(jinja2, "__version__", "3.10.0")
    assert Tokenizer(folder).chat(ASKED)


def test_an_empty_system_prompt_is_one_and_not_the_default(tmp_path):
    template = TEMPLATES["a namespace, and quotation marks"]
    folder = make_folder(tmp_path, chat_template=template)
    tokenizer = Tokenizer(folder)
    ids = tokenizer.chat(ASKED, system="")
    assert ids == render_theirs(theirs_of(folder), [said("system", ""), *ASKED])
    assert spell(tokenizer, ids).startswith(f"{START}system\n{END}\n")
    assert "You're" in spell(tokenizer, tokenizer.chat(ASKED))


def test_a_system_prompt_is_that_of_the_conversation_else_that_of_the_option(tokenizer, example_of):
    with_system = [said("system", BRIEF), *ASKED]
    ids = tokenizer.chat(with_system)
    assert spell(tokenizer, ids).startswith(f"{START}system\n{BRIEF}{END}\n")
    assert tokenizer.chat(ASKED, system=BRIEF) == ids
    assert tokenizer.chat(with_system, system="Another.") == ids
    for messages, system in ((ASKED, BRIEF), (with_system, "Another."), (with_system, None)):
        row = {"messages": [*messages, said("assistant", "So.")]}
        assert example_of(row, system=system).prompt == ids


@parametrize("system", [BRIEF, "Why?"])
def test_a_system_prompt_that_the_template_drops_is_an_error(tmp_path, system):
    dropped = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    tokenizer = Tokenizer(make_folder(tmp_path, chat_template=dropped))
    fault = fault_at(
        "a.jsonl:7", tokenizer.chat, [said("user", "Why? Because.")], system, "a.jsonl:7"
    )
    assert fault.startswith("the chat template drops the system prompt")


def test_a_system_prompt_that_the_template_changes_is_not_dropped(tmp_path):
    changed = "{% for m in messages %}{{ m.content | upper | tojson }}{% endfor %}"
    tokenizer = Tokenizer(make_folder(tmp_path, chat_template=changed))
    ids = tokenizer.chat(ASKED, 'Say "a".\n')
    assert tokenizer.decode(ids) == r'"SAY \"A\".\n""WHY?"'


SOURCES = {
    # files, template in tokenizer_config.json -> the template that counts
    "the configuration": ({}, "A", "A"),
    "a file": ({"chat_template.jinja": "B"}, "A", "B"),
    "a file for tools, too": (
        {"chat_template.jinja": "B", "additional_chat_templates/tool_use.jinja": "C"},
        "A",
        "B",
    ),
    "a default among the others": (
        {"chat_template.jinja": "B", "additional_chat_templates/default.jinja": "C"},
        "A",
        "C",
    ),
    "a list": ({}, [{"name": "x", "template": "A"}, {"name": "default", "template": "B"}], "B"),
}


@parametrize("name", SOURCES)
def test_the_template_is_read_where_transformers_reads_it(tmp_path, name):
    files, template, text = SOURCES[name]
    folder = make_folder(tmp_path, chat_template=template)
    for file, content in files.items():
        write(folder / file, content)
    assert theirs_of(folder).apply_chat_template(ASKED, tokenize=False) == text
    tokenizer = Tokenizer(folder)
    assert tokenizer.decode(tokenizer.chat(ASKED)) == text


NO_DEFAULT = {
    "a list without a default": ({}, [{"name": "tool_use", "template": "A"}]),
    "only a file for tools": ({"additional_chat_templates/tool_use.jinja": "C"}, "A"),
}


@parametrize("name", NO_DEFAULT)
def test_a_template_that_transformers_does_not_choose_is_an_error(tmp_path, name):
    files, template = NO_DEFAULT[name]
    folder = make_folder(tmp_path, chat_template=template)
    for file, content in files.items():
        write(folder / file, content)
    with pytest.raises(ValueError, match="no default"):
        render_theirs(theirs_of(folder), ASKED)
    assert "--chat" in fault_of(Tokenizer, folder)


def test_a_folder_without_a_template_encodes_and_is_refused_where_a_prompt_is_rendered(tmp_path):
    tokenizer = Tokenizer(make_folder(tmp_path, chat_template=None))
    assert tokenizer.decode(tokenizer.encode("a boat")) == "a boat"
    assert tokenizer.eos_ids == [2]
    fault = fault_at(f"{tmp_path}", tokenizer.chat, ASKED)
    assert fault.startswith("has no chat template; give --chat")
    for name in data.NAMES:
        assert name in fault
    assert "no such file" in fault_of(Tokenizer, tmp_path, "chatlm")


def test_chat_takes_a_file_with_a_template(folder, tmp_path):
    file = write(tmp_path / "mine.jinja", "{{ messages[0].content }}, please:")
    tokenizer = Tokenizer(folder, str(file))
    assert tokenizer.decode(tokenizer.chat([said("user", "Go")])) == "Go, please:"
    assert tokenizer.end_id == tokenizer.eos_id


def test_an_answer_ends_with_what_the_template_writes_after_one_else_with_eos(tmp_path):
    ends = {
        CHATML: "<|im_end|>",
        TEMPLATES["a loop"]: "</s>",
        "{% for m in messages %}<|im_start|>Reply: {{ m.content }}{% endfor %}": "</s>",
        "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %} by you": "<|im_end|>",
        "{{ bos_token + messages[0].content }}": "</s>",
        "{% if messages[1] %}{{ raise_exception('x') }}{% endif %}": "</s>",
    }
    for template, end in ends.items():
        tokenizer = Tokenizer(make_folder(tmp_path, chat_template=template))
        assert spell(tokenizer, [tokenizer.end_id]) == end
        assert tokenizer.eos_ids == sorted({2, tokenizer.end_id})


def test_without_an_eos_token_generation_stops_where_the_template_ends_an_answer(tmp_path):
    tokenizer = Tokenizer(make_folder(tmp_path, eos_token=None))
    assert spell(tokenizer, tokenizer.eos_ids) == END
    plain = make_folder(tmp_path, eos_token=None, chat_template="{{ messages[0].content }}")
    assert "no eos_token" in fault_of(lambda: Tokenizer(plain).end_id)


# 4. Text of a user never becomes a control token, and none of it is lost

HOSTILE_TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m.role }}\n<think>{{ m.content }}<|end|>¤\n{% endfor %}"
)
USER_DEFINED = ["<|user|>", "<|user|>>", "§", "▁<tag>"]
SPECIAL = ["<|end|>", "<|end|>>", "¤", "<two words>"]
NOT_SPECIAL = ["<think>", "<word>"]
KNOWN = ["<unk>", "<s>", "</s>", START, END, *SPECIAL, *NOT_SPECIAL]
KNOWN += [piece.replace("▁", " ") for piece in USER_DEFINED]
HARMLESS = ["§", " <tag>", "<word>"]  # not special, and no template writes them


def hostile_tokenizer(folder: Path, template: str, **options) -> Tokenizer:
    """Control, user-defined and added tokens; of one character and with a space."""
    write_vocabulary(folder, user_defined_symbols=USER_DEFINED, **options)
    added = added_tokens(SPECIAL, special=True) | added_tokens(NOT_SPECIAL, start=490)
    config = {"chat_template": template, "added_tokens_decoder": added}
    write(folder / "tokenizer_config.json", config)
    return Tokenizer(folder)


def hostile_texts(tokens: list):
    """Each token alone, next to itself and in a text, and texts of their fragments."""
    for token in tokens:
        yield token
        yield f"a{token} {token}{token}\n{token}b"
        yield token[:1] + token + token[1:]
    yield "".join(tokens)
    fragments = [token[:i] for token in tokens for i in range(1, len(token))]
    fragments += [token[i:] for token in tokens for i in range(len(token))]
    r = random.Random(0)
    for _ in range(300):
        yield "".join(r.choices([*fragments, " ", "\n", "x"], k=r.randint(1, 8)))


CUT_TEMPLATE = """
{%- for m in messages -%}
<|user|>-{{ m.content.split('<|end|>')[0] }}<|end|>
{{ m.content.split('<think>')[-1] }}<think>-{{ m.content | replace('<s>', '') }}<|end|>
{%- endfor -%}"""
HOSTILE_TEMPLATES = {
    # a template -> the tokens that are not special and that it writes
    "tokens before and after": (HOSTILE_TEMPLATE, ["<|user|>", "<think>"]),
    "tokens between parts of a text": (CUT_TEMPLATE, ["<|user|>", "<think>"]),
    "other tokens": (CHATML, []),
}


@parametrize("legacy", [True, False])
@parametrize("name", HOSTILE_TEMPLATES)
def test_a_prompt_has_as_many_control_tokens_as_a_harmless_one_and_no_text_is_lost(
    tmp_path, name, legacy
):
    template, written = HOSTILE_TEMPLATES[name]
    tokenizer = hostile_tokenizer(tmp_path, template)
    tokenizer.legacy = legacy
    names = {text: id for id, text in tokenizer.list_tokens().items()}
    control = {names[text] for text in ("<s>", "</s>", START, END, *SPECIAL, *written)}
    roles = ("system", "user", "assistant", "user")
    harmless = tokenizer.chat([said(role, "a boat") for role in roles])
    harmless = [id for id in harmless if id in control]
    texts = [*hostile_texts(KNOWN)]
    for four in zip(texts, texts[1:], texts[2:], texts[3:]):
        ids = tokenizer.chat([said(role, text) for role, text in zip(roles, four)])
        assert [id for id in ids if id in control] == harmless, four
        for text in four:
            held = text in tokenizer.decode(ids)
            # with `legacy` there is a space after every added token
            assert held or legacy or template == CUT_TEMPLATE
    for text in texts:
        ids = tokenizer.encode(text)
        assert control.isdisjoint(ids)
        assert control.isdisjoint(tokenizer.answer(text))
        if legacy:
            text = text.replace(" ", "")
            assert tokenizer.decode(ids).replace(" ", "") == text
        else:
            assert tokenizer.decode(ids) == text


def test_an_added_word_that_is_not_special_is_one_id_in_a_text_and_stays_when_decoded(tmp_path):
    tokenizer = hostile_tokenizer(tmp_path, CHATML)
    for text in HARMLESS:
        ids = tokenizer.encode(f"a{text}b")
        assert len(ids) == 1 + len(tokenizer.encode("a")) + len(tokenizer.encode("b", within=True))
        assert tokenizer.decode(ids) == f"a{text}b"


def test_a_text_may_hold_private_characters(tokenizer):
    for character in ("\ue000", "\ue001", "\uf8ff"):
        text = f"{character}<|im_end|>{character}"
        assert tokenizer.decode(tokenizer.encode(text)) == text
        ids = tokenizer.chat([said("user", text)])
        assert text in tokenizer.decode(ids)
        assert ids.count(tokenizer.end_id) == 1


def test_a_private_character_of_the_template_stays(tmp_path):
    template = "\ue000{{ messages[0].content }}\ue001"
    tokenizer = Tokenizer(make_folder(tmp_path, chat_template=template))
    ids = tokenizer.chat([said("user", "a</s>b")])
    assert tokenizer.decode(ids) == "\ue000a</s>b\ue001"


def test_a_vocabulary_without_bytes_has_unknown_characters_and_no_control_token(tmp_path):
    tokenizer = hostile_tokenizer(tmp_path, HOSTILE_TEMPLATE, byte_fallback=False)
    ids = tokenizer.encode("a 🚀 <unk> <|user|> ¤")
    assert tokenizer.control.isdisjoint(ids)
    assert tokenizer.decode(ids).startswith("a  ⁇  ")


@parametrize("pieces", [["\n"], ["▁"], ["\n", "▁▁", "▁"]])
def test_white_space_that_the_vocabulary_defines_is_text_though_the_template_has_it(
    tmp_path, pieces
):
    write_vocabulary(tmp_path, user_defined_symbols=pieces)
    config = {"chat_template": CHATML.replace("\\n", "\n"), "tokenizer_class": "LlamaTokenizer"}
    write(tmp_path / "tokenizer_config.json", config)
    tokenizer = Tokenizer(tmp_path)
    text = "a b\nc d\n\ne"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    asked = [said("user", text)]
    assert tokenizer.chat(asked) == render_theirs(theirs_of(tmp_path), asked)


def test_a_piece_that_the_vocabulary_defines_may_be_long(tmp_path):
    pieces = ["<" + "g" * 140 + ">", "<word>"]
    folder = make_folder(tmp_path)
    write_vocabulary(folder, user_defined_symbols=pieces)
    tokenizer = Tokenizer(folder)
    for piece in pieces:
        ids = tokenizer.encode(f"a{piece}b")
        assert tokenizer.sp.piece_to_id(piece) in ids
        assert tokenizer.decode(ids) == f"a{piece}b"
        assert tokenizer.decode([tokenizer.sp.piece_to_id(piece)]) == piece


@parametrize("word", ["user", "content", "if", "m", "{%", "}"])
def test_an_added_word_is_text_though_the_source_of_the_template_has_it(tmp_path, word):
    tags = added_tokens([word])
    tokenizer = Tokenizer(make_folder(tmp_path, added_tokens_decoder=tags))
    text = f"the {word} here"
    assert 480 in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


# 5. Special and added tokens, as transformers reads them

EOT = "<|eot|>"
TYPED = {"__type": "AddedToken"}


EOT_ADDED = {"added_tokens_decoder": added_tokens([EOT], special=True)}
END_MAP = {"special_tokens_map.json": {"eos_token": {"content": END}, "pad_token": "<unk>"}}
NAMED = {
    # fields of tokenizer_config.json, other files
    "as in the vocabulary": ({}, {}),
    "a dictionary": ({"eos_token": {"content": END} | TYPED}, {}),
    "no BOS": ({"bos_token": None}, {}),
    "no BOS, but add_bos_token": ({"bos_token": None, "add_bos_token": True}, {}),
    "no EOS": ({"eos_token": None}, {}),
    "<unk> as EOS": ({"eos_token": "<unk>"}, {}),
    "an added EOS": ({"eos_token": EOT} | EOT_ADDED, {}),
    "an added PAD": ({"pad_token": EOT} | EOT_ADDED, {}),
    "an EOS in added_tokens.json": ({"eos_token": EOT}, {"added_tokens.json": {EOT: 480}}),
    "special_tokens_map.json": ({"eos_token": "</s>"}, END_MAP),
    "special_tokens_map.json and added tokens": (EOT_ADDED, END_MAP),
    "a list": ({"additional_special_tokens": [EOT, START, END]} | EOT_ADDED, {}),
    "a list of transformers 5": ({"extra_special_tokens": [EOT, START, END]} | EOT_ADDED, {}),
    "a dictionary by name": ({"extra_special_tokens": {"call_token": EOT}} | EOT_ADDED, {}),
    "another dictionary": ({"model_specific_special_tokens": {"call_token": EOT}} | EOT_ADDED, {}),
    "a field": ({"call_token": EOT} | EOT_ADDED, {}),
}
VARIABLES = """
{% set names = [bos_token, eos_token, unk_token, pad_token, call_token] %}
{% for name in names %}{{ loop.index }}{{ name }}{% endfor %}"""


@parametrize("name", NAMED)
def test_named_tokens_have_the_ids_of_transformers(tmp_path, name):
    config, files = NAMED[name]
    folder = make_folder(tmp_path, files, chat_template=VARIABLES, **config)
    tokenizer = Tokenizer(folder)
    theirs = theirs_of(folder)
    assert tokenizer.bos_id == theirs.bos_token_id
    assert tokenizer.eos_id == theirs.eos_token_id
    assert tokenizer.vocab_size == len(theirs)
    assert tokenizer.chat(ASKED) == render_theirs(theirs, ASKED)
    for id in range(1, tokenizer.vocab_size):  # SentencePiece shows <unk> as " ⁇ "
        shown = theirs.decode([430, id], skip_special_tokens=True)
        assert bool(tokenizer.decode([430, id])) == bool(shown)


MISSING = {
    "an absent EOS": {"eos_token": EOT},
    "an EOS with a space": {"eos_token": " </s>"},
    "an absent BOS": {"bos_token": {"content": EOT} | TYPED},
    "an empty EOS": {"eos_token": ""},
    "an absent special token": {"additional_special_tokens": [EOT]},
    "an absent token by name": {"call_token": EOT},
}


@parametrize("name", MISSING)
def test_a_named_token_that_the_vocabulary_lacks_is_an_error(tmp_path, name):
    folder = make_folder(tmp_path, **MISSING[name])
    fault = fault_at(f"{folder}/tokenizer_config.json", Tokenizer, folder)
    assert "which the vocabulary lacks" in fault


def test_a_padding_token_need_not_be_in_the_vocabulary(tmp_path):
    tokenizer = Tokenizer(make_folder(tmp_path, pad_token="[PAD]", mask_token="[MASK]"))
    assert tokenizer.vocab_size == 480
    assert tokenizer.decode(tokenizer.encode("a [PAD]")) == "a [PAD]"


EOS_FILES = {
    # generation_config.json, config.json -> where generation stops; the template ends with 4
    "neither": (None, None, [2, 4]),
    "one id": ({"eos_token_id": 7}, {"eos_token_id": 8}, [2, 4, 7]),
    "several": ({"eos_token_id": [7, 2]}, None, [2, 4, 7]),
    "config.json": (None, {"eos_token_id": [8, 9]}, [2, 4, 8, 9]),
    "config.json where the other has none": ({"top_p": 0.9}, {"eos_token_id": 8}, [2, 4, 8]),
    "a token that is not special": ({"eos_token_id": 480}, None, [2, 4, 480]),
}


@parametrize("name", EOS_FILES)
def test_generation_stops_at_the_ids_of_the_configuration_files(tmp_path, name):
    *contents, ids = EOS_FILES[name]
    files = dict(zip(("generation_config.json", "config.json"), contents))
    files = {file: content for file, content in files.items() if content is not None}
    added = added_tokens([EOT])
    tokenizer = Tokenizer(make_folder(tmp_path, files, added_tokens_decoder=added))
    assert tokenizer.eos_ids == ids
    for id in ids:  # is a control token
        assert id not in tokenizer.encode(tokenizer.list_tokens()[id])
    assert tokenizer.decode([480]) == ("" if 480 in ids else EOT)


@parametrize("legacy", LEGACY)
@parametrize("single_word", [False, True])
@parametrize("rstrip", [False, True])
@parametrize("lstrip", [False, True])
def test_added_tokens_are_found_where_transformers_finds_them(
    tmp_path, lstrip, rstrip, single_word, legacy
):
    flags = {"lstrip": lstrip, "rstrip": rstrip, "single_word": single_word}
    texts = ["a<call>b", "x \n<call>\n\ny", "<call><call>", "été<call>", "_<call>_", "3<call>."]
    texts += ["x\u3000<call>\u3000y", "the long <call>", "a b<call>b", "<call>", "don't <call>s"]
    tags = added_tokens(["<call>", "long <call>", "<call>b"], **flags)
    for text in texts:
        fields = LEGACY[legacy] | {"chat_template": text, "added_tokens_decoder": tags}
        folder = make_folder(tmp_path, **fields)
        assert Tokenizer(folder).chat(ASKED) == render_theirs(theirs_of(folder), ASKED)


@parametrize("legacy", LEGACY)
def test_without_a_prefix_space_ids_are_those_of_transformers(tmp_path, legacy):
    fields = LEGACY[legacy] | {"add_prefix_space": False, "chat_template": CHATML}
    folder = make_folder(tmp_path, **fields)
    tokenizer = Tokenizer(folder)
    theirs = theirs_of(folder)
    for messages, answer in conversations():
        assert tokenizer.chat(messages) == render_theirs(theirs, messages)
        assert tokenizer.encode(answer) == theirs.encode(answer, add_special_tokens=False)
        assert tokenizer.decode(tokenizer.encode(answer)) == answer


def test_without_a_prefix_space_an_answer_has_one_where_the_prompt_does_not_separate_it(tmp_path):
    separators = {" [/INST]": " So.", "\n": "So.", " ": "So.", END: "So."}
    for end, text in separators.items():
        template = "{{ messages[0].content + '" + end.replace("\n", "\\n") + "' }}"
        fields = {"chat_template": template, "add_prefix_space": False}
        tokenizer = Tokenizer(make_folder(tmp_path, **fields))
        assert spell(tokenizer, tokenizer.chat(ASKED)) == f"Why?{end}"
        assert spell(tokenizer, tokenizer.answer("So.")) == text


def test_an_id_that_no_token_has_is_decoded_to_nothing(tmp_path):
    added = added_tokens(["<call>"], start=490)
    tokenizer = Tokenizer(make_folder(tmp_path, added_tokens_decoder=added))
    assert tokenizer.vocab_size == 491
    ids = tokenizer.encode("a boat")
    for id in (480, 489):
        assert tokenizer.decode([*ids, id, 490, id, *ids]) == "a boat<call> a boat"


def test_a_first_line_ends_after_a_line_that_is_not_blank(tokenizer):
    ids = tokenizer.encode("\n \nA boat.\n\nIt", within=True)
    ends = [tokenizer.first_line_ends(ids[: i + 1]) for i in range(len(ids))]
    texts = [tokenizer.decode(ids[: i + 1]) for i, end in enumerate(ends) if end]
    assert [text.strip(" ") for text in texts] == ["\n \nA boat.\n", "\n \nA boat.\n\n"]


@parametrize("piece", ["▁the", "<0x0A>", "▁"])
def test_an_added_token_that_is_a_piece_of_the_vocabulary_deletes_no_text(tmp_path, piece):
    tokenizer = Tokenizer(make_folder(tmp_path))
    id = tokenizer.sp.piece_to_id(piece)
    assert id > 4
    text = "the boat\n<0x0A> the ▁the"
    ids = tokenizer.encode(text)
    for flags in ({}, {"special": True}):
        decoder = added_tokens([piece], start=id, **flags)
        same = Tokenizer(make_folder(tmp_path, added_tokens_decoder=decoder))
        assert same.encode(text) == ids
        assert same.decode(ids) == tokenizer.decode(ids)


CONTRADICTIONS = {
    "an id of another piece": added_tokens([EOT], start=7),
    "two ids": added_tokens([EOT, EOT]),
    "an id that is no number": {"x": {"content": EOT}},
    "a token without text": {"480": {"content": ""}},
    "a token that is text": {"480": EOT},
}


@parametrize("name", CONTRADICTIONS)
def test_an_added_token_that_contradicts_the_vocabulary_is_an_error(tmp_path, name):
    folder = make_folder(tmp_path, added_tokens_decoder=CONTRADICTIONS[name])
    assert fault_at(f"{folder}/tokenizer_config.json", Tokenizer, folder)


@parametrize("ids", [[-5], [7], [True], ["x"], [480, 480]])
def test_ids_that_added_tokens_json_must_not_have_are_an_error(tmp_path, ids):
    added = dict(zip((EOT, "<|other|>"), ids))
    folder = make_folder(tmp_path, {"added_tokens.json": added})
    assert fault_at(f"{folder}/added_tokens.json", Tokenizer, folder)


def test_a_vocabulary_may_have_no_bos(tmp_path):
    folder = make_folder(tmp_path, chat_template="{{ bos_token }}a{{ bos_token is defined }}")
    tokenizer = Tokenizer(write_vocabulary(folder, bos_id=-1))
    assert tokenizer.bos_id is None
    assert not tokenizer.adds_bos
    assert tokenizer.decode(tokenizer.chat(ASKED)) == "aFalse"


def saved_by_transformers(folder: Path, **config) -> Path:
    """A folder that transformers saved, with the tokenizer.model of the original."""
    theirs = theirs_of(make_folder(folder / "original", **config))
    saved = folder / "saved"
    theirs.save_pretrained(saved)
    write(saved / "tokenizer.model", (folder / "original/tokenizer.model").read_bytes())
    return saved


def test_a_folder_saved_by_transformers_has_its_ids(tmp_path):
    tags = added_tokens([EOT], special=True)
    fields = {"eos_token": EOT, "added_tokens_decoder": tags, "add_bos_token": True}
    saved = saved_by_transformers(tmp_path, **fields)
    names = {file.name for file in saved.iterdir()}
    assert names >= {"tokenizer.json", "chat_template.jinja"}
    assert "added_tokens_decoder" not in json.loads((saved / "tokenizer_config.json").read_text())
    tokenizer = Tokenizer(saved)
    theirs = theirs_of(saved)
    assert tokenizer.eos_id == theirs.eos_token_id == 480
    assert tokenizer.bos_id == theirs.bos_token_id == 1
    assert tokenizer.adds_bos
    for messages, _ in conversations():
        assert tokenizer.chat(messages) == render_theirs(theirs, messages)


ADD_BOS = {
    # fields of tokenizer_config.json
    "unspecified": {},
    "null": {"add_bos_token": None},
    "true": {"add_bos_token": True},
    "false": {"add_bos_token": False},
    "true without a BOS": {"add_bos_token": True, "bos_token": None},
}


@parametrize("name", ADD_BOS)
def test_plain_text_gets_a_bos_where_transformers_adds_one(tmp_path, name):
    folder = make_folder(tmp_path, **ADD_BOS[name])
    assert Tokenizer(folder).adds_bos == (theirs_of(folder).encode("x")[0] == 1)


BOS = {"SpecialToken": {"id": "<s>", "type_id": 0}}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}
PROCESSORS = {
    # `single` of the post_processor -> whether a text gets BOS
    "BOS": ([BOS, TEXT], True),
    "nothing": ([TEXT], False),
}


@parametrize("add_bos", [True, False])
@parametrize("name", PROCESSORS)
def test_a_post_processor_decides_and_not_the_settings(tmp_path, name, add_bos):
    single, adds = PROCESSORS[name]
    saved = saved_by_transformers(tmp_path, add_bos_token=True)
    file = json.loads((saved / "tokenizer.json").read_text())
    file["post_processor"]["single"] = single
    write(saved / "tokenizer.json", file)
    settings = json.loads((saved / "tokenizer_config.json").read_text())
    write(saved / "tokenizer_config.json", settings | {"add_bos_token": add_bos})
    assert (theirs_of(saved).encode("x")[0] == 1) == adds
    assert Tokenizer(saved).adds_bos == adds
    file["post_processor"] = {"type": "Sequence", "processors": [file["post_processor"]]}
    write(saved / "tokenizer.json", file)
    assert (theirs_of(saved).encode("x")[0] == 1) == adds
    assert Tokenizer(saved).adds_bos == adds
    file["post_processor"] = None
    write(saved / "tokenizer.json", file)
    assert theirs_of(saved).encode("x")[0] != 1
    assert not Tokenizer(saved).adds_bos


def test_a_bos_beyond_ascii_is_found_in_a_post_processor(tmp_path):
    bos = "<｜begin▁of▁text｜>"
    tags = added_tokens([bos], special=True)
    fields = {"bos_token": bos, "added_tokens_decoder": tags, "add_bos_token": True}
    saved = saved_by_transformers(tmp_path, **fields)
    assert theirs_of(saved).encode("x")[0] == 480
    assert Tokenizer(saved).adds_bos


def test_a_tokenizer_json_that_contradicts_tokenizer_model_is_refused_and_both_are_named(tmp_path):
    saved = saved_by_transformers(tmp_path)
    file = json.loads((saved / "tokenizer.json").read_text())
    pieces = file["model"]["vocab"]
    pieces["e"], pieces["n"] = pieces["n"], pieces["e"]
    write(saved / "tokenizer.json", file)
    fault = fault_of(Tokenizer, saved)
    assert "tokenizer.json" in fault
    assert "tokenizer.model" in fault


# fields of tokenizer_config.json that transformers reads
IMPLEMENTED = {
    *("chat_template", "legacy", "add_prefix_space", "add_bos_token", "added_tokens_decoder"),
    *("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"),
    *("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"),
}
WITHOUT_EFFECT = {  # on ids, with a value to show it
    "add_eos_token": True,  # of plain text only
    "auto_map": {"AutoTokenizer": ["a.B", "a.C"]},
    "backend": "sentencepiece",
    "chat_control_tokens": ["<call>"],
    "clean_up_tokenization_spaces": True,
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
    "files_loaded": ["x"],
    "fix_mistral_regex": True,
    "init_inputs": [],
    "is_local": False,
    "max_len": 3,
    "max_length": 3,
    "merges": [["a", "b"]],
    "model_input_names": ["input_ids"],
    "model_max_length": 3,
    "name_or_path": "x",
    "pad_to_multiple_of": 8,
    "pad_token_type_id": 1,
    "padding_side": "left",
    "post_processor": None,
    "processor_class": "X",
    "response_schema": {"x": 1},
    "response_template": "x",
    "stride": 2,
    "tokenizer": "x",
    "tokenizer_class": "LlamaTokenizerFast",
    "tokenizer_file": "x.json",
    "tokenizer_object": None,
    "tokenizer_padding": None,
    "tokenizer_truncation": {
        "max_length": 3,
        "stride": 0,
        "strategy": "longest_first",
        "direction": "right",
    },
    "truncation_side": "left",
    "truncation_strategy": "x",
    "unk_id": 5,
    "use_default_system_prompt": True,
    "verbose": True,
    "vocab": {"<unk>": 0},
    "vocab_file": "y.model",
}
ARGUMENTS = {  # of calls in Python, and nothing that a file holds
    *(
        "self",
        "args",
        "kwargs",
        "init_configuration",
        "pretrained_model_name_or_path",
        "gguf_file",
        "token",
    ),
    *("resolved_vocab_files", "cache_dir", "local_files_only", "trust_remote_code", "_is_local"),
    *("_json_padding", "_json_truncation", "_spm_precompiled_charsmap"),
}


def fields_read(function) -> set:
    """The names of settings that a method of a tokenizer takes."""
    names = set(inspect.signature(function).parameters)
    source = inspect.getsource(function)
    for pattern in (
        r'kwargs\.(?:pop|get|setdefault)\(\s*"(\w+)"',
        r'kwargs\["(\w+)"\]',
        r'"(\w+)" (?:not )?in (?:init_)?kwargs',
    ):
        names |= set(re.findall(pattern, source))
    return names


def test_each_field_that_transformers_reads_is_implemented_without_effect_or_refused():
    transformers = pytest.importorskip("transformers")
    base = transformers.PreTrainedTokenizerBase
    names = set(base.SPECIAL_TOKENS_ATTRIBUTES)
    for function in (
        base.__init__,
        base._from_pretrained,
        transformers.LlamaTokenizer.__init__,
        transformers.TokenizersBackend.__init__,
    ):
        found = fields_read(function)
        assert len(found) > 8
        names |= found
    known = IMPLEMENTED | WITHOUT_EFFECT.keys() | ARGUMENTS | set(data.REFUSED)
    assert names - known == set()


@parametrize("name", WITHOUT_EFFECT)
def test_a_field_without_effect_changes_no_id_of_ours_and_none_of_transformers(
    tokenizer, tmp_path, name
):
    other = make_folder(tmp_path, **{name: WITHOUT_EFFECT[name]})
    asked = [said("user", "a boat, <call> .")]
    ids = tokenizer.chat(asked)
    assert render_theirs(theirs_of(other), asked) == ids
    same = Tokenizer(other)
    assert same.chat(asked) == ids
    assert same.hash == tokenizer.hash


@parametrize("name", data.REFUSED)
def test_a_field_that_is_not_implemented_is_refused_by_name(tmp_path, name):
    folder = make_folder(tmp_path, **{name: True})
    assert fault_of(Tokenizer, folder).startswith(f"{folder}/tokenizer_config.json: {name} ")
    assert Tokenizer(make_folder(tmp_path, **{name: None})).hash


def test_fields_of_nobody_do_no_harm(tokenizer, tmp_path):
    fields = {"x": [1], "y_token": None, "sampling": {"a": {}}}
    folder = make_folder(tmp_path, **fields)
    write(folder / "generation_config.json", {"temperature": 0.6, "do_sample": True, "x": [1]})
    assert Tokenizer(folder).hash == tokenizer.hash


def test_the_hash_ignores_which_pieces_of_the_vocabulary_are_listed(tokenizer, tmp_path):
    pieces = ["<unk>", "<s>", "</s>", START, END]
    listed = added_tokens(pieces, start=0, special=True)
    assert Tokenizer(make_folder(tmp_path)).hash == tokenizer.hash
    for fields in (
        {"added_tokens_decoder": listed},
        {"added_tokens_decoder": {}},
        {"eos_token": END, "pad_token": "<unk>"},
        {"additional_special_tokens": [START, END]},
        {"chat_template": "{{ messages }}", "legacy": False, "add_bos_token": True},
    ):
        assert Tokenizer(make_folder(tmp_path, **fields)).hash == tokenizer.hash


def test_the_hash_changes_with_what_changes_an_encoding(tokenizer, tmp_path):
    hashes = [tokenizer.hash]
    tag = added_tokens(["<call>"])
    for fields in (
        {"legacy": True},
        {"add_prefix_space": False},
        {"added_tokens_decoder": tag},
        {"added_tokens_decoder": added_tokens(["<call>"], start=481)},
        {"added_tokens_decoder": added_tokens(["<cell>"])},
        {"added_tokens_decoder": added_tokens(["<call>"], special=True)},
        {"added_tokens_decoder": added_tokens(["<call>"], lstrip=True)},
        {"added_tokens_decoder": added_tokens(["<call>"], rstrip=True)},
        {"added_tokens_decoder": added_tokens(["<call>"], single_word=True)},
    ):
        hashes.append(Tokenizer(make_folder(tmp_path, **fields)).hash)
    for options in ({"vocab_size": 470}, {"add_dummy_prefix": False}):
        make_folder(tmp_path)
        hashes.append(Tokenizer(write_vocabulary(tmp_path, **options)).hash)
    assert len(set(hashes)) == len(hashes)


def test_two_models_of_one_vocabulary_have_the_same_tokens(folder, tokenizer, tmp_path):
    config = ModelConfig.from_file(folder)
    other = make_folder(tmp_path, eos_token=END)
    write_config(other)
    data.require_vocabulary(other, tokenizer, config)
    write_config(other, vocab_size=512)
    fault_at(other, data.require_vocabulary, other, tokenizer, config)
    write_config(other)
    write_vocabulary(other, vocab_size=470)
    fault_at(other, data.require_vocabulary, other, tokenizer, config)


TOKENIZER_FILES = {
    "added_tokens.json": "{}",
    "special_tokens_map.json": "{}",
    "generation_config.json": '{"eos_token_id": 2}',
    "chat_template.jinja": "{{ messages[0].content }}",
    "additional_chat_templates/tool_use.jinja": "tools",
}


def test_the_files_of_a_tokenizer_are_their_bytes_also_in_a_folder_of_links(tmp_path):
    store = make_folder(tmp_path / "store", TOKENIZER_FILES)
    names = {*TOKENIZER_FILES, "tokenizer.model", "tokenizer_config.json"}
    contents = {name: (store / name).read_bytes() for name in names}
    links = tmp_path / "links"
    for name in names:
        (links / name).parent.mkdir(parents=True, exist_ok=True)
        (links / name).symlink_to(store / name)
    for name in ("model.safetensors", "README.md", "config.json", "additional_chat_templates/x"):
        write(links / name, b"not a tokenizer's")
    (links / "config.json").write_text("{}")
    tokenizer = Tokenizer(links)
    assert tokenizer.files == contents
    write(store / "tokenizer_config.json", {"legacy": True})  # as it was read, not as it is
    assert tokenizer.files == contents


# 6. --chat NAME: the official encodings


def folder_of_mistral(folder: Path, version: str, **fields) -> Path:
    """The tokenizer that mistral-common has."""
    names = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}
    common = pytest.importorskip("mistral_common")
    model = Path(common.__file__).parent / "data" / names[version]
    write(folder / "tokenizer.model", model.read_bytes())
    write(folder / "tokenizer_config.json", fields)
    return folder


HOSTILE = [*WORDS, "[INST]", "[/INST]", "</s>", "<s>", "<<SYS>>", "<0x0A>", "<unk>", "  "]


@parametrize("legacy", LEGACY)
@parametrize("version", ["v1", "v3"])
def test_chat_mistral_has_the_ids_of_mistral_common(tmp_path, version, legacy):
    tokenizer = Tokenizer(folder_of_mistral(tmp_path, version, **LEGACY[legacy]), "mistral")
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    official = getattr(MistralTokenizer, version)()
    for messages, answer in conversations(HOSTILE):
        forced = said("assistant", answer) | {"prefix": True}
        request = ChatCompletionRequest(messages=[*messages, forced])
        ids = official.encode_chat_completion(request).tokens
        assert tokenizer.chat(messages) + tokenizer.answer(answer) == ids


@parametrize("legacy", LEGACY)
def test_chat_llama2_has_the_ids_of_the_recipe_of_meta(tmp_path, legacy):
    tokenizer = Tokenizer(folder_of_mistral(tmp_path, "v1", **LEGACY[legacy]), "llama2")
    encode = tokenizer.sp.encode
    for messages, answer in conversations(HOSTILE):
        texts = [message["content"] for message in messages]
        if messages[0]["role"] == "system":
            texts[:2] = [f"<<SYS>>\n{texts[0]}\n<</SYS>>\n\n{texts[1]}"]
        ids = []
        for user, reply in zip(texts[::2], texts[1::2]):
            ids += [1, *encode(f"[INST] {user.strip()} [/INST] {reply.strip()} "), 2]
        ids += [1, *encode(f"[INST] {texts[-1].strip()} [/INST]")]
        assert tokenizer.chat(messages) == ids
        assert tokenizer.answer(answer) == encode(answer)


@parametrize("name", ["llama2", "mistral"])
def test_without_a_prefix_space_or_a_bos_formats_have_none(tmp_path, name):
    texts = {"llama2": "[INST] a [/INST] b ", "mistral": "[INST] a [/INST]b"}
    folder = make_folder(tmp_path)
    write_vocabulary(folder, add_dummy_prefix=False)
    talk = [said("user", "a"), said("assistant", "b"), said("user", "c")]
    tokenizer = Tokenizer(folder, name)
    encode = tokenizer.sp.encode
    last = [1] * (name == "llama2") + encode("[INST] c [/INST]")
    assert tokenizer.chat(talk) == [1, *encode(texts[name]), 2, *last]
    tokenizer = Tokenizer(make_folder(tmp_path, bos_token=None), name)
    encode = tokenizer.sp.encode
    first = tokenizer.chat([said("user", "c")])
    assert first == encode("[INST] c [/INST]")


def test_a_format_whose_tokens_the_vocabulary_lacks_is_refused(tmp_path):
    folder = make_folder(tmp_path, chat_template="{{ messages[0].content }}")
    write_vocabulary(folder, control_symbols=[START])
    assert END in fault_at("--chat chatml", Tokenizer, folder, "chatml")


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)


def zephyr_text(messages):
    turns = [f"<|{m['role']}|>\n{m['content']}</s>\n" for m in messages]
    return "".join(turns) + "<|assistant|>\n"


def chatml_text(messages):
    turns = [f"{START}{m['role']}\n{m['content']}{END}\n" for m in messages]
    return "".join(turns) + f"{START}assistant\n"


def vicuna_text(messages):
    text = VICUNA_SYSTEM
    if messages[0]["role"] == "system":
        text = messages[0]["content"]
        messages = messages[1:]
    text += " "
    for user, answer in zip(messages[::2], messages[1::2]):
        text += f"USER: {user['content']} ASSISTANT: {answer['content']}</s>"
    return f"<s>{text}USER: {messages[-1]['content']} ASSISTANT:"


def plain_text(messages):
    return "<s>" + "\n\n".join(message["content"] for message in messages)


DEFINITIONS = {
    # the prompt as text, and what ends an answer
    "zephyr": (zephyr_text, "</s>"),
    "chatml": (chatml_text, END),
    "vicuna": (vicuna_text, "</s>"),
    "plain": (plain_text, "</s>"),
}


@parametrize("legacy", LEGACY)
@parametrize("name", DEFINITIONS)
def test_other_formats_have_the_ids_of_their_definition(tmp_path, name, legacy):
    prompt_text, end = DEFINITIONS[name]
    folder = make_folder(tmp_path, **LEGACY[legacy])
    tokenizer = Tokenizer(folder, name)
    theirs = theirs_of(folder)
    assert spell(tokenizer, [tokenizer.end_id]) == end
    for messages, answer in conversations():
        text = prompt_text(messages)
        if text.startswith("<s>") and legacy != "legacy":
            text = text.replace("<s>", "<s> ", 1)  # SentencePiece's, before every text
        ids = theirs.encode(text, add_special_tokens=False)
        assert tokenizer.chat(messages) == ids
        text += answer if text.endswith("\n") else f" {answer}"
        ids += tokenizer.answer(answer)
        assert ids == theirs.encode(text, add_special_tokens=False)


MISTRAL_V3 = [START, END, "[INST]", "[/INST]"]


@parametrize("legacy", LEGACY)
@parametrize("name", [*data.NAMES, "mistral v3", "a file"])
def test_exported_files_have_the_ids_of_chat_in_transformers(tmp_path, name, legacy):
    fields = LEGACY[legacy] | {"chat_template": [{"name": "default", "template": "another"}]}
    folder = make_folder(tmp_path / "folder", **fields)
    write(folder / "additional_chat_templates/tool_use.jinja", "tools")
    chat = name
    if name == "mistral v3":
        write_vocabulary(folder, control_symbols=MISTRAL_V3)
        chat = "mistral"
    elif name == "a file":
        chat = str(write(tmp_path / "x.jinja", TEMPLATES["a macro"]))
    tokenizer = Tokenizer(folder, chat)
    for file, content in tokenizer.files.items():
        write(tmp_path / "export" / file, content)
    theirs = theirs_of(tmp_path / "export")
    again = Tokenizer(tmp_path / "export")
    assert again.hash == tokenizer.hash
    assert again.end_id == tokenizer.end_id
    for messages, _ in conversations():
        ids = tokenizer.chat(messages)
        assert again.chat(messages) == ids
        assert render_theirs(theirs, messages) == ids


def test_a_folder_with_a_template_named_default_is_exported_with_that_of_chat(tmp_path):
    folder = make_folder(tmp_path / "folder")
    write(folder / "additional_chat_templates/default.jinja", "another")
    for file, content in Tokenizer(folder, "plain").files.items():
        write(tmp_path / "export" / file, content)
    ids = Tokenizer(folder, "plain").chat(ASKED)
    assert render_theirs(theirs_of(tmp_path / "export"), ASKED) == ids


# 7. Rows

BACK = [
    {"source": pair["reference"], "reference": pair["source"]}
    | {"source_lang": "en", "target_lang": "de"}
    for pair in PAIRS
]
BARE = [{"source": pair["source"], "reference": pair["reference"]} for pair in PAIRS]
ALMA = [{"translation": {"de": pair["source"], "en": pair["reference"]}} for pair in PAIRS]


def lines_of(rows: list) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


FORMATS = {
    # content of a file, --direction for one way
    "pairs": (lines_of(PAIRS), []),
    "pairs in an array": (json.dumps(PAIRS), []),
    "pairs without languages": (lines_of(BARE), ["de-en"]),
    "pairs of the other direction": (lines_of(BACK), ["de-en"]),
    "ALMA": (lines_of(ALMA), ["de-en"]),
    "ALMA in an array": ("\n" + json.dumps(ALMA, indent=1), ["de-en"]),
    "with blank lines and spaces": ("\n" + lines_of(PAIRS).replace("\n", " \n \n"), []),
    "with fields of somebody": (lines_of([pair | {"prompt": "p3"} for pair in PAIRS]), []),
    "with null fields": (lines_of([pair | {"prompt": None} for pair in PAIRS]), []),
}
ENDINGS = {"LF": ("\n", ""), "CRLF": ("\r\n", ""), "BOM": ("\n", "\ufeff")}


@parametrize("ending", ENDINGS)
@parametrize("name", FORMATS)
def test_every_format_gives_the_same_pairs_in_one_direction_and_in_both(tmp_path, name, ending):
    content, one_way = FORMATS[name]
    end, mark = ENDINGS[ending]
    file = write(tmp_path / "a.json", mark + content.replace("\n", end))
    for directions, pairs in ((one_way, PAIRS), (["de-en", "en-de"], PAIRS + BACK)):
        rows = read_rows([str(file)], directions)
        assert [row.id for row in rows] == [*range(len(pairs))]
        found = [{field: getattr(row, field) for field in PAIRS[0]} for row in rows]
        assert sorted(found, key=str) == sorted(pairs, key=str)


def test_each_row_knows_its_line(tmp_path):
    pair = json.dumps(PAIRS[0])
    file = write(tmp_path / "a.json", f"[\n{pair},\n\n{pair}, {pair}\n,{pair}]")
    lines = [row.where.removeprefix(f"{file}:") for row in read_rows([str(file)])]
    assert lines == ["2", "4", "4", "5"]
    file = write(tmp_path / "b.json", "\n" + json.dumps(ALMA, indent=2))
    rows = read_rows([str(file)], ["de-en"])
    assert [row.where for row in rows[:3]] == [f"{file}:{line}" for line in (3, 9, 15)]
    file = write(tmp_path / "c.json", f"\n{pair}\n\n {pair}\n")
    assert [row.where for row in read_rows([str(file)])] == [f"{file}:2", f"{file}:4"]


ANSWERED = [*ASKED, said("assistant", "So.")]
TALK = [said("system", ""), *ANSWERED, said("user", "How?"), said("assistant", "Thus.")]
CONVERSATIONS = {
    # row -> the conversation before the answer, and the answer
    "prompt and response": ({"prompt": "Why?", "response": "So."}, ASKED, "So."),
    "messages": ({"messages": ANSWERED}, ASKED, "So."),
    "several turns and an empty system prompt": ({"messages": TALK}, TALK[:-1], "Thus."),
    "messages of somebody": ({"messages": ANSWERED, "source": "web"}, ASKED, "So."),
    "messages and their prompt": ({"messages": ANSWERED, "prompt": "Why?"}, ASKED, "So."),
    "null messages": ({"prompt": "Why?", "response": "So.", "messages": None}, ASKED, "So."),
}


@parametrize("name", CONVERSATIONS)
def test_a_conversation_has_an_answer_and_no_direction(name, rows_of):
    fields, messages, answer = CONVERSATIONS[name]
    for directions in ([], ["de-en", "en-de"]):
        [row] = rows_of([fields], directions)
        assert row.messages == messages
        assert row.reference == answer
        assert row.source is row.source_lang is None


PROMPTS = {
    "a prompt": {"prompt": "Why?"},
    "a prompt of somebody": {"prompt": "Why?", "source": "web", "reference": None},
    "a prompt and turns of somebody": {"prompt": "Why?", "turns": ["x"]},
    "FastChat's": {"question_id": 81, "turns": ["Why?", "And?"], "reference": ["x"]},
    "messages": {"messages": ASKED},
}


@parametrize("name", PROMPTS)
def test_a_prompt_alone_is_read_where_prompts_are_asked_for(tmp_path, name, rows_of):
    [row] = rows_of([PROMPTS[name]], prompts=True)
    assert row.messages == ASKED
    assert row.reference == ""
    assert row.id == PROMPTS[name].get("question_id", 0)
    fault = fault_at(f"{tmp_path}/rows.jsonl:1", rows_of, [PROMPTS[name]])
    assert fault.startswith("the row has no answer")


def test_a_row_without_id_gets_its_place_in_the_data(tmp_path):
    files = []
    for name in ("a", "b"):
        rows = [PAIRS[0], PAIRS[1] | {"id": name}, PAIRS[2] | {"id": None}]
        files.append(str(write_jsonl(tmp_path / name, rows)))
    assert [row.id for row in read_rows(files)] == [0, "a", 2, 3, "b", 5]


def test_a_row_that_is_read_in_two_directions_has_two_ids(rows_of):
    rows = [PAIRS[0] | {"id": 7}, PAIRS[1] | {"id": "x"}, PAIRS[2]]
    ids = [row.id for row in rows_of(rows, ["de-en", "en-de"])]
    assert ids == [7, "x", 2, "7 en-de", "x en-de", 5]
    assert len(rows_of(rows, ["de-en", "de-en"])) == 3


@parametrize("array", [False, True])
@parametrize("ids", [(7, 7), ("a", "a"), (None, 0), (1.0, 1.0)])
def test_a_duplicate_id_is_refused_by_line(tmp_path, ids, array):
    rows = [PAIRS[0] | {"id": ids[0]}, PAIRS[1], PAIRS[2] | {"id": ids[1]}]
    content = ",\n".join(map(json.dumps, rows)) if array else lines_of(rows)
    file = write(tmp_path / "a.json", f"[{content}]" if array else content)
    fault = fault_of(read_rows, [str(file)])
    if ids[0] == 1.0:
        assert fault == f'{file}:1: "id" must be a whole number or a text'
    else:
        assert fault == f"{file}:3: duplicate id {ids[1]!r} in {file}"


def test_a_number_and_a_text_are_two_ids(rows_of):
    rows = [PAIRS[0] | {"id": 7}, PAIRS[1] | {"id": "7"}]
    assert [row.id for row in rows_of(rows)] == [7, "7"]


BAD_FIELDS = {
    # fields that replace those of a pair -> what the message names
    "no source": ({"source": None}, "a row needs"),
    "no reference": ({"reference": None}, '"reference" is missing'),
    "a blank source": ({"source": "\u3000\n"}, '"source" is empty'),
    "half a surrogate pair": ({"source": "\ud800x"}, "ud800"),
    "an id that is a fraction": ({"id": 1.5}, '"id" must be'),
    "an id that is true": ({"id": True}, '"id" must be'),
    "an unknown language": ({"source_lang": "xx"}, "two languages"),
    "a language by its name": ({"source_lang": "German"}, "two languages"),
    "one language twice": ({"source_lang": "en"}, "two languages"),
    "a rationale that is a number": ({"rationale": 7}, '"rationale" must be text'),
}


@parametrize("name", BAD_FIELDS)
def test_a_bad_field_of_a_pair_is_refused_by_line(tmp_path, name):
    fields, words = BAD_FIELDS[name]
    rows = [PAIRS[0], PAIRS[1] | fields]
    file = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    fault = fault_at(f"{file}:2", read_rows, [str(file)])
    assert words in fault


BAD_ROWS = {
    "a list": ([1], "a row must be a JSON object"),
    "two users": ({"messages": ASKED * 2 + ANSWERED[1:]}, "roles must be user, assistant"),
    "only a system prompt": ({"messages": [said("system", "x")]}, "no answer"),
    "a tool": ({"messages": [*ASKED, said("tool", "x"), *ANSWERED]}, "roles must be"),
    "no turn": ({"messages": []}, "no answer"),
    "messages that are text": ({"messages": "Why?"}, '"messages" must be a list'),
    "a role that is a list": ({"messages": [said([1], "Why?")]}, '"role" must be text'),
    "content in parts": (
        {"messages": [said("user", [{"type": "text", "text": "Why?"}])]},
        '"content" must be text',
    ),
    "an answer that is a number": ({"messages": [*ASKED, said("assistant", 7)]}, '"content"'),
    "a blank answer": ({"messages": [*ASKED, said("assistant", " ")]}, '"content" is empty'),
    "turns that are text": ({"turns": "Why?"}, '"turns" must be a list'),
    "no turns": ({"turns": []}, '"prompt" is missing'),
    "a null prompt": ({"prompt": None, "response": "x"}, '"prompt" is missing'),
    "a blank response": ({"prompt": "Why?", "response": " "}, '"response" is empty'),
    "a pair without languages": (BARE[0], "two languages are needed, such as --direction de-en"),
    "a two-way row": (ALMA[0], "choose --direction, such as de-en"),
    "a translation that is text": ({"translation": "Tor"}, '"translation" must be an object'),
}
FOREIGN_ROWS = {
    "ARC": {"question": "Why?", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"},
    "GSM8K": {"question": "Why?", "answer": "So. #### 42"},
    "Alpaca": {"instruction": "Why?", "input": "", "output": "So."},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Why?"}]},
}


@parametrize("name", BAD_ROWS)
def test_a_bad_row_is_refused_by_line(tmp_path, name):
    fields, words = BAD_ROWS[name]
    file = write(tmp_path / "a.jsonl", json.dumps(fields) + "\n")
    fault = fault_at(f"{file}:1", read_rows, [str(file)])
    assert words in fault


@parametrize("name", FOREIGN_ROWS)
def test_a_row_of_another_format_is_refused_by_the_names_of_its_fields(tmp_path, name, rows_of):
    fault = fault_at(f"{tmp_path}/rows.jsonl:1", rows_of, [FOREIGN_ROWS[name]])
    assert fault.startswith("a row needs translation, source and")
    for field in FOREIGN_ROWS[name]:
        assert f'"{field}"' in fault


BAD_LEDGERS = {
    "an id that is negative": ({"prompt_ids": [5, -1]}, "-1"),
    "an id that is true": ({"rationale_ids": [True]}, "true"),
    "an id beyond any vocabulary": ({"reference_ids": [2**31]}, "2147483648"),
    "ids that are text": ({"rationale_ids": "5"}, '"rationale_ids" must be a list'),
    "no prompt": ({"prompt_ids": []}, '"prompt_ids" is empty'),
    "another finish": ({"finish": "stop"}, '"finish" must be eos or length'),
    "another status": ({"status": "copy"}, '"status" must be ok or empty or repetitive'),
    "a template that is a list": ({"template": []}, '"template" must be text'),
}


@parametrize("name", BAD_LEDGERS)
def test_a_bad_field_of_a_ledger_row_is_refused_by_line(tmp_path, name, rows_of, ledger_of):
    fields, words = BAD_LEDGERS[name]
    rows = ledger_of()
    rows[1] |= fields
    fault = fault_at(f"{tmp_path}/rows.jsonl:2", rows_of, rows)
    assert words in fault


GOOD = json.dumps(PAIRS[0])
PRETTY = json.dumps(PAIRS[0], indent=1)
BAD_FILES = {
    # content -> line and what is wrong
    "empty": ("", "", "the file is empty"),
    "blank": (" \n \n", "", "the file is empty"),
    "an array of nothing": ("[]", "", "the file holds no rows"),
    "a broken line": (f"{GOOD}\n\n{{1}}", ":3", "not valid JSON"),
    "a broken array": (f"[{GOOD}\n,{GOOD}\n,{{1}}]", ":3", "not valid JSON"),
    "half an array": (f"[{GOOD}\n,{GOOD}\n,", ":3", "not valid JSON"),
    "no comma": (f"[{GOOD}\n{GOOD}]", ":2", "not valid JSON"),
    "two arrays": (f"[{GOOD}]\n[{GOOD}]", ":2", "not valid JSON"),
    "a pretty-printed object": (PRETTY, ":1", "one JSON object on one line"),
    "one after a good line": (f"{GOOD}\n{PRETTY}", ":2", "one JSON object on one line"),
    "one that begins at once": (PRETTY.replace("{\n", "{"), ":1", "one JSON object on one line"),
    "Latin-1": (GOOD.encode() + b"\n\xfc", ":2", "not UTF-8"),
    "UTF-16": (GOOD.encode("utf-16"), ":1", "not UTF-8"),
    "a number of 5,000 digits": ('{"id": ' + "9" * 5000 + "}", ":1", "not valid JSON"),
    "a line 100,000 deep": (
        f'{GOOD}\n{{"x": ' + "[" * 10**5 + "]" * 10**5 + "}",
        ":2",
        "not valid JSON",
    ),
    "an array 100,000 deep": ("[" * 10**5 + "]" * 10**5, ":1", "not valid JSON"),
}


@parametrize("name", BAD_FILES)
def test_a_broken_file_is_refused_by_line(tmp_path, name):
    content, line, words = BAD_FILES[name]
    file = write(tmp_path / "a.json", content)
    fault = fault_at(f"{file}{line}", read_rows, [str(file)])
    assert words in fault


def test_a_file_that_is_missing_or_a_folder_is_refused_by_name(tmp_path):
    for file in (tmp_path / "absent.jsonl", tmp_path):
        assert fault_of(read_rows, [str(file)]).startswith(f"{file}: ")


DIRECTIONS = {
    # --direction, rows -> what the message names
    "another language": (["fr-en"], ALMA, "a.jsonl:1: --direction fr-en needs both"),
    "another target": (["de-fr"], ALMA, "a.jsonl:1: --direction de-fr needs both"),
    "no language": (["xx-de"], PAIRS, "--direction: two languages"),
    "three": (["de-en-fr"], PAIRS, "--direction: two languages"),
    "one twice": (["de-de"], PAIRS, "--direction: two languages"),
    "a blank text": (["de-en"], [{"translation": {"de": " ", "en": "x"}}], '"de" is empty'),
    "a text that is a number": (["de-en"], [{"translation": {"de": "x", "en": 3}}], '"en" must'),
    "a rationale for both": (["de-en", "en-de"], [PAIRS[0] | {"rationale": WHY}], "a rationale"),
}


@parametrize("name", DIRECTIONS)
def test_a_direction_that_the_rows_do_not_have_is_refused(tmp_path, name):
    directions, rows, words = DIRECTIONS[name]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    assert words in fault_of(read_rows, [str(file)], directions)


def test_a_two_way_row_may_have_a_rationale_for_one_direction(rows_of):
    [row] = rows_of([ALMA[0] | {"rationale": WHY}], ["de-en"])
    assert row.rationale == WHY
    assert row.reference == LINES[0]


def test_a_ledger_has_one_direction(tmp_path, rows_of, ledger_of):
    ledger = ledger_of()
    assert rows_of(ledger, ["de-en"]) == rows_of(ledger)
    for directions in (["en-de"], ["de-en", "en-de"]):
        fault_at(f"{tmp_path}/rows.jsonl:1", rows_of, ledger, directions)


def test_a_template_names_the_source_and_may_name_the_languages(tokenizer, tmp_path, rows_of):
    [row] = rows_of(PAIRS[:1])
    file = write(tmp_path / "t.txt", "{source_lang}: {source}\n{target_lang}:\n")
    for template in (str(file), "{source_lang}: {source}\\n{target_lang}:"):
        [message] = Encoder(tokenizer, read_template(template)).messages(row)
        assert message == said("user", f"German: {LINES[1]}\nEnglish:")
    for template in ("{source} {text}", "Translate it.", "{source} {target lang}", "absent.txt"):
        assert fault_of(read_template, template).startswith(f"--template {template}: ")
    assert read_template(None) is None


def test_braces_in_a_source_are_text(tokenizer, rows_of):
    source = "{target_lang} {source} {x} {"
    [row] = rows_of([PAIRS[0] | {"source": source}])
    [message] = Encoder(tokenizer, "{source}").messages(row)
    assert message["content"] == source


# 8. Folders that a run owns

SETTINGS = {"program": "RaDis", "seed": 1, "model": "m"}


def claim_of(folder: Path, **settings):
    """Claims a folder as train.py does. One setting is newer than the others."""
    start_processes()
    values = {"seed": 1, "model": "m", "limit": None} | settings
    return claim(folder, "args.json", values, defaults={"limit": None})


def contents_of(folder: Path) -> dict:
    """Everything below a folder: the text of files, the target of links."""
    contents = {}
    for path in sorted(folder.rglob("*")):
        content = path.stat(follow_symlinks=False).st_mode
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = path.read_bytes()
        contents[str(path.relative_to(folder))] = content
    return contents


def refusal_of(folder: Path, **settings) -> str:
    """The error of a claim that must change nothing."""
    before = contents_of(folder.parent)
    fault = fault_of(claim_of(folder, **settings).__enter__)
    assert contents_of(folder.parent) == before
    return fault


def test_a_run_creates_its_folder_and_knows_it_again(tmp_path):
    folder = tmp_path / "a/b"
    with claim_of(folder) as known:
        assert not known
        assert json.loads((folder / "args.json").read_text()) == SETTINGS | {"limit": None}
        write(folder / "metrics.jsonl", "1\n")
    assert sorted(contents_of(folder)) == ["args.json", "metrics.jsonl"]
    with claim_of(folder) as known:
        assert known
    assert (folder / "metrics.jsonl").read_text() == "1\n"


def test_an_empty_folder_may_be_taken(tmp_path):
    start_processes()
    for before in (False, True):
        with claim(tmp_path, "args.json", {"seed": 1}) as known:
            assert known == before


def test_a_folder_is_free_again_after_a_run_that_failed(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(KeyError), claim_of(folder):
        raise KeyError("a bug")
    with claim_of(folder) as known:
        assert known


def test_a_folder_of_somebody_else_is_refused(tmp_path):
    contents = {
        "a file": {"thesis.txt": "mine"},
        "a hidden file": {".git/config": "mine"},
        "settings of another program": {"args.json": {"seed": 1}},
        "broken settings": {"args.json": "{"},
        "deep settings": {"args.json": "[" * 10**5},
        "settings of another script": {"settings.json": SETTINGS},
        "a lock with a text": {".lock": "mine"},
        "a temporary file": {"args.json.tmp": {"seed": 1}},
        "a lock in our folder": {"args.json": SETTINGS, ".lock": "mine"},
        "a temporary file in our folder": {"args.json": SETTINGS, "args.json.tmp": "mine"},
    }
    for name, files in contents.items():
        for file, content in files.items():
            write(tmp_path / name / file, content)
        fault = refusal_of(tmp_path / name)
        assert fault.startswith(f"{tmp_path / name}"), name
        assert "choose another --out" in fault


def test_a_file_is_no_folder_and_nothing_below_a_file_is(tmp_path):
    write(tmp_path / "a.txt", "mine")
    assert "is not a folder" in refusal_of(tmp_path / "a.txt")
    with pytest.raises(OSError, match=r"a\.txt"):
        claim_of(tmp_path / "a.txt/run").__enter__()


LINKS = ["args.json", "args.json.tmp", ".lock"]


@parametrize("name", LINKS)
@parametrize("own", [False, True])
def test_nothing_is_opened_through_a_link(tmp_path, name, own):
    folder = tmp_path / "run"
    folder.mkdir()
    write(tmp_path / "victim", SETTINGS)
    if own and name != "args.json":
        write(folder / "args.json", SETTINGS)
    write(tmp_path / "empty", "")
    for target in ("../victim", "../empty", "../nowhere"):
        (folder / name).symlink_to(target)
        refusal_of(folder)
        (folder / name).unlink()


@parametrize("name", LINKS)
def test_a_pipe_or_a_folder_of_the_name_is_refused_and_not_waited_for(tmp_path, name):
    for make in (os.mkfifo, os.mkdir):
        folder = tmp_path / make.__name__
        folder.mkdir()
        make(folder / name)
        refusal_of(folder)


def test_the_folder_of_a_run_that_was_killed_early_is_taken(tmp_path):
    begun = json.dumps(SETTINGS, indent=2)
    for length in (0, 5, 30, len(begun)):
        folder = tmp_path / f"run {length}"
        write(folder / ".lock", "")
        write(folder / "args.json.tmp", begun[:length])
        with claim_of(folder) as known:
            assert not known
        assert sorted(contents_of(folder)) == ["args.json"]


def test_settings_that_changed_are_refused_by_name_and_free_ones_may_change(tmp_path):
    write(tmp_path / "run/args.json", SETTINGS)
    fault = refusal_of(tmp_path / "run", seed=2)
    assert fault.startswith(f"{tmp_path}/run/args.json: seed was 1, now 2")
    with claim_of(tmp_path / "run", model="moved") as known:
        assert known
    assert json.loads((tmp_path / "run/args.json").read_text()) == SETTINGS


def test_a_setting_that_an_older_file_lacks_was_the_default(tmp_path):
    write(tmp_path / "run/args.json", SETTINGS)
    with claim_of(tmp_path / "run") as known:
        assert known
    assert "limit was null, now 5" in refusal_of(tmp_path / "run", limit=5)
    write(tmp_path / "run/args.json", SETTINGS | {"limit": 5, "unknown": 1})
    with claim_of(tmp_path / "run", limit=5) as known:
        assert known


def hold(lock, holding, release):
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        holding.set()
        release.wait(30)


def test_a_folder_that_another_process_holds_is_refused_until_it_ends(tmp_path):
    lock = write(tmp_path / "run/.lock", "")
    write(tmp_path / "run/args.json", SETTINGS)
    context = multiprocessing.get_context("fork")
    holding = context.Event()
    release = context.Event()
    other = context.Process(target=hold, args=(lock, holding, release))
    other.start()
    assert holding.wait(30)
    assert "another process" in refusal_of(tmp_path / "run")
    release.set()
    other.join(30)
    with claim_of(tmp_path / "run") as known:
        assert known


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    write(tmp_path / "run/args.json", SETTINGS)
    monkeypatch.setattr(fcntl, "flock", refuse)
    fault = refusal_of(tmp_path / "run")
    assert fault.startswith(f"{tmp_path}/run: its file system has no locks")
    assert "No locks available" in fault


def test_a_number_that_is_not_finite_is_not_written():
    assert data.finite_json({"a": "ä", "b": 1.5}, "x") == '{"a": "ä", "b": 1.5}'
    for number in (float("nan"), float("inf")):
        assert fault_of(data.finite_json, {"a": [number]}, "step 3").startswith("step 3: ")


# 9. Options

OPTIONS = """
--name! NAME           the name
--file FILE...         files
--count COUNT=3        a count
--place N=0            a place
--rate NUMBER=0.5      a rate
--share SHARE=1        a share
--top-p P=1            a probability
--text TEXT            a text
--kind plain|fancy     a kind
--fast                 a switch
"""
GIVEN = {
    # options -> name and value, of the attribute
    "no file": ([], ("file", [])),
    "repeated": (["--file", "a", "b", "--file", "c"], ("file", ["a", "b", "c"])),
    "a default": ([], ("count", 3)),
    "zero": (["--place", "0"], ("place", 0)),
    "a bound": (["--share", "0"], ("share", 0.0)),
    "a small probability": (["--top-p", "1e-9"], ("top_p", 1e-9)),
    "an empty text": (["--text", ""], ("text", "")),
    "a text of two lines": (["--text", "a\\nb\\tc"], ("text", "a\nb\tc")),
    "no text": ([], ("text", None)),
    "the first choice": ([], ("kind", "plain")),
    "no switch": ([], ("fast", False)),
    "the type of weights on a CPU": ([], ("dtype", "float32")),
}


@parametrize("name", GIVEN)
def test_options_are_parsed_by_the_table(name):
    words, (attribute, value) = GIVEN[name]
    args = make_parser("What it does.", OPTIONS).parse_args(["--name", "x", *words])
    assert getattr(args, attribute) == value
    assert type(getattr(args, attribute)) is type(value)


BAD_OPTIONS = {
    # options -> what the line names
    "": "--name",
    "--name x --color": "--color",
    "--name x --kind odd": "argument --kind: ",
    "--name x --count 0": "argument --count: 0 is out of range, from 1 to",
    "--name x --place -1": "argument --place: ",
    "--name x --place 1000000000000": "argument --place: ",
    "--name x --place 1e3": "argument --place: invalid int value",
    "--name x --rate nan": "argument --rate: ",
    "--name x --rate inf": "argument --rate: ",
    "--name x --share 1.1": "argument --share: 1.1 is out of range, from 0 to 1",
    "--name x --top-p 0": "argument --top-p: 0 is out of range, above 0 to 1",
    "--name x --text \udcff": "argument --text: ",
    "--name x --file": "argument --file: ",
}


@parametrize("words", BAD_OPTIONS)
def test_a_bad_option_is_one_line_that_names_it(capsys, words):
    with pytest.raises(SystemExit) as ended:
        make_parser("What it does.", OPTIONS).parse_args(words.split())
    assert ended.value.code == 2
    [line, end] = capsys.readouterr().err.split("\n")
    assert line.startswith("error: ")
    assert BAD_OPTIONS[words] in line
    assert end == ""


def test_help_explains_each_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        make_parser("What it does.", OPTIONS).parse_args(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "What it does." in text
    for line in (
        "--count COUNT a count (default 3)",
        "--kind {plain,fancy} a kind (default plain)",
    ):
        assert line in text
    assert "--file FILE [FILE ...] files --count" in text


# 10. How a script ends


def outcome_of(main, **environment) -> tuple[int, str]:
    """Exit status and stderr of a script, which runs in another process."""

    def run():
        os.dup2(writing, 2)
        sys.stderr = open(2, "w", encoding="ascii", errors="strict")
        os.environ.update(environment)
        sys.argv[1:] = []
        data.cli(main, make_parser("", ""))

    reading, writing = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    os.close(writing)
    with open(reading, encoding="ascii") as pipe:
        printed = pipe.read()
    process.join(30)
    return process.exitcode, printed


def raising(error):
    def main(args):
        raise error

    return main


LINE = {
    # what main raises -> the line
    "a mistake": (UserError("a.jsonl:3: no row"), "a.jsonl:3: no row"),
    "a mistake of two lines": (UserError("x: first\nsecond"), "x: first second"),
    "Latin-1 in a path": (UserError("\udcfc.jsonl: no row"), "\\udcfc.jsonl: no row"),
    "letters beyond ASCII": (UserError("ü: no row"), "\\xfc: no row"),
    "no space": (
        OSError(errno.ENOSPC, "No space left on device", "x.json"),
        "[Errno 28] No space left on device: 'x.json'",
    ),
    "no memory": (MemoryError(), "out of memory (); lower --micro-batch-size or --batch-size"),
    "no memory for torch": (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes\nmore"),
        "out of memory ([enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes); "
        "lower --micro-batch-size or --batch-size",
    ),
    "no memory on the GPU": (
        torch.OutOfMemoryError("CUDA out of memory."),
        "out of memory (CUDA out of memory.); lower --micro-batch-size or --batch-size",
    ),
    "a lost rank": (
        dist.DistNetworkError("Connection closed by peer"),
        "lost another rank; its own message says why (Connection closed by peer)",
    ),
    "a rank that gloo lost": (
        RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer\nmore"),
        "lost another rank; its own message says why "
        "([../gloo/transport/tcp/pair.cc:534] Connection closed by peer)",
    ),
}


@parametrize("name", LINE)
def test_a_mistake_of_the_user_is_one_line_with_status_2(name):
    error, line = LINE[name]
    assert outcome_of(raising(error)) == (2, f"error: {line}\n")


def test_another_rank_says_which_it_is(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    mistake = raising(UserError("x: y"))
    assert outcome_of(mistake, RANK="3") == (2, "error: rank 3: x: y\n")


@parametrize("kind", [ValueError, KeyError, TypeError, RuntimeError, RecursionError])
def test_a_bug_keeps_its_traceback(kind):
    status, printed = outcome_of(raising(kind("of our own code")))
    assert status == 1
    assert "Traceback (most recent call last)" in printed
    assert f"{kind.__name__}: " in printed
    assert "of our own code" in printed


def test_a_script_that_ends_well_has_status_0():
    assert outcome_of(lambda args: None) == (0, "")


@parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_script_without_a_word(number):
    def main(args):
        os.kill(os.getpid(), number)
        time.sleep(30)

    assert outcome_of(main) == (128 + number, "")


@parametrize("lines", [1, 100_000])
def test_a_closed_pipe_ends_a_script_without_a_word(lines):
    def main(args):
        reading, writing = os.pipe()
        os.close(reading)
        sys.stdout = open(writing, "w")
        print("a line\n" * lines)

    assert outcome_of(main) == (141, "")


SENT_SIGINT = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"


@parametrize("name", ["data", "generate", "train", "evaluate"])
def test_ctrl_c_while_torch_is_imported_ends_a_script_without_a_word(tmp_path, name):
    write(tmp_path / "torch.py", SENT_SIGINT)  # is imported instead of torch
    script = Path(data.__file__).with_name(f"{name}.py")
    variables = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, script], env=variables, capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGINT
    assert done.stdout == done.stderr == b""


def test_the_script_itself_ends_with_status_2_and_one_line_on_an_ascii_terminal(folder, tmp_path):
    file = os.fsencode(tmp_path) + b"/\xfc.jsonl"  # Latin-1
    Path(os.fsdecode(file)).write_text(f"{GOOD}\n{{}}\n")
    ascii_terminal = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, data.__file__, "--model", folder, "--data", file]
    done = subprocess.run(command, capture_output=True, env=os.environ | ascii_terminal)
    assert done.returncode == 2
    assert done.stdout == b""
    [line, end] = done.stderr.decode("ascii").split("\n")
    assert line.startswith(f"error: {tmp_path}/\\udcfc.jsonl:2: ")
    assert end == ""


# 11. The command


def output_of(capsys, *words) -> str:
    """What data.py prints."""
    data.main(data.parser().parse_args([str(word) for word in words]))
    return capsys.readouterr().out


def test_the_command_counts_rows_and_tokens(folder, tmp_path, capsys, examples_of):
    file = write_jsonl(tmp_path / "a.jsonl", PAIRS)
    examples = examples_of(PAIRS)
    longest = max(map(len, examples))
    limit = ["--max-length", longest - 1]
    printed = output_of(capsys, "--model", folder, "--data", file, *limit)
    at_limit = sum(len(example) == longest for example in examples)
    assert f"7 rows, {at_limit} of them longer than {longest - 1} tokens\n" in printed
    for name in ("prompt", "reference"):
        n = sorted(len(getattr(example, name)) for example in examples)
        assert f"{name}: {sum(n)} tokens, median {n[3]}, longest {n[-1]}\n" in printed
    assert "rationale: 0 tokens" in printed
    assert "status" not in printed


def test_the_command_shows_an_example_in_color(
    folder, tokenizer, tmp_path, capsys, monkeypatch, examples_of
):
    rows = [pair | {"rationale": WHY, "id": f"row {i}"} for i, pair in enumerate(PAIRS)]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    given = ["--model", folder, "--data", file]
    printed = output_of(capsys, *given, "--show", 2)
    assert "row row 2" in printed
    [prompt, reference, rationale] = re.findall("\033\\[(?:90|32|34)m(.*)\033\\[0m", printed)
    example = examples_of(rows)[2]
    for shown, ids in (
        (prompt, example.prompt),
        (reference, example.reference),
        (rationale, example.rationale),
    ):
        assert shown == "".join(tokenizer.sp.id_to_piece(ids))
    assert "row row 6" in output_of(capsys, *given, "--show", 99)  # the last
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert "\033" not in output_of(capsys, *given)


def test_the_command_counts_statuses_and_openings_of_a_ledger(folder, tmp_path, capsys, ledger_of):
    rows = ledger_of()[:3]
    rows[1] |= REPETITIVE | {"rationale": "A B C D E", "rationale_ids": [5]}
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    printed = output_of(capsys, "--model", folder, "--data", file)
    assert "     2 rationales of status ok\n" in printed
    assert "     1 rationales of status repetitive\n" in printed
    assert "     2 rationales begin: The wind turns.\n" in printed
    assert "     1 rationales begin: A B C D\n" in printed


def test_the_command_takes_the_options_of_a_prompt(folder, tmp_path, capsys):
    file = write_jsonl(tmp_path / "a.jsonl", PAIRS)
    template = ["--template", "To {target_lang}: {source}"]
    options = ["--direction", "en-de", "--chat", "plain", "--system", BRIEF, *template]
    printed = output_of(capsys, "--model", folder, "--data", file, *options)
    shown = printed.replace("▁", " ").replace("<0x3A>", ":").replace("<0x0A>", "\n")
    assert f"{BRIEF}\n\nTo German: {LINES[0]}" in shown


def test_a_mistake_on_the_command_line_is_one_line(folder, tmp_path, monkeypatch, capsys):
    file = write_jsonl(tmp_path / "a.jsonl", PAIRS)
    given = ["--model", folder, "--data", file]
    for words, fault in (
        (["--model", tmp_path / "absent"], f"{tmp_path}/absent/tokenizer.model: "),
        (["--direction", "fr-en"], f"{file}:1: "),
        (["--chat", "chatlm"], "--chat chatlm: "),
        (["--template", "x"], "--template x: "),
        (["--system", "\udcff"], "argument --system: "),
        (["--data", tmp_path / "absent"], f"{tmp_path}/absent: "),
    ):
        line = error_of(data, [*given, *words], monkeypatch, capsys)
        assert line.startswith(f"error: {fault}")


# 12. Whatever a file holds: one line, or no harm

BROKEN_FILES = {
    # file, content -> what the message names after the file
    "no vocabulary": ("tokenizer.model", None, ": missing or empty"),
    "an empty vocabulary": ("tokenizer.model", "", ": missing or empty"),
    "text as vocabulary": ("tokenizer.model", "aGVsbG8= 1\n", ": not a SentencePiece model"),
    "broken JSON": ("tokenizer_config.json", '{\n"a": }', ":2: not valid JSON"),
    "half a file": ("generation_config.json", "{", ":1: not valid JSON"),
    "a list": ("tokenizer_config.json", [], ": must hold a JSON object"),
    "added tokens in a list": ("added_tokens.json", ["<a>"], ": must hold a JSON object"),
    "a template in Latin-1": ("chat_template.jinja", b"x\n\xfc", ":2: byte 0xfc is not UTF-8"),
    "an empty template": ("chat_template.jinja", "", ": the file is empty"),
    "an EOS that is text": ("generation_config.json", {"eos_token_id": "x"}, ": "),
    "an EOS of -1": ("config.json", {"eos_token_id": [2, -1]}, ": "),
}


@parametrize("name", BROKEN_FILES)
def test_a_broken_tokenizer_file_is_refused_by_name(tmp_path, name):
    file, content, words = BROKEN_FILES[name]
    folder = make_folder(tmp_path)
    if content is None:
        (folder / file).unlink()
    else:
        write(folder / file, content)
    assert fault_of(Tokenizer, folder).startswith(f"{folder}/{file}{words}")


ODD_FIELDS = {
    "tokenizer_config.json": [
        *("bos_token", "eos_token", "pad_token", "chat_template", "added_tokens_decoder"),
        *("legacy", "add_prefix_space", "add_bos_token", "additional_special_tokens"),
        *("extra_special_tokens", "model_specific_special_tokens", "x_token"),
    ],
    "special_tokens_map.json": ["eos_token", "additional_special_tokens"],
    "added_tokens.json": ["<new>", END],
    "tokenizer.json": ["added_tokens", "post_processor", "model"],
    "generation_config.json": ["eos_token_id"],
    "config.json": ["eos_token_id"],
}
ODD_SHAPES = [
    *("{}", "[{}]", '{{"content": {}}}', '{{"480": {{"content": {}}}}}', '[{{"id": {}}}]'),
    *('{{"vocab": {}}}', '{{"vocab": {{"a": {}}}}}'),
]


@parametrize("file", ODD_FIELDS)
def test_an_odd_value_in_a_tokenizer_file_is_one_line_or_does_no_harm(
    tmp_path, monkeypatch, capsys, file
):
    pairs = write_jsonl(tmp_path / "pairs.jsonl", PAIRS[:1])
    folder = make_folder(tmp_path / "folder")
    start = f'"chat_template": {json.dumps(CHATML)}, ' if file == "tokenizer_config.json" else ""
    refused = []
    cases = [*itertools.product(ODD_FIELDS[file], ODD_SHAPES, ODD.values())]
    for field, shape, odd in random.Random(0).sample(cases, min(len(cases), 300)):
        write(folder / file, f'{{{start}"{field}": {shape.format(odd)}}}')
        given = ["--model", folder, "--data", pairs]
        refused.append(last_line(data, given, monkeypatch, capsys))
    assert len(set(refused)) > 1
    for line in filter(None, refused):
        assert str(folder) in line


@parametrize("part", range(4))
def test_an_odd_row_is_one_line_with_its_place_or_does_no_harm(
    folder, tokenizer, tmp_path, monkeypatch, capsys, part
):
    file = tmp_path / "odd.jsonl"
    refused = 0
    for seed in range(100 * part, 100 * (part + 1)):
        write(file, f"{GOOD}\n{odd_row(seed, seed % 2 * tokenizer.hash)}\n")
        line = last_line(data, ["--model", folder, "--data", file], monkeypatch, capsys)
        if line:
            assert line.startswith(f"error: {file}:2: ")
            refused += 1
    assert 0 < refused < 100


def test_a_file_with_odd_bytes_is_one_line_or_does_no_harm(tmp_path):
    content = lines_of(PAIRS[:2]).encode()
    r = random.Random(0)
    refused = 0
    for _ in range(300):
        odd = bytearray(content)
        for _ in range(r.randint(1, 3)):
            odd[r.randrange(len(odd))] = r.choice(b'\0\n"{}[]\\,:0\x80\xff')
        file = write(tmp_path / "a.jsonl", bytes(odd))
        try:
            rows = read_rows([str(file)])
        except UserError as e:
            assert re.match(rf"{file}(:[123])?: ", str(e))
            refused += 1
        else:
            assert len(rows) <= 2
    assert 0 < refused < 300
