"""The model is the one that transformers computes, reads what Hugging Face writes, and refuses the rest by name."""

import json
import os

import pytest
import torch
from conftest import write_config, write_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import model as model_module
from generate import generate
from model import KVCache, Transformer

INDEX = "model.safetensors.index.json"
MISTRAL = dict(architectures=["MistralForCausalLM"], model_type="mistral")
VARIANTS = {
    "llama": {}, "tied": dict(tie_word_embeddings=True), "head_dim given": dict(head_dim=32),
    "one kv head": dict(num_key_value_heads=1), "kv heads absent": dict(num_key_value_heads=...),
    "eps absent": dict(rms_norm_eps=...), "rope_theta": dict(rope_theta=500.0, rope_scaling=None),
    "rope_parameters": dict(rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rope_theta=...),
    "rope_theta absent": dict(rope_theta=...), "dtype": dict(torch_dtype=..., dtype="float32"),
    "mistral window": MISTRAL | dict(sliding_window=5), "mistral window null": MISTRAL | dict(sliding_window=None),
    "mistral window absent": MISTRAL | dict(num_attention_heads=8, num_key_value_heads=...),
    "llama ignores window": dict(sliding_window=5),
}  # fmt: skip
# float32 sums in another order than transformers'; logits here are of size 1 to 10
CLOSE = dict(atol=1e-4, rtol=0)


