"""One row of a ledger as a strip of tokens, coloured by what they are to the loss.

    python experiments/strip.py --model experiments/run/seed-0/base \\
        --data experiments/run/seed-0/drawn/rationales.jsonl --row 3 --out experiments/strip.svg

The picture in the README.
"""

import argparse
import html
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Encoder, Tokenizer, read_rows  # noqa: E402

COLOURS = {
    "prompt: read, no loss": "#d9d9d9",
    "reference: the skill": "#a8ddb5",
    "rationale: self-distillation": "#a6bddb",
    "EOS": "#f4a582",
}
WIDTH = 900  # pixels
LINE = 26
LETTER = 7.3


class Strip:
    """Boxes of text, in lines."""

    def __init__(self):
        self.shapes = []
        self.x = 0.0
        self.y = 0

    def new_line(self, gap: int = 0):
        self.x = 0.0
        self.y += LINE + gap

    def add(self, text: str, colour: str):
        width = LETTER * len(text) + 8
        if self.x + width > WIDTH:
            self.new_line()
        box = f'x="{self.x:.1f}" y="{self.y}" width="{width - 2:.1f}" height="{LINE - 4}"'
        self.shapes.append(f'<rect {box} fill="{colour}"/>')
        place = f'x="{self.x + 3:.1f}" y="{self.y + 15}"'
        self.shapes.append(f"<text {place}>{html.escape(text)}</text>")
        self.x += width

    def svg(self) -> str:
        size = f'width="{WIDTH}" height="{self.y + LINE}"'
        style = 'font-family="monospace" font-size="12"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>'
        return "\n".join([head, *self.shapes, "</svg>"]) + "\n"


def main(args: argparse.Namespace):
    tokenizer = Tokenizer(args.model)
    example = Encoder(tokenizer).example(read_rows([args.data])[args.row])
    prompt, reference, rationale, end = COLOURS.values()
    strip = Strip()
    segments = {prompt: example.prompt, reference: example.reference, rationale: example.rationale}
    for colour, ids in segments.items():
        for i in ids:
            ends = i == tokenizer.end_id and colour != prompt
            strip.add(tokenizer.sp.id_to_piece(i), end if ends else colour)
    strip.new_line(gap=10)
    for name, colour in COLOURS.items():
        strip.add(name, colour)
    Path(args.out).write_text(strip.svg(), "utf-8")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description="Draws one row of a ledger as coloured tokens.")
    p.add_argument("--model", required=True, help="model folder (only its tokenizer is read)")
    p.add_argument("--data", required=True, help="ledger")
    p.add_argument("--row", type=int, default=0, help="which (default the first)")
    p.add_argument("--out", required=True, help="SVG to write")
    main(p.parse_args())
