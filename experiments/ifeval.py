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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import evaluate  # noqa: E402
from model import read_object, require  # noqa: E402

SMALL = re.IGNORECASE
# the versions of an answer, without lines from the first and from the last on, that are loose
LINES = (slice(None), slice(1, None), slice(None, -1), slice(1, -1))
SENTENCE_END = re.compile(r"""[.!?](?=[]["'(){};:@*?!]|\s+\S)""")
# ... and these end no sentence, as a number does not before a small letter
ABBREVIATION = re.compile(
    r"(\b(mr|mrs|ms|dr|prof|st|vs|p\.m|a\.m|u\.s|ph\.d|[a-z])|\.\.)\.$", SMALL
)
FENCE = re.compile(r"^```(json)?|```$", SMALL)


# 1. The 25 kinds: text, and arguments by their names in the data -> is the instruction followed?


def count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def enough(number: int, a: dict) -> bool:
    """Compares with the number among the arguments; they can ask for less than it."""
    [limit] = [value for value in a.values() if isinstance(value, int)]
    less = any(a.get(f"{name}relation") == "less than" for name in ("", "let_", "capital_"))
    return number < limit if less else number >= limit


def is_language(text: str, language: str) -> bool:
    """Whether langdetect finds this language; a text without letters has any."""
    import langdetect

    langdetect.DetectorFactory.seed = 0
    try:
        return langdetect.detect(text) == language
    except langdetect.LangDetectException:
        return True


def count_sentences(text: str) -> int:
    """About those of NLTK's Punkt: 1. before a capital is one, and so is each ! of two."""
    count = 0
    rest = text
    for match in SENTENCE_END.finditer(text):
        before = text[: match.end()][-8:]
        after = text[match.end() :]
        numbered = re.search(r"\d\.$", before) and re.match(r"\s+[a-z]", after)
        if not ABBREVIATION.search(before) and not numbered:
            count += 1
            rest = after
    return count + bool(rest.strip("\"')]} \t\n"))


def has_paragraphs(text, a):
    """Paragraphs are separated by ***; only before the first and after the last may be nothing."""
    first, *others = re.split(r"\s?\*\*\*\s?", text)
    inner = others[:-1]
    outer = [x for x in (first, *others[-1:]) if x.strip()]
    return all(x.strip() for x in inner) and len(inner) + len(outer) == a["num_paragraphs"]


def starts_paragraph(text, a):
    """Paragraphs are separated by empty lines; the nth begins with a word."""
    paragraphs = text.split("\n\n")
    count = sum(bool(x.strip()) for x in paragraphs)
    if count != a["num_paragraphs"] or a["nth_paragraph"] > count:
        return False
    words = paragraphs[a["nth_paragraph"] - 1].split()
    first = words[0].lstrip("'").lstrip('"') if words else ""
    return re.split("[.,?!'\"]", first)[0].lower() == a["first_word"].lower()


def has_postscript(text, a):
    marker = a["postscript_marker"].lower()
    forms = {"p.s.": r"p\.\s?s\.", "p.p.s": r"p\.\s?p\.\s?s"}
    return re.search(forms.get(marker, re.escape(marker)), text.lower()) is not None


def is_json(text, a):
    try:
        json.loads(FENCE.sub("", text.strip()).strip())
    except ValueError:
        return False
    return True


def count_highlights(text: str) -> int:
    """*one* and **two** asterisks, each with something between them."""
    found = re.findall(r"\*[^\n*]*\*", text) + re.findall(r"\*\*[^\n*]*\*\*", text)
    return sum(bool(x.strip("*").strip()) for x in found)


def has_two_responses(text, a):
    first, *others = [x.strip() for x in text.split("******")]
    parts = [x for x in (first, *others) if x]
    return all(others[:-1]) and len(parts) == 2 and parts[0] != parts[1]


def has_title(text, a):
    titles = re.findall(r"<<[^\n]+>>", text)
    return any(x.lstrip("<").rstrip(">").strip() for x in titles)


def count_capitals(text: str) -> int:
    # an apostrophe separates words: the I of I'm is one
    words = re.findall(r"[^\W_]+(?:[-.&/][^\W_]+)*", text)
    return sum(word.isupper() for word in words)