def reference(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def random_tokens(*shape, seed=0):
    return torch.randint(3, 480, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_logits_equal_transformers_with_and_without_cache(tmp_path, changes):
    folder, tokens = write_model(tmp_path, **changes), random_tokens(2, 24)
    model, theirs = Transformer.from_pretrained(folder), reference(folder)
    assert theirs.config.model_type == "llama" or theirs.config.sliding_window == model.config.sliding_window
    wanted = theirs(tokens).logits
    assert_close(model(tokens), wanted, **CLOSE)
    cache, steps = KVCache(model.config, 2, 24, torch.float32), []
    for part in torch.arange(24).split([9, 1, 6, *[1] * 8]):
        steps.append(model(tokens[:, part], cache=cache, positions=part.expand(2, -1)))
    assert_close(torch.cat(steps, 1), wanted, **CLOSE)


@pytest.mark.parametrize("changes", [{}, MISTRAL | dict(sliding_window=4)], ids=["llama", "mistral window"])
@torch.no_grad()
def test_ragged_cached_decoding_equals_full_forward(tmp_path, changes):
    model, tokens = Transformer.from_pretrained(write_model(tmp_path, **changes)), random_tokens(3, 20)
    lengths = [3, 11, 7]
    full, cache, rows = model(tokens), KVCache(model.config, 3, 20, torch.float32), torch.arange(3)
    padded = tokens[:, :11].masked_fill(torch.arange(11) >= torch.tensor(lengths)[:, None], 0)
    logits, at = model(padded, cache=cache, positions=torch.arange(11).expand(3, -1)), torch.tensor(lengths) - 1
    assert_close(logits[rows, at], full[rows, at], **CLOSE)
    for _ in range(9):
        at = at + 1
        step = model(tokens[rows, at][:, None], cache=cache, positions=at[:, None])
        assert_close(step[:, 0], full[rows, at], **CLOSE)


@torch.no_grad()
def test_selected_logits_are_the_full_ones_and_padding_on_the_right_changes_none(folder):
    model, tokens, places = Transformer.from_pretrained(folder), random_tokens(3, 10), torch.tensor([29, 0, 7, 7, 12])
    full, padded = model(tokens), tokens * (torch.arange(10) < 6)
    assert_close(model(tokens, places), full.flatten(0, 1)[places], **CLOSE)
    assert_close(model(padded)[:, :6], full[:, :6], **CLOSE)
    assert model(tokens, places[:0]).shape == (0, 480)


@pytest.mark.parametrize("changes", [{}, MISTRAL | dict(sliding_window=6)], ids=["llama", "mistral window"])
def test_greedy_ragged_batch_equals_transformers_token_for_token(tmp_path, changes):
    folder = write_model(tmp_path, **changes)
    prompts = [random_tokens(n, seed=n).tolist() for n in (1, 13, 5, 8)]
    model, theirs = Transformer.from_pretrained(folder), reference(folder)
    eos = generate(model, prompts, max_new_tokens=8)[1][7]  # a token that does come up ends at least one row early
    mine = generate(model, prompts, max_new_tokens=20, eos_ids=[eos], batch_size=3)
    assert len(mine[1]) < 8
    for prompt, ids in zip(prompts, mine, strict=True):
        settings = dict(max_new_tokens=20, do_sample=False, eos_token_id=eos, pad_token_id=0)
        out = theirs.generate(torch.tensor([prompt]), **settings)
        assert ids == [i for i in out[0, len(prompt) :].tolist() if i != eos]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_load_and_save_keep_every_bit(tmp_path, dtype, tied):
    write_model(tmp_path / "a", tie_word_embeddings=tied)
    Transformer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b", dtype)
    Transformer.from_pretrained(tmp_path / "b", dtype).save_pretrained(tmp_path / "c")
    b, c = (load_file(tmp_path / name / "model.safetensors") for name in "bc")
    assert b.keys() == c.keys() and all(b[k].dtype == c[k].dtype == dtype and b[k].equal(c[k]) for k in b)
    assert json.loads((tmp_path / "c/config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("changes", [{}, dict(tie_word_embeddings=True), MISTRAL], ids=["llama", "tied", "mistral"])
@torch.no_grad()
def test_transformers_reads_what_we_write_and_we_what_it_writes(tmp_path, changes):
    mine, tokens = Transformer.from_pretrained(write_model(tmp_path / "a", **changes)), random_tokens(1, 12)
    mine.save_pretrained(tmp_path / "b")
    theirs = reference(tmp_path / "b")
    theirs.save_pretrained(tmp_path / "c")
    assert_close(theirs(tokens).logits, mine(tokens), **CLOSE)
    assert_close(Transformer.from_pretrained(tmp_path / "c")(tokens), mine(tokens), **CLOSE)


@pytest.mark.parametrize("sizes", [[150_000], [150_000, 10**10], [10**10, 150_000], [300_000, 150_000]], ids=str)
@torch.no_grad()
def test_export_in_several_files_or_over_an_older_one_is_the_same_model(tmp_path, monkeypatch, sizes):
    for seed, size in enumerate(sizes):
        monkeypatch.setattr(model_module, "MAX_FILE_BYTES", size)
        write_model(tmp_path, seed=seed)
    files, index, tokens = sorted(tmp_path.glob("*.safetensors")), tmp_path / INDEX, random_tokens(1, 12)
    assert len(files) == 1 if size == 10**10 else len(files) > 2 and index.exists()
    where = {name: file.name for file in files for name in load_file(file)}
    assert json.loads(index.read_text())["weight_map"] == where if index.exists() else len(files) == 1
    wanted = Transformer.from_pretrained(write_model(tmp_path / "fresh", seed=seed))
    mine = Transformer.from_pretrained(tmp_path).state_dict()
    assert all(mine[name].equal(tensor) for name, tensor in wanted.state_dict().items())
    assert_close(reference(tmp_path)(tokens).logits, wanted(tokens), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float32], ids=str)
def test_weights_of_any_float_type_load_beside_rotary_buffers_of_old_checkpoints(tmp_path, dtype):
    file = write_model(tmp_path) / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file(tensors | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}, file)
    loaded = Transformer.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == tensors.keys() and all(loaded[k].equal(tensors[k].float()) for k in tensors)


NORM, HEAD = "model.layers.1.input_layernorm.weight", "lm_head.weight"
UP, BIAS = "model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"


def tensors(change):
    def spoil(folder):
        content = load_file(folder / "model.safetensors")
        change(content)
        save_file(content, folder / "model.safetensors")

    return spoil


WRONG_FILES = {
    "missing norm": (tensors(lambda t: t.pop(NORM)), f"missing {NORM}"),
    "missing head": (tensors(lambda t: t.pop(HEAD)), f"missing {HEAD}"),
    "surplus layer": (tensors(lambda t: t.update({UP: t[HEAD].clone()})), UP),
    "surplus bias": (tensors(lambda t: t.update({BIAS: t[NORM].clone()})), BIAS),
    "misshapen": (tensors(lambda t: t.update({HEAD: t[HEAD][:9].clone()})), rf"{HEAD}.*\[9, 64\].*\[480, 64\]"),
    "integer": (tensors(lambda t: t.update({NORM: t[NORM].to(torch.int8)})), f"{NORM}.*I8"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json.*no such file"),
    "broken config": (lambda f: (f / "config.json").write_text('{"eos": 2,\n\n"bos" 1}'), r"config\.json:3: "),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "safetensors"),
    "truncated weights": (lambda f: os.truncate(f / "model.safetensors", 99_000), "model.safetensors"),
    "empty weights": (lambda f: (f / "model.safetensors").write_text(""), "model.safetensors"),
    "broken index": (lambda f: (f / INDEX).write_text('{"weight_map"'), INDEX),
    "index without map": (lambda f: (f / INDEX).write_text("{}"), INDEX),
    "index of numbers": (lambda f: (f / INDEX).write_text('{"weight_map": {"x": 3}}'), INDEX),
    "file of the index": (lambda f: (f / INDEX).write_text('{"weight_map": {"x": "absent"}}'), "absent"),
}


@pytest.mark.parametrize("spoil, message", WRONG_FILES.values(), ids=WRONG_FILES)
def test_folder_that_does_not_fit_is_refused_by_the_file_or_tensor_at_fault(tmp_path, spoil, message):
    spoil(write_model(tmp_path))
    with pytest.raises(ValueError, match=message) as caught:
        Transformer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


WRONG_CONFIGS = {
    "hidden_act": dict(hidden_act="gelu"),
    "rope_scaling.*yarn": dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
    "rope_scaling.*dynamic": dict(rope_scaling={"type": "dynamic", "factor": 2.0}),
    "rope_scaling.*linear": dict(rope_scaling={"type": "linear", "factor": 2.0}),
    "rope_parameters.*llama3": dict(rope_parameters={"rope_type": "llama3", "factor": 8.0, "rope_theta": 500.0}),
    "rope_parameters.*layer": dict(rope_parameters={"layer": {"rope_type": "default", "rope_theta": 500.0}}),
    "rope_theta": dict(rope_theta=-1.0), "rope_scaling": dict(rope_scaling="linear"),
    "partial_rotary_factor is 0.5": dict(partial_rotary_factor=0.5),
    "partial_rotary_factor is 0.25": dict(rope_parameters={"rope_theta": 500.0, "partial_rotary_factor": 0.25}),
    "attention_bias": dict(attention_bias=True), "mlp_bias": dict(mlp_bias=True),
    "quantization_config": dict(quantization_config={"quant_method": "awq", "bits": 4}),
    "Qwen2ForCausalLM": dict(architectures=["Qwen2ForCausalLM"]), "qwen2": dict(model_type="qwen2"),
    "model_type": dict(architectures=..., model_type="gpt2"), "vocab_size": dict(vocab_size=...),
    "num_hidden_layers": dict(num_hidden_layers="two"), "num_key_value_heads": dict(num_key_value_heads=3),
    "num_attention_heads": dict(num_attention_heads=0), "head_dim": dict(head_dim=15),
    "tie_word": dict(tie_word_embeddings=2),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_CONFIGS)
def test_config_that_would_change_the_mathematics_is_refused_by_name(tmp_path, name):
    write_config(tmp_path, **WRONG_CONFIGS[name])
    with pytest.raises(ValueError, match=name) as caught:
        Transformer.from_pretrained(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_activation_checkpointing_computes_layers_twice_and_gives_the_same_gradients(folder):
    tokens, gradients, calls = random_tokens(2, 12), [], []
    for flag in (False, True):
        model = Transformer.from_pretrained(folder).train()
        model.activation_checkpointing, seen = flag, []
        norm = model.get_submodule("model.layers.0.input_layernorm")
        norm.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        model(tokens).logsumexp(-1).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        calls.append(len(seen))
    assert calls == [1, 2]
    for name, grad in gradients[0].items():
        assert grad.abs().max() > 0
        assert_close(gradients[1][name], grad, atol=1e-6, rtol=1e-5, msg=name)  # the same operations, run again
