"""One row of a ledger as a strip of tokens, coloured by what they are to the loss: the picture in the README.

python demo/strip.py --model demo/run/base --data demo/run/rationales.jsonl --row 3 --out demo/strip.svg
"""

import argparse
import html
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import Encoder, Tokenizer, read_rows  # noqa: E402

COLOURS = {
    "prompt: read, no loss": "#d9d9d9",
    "reference: the skill": "#a8ddb5",
    "rationale: self-distillation": "#a6bddb",
    "EOS": "#f4a582",
}
WIDTH, HEIGHT, CHARACTER = 900, 26, 7.3  # of the picture, of a line, of a letter, in pixels


def main(args: argparse.Namespace) -> None:
    tokenizer = Tokenizer(args.model)
    example = Encoder(tokenizer).example(read_rows([args.data])[args.row])
    shapes, x, y, kinds = [], 0.0, 0, list(COLOURS)
    segments = zip(kinds, (example.prompt, example.reference, example.rationale))
    tokens = [(tokenizer.sp.id_to_piece(i), kind, i) for kind, ids in segments for i in ids]
    for piece, kind, i in [*tokens, *((kind, kind, -1) for kind in kinds)]:
        kind = "EOS" if i == tokenizer.end_id and kind != kinds[0] else kind
        width = CHARACTER * len(piece) + 8
        if x + width > WIDTH or (i < 0 and piece == kinds[0]):  # the legend has a line of its own
            x, y = 0.0, y + HEIGHT + 10 * (i < 0)
        shapes.append(f'<rect x="{x}" y="{y}" width="{width - 2:.1f}" height="{HEIGHT - 4}" fill="{COLOURS[kind]}"/>')
        shapes.append(f'<text x="{x + 3}" y="{y + 15}">{html.escape(piece)}</text>')
        x += width
    style = 'font-family="monospace" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + HEIGHT}" {style}>'
    Path(args.out).write_text("\n".join([head, *shapes, "</svg>"]) + "\n", "utf-8")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description="Draws one row of a ledger as a strip of coloured tokens.")
    p.add_argument("--model", required=True, help="model folder (only its tokenizer is read)")
    p.add_argument("--data", required=True, help="ledger")
    p.add_argument("--row", type=int, default=0, help="which (default the first)")
    p.add_argument("--out", required=True, help="SVG to write")
    main(p.parse_args())
