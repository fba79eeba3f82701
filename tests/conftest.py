"""A tiny chat model for every test: random weights, a vocabulary trained on the lines below."""

import io
import json
import os
import random
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are of the CPU, whose sums have one order
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models are faster so, and processes share the cores

import pytest
import sentencepiece
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)

import data  # noqa: E402
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
PAIRS = [
    {"source": german, "reference": english, "source_lang": "de", "target_lang": "en"}
    for english, german in zip(LINES[::2], LINES[1::2])
]
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 480,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# values that JSON can hold and no field is meant to have, as JSON text
ODD = {
    "null": "null",
    "true": "true",
    "-5": "-5",
    "0": "0",
    "10^30": "1" + "0" * 30,
    "10^400": "1" + "0" * 400,
    "5,000 digits": "9" * 5000,
    "1e30": "1e30",
    "1e400": "1e400",
    "NaN": "NaN",
    "text": '"x"',
    "empty text": '""',
    "surrogate": '"\\ud800"',
    "list": "[]",
    "list of lists": "[[]]",
    "object": '{"x": {}}',
    "100,000 deep": "[" * 100_000 + "]" * 100_000,
    "900 deep": "[" * 900 + "]" * 900,
}


def write_config(folder: Path, **changes) -> dict:
    """config.json, without the fields that are set to `...`."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = CONFIG | changes
    config = {name: value for name, value in fields.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    return config


@torch.no_grad()
def write_model(folder: Path, seed: int = 0, **changes) -> Path:
    """A model folder without tokenizer: config.json and model.safetensors."""
    write_config(folder, **changes)
    model = Transformer(ModelConfig.from_file(folder / "config.json"))
    model.initialize(seed)
    for p in model.parameters():
        if p.dim() > 1:
            p.mul_(6)  # 0.02 is too small for a tiny width: all logits would be nearly the same
        else:
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
            p.add_(0.1 * noise)
    model.save_pretrained(folder)
    return folder


SENTENCEPIECE = {
    "model_type": "bpe",
    "vocab_size": 480,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "character_coverage": 1.0,
    "control_symbols": ["<|im_start|>", "<|im_end|>"],
    "minloglevel": 2,
    "num_threads": 1,
}


def write_vocabulary(folder: Path, **options) -> Path:
    """tokenizer.model like Llama's: BPE, bytes, a space before each text, 480 pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()  # model_prefix would write the folder's name into the file
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        **SENTENCEPIECE | options,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


def write_tokenizer(folder: Path, **config) -> Path:
    """A vocabulary, and tokenizer_config.json with the chatml template."""
    write_vocabulary(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML} | config))
    return folder


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), "utf-8")
    return path


def read_jsonl(path: Path) -> list[dict]:
    lines = path.read_text("utf-8").split("\n")  # not at U+2028, as splitlines would
    return [json.loads(line) for line in lines[:-1]]


ROW_FIELDS = [
    *("id", "source", "reference", "source_lang", "target_lang", "translation"),
    *("prompt", "response", "messages", "turns", "question_id", "role", "content"),
    *("prompt_ids", "reference_ids", "rationale_ids", "rationale", "tokenizer"),
    *("finish", "status", "chat", "system", "template", "logprob", "where"),
]
LEDGER_FIELDS = {
    "prompt_ids": "[5]",
    "reference_ids": "[6]",
    "rationale_ids": "[7]",
    "rationale": '"So."',
    "finish": '"eos"',
    "status": '"ok"',
}
SHAPES = ["{}", "[{}]", '{{"de": {}, "en": "x"}}', '[{{"role": "user", "content": {}}}]']


def odd_row(seed: int, tokenizer: str = "x") -> str:
    """A pair, a conversation or a ledger row in which one to three fields have odd values."""
    r = random.Random(seed)
    row = {name: json.dumps(value) for name, value in r.choice(PAIRS).items()}
    if r.random() < 0.3:
        row = {"prompt": '"Why?"', "response": '"So."'}
    if r.random() < 0.3:
        row |= LEDGER_FIELDS | {"tokenizer": json.dumps(tokenizer)}
    for name in r.sample(ROW_FIELDS, r.randint(1, 3)):
        row[name] = r.choice(SHAPES).format(r.choice([*ODD.values()]))
    return "{" + ", ".join(f'"{name}": {value}' for name, value in row.items()) + "}"


def last_line(module, arguments: list, monkeypatch, capsys) -> str:
    """The one line with which a script ends (status 2), or "" where it ends well."""
    words = [str(argument) for argument in arguments]
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *words])
    monkeypatch.setattr("signal.signal", lambda *_: None)  # those of the tests stay
    try:
        data.cli(module.main, module.parser())
    except SystemExit as ended:
        assert ended.code == 2
    else:
        capsys.readouterr()
        return ""
    printed = capsys.readouterr().err.split("\n")
    lines = [line for line in printed if line and not line.startswith("\r")]  # progress bars aside
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert len(lines[0]) < 1000
    return lines[0]


def error_of(module, arguments: list, monkeypatch, capsys) -> str:
    """The one line with which a script must end (status 2)."""
    line = last_line(module, arguments, monkeypatch, capsys)
    assert line
    return line


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A whole model folder in the chatml format. Tests must not change it."""
    return write_tokenizer(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def pairs(tmp_path) -> Path:
    """Seven German-English pairs, JSON lines."""
    return write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