# what an answer has to build; a short answer follows the other kinds by accident
BUILT = {
    "combination:two_responses": has_two_responses,
    "detectable_content:number_placeholders": lambda text, a: enough(count(r"\[.*?\]", text), a),
    "detectable_content:postscript": has_postscript,
    "detectable_format:json_format": is_json,
    "detectable_format:multiple_sections": lambda text, a: enough(
        count(rf"{a['section_spliter']}\s?\d+", text), a
    ),
    "detectable_format:number_bullet_lists": lambda text, a: (
        count(r"(?m)^\s*(?:\*[^*]|-).*$", text) == a["num_bullets"]
    ),
    "detectable_format:number_highlighted_sections": lambda text, a: enough(
        count_highlights(text), a
    ),
    "detectable_format:title": has_title,
    "keywords:existence": lambda text, a: all(count(f"(?i){x}", text) for x in a["keywords"]),
    "keywords:frequency": lambda text, a: enough(count(f"(?i){a['keyword']}", text), a),
    "length_constraints:nth_paragraph_first_word": starts_paragraph,
    "length_constraints:number_paragraphs": has_paragraphs,
    "startend:end_checker": lambda text, a: (
        text.strip().strip('"').lower().endswith(a["end_phrase"].strip().lower())
    ),
}
CHECKS = BUILT | {
    "change_case:capital_word_frequency": lambda text, a: enough(count_capitals(text), a),
    "change_case:english_capital": lambda text, a: text.isupper() and is_language(text, "en"),
    "change_case:english_lowercase": lambda text, a: text.islower() and is_language(text, "en"),
    "combination:repeat_prompt": lambda text, a: (
        text.strip().lower().startswith(a["prompt_to_repeat"].strip().lower())
    ),
    "detectable_format:constrained_response": lambda text, a: (
        count(r"My answer is (?:yes|no|maybe)\.", text) > 0
    ),
    "keywords:forbidden_words": lambda text, a: (
        not any(count(rf"(?i)\b{x}\b", text) for x in a["forbidden_words"])
    ),
    "keywords:letter_frequency": lambda text, a: enough(text.lower().count(a["letter"].lower()), a),
    "language:response_language": lambda text, a: is_language(text, a["language"]),
    "length_constraints:number_sentences": lambda text, a: enough(count_sentences(text), a),
    "length_constraints:number_words": lambda text, a: enough(count(r"\w+", text), a),
    "punctuation:no_comma": lambda text, a: "," not in text,
    "startend:quotation": lambda text, a: count(r'(?s)^".*"$', text.strip()) > 0,
}


# 2. From answers to scores


def follows(kind: str, arguments: dict, text: str) -> tuple[bool, bool]:
    """Whether an answer follows an instruction: strictly, and loosely."""
    versions = []
    for lines in LINES:
        version = "\n".join(text.split("\n")[lines]).strip()
        versions += [version, version.replace("*", "")]
    versions[0] = text
    verdicts = [bool(x.strip()) and bool(CHECKS[kind](x, arguments)) for x in versions]
    return verdicts[0], any(verdicts)


def score_item(item: dict) -> dict:
    """Of each score the number of instructions that are followed, and of all."""
    scores = {}
    for kind, arguments in zip(item["instruction_id_list"], item["kwargs"]):
        half = "built" if kind in BUILT else "other"
        both = follows(kind, arguments, item["output"])
        for name, followed in zip(("strict", "loose"), both):
            for part in ("all", half):
                count, total = scores.get(f"ifeval_{name}/{part}", (0, 0))
                scores[f"ifeval_{name}/{part}"] = (count + followed, total + 1)
    for name in ("strict", "loose"):
        count, total = scores[f"ifeval_{name}/all"]
        scores[f"ifeval_prompt_{name}/all"] = (count == total, 1)
    return scores


def read_scores(folder: Path, file: str) -> dict[str, evaluate.Statistic]:
    """The scores of the answers to `file` that evaluate.py has stored in a folder."""
    questions = [fields for _, fields in data.read_json(file)]
    answers = folder / f"items/answers/{Path(file).stem}.jsonl"
    items = [item for _, item in data.read_json(answers)]
    same = [x["prompt"] for x in items] == [x["prompt"] for x in questions]
    fault = "its prompts are not those of --data; answer them by evaluate.py --answers"
    require(same, answers, fault)
    pairs = {}
    for question, item in zip(questions, items):
        for name, pair in score_item(question | item).items():
            pairs.setdefault(name, []).append(pair)
    return {name: evaluate.bootstrap(pairs[name]) for name in sorted(pairs)}


def main(args: argparse.Namespace):
    folders = [Path(folder) for folder in args.results]
    for folder in folders:
        settings = [read_object(x / "settings.json") for x in (folders[0], folder)]
        data.require_same(folder, *settings, free=(*data.NOT_COMPARED, "model_hash"))
    names = [f"{folder.parent.name}/{folder.name}" for folder in folders]
    evaluate.print_table(names, [read_scores(folder, args.data) for folder in folders])


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="Scores answers to IFEval.")
    p.add_argument("--data", required=True, metavar="FILE", help="IFEval's prompts, as JSON lines")
    p.add_argument("results", nargs="+", metavar="OUT", help="folders of evaluate.py, base first")
    return p


if __name__ == "__main__":
    data.cli(main, parser())
