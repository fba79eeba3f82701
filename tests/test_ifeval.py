"""experiments/ifeval.py: what follows an instruction, and what does not."""

import json
import sys
from pathlib import Path

import pytest
from conftest import write_jsonl

from model import UserError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))
import ifeval  # noqa: E402

# kind | arguments | an answer that follows it | one that does not
CASES = r"""
capital_word_frequency | {"capital_relation": "at least", "capital_frequency": 2} | A NASA | I'm
two_responses | {} | Yes.\n******\nNo. | Yes.\n******\nYes.
number_placeholders | {"num_placeholders": 2} | Dear [name] of [town] | Dear [name]
postscript | {"postscript_marker": "P.S."} | Bye.\nP. S. Write! | Bye. PS
postscript | {"postscript_marker": "P.P.S"} | Bye.\np.p.s again | P.S. once
constrained_response | {} | My answer is no. Sorry. | No.
json_format | {} | ```json\n{"a": [1]}\n``` | {a: 1}
multiple_sections | {"section_spliter": "Part", "num_sections": 2} | Part 1\nPart 2 | Part 1
number_bullet_lists | {"num_bullets": 2} | * a\n- b | * a\n- b\n- c
number_highlighted_sections | {"num_highlights": 2} | *one* and **two** | *one* and ** **
title | {} | <<Rain>>\nIt fell. | << >>\nIt fell.
existence | {"keywords": ["rain", "sun"]} | Sun, then rain | Sun, then snow
forbidden_words | {"forbidden_words": ["rain"]} | a train | Rain!
frequency | {"relation": "less than", "keyword": "ha", "frequency": 3} | haha | ha ha Ha
letter_frequency | {"let_relation": "at least", "letter": "o", "let_frequency": 3} | Oo, o | otto
nth_paragraph_first_word | {"num_paragraphs":2,"nth_paragraph":2,"first_word":"b"} | a\n\nB | B\n\na
number_paragraphs | {"num_paragraphs": 2} | a\n***\nb\n*** | a\n***\n***\nb
number_sentences | {"relation": "less than", "num_sentences": 3} | Dr. No left. | One. Two. 3
number_words | {"relation": "at least", "num_words": 3} | it's it | only two
no_comma | {} | no | no, no
end_checker | {"end_phrase": "The end."} | It is "the END." | The end. Or not
quotation | {} | "All of it" | "Half" of it
repeat_prompt | {"prompt_to_repeat": "Say hi"} | say hi\nhi | hi
english_capital | {} | IT IS RAINING IN THE OLD TOWN | It is raining in the old town
english_lowercase | {} | it is raining in the old town | IT IS RAINING
response_language | {"language": "de"} | Es regnet heute in der Stadt | It rains in the town
"""
ROWS = [[cell.strip() for cell in line.split(" | ")] for line in CASES.strip().split("\n")]


def whole(kind: str) -> str:
    """The kind with the group before it, as the data has it."""
    [name] = [name for name in ifeval.CHECKS if name.endswith(f":{kind}")]
    return name


@pytest.mark.parametrize(("kind", "arguments", "right", "wrong"), ROWS)
def test_an_answer_follows_an_instruction_or_does_not(kind, arguments, right, wrong):
    if kind.startswith(("english", "response")):
        pytest.importorskip("langdetect")
    right, wrong = (text.replace(r"\n", "\n") for text in (right, wrong))
    assert ifeval.follows(whole(kind), json.loads(arguments), right) == (True, True)
    assert ifeval.follows(whole(kind), json.loads(arguments), wrong)[0] is False


def test_every_kind_has_a_case():
    assert {whole(kind) for kind, *_ in ROWS} == {*ifeval.CHECKS}


def test_loosely_an_answer_may_have_a_first_and_a_last_line_and_asterisks():
    kind = whole("quotation")
    for text in ('Sure:\n"Yes"', '"Yes"\nBye', 'Sure:\n"Yes"\nBye', '*"Yes"*'):
        assert ifeval.follows(kind, {}, text) == (False, True)
    assert ifeval.follows(kind, {}, 'Sure: "Yes"') == (False, False)
    assert ifeval.follows(whole("no_comma"), {}, " ") == (False, False)


QUESTIONS = [
    {"prompt": "a", "instruction_id_list": [whole("no_comma")], "kwargs": [{}]},
    {
        "prompt": "b",
        "instruction_id_list": [whole("title"), whole("no_comma")],
        "kwargs": [{"language": None}, {}],
    },
]


def test_scores_count_instructions_prompts_and_both_halves(tmp_path):
    file = tmp_path / "items/answers/x.jsonl"
    file.parent.mkdir(parents=True)
    write_jsonl(file, [{"prompt": "a", "output": "Yes"}])
    write_jsonl(tmp_path / "x.jsonl", QUESTIONS)
    with pytest.raises(UserError, match=r"x\.jsonl: its prompts are not those of "):
        ifeval.read_scores(tmp_path, str(tmp_path / "x.jsonl"))
    answers = [{"prompt": "a", "output": "Yes"}, {"prompt": "b", "output": "Yes, or\n<<No>>"}]
    write_jsonl(file, answers)
    scores = ifeval.read_scores(tmp_path, str(tmp_path / "x.jsonl"))
    values = {name: scores[name].values[0] for name in scores}
    assert values["ifeval_strict/all"] == pytest.approx(2 / 3)
    assert values["ifeval_strict/built"] == 1
    assert values["ifeval_strict/other"] == 0.5
    assert values["ifeval_prompt_strict/all"] == 0.5
    assert values["ifeval_loose/all"] == 1  # without the first line there is no comma
