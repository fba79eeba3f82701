"""A tiny chat model for every test: random weights, a SentencePiece vocabulary trained on the lines below."""

import json
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)  # tiny models are faster so, and two-process tests do not fight over cores

from model import ModelConfig, Transformer  # noqa: E402

LINES = """The little boat waits at the harbour until the wind turns.
Das kleine Boot wartet im Hafen, bis der Wind sich dreht.
Our neighbour grows tomatoes, beans and three kinds of apples.
Unser Nachbar zieht Tomaten, Bohnen und drei Sorten Äpfel.
Please translate this sentence from German to English, and explain your choice.
Bitte übersetze diesen Satz aus dem Deutschen ins Englische und erkläre ihn.
The train to the mountains leaves at seven; bring a warm coat.
Der Zug in die Berge fährt um sieben; nimm einen warmen Mantel mit.
What colour is the door? It is green, as the garden is green.
Welche Farbe hat die Tür? Sie ist grün, wie der Garten grün ist.
She read the letter twice before she answered it.
Sie las den Brief zweimal, bevor sie ihn beantwortete.
A teacher asks, a pupil answers, and both of them learn something.
Ein Lehrer fragt, ein Schüler antwortet, und beide lernen etwas.""".splitlines()
PAIRS = [dict(source=b, reference=a, source_lang="de", target_lang="en") for a, b in zip(LINES[::2], LINES[1::2])]

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONFIG = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=480, hidden_size=64, intermediate_size=128,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5,
    rope_theta=10000.0, hidden_act="silu", tie_word_embeddings=False, torch_dtype="float32", bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip


def write_config(folder: Path, **changes) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    config = {k: v for k, v in (CONFIG | changes).items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    return config


def write_model(folder: Path, seed: int = 0, **changes) -> Path:
    """A model folder without tokenizer: config.json and model.safetensors. A field set to ... is left out."""
    write_config(folder, **changes)
    model = Transformer(ModelConfig.from_file(folder / "config.json"))
    model.initialize(seed)
    with torch.no_grad():  # 0.02 is too small for a tiny width: every logit would be nearly the same
        for p in model.parameters():
            p.mul_(6) if p.dim() > 1 else p.add_(
                0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
            )
    model.save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path, **config) -> Path:
    """tokenizer.model in the manner of Llama (BPE, byte fallback, a space before each text), 480 pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lines.txt").write_text("\n".join(LINES), "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "lines.txt"), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=480,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=1.0,
        control_symbols=["<|im_start|>", "<|im_end|>"], minloglevel=2, num_threads=1,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    (folder / "lines.txt").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML} | config))
    return folder


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]  # not at U+2028, as splitlines would


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A whole model folder in the chatml format. Tests must not change it."""
    return write_tokenizer(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def pairs(tmp_path) -> Path:
    """Seven German-English pairs, JSONL."""
    return write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
