"""The memory that `train.py --dry-run` foretells for 7B, 13B and 70B models on 1 to 64 GPUs, as a Markdown table.

    python benchmarks/memory.py

Computed, not measured: bfloat16, micro-batches of 8 rows of 1,024 tokens, half of them supervised.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import Example  # noqa: E402
from model import ModelConfig  # noqa: E402
from train import memory  # noqa: E402

# hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, intermediate_size of Llama 2
SHAPES = {"7B": (4096, 32, 32, 32, 11008), "13B": (5120, 40, 40, 40, 13824), "70B": (8192, 80, 64, 8, 28672)}
FIELDS = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size".split()
RANKS = [1, 2, 4, 8, 16, 32, 64]
ROOM = 80e9 / 2**30  # GiB of a GPU of 80 GB

if __name__ == "__main__":
    part = [Example(i, [1] * 512, [1] * 128, [1] * 384) for i in range(8)]
    print("| GiB a rank on ... GPUs |", *(f"{n} |" for n in RANKS))
    print("|---|" + "---:|" * len(RANKS))
    for name, shape in SHAPES.items():
        raw = dict(model_type="llama", vocab_size=32000, max_position_embeddings=4096) | dict(zip(FIELDS, shape))
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(raw))
            config = ModelConfig.from_file(Path(folder) / "config.json")
        table = memory(config, part, torch.bfloat16, 0, RANKS)
        for title, column in (("", "total"), (", activations recomputed", "total'")):
            cells = [line[column] / 2**30 for line in table]
            marked = " | ".join(f"**{x:.0f}**" if x < 0.95 * ROOM else f"{x:.0f}" for x in cells)
            print(f"| {name}{title} | {marked} |")
    print(f"\nBold: below 95 % of {ROOM:.1f} GiB.")
