"""What data.py does with rows, tokenizers, chat templates, folders and options.

Expected ids come from transformers, mistral-common or SentencePiece.
"""

import ast
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
    write_jsonl,
    write_tokenizer,
    write_vocabulary,
)

import data
from data import Encoder, Tokenizer, claim, collate, make_parser, read_rows, read_template, share
from model import UserError, start_processes

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


def rows_of(folder: Path, rows: list, directions=(), prompts: bool = False) -> list:
    """The rows of a file that holds `rows`."""
    file = write_jsonl(folder / "rows.jsonl", rows)
    return read_rows([str(file)], directions, prompts)


def fault_of(function, *arguments, **options) -> str:
    """The message of the UserError that a call must raise: one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


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


def ledger_of(folder: Path, tokenizer, rows=PAIRS, rationale=WHY, **options) -> list:
    """Rows as generate.py writes them, with the options template and system."""
    encoder = Encoder(tokenizer, **options)
    ledger = []
    for given, row in zip(rows, rows_of(folder, rows), strict=True):
        reference_ids = tokenizer.answer(row.reference)
        fields = {
            "id": row.id,
            "rationale": rationale,
            "prompt_ids": encoder.prompt(row),
            "reference_ids": reference_ids,
            "rationale_ids": tokenizer.continuation(row.reference, reference_ids, rationale),
            "tokenizer": tokenizer.hash,
            "finish": "eos",
            "status": "ok",
            "logprob": -1.5,
        }
        ledger.append(given | fields | options)
    return ledger


def examples_of(folder: Path, rows: list, tokenizer, **options) -> list:
    """What train.py learns from `rows`."""
    encoder = Encoder(tokenizer, **options)
    return [encoder.example(row) for row in rows_of(folder, rows)]


def example_of(folder: Path, row: dict, tokenizer, **options):
    [example] = examples_of(folder, [row], tokenizer, **options)
    return example


# 1. From a row to what is learned


def test_a_pair_becomes_prompt_reference_rationale_and_eos(tokenizer, tmp_path):
    example = example_of(tmp_path, PAIRS[0] | {"rationale": WHY}, tokenizer)
    assert spell(tokenizer, example.prompt) == PROMPT
    assert spell(tokenizer, example.reference) == LINES[0]
    assert spell(tokenizer, example.rationale) == WHY + END
    assert example.tokens == example.prompt + example.reference + example.rationale
    assert len(example) == len(example.tokens)


def test_without_a_rationale_the_reference_ends_with_eos(tokenizer, tmp_path):
    example = example_of(tmp_path, PAIRS[0], tokenizer)
    assert spell(tokenizer, example.reference) == LINES[0] + END
    assert example.rationale == []


def test_the_reference_has_the_same_ids_whatever_rationale_follows(tokenizer, tmp_path):
    alone = example_of(tmp_path, PAIRS[0], tokenizer).reference[:-1]
    for rationale in (" s", "s", ".", "\n", " It turns."):
        example = example_of(tmp_path, PAIRS[0] | {"rationale": rationale}, tokenizer)
        assert example.reference == alone
        assert spell(tokenizer, example.reference + example.rationale) == (
            LINES[0] + rationale + END
        )


def test_a_batch_predicts_exactly_reference_rationale_and_eos(tokenizer, tmp_path):
    rows = [row | {"rationale": i % 3 * WHY} for i, row in enumerate(PAIRS)]
    examples = examples_of(tmp_path, rows, tokenizer)
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


@pytest.mark.parametrize("name", ENDS)
def test_eos_ends_what_the_model_ended_and_nothing_that_was_truncated(tokenizer, tmp_path, name):
    fields, options, learned, ended = ENDS[name]
    [row, *_] = ledger_of(tmp_path, tokenizer)
    example = example_of(tmp_path, row | fields, tokenizer, **options)
    end = [tokenizer.end_id] if ended else []
    if learned:
        assert example.reference == row["reference_ids"]
        assert example.rationale == row["rationale_ids"] + end
        assert example.dropped == ""
    else:
        assert example.reference == row["reference_ids"] + end
        assert example.rationale == []


def test_an_example_says_why_its_rationale_was_dropped(tokenizer, tmp_path):
    [row, *_] = ledger_of(tmp_path, tokenizer)
    example = example_of(tmp_path, row | REPETITIVE, tokenizer, only_ok=True)
    assert "repetitive" in example.dropped
    assert "coverage" in example_of(tmp_path, row, tokenizer, coverage=0).dropped


@pytest.mark.parametrize("finish", ["eos", "length"])
@pytest.mark.parametrize("text", ["Tomatoes.", ""])
def test_an_answer_without_reference_ends_with_eos_if_the_model_ended_it(
    tokenizer, tmp_path, text, finish
):
    asked = [said("user", "What grows?")]
    ids = tokenizer.answer(text)
    [row, *_] = ledger_of(tmp_path, tokenizer)
    row = {name: row[name] for name in ("tokenizer", "status")} | {"prompt": "What grows?"}
    row |= {"rationale": text, "rationale_ids": ids, "finish": finish}
    row |= {"prompt_ids": tokenizer.chat(asked), "reference_ids": []}
    example = example_of(tmp_path, row, tokenizer)
    assert example.prompt == tokenizer.chat(asked)
    assert example.reference == []
    assert example.rationale == ids + [tokenizer.end_id] * (finish == "eos")


def test_a_larger_coverage_keeps_the_rationales_of_a_smaller_one(tokenizer, tmp_path):
    row = {"prompt": "Why?", "response": "So.", "rationale": "\nThus."}
    rows = rows_of(tmp_path, [row] * 1000)
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


def sampled_ledger(folder: Path, tokenizer) -> list:
    """A ledger whose rationales were sampled as other pieces than their text is encoded to."""
    pieces = [tokenizer.sp.piece_to_id(piece) for piece in ("<0x0A>", "b", "o", "a", "t")]
    rows = ledger_of(folder, tokenizer, rationale="\nboat")
    assert rows[0]["rationale_ids"] != pieces
    return [row | {"rationale_ids": pieces} for row in rows]


def test_a_ledger_trains_on_the_ids_that_were_sampled(tokenizer, tmp_path):
    [row, *_] = sampled_ledger(tmp_path, tokenizer)
    example = example_of(tmp_path, row, tokenizer)
    assert example.prompt == row["prompt_ids"]
    assert example.reference == row["reference_ids"]
    assert example.rationale == row["rationale_ids"] + [tokenizer.end_id]


def test_rows_of_a_ledger_may_be_moved_split_joined_and_shuffled(tokenizer, tmp_path):
    rows = sampled_ledger(tmp_path, tokenizer)
    examples = examples_of(tmp_path, rows, tokenizer)
    order = [4, 0, 6, 2]
    parts = [[rows[i] for i in order], [rows[5]]]
    files = [write_jsonl(tmp_path / f"part{i}.jsonl", part) for i, part in enumerate(parts)]
    encoder = Encoder(tokenizer)
    found = [encoder.example(row) for row in read_rows([str(file) for file in files])]
    assert found == [examples[i] for i in [*order, 5]]


def test_a_ledger_of_another_tokenizer_is_encoded_by_its_text(tokenizer, tmp_path):
    [row, *_] = sampled_ledger(tmp_path, tokenizer)
    foreign = row | {"tokenizer": "another", "prompt_ids": [7]}
    [plain] = [PAIRS[0] | {"rationale": "\nboat"}]
    example = example_of(tmp_path, foreign, tokenizer)
    assert example == example_of(tmp_path, plain, tokenizer)
    foreign |= {"prompt_ids": [10**6], "rationale_ids": [10**6]}  # of a larger vocabulary
    assert example == example_of(tmp_path, foreign, tokenizer)


def test_an_edited_text_is_encoded_and_what_was_not_edited_keeps_its_ids(tokenizer, tmp_path):
    [row, *_] = sampled_ledger(tmp_path, tokenizer)
    edited = example_of(tmp_path, row | {"rationale": "\nship"}, tokenizer)
    assert spell(tokenizer, edited.rationale) == "\nship" + END
    assert edited.prompt == row["prompt_ids"]
    assert edited.reference == row["reference_ids"]
    edited = example_of(tmp_path, row | {"reference": "The ship waits."}, tokenizer)
    assert spell(tokenizer, edited.reference) == "The ship waits."
    assert edited.rationale == row["rationale_ids"] + [tokenizer.end_id]
    edited = example_of(tmp_path, row | {"source": "Das Schiff."}, tokenizer)
    assert spell(tokenizer, edited.prompt) == PROMPT.replace(LINES[1], "Das Schiff.")
    assert edited.rationale == row["rationale_ids"] + [tokenizer.end_id]


BRIEF = "Be brief."
TO = "To {target_lang}: {source}"


@pytest.mark.parametrize("options", [{"template": TO}, {"system": BRIEF}, {"system": ""}])
def test_an_edited_source_is_asked_by_the_options_of_its_row(tokenizer, tmp_path, options):
    [row, *_] = ledger_of(tmp_path, tokenizer, **options)
    edited = example_of(tmp_path, row | {"source": "Das Schiff."}, tokenizer)
    new = example_of(tmp_path, PAIRS[0] | {"source": "Das Schiff."}, tokenizer, **options)
    assert edited.prompt == new.prompt
    assert edited.prompt != example_of(tmp_path, row, tokenizer).prompt


def test_an_edited_conversation_is_asked_as_it_is_now(tokenizer, tmp_path):
    rows = [{"messages": [said("user", "Why?"), said("assistant", "So.")]}]
    [row] = ledger_of(tmp_path, tokenizer, rows)
    assert example_of(tmp_path, row, tokenizer).prompt == row["prompt_ids"]
    asked = [said("user", "How?")]
    row["messages"] = [*asked, said("assistant", "So.")]
    assert example_of(tmp_path, row, tokenizer).prompt == tokenizer.chat(asked)


CHANGED_PROMPTS = {
    # options when the ledger was written, options now -> the option that is named, if any
    "the same template": ({"template": TO}, {"template": TO}, None),
    "the default template": ({}, {"template": data.TEMPLATE}, None),
    "another template": ({}, {"template": TO}, "--template"),
    "the default for another template": (
        {"template": TO},
        {"template": data.TEMPLATE},
        "--template",
    ),
    "the same system prompt": ({"system": BRIEF}, {"system": BRIEF}, None),
    "a new system prompt": ({}, {"system": BRIEF}, "--system"),
    "a new empty system prompt": ({}, {"system": ""}, "--system"),
    "another system prompt": ({"system": BRIEF}, {"system": ""}, "--system"),
}


@pytest.mark.parametrize("edited", [False, True], ids=["as written", "edited"])
@pytest.mark.parametrize("other", [False, True], ids=["own tokenizer", "another's"])
@pytest.mark.parametrize("name", CHANGED_PROMPTS)
def test_an_option_that_gives_another_prompt_than_the_ledger_has_is_refused(
    tokenizer, tmp_path, name, other, edited
):
    written, now, option = CHANGED_PROMPTS[name]
    rows = ledger_of(tmp_path, tokenizer, **written)
    if other:
        rows = [row | {"tokenizer": "another"} for row in rows]
    if edited:
        rows = [row | {"source": "Das Schiff."} for row in rows]
    if option is None:
        asked = [row | {"rationale": ""} for row in rows]
        plain = [{name: row[name] for name in PAIRS[0]} for row in asked]
        for old, new in zip(rows, plain):
            same = example_of(tmp_path, old, tokenizer, **now).prompt
            assert same == example_of(tmp_path, new, tokenizer, **now).prompt
    else:
        fault = fault_of(examples_of, tmp_path, rows, tokenizer, **now)
        assert fault.startswith(f"{tmp_path}/rows.jsonl:1: ")
        assert f"another {option}" in fault


def test_the_same_chat_format_by_another_name_is_accepted_and_another_is_refused(
    folder, tokenizer, tmp_path
):
    file = write(tmp_path / "chatml.jinja", CHATML)
    ledgers = [ledger_of(tmp_path, tokenizer)]
    for chat in (str(file), "chatml"):
        same = Tokenizer(folder, chat)
        assert example_of(tmp_path, ledgers[0][0], same).prompt == ledgers[0][0]["prompt_ids"]
    for chat in ("plain", "vicuna"):
        fault = fault_of(examples_of, tmp_path, ledgers[0], Tokenizer(folder, chat))
        assert fault.startswith(f"{tmp_path}/rows.jsonl:1: ")
        assert "another --chat" in fault


def test_a_prompt_that_was_made_with_chat_is_kept_without_it_and_not_made_anew(
    folder, tokenizer, tmp_path
):
    plain = Tokenizer(folder, "plain")
    [row, *_] = ledger_of(tmp_path, plain)
    row["chat"] = "plain"
    assert example_of(tmp_path, row, plain).prompt == row["prompt_ids"]
    assert example_of(tmp_path, row, tokenizer).prompt == row["prompt_ids"]
    row["source"] = "Das Schiff."
    assert spell(plain, example_of(tmp_path, row, plain).prompt).endswith("Das Schiff.\nEnglish:")
    assert "--chat" in fault_of(example_of, tmp_path, row, tokenizer)


def test_an_id_beyond_the_vocabulary_is_refused_by_row(tokenizer, tmp_path):
    rows = ledger_of(tmp_path, tokenizer)
    for name in ("prompt_ids", "reference_ids", "rationale_ids"):
        rows[1] |= {name: [5, tokenizer.vocab_size]}
        fault = fault_of(examples_of, tmp_path, rows, tokenizer)
        assert fault.startswith(f"{tmp_path}/rows.jsonl:2: token id {tokenizer.vocab_size}")
        rows[1] |= {name: [5]}


def test_a_ledger_row_without_one_of_its_fields_is_of_an_older_version(tokenizer, tmp_path):
    [row, *_] = ledger_of(tmp_path, tokenizer)
    for name in row.keys() - PAIRS[0].keys() - {"id", "logprob"}:
        fields = {field: value for field, value in row.items() if field != name}
        fault = fault_of(rows_of, tmp_path, [fields])
        assert fault.startswith(f"{tmp_path}/rows.jsonl:1: ")
        assert f'"{name}"' in fault
        assert "generate.py" in fault


def test_a_pair_may_have_fields_that_only_a_ledger_needs(tokenizer, tmp_path):
    fields = {"finish": "length", "status": "draft", "tokenizer": 3, "system": ["x"]}
    example = example_of(tmp_path, PAIRS[0] | fields, tokenizer)
    assert example == example_of(tmp_path, PAIRS[0], tokenizer)
