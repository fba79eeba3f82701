"""Instruction following: IFEval (Zhou et al. 2023), from the answers that evaluate.py has stored.

    python evaluate.py --model DIR --out results/DIR --answers ifeval.jsonl --max-new-tokens 384
    python experiments/ifeval.py --data ifeval.jsonl results/base results/vanilla results/radis

Each of the 541 prompts has one to three instructions, of 25 kinds that a program can verify. An
answer is judged as it is (strict), and also without its first line, its last line, both, and
without asterisks (loose: one of these versions has to follow the instruction).

Differences to the official program: it splits sentences and words with models of NLTK, this one
with rules; it replaces a "letter" such as # by a random one; langdetect is seeded here.
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import numpy as np  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
from model import require  # noqa: E402

SMALL = re.IGNORECASE
# the versions of an answer, without lines from the first and from the last on, that are loose
LINES = (slice(None), slice(1, None), slice(None, -1), slice(1, -1))
ABBREVIATION = re.compile(r"(\d+|[a-z]|mr|mrs|ms|dr|prof|st|vs|etc|e\.g|i\.e)\.", SMALL)
ANSWER = r"My answer is (yes|no|maybe)\."
FENCE = re.compile(r"^```(json)?|```$", SMALL)


# 1. The 25 kinds: text and arguments -> whether the instruction is followed


def satisfies(count: int, relation: str, limit: int) -> bool:
    """relation: "less than" or "at least"."""
    return count < limit if relation == "less than" else count >= limit


def is_language(text: str, language: str) -> bool:
    """Whether langdetect finds this language; a text without letters has any."""
    import langdetect

    langdetect.DetectorFactory.seed = 0
    try:
        return langdetect.detect(text) == language
    except langdetect.LangDetectException:
        return True


def count_sentences(text: str) -> int:
    """Words that end in . ! or ? (abbreviations and numbers aside), and an unfinished sentence."""
    words = text.split()
    ends = [re.search(r"[.!?]['\"”’)*\]]*$", x) and not ABBREVIATION.fullmatch(x) for x in words]
    return sum(map(bool, ends)) + bool(words and not ends[-1])


def has_paragraphs(text, num_paragraphs):
    """Paragraphs are separated by ***; only before the first and after the last may be nothing."""
    paragraphs = re.split(r"\s?\*\*\*\s?", text)
    inner = paragraphs[1:-1]
    outer = [x for x in (paragraphs[0], *paragraphs[1:][-1:]) if x.strip()]
    return all(x.strip() for x in inner) and len(inner) + len(outer) == num_paragraphs


def starts_paragraph(text, num_paragraphs, nth_paragraph, first_word):
    """Paragraphs are separated by empty lines; the nth begins with a word."""
    paragraphs = text.split("\n\n")
    count = sum(bool(x.strip()) for x in paragraphs)
    if count != num_paragraphs or nth_paragraph > count:
        return False
    words = paragraphs[nth_paragraph - 1].split()
    first = words[0].lstrip("'").lstrip('"') if words else ""
    return re.split("[.,?!'\"]", first)[0].lower() == first_word.lower()


def has_postscript(text, postscript_marker):
    pattern = r"\.\s?".join(re.findall("[a-z]", postscript_marker.lower()))
    end = r"\." if postscript_marker.endswith(".") else ""
    return re.search(pattern + end, text.lower()) is not None


def is_json(text):
    try:
        json.loads(FENCE.sub("", text.strip()).strip())
    except ValueError:
        return False
    return True


def has_highlights(text, num_highlights):
    """*one* and **two** asterisks, each with something between them."""
    single = [x for x in re.findall(r"\*[^\n*]*\*", text) if x.strip("*").strip()]
    double = [x for x in re.findall(r"\*\*([^\n*]*)\*\*", text) if x.strip()]
    return len(single) + len(double) >= num_highlights


def has_bullets(text, num_bullets):
    stars = re.findall(r"(?m)^\s*\*[^*].*$", text)
    dashes = re.findall(r"(?m)^\s*-.*$", text)
    return len(stars) + len(dashes) == num_bullets


def has_two_responses(text):
    parts = text.split("******")
    if any(not x.strip() for x in parts[1:-1]):
        return False
    parts = [x.strip() for x in parts if x.strip()]
    return len(parts) == 2 and parts[0] != parts[1]


def has_title(text):
    titles = re.findall(r"<<[^\n]+>>", text)
    return any(x.lstrip("<").rstrip(">").strip() for x in titles)


def count_capital_words(text: str) -> int:
    # an apostrophe separates words: the I of I'm is one
    words = re.findall(r"[^\W_]+(?:[-.&/][^\W_]+)*", text)
    return sum(word.isupper() for word in words)


CHECKS = {
    "change_case:capital_word_frequency": lambda text, capital_relation, capital_frequency: (
        satisfies(count_capital_words(text), capital_relation, capital_frequency)
    ),
    "change_case:english_capital": lambda text: text.isupper() and is_language(text, "en"),
    "change_case:english_lowercase": lambda text: text.islower() and is_language(text, "en"),
    "combination:repeat_prompt": lambda text, prompt_to_repeat: (
        text.strip().lower().startswith(prompt_to_repeat.strip().lower())
    ),
    "combination:two_responses": has_two_responses,
    "detectable_content:number_placeholders": lambda text, num_placeholders: (
        len(re.findall(r"\[.*?\]", text)) >= num_placeholders
    ),
    "detectable_content:postscript": has_postscript,
    "detectable_format:constrained_response": lambda text: re.search(ANSWER, text),
    "detectable_format:json_format": is_json,
    "detectable_format:multiple_sections": lambda text, section_spliter, num_sections: (
        len(re.findall(rf"{section_spliter}\s?\d+", text)) >= num_sections
    ),
    "detectable_format:number_bullet_lists": has_bullets,
    "detectable_format:number_highlighted_sections": has_highlights,
    "detectable_format:title": has_title,
    "keywords:existence": lambda text, keywords: all(re.search(x, text, SMALL) for x in keywords),
    "keywords:forbidden_words": lambda text, forbidden_words: (
        not any(re.search(rf"\b{x}\b", text, SMALL) for x in forbidden_words)
    ),
    "keywords:frequency": lambda text, relation, keyword, frequency: satisfies(
        len(re.findall(keyword, text, SMALL)), relation, frequency
    ),
    "keywords:letter_frequency": lambda text, let_relation, letter, let_frequency: satisfies(
        text.lower().count(letter.lower()), let_relation, let_frequency
    ),
    "language:response_language": is_language,
    "length_constraints:nth_paragraph_first_word": starts_paragraph,
    "length_constraints:number_paragraphs": has_paragraphs,
    "length_constraints:number_sentences": lambda text, relation, num_sentences: satisfies(
        count_sentences(text), relation, num_sentences
    ),
    "length_constraints:number_words": lambda text, relation, num_words: satisfies(
        len(re.findall(r"\w+", text)), relation, num_words
    ),
    "punctuation:no_comma": lambda text: "," not in text,
    "startend:end_checker": lambda text, end_phrase: (
        text.strip().strip('"').lower().endswith(end_phrase.strip().lower())
    ),
    "startend:quotation": lambda text: re.fullmatch('"(.|\n)*"', text.strip()),
}
# what an answer has to build; a short answer follows the other kinds by accident
BUILT = """number_placeholders postscript multiple_sections number_bullet_lists
    number_highlighted_sections title json_format existence frequency nth_paragraph_first_word
    number_paragraphs two_responses end_checker""".split()
NAMES = [
    f"ifeval_{name}/{half}" for name in ("loose", "strict") for half in ("all", "built", "other")
]
NAMES += ["ifeval_prompt_loose/all", "ifeval_prompt_strict/all"]


# 2. From answers to scores


def follows(kind: str, arguments: dict, text: str) -> tuple[bool, bool]:
    """Whether an answer follows an instruction: strictly, and loosely."""
    versions = []
    for lines in LINES:
        version = "\n".join(text.split("\n")[lines]).strip()
        versions += [version, version.replace("*", "")]
    versions[0] = text
    verdicts = [bool(x.strip()) and bool(CHECKS[kind](x, **arguments)) for x in versions]
    return verdicts[0], any(verdicts)


def read_scores(folder: Path, file: str) -> dict[str, evaluate.Statistic]:
    """The scores of the answers to `file` that evaluate.py has stored in a folder, by name."""
    questions = [fields for _, fields in data.read_json(file)]
    answers = folder / f"items/answers/{Path(file).stem}.jsonl"
    items = [item for _, item in data.read_json(answers)]
    same = [x["prompt"] for x in items] == [x["prompt"] for x in questions]
    require(same, answers, f"its prompts are not those of {file}; answer them by evaluate.py")
    sums = {name: [] for name in NAMES}
    for item, question in zip(items, questions):
        row = {name: [] for name in NAMES}
        for kind, arguments in zip(question["instruction_id_list"], question["kwargs"]):
            given = {name: value for name, value in arguments.items() if value is not None}
            half = "built" if kind.partition(":")[2] in BUILT else "other"
            for name, followed in zip(("strict", "loose"), follows(kind, given, item["output"])):
                row[f"ifeval_{name}/all"].append(followed)
                row[f"ifeval_{name}/{half}"].append(followed)
                row[f"ifeval_prompt_{name}/all"].append(followed)
        for name, followed in row.items():
            pair = (all(followed), 1) if "prompt" in name else (sum(followed), len(followed))
            sums[name].append(pair)
    with np.errstate(invalid="ignore"):  # a prompt may have no instruction of a half
        return {name: evaluate.bootstrap(pairs) for name, pairs in sums.items()}


def main(args: argparse.Namespace):
    runs = [read_scores(Path(folder), args.data) for folder in args.results]
    evaluate.print_table([Path(folder).name for folder in args.results], runs)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="Scores answers to IFEval.")
    p.add_argument("--data", required=True, metavar="FILE", help="IFEval's prompts, as JSON lines")
    p.add_argument("results", nargs="+", metavar="OUT", help="folders of evaluate.py, base first")
    return p


if __name__ == "__main__":
    data.cli(main, parser())
