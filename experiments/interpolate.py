"""Interpolates the weights of two models (WiSE-FT, Wortsman et al. 2022).

    python experiments/interpolate.py BASE TUNED 0.5 OUT

OUT is BASE + WEIGHT * (TUNED - BASE), with the configuration and the tokenizer of TUNED.
"""

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import data  # noqa: E402
from model import require  # noqa: E402


def main(args: argparse.Namespace):
    tuned = args.tuned
    require(not args.out.exists(), args.out, "exists; remove it, or choose another folder")
    files = {}  # tensor -> file of the base model
    for file in args.base.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            files |= dict.fromkeys(f.keys(), file)
    for name, content in data.Tokenizer(tuned).files.items():
        (args.out / name).parent.mkdir(parents=True, exist_ok=True)
        (args.out / name).write_bytes(content)
    for file in tuned.glob("*.safetensors"):
        tensors = {}
        with safe_open(file, "pt") as f:
            for name in f.keys():
                end = f.get_tensor(name)
                require(name in files, args.base, f"has no {name}; give the base of {tuned}")
                with safe_open(files[name], "pt") as g:
                    start = g.get_tensor(name).float()
                same = start.shape == end.shape
                require(same, args.base, f"{name} has another shape than in {tuned}")
                tensors[name] = start.lerp(end.float(), args.weight).to(end.dtype)
        save_file(tensors, args.out / file.name, metadata={"format": "pt"})
    for file in (*tuned.glob("*.index.json"), tuned / "config.json"):
        shutil.copyfile(file, args.out / file.name)


def parser() -> argparse.ArgumentParser:
    p = data.Arguments(description="Interpolates the weights of two models.")
    for name in ("base", "tuned", "weight", "out"):
        p.add_argument(name, type=float if name == "weight" else Path)
    return p


if __name__ == "__main__":
    data.cli(main, parser())
