"""A tiny chat model for every test: random weights, a vocabulary trained on the lines below."""

import functools
import io
import json
import multiprocessing
import os
import random
import re
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
from model import ModelConfig, Transformer, UserError  # noqa: E402

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
WHY = "\n\nThe wind turns."  # a rationale
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# one or two constructs of Jinja each
TEMPLATES = {
    "a loop": """
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% else %}
{{ '<|assistant|>\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "a default system prompt": """
{%- if messages[0].role == 'system' -%}
    {%- set system = messages[0].content -%}
    {%- set messages = messages[1:] -%}
{%- else -%}
    {%- set system = 'You mend boats.' -%}
{%- endif -%}
{{ bos_token + system }}
{%- for turn in messages -%}
    {{ ' ' + turn.role | upper + ': ' + turn.content }}
    {{- eos_token + '\n' if turn.role == 'assistant' }}
{%- endfor -%}
{{ ' ASSISTANT:' if add_generation_prompt }}""",
    "a macro and generation marks": """
{%- macro start(role) -%}
<|im_start|>{{ role + '\n' }}
{%- endmacro -%}
{%- for message in messages -%}
{{ start(message.role) }}
{%- generation %}{{ message.content }}<|im_end|>{% endgeneration %}

{% endfor -%}
{{ start('assistant') if add_generation_prompt }}""",
    "a namespace": """
{%- set chat = namespace(system='You\\'re "Bo", who mends boats.') -%}
{%- for message in messages if message.role == 'system' -%}
{%- set chat.system = message.content -%}
{%- endfor -%}
<|im_start|>system
{{ chat.system }}<|im_end|>
{% for message in messages if message.role != 'system' %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}""",
    "a refusal": """
{%- if messages[0]['role'] == 'system' -%}
{{- raise_exception('No "system" role here') -}}
{%- endif -%}
{%- for message in messages -%}
<|im_start|>{{ 'model' if message.role == 'assistant' else message.role }}
{{ message.content | trim }}<|im_end|>
{% endfor -%}
<|im_start|>model
""",
    "added tokens": """
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.content == 'waits' -%}{%- continue -%}{%- endif -%}
{{ '<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>' + '\n' -}}
{%- endfor -%}
{% if add_generation_prompt %}
{{ '<|assistant|>\n' -}}
{% endif %}""",
    "filters, methods and what is defined": """
{%- if tools is none and documents is none -%}
NO TOOLS {{ pad_token is defined }} {{ unk_token is defined }} {{ tools }}
{%- endif -%}
{{ cls_token }} {{ strftime_now('%B %Y') }}
{%- set names = dict(user='Q', assistant='A', system='S') -%}
{%- for message in messages[::-1] | reverse -%}
{{ names[message.role] ~ ': ' ~ message.content.replace('\n\n', '\n').strip() ~ '\n' }}
{{ message.get('name', message['role']) | title }}> {{ message.content | trim ~ eos_token }}
{{ {'role': message.role, 'text': message.content} | tojson }}
{%- endfor -%}
{{ messages[0] | tojson(indent=1, sort_keys=true) }}
{{ messages[-1].content | tojson(ensure_ascii=true) }}
{{ 'A: '.rstrip() }}""",
}
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


def table(arguments: str, text: str):
    """Runs a test once for each line of a table.

    "|" separates its columns, of which the first names the case; "↵" is a line break in a cell.
    """
    cases = []
    for line in text.strip().split("\n"):
        name, *cells = re.split(r"\s+\|\s+", line.strip())
        cells = [cell.replace("↵", "\n") for cell in cells]
        cases.append(pytest.param(*cells, id=name))
    return pytest.mark.parametrize(arguments, cases)


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


@functools.cache
def train_vocabulary(options: str = "{}") -> bytes:
    """A SentencePiece model like Llama's: BPE, bytes, a space before each text, 480 pieces."""
    model = io.BytesIO()  # model_prefix would write the folder's name into the file
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        **SENTENCEPIECE | json.loads(options),
    )
    return model.getvalue()


SP = sentencepiece.SentencePieceProcessor(model_proto=train_vocabulary())


def spell(ids: list) -> str:
    """The text of ids of the usual vocabulary, control tokens included."""
    text = "".join(SP.id_to_piece(ids)).replace("▁", " ")
    return re.sub(
        "(<0x..>)+",
        lambda match: bytes.fromhex(re.sub("<0x|>", "", match[0])).decode(),
        text,
    )


def write_vocabulary(folder: Path, **options) -> Path:
    """tokenizer.model, with other options of SentencePiece than those above."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(train_vocabulary(json.dumps(options)))
    return folder


def write_tokenizer(folder: Path, **config) -> Path:
    """A vocabulary, and tokenizer_config.json with the chatml template."""
    write_vocabulary(folder)
    fields = {"chat_template": CHATML, "tokenizer_class": "LlamaTokenizer"} | config
    write(folder / "tokenizer_config.json", fields)
    return folder


def added_tokens(*texts, start: int = 480, **flags) -> dict:
    """`added_tokens_decoder` of tokenizer_config.json; the vocabulary has 480 pieces."""
    return {str(id): {"content": text, **flags} for id, text in enumerate(texts, start)}


def text_of_zephyr(messages):
    turns = [f"<|{turn['role']}|>\n{turn['content']}</s>\n" for turn in messages]
    return "".join(turns) + "<|assistant|>\n"


def text_of_chatml(messages):
    turns = [f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


def text_of_plain(messages):
    return "<s>" + "\n\n".join(turn["content"] for turn in messages)


def text_of_vicuna(messages):
    text = (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. "
    )
    for turn in messages:
        if turn["role"] == "system":
            text = f"<s>{turn['content']} "
        elif turn["role"] == "user":
            text += f"USER: {turn['content']} ASSISTANT:"
        else:
            text += f" {turn['content']}</s>"
    return text


# the text of a prompt in each --chat NAME, by its definition: a new format needs one here. Those of
# llama2 and mistral are compared with ids
DEFINITIONS = {
    "zephyr": text_of_zephyr,
    "chatml": text_of_chatml,
    "vicuna": text_of_vicuna,
    "plain": text_of_plain,
}


def theirs_of(folder: Path):
    """The tokenizer of transformers."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


def render_theirs(theirs, messages: list, prompt: bool = True) -> list:
    options = {"add_generation_prompt": prompt, "return_dict": False}
    return theirs.apply_chat_template(messages, **options)


WORDS = [
    *("The harbour", "waits", "Ärger,", "naïve", "港は静かだ", "你好", "🚀", "\n", "\n\n"),
    *("\t", "don't", '"3.14"', "привет", "<b>", "👩\u200d🚀"),  # the last: one of three characters
]


def random_text(r: random.Random, words: list) -> str:
    """One to six words, never with two spaces in a row."""
    text = "".join(r.choice(words) + r.choice(["", " "]) for _ in range(r.randint(1, 6)))
    return text.strip() or "A boat."


def conversations(words: list = WORDS):
    """One turn and three, half of them with a system prompt; each with an answer."""
    for seed in range(16):
        r = random.Random(seed)
        roles = ["user", "assistant"] * (seed % 4 // 2) + ["user"]
        if seed % 2:
            roles = ["system", *roles]
        yield [said(role, random_text(r, words)) for role in roles], random_text(r, words)


def contents_of(folder: Path) -> dict:
    """Everything below a folder: the bytes of files, the target of links, the kind of others."""
    contents = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            contents[path] = os.readlink(path)
        else:
            contents[path] = path.read_bytes() if path.is_file() else path.stat().st_mode
    return contents


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


def fault_of(function, *arguments, **options) -> str:
    """The message of the UserError that a call must raise: one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def outcome_of(main, **environment) -> tuple[int, str]:
    """Exit status and stderr of a script, which runs in another process."""

    def run():
        os.dup2(writing, 2)
        sys.stderr = open(2, "w", encoding="ascii", errors="strict")
        os.environ.update(environment)
        sys.argv[1:] = []
        data.cli(main, data.make_parser("", ""))

    reading, writing = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    os.close(writing)
    with open(reading, encoding="ascii") as pipe:
        printed = pipe.read()
    process.join(30)
    return process.exitcode, printed


def raising(error):
    def main(args):
        raise error

    return main


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


@pytest.fixture(scope="session")
def tokenizer(folder) -> data.Tokenizer:
    return data.Tokenizer(folder)


@pytest.fixture
def rows_of(tmp_path):
    """Reads the rows of a file that holds the given ones."""

    def read(*rows, directions=(), prompts=False) -> list:
        file = write_jsonl(tmp_path / "rows.jsonl", rows)
        return data.read_rows([str(file)], directions, prompts)

    return read


@pytest.fixture
def learn(rows_of, tokenizer):
    """What is learned from one row, with options of data.Encoder."""

    def encode(row, tokenizer=tokenizer, **options):
        return data.Encoder(tokenizer, **options).example(*rows_of(row))

    return encode


@pytest.fixture
def ledger_row(rows_of, tokenizer):
    """A row as generate.py writes it, with the options template and system."""

    def write_row(given=PAIRS[0], tokenizer=tokenizer, rationale=WHY, **options) -> dict:
        [row] = rows_of(given, prompts=True)
        ids = tokenizer.answer(row.reference)
        encoder = data.Encoder(tokenizer, **options)
        fields = {
            "rationale": rationale,
            "prompt_ids": encoder.prompt(row),
            "prompt_hash": data.short_hash(encoder.messages(row)),
            "reference_ids": ids,
            "rationale_ids": tokenizer.continuation(row.reference, ids, rationale),
            "tokenizer": tokenizer.hash,
            "finish": "eos",
            "status": "ok",
        }
        return given | fields | options

    return write_row
