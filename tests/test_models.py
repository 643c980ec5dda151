"""Loading and saving models: bundled folders, local paths, and everything that can be wrong with them."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from refimpl import models
from refimpl.models import DamagedModel, bundled, load, new, save_model

SPECIAL = ["<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>"]


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the bear went over the mountain"] * 20, trainer)
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, tokenizer_file):
    """A data folder with two bundled models: random weights, shared tokenizer."""
    data = tmp_path_factory.mktemp("data")
    (data / "models").mkdir()
    shutil.copy(tokenizer_file, data / "models" / "tokenizer.json")
    for name in ("llama-pocket", "gpt2-mini"):
        save_model(new(name, seed=1), data / "models" / name)
    return data


@pytest.fixture
def data(pristine, tmp_path, monkeypatch):
    copy = tmp_path / "data"
    shutil.copytree(pristine, copy)
    monkeypatch.setattr(models, "data_file", lambda *parts: copy.joinpath(*parts))
    return copy


@pytest.mark.parametrize("name", ["llama-pocket", "gpt2-mini"])
def test_save_and_load_keep_the_weights_rounded_to_bfloat16(data, name):
    model, _ = load(name)
    original = new(name, seed=1)
    for (key, saved), (other, weight) in zip(
        model.state_dict().items(), original.state_dict().items(), strict=True
    ):
        assert key == other and saved.dtype == torch.float32
        assert torch.equal(saved, weight.to(torch.bfloat16).float()), key
    assert not model.training
    tied = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert tied[0] is tied[1]
    from safetensors import safe_open

    with safe_open(data / "models" / name / "model.safetensors", "pt") as file:
        assert not any("lm_head" in key for key in file.keys())
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}


def test_load_gives_the_logits_of_the_model_that_was_saved(data):
    original = new("llama-pocket", seed=1).to(torch.bfloat16).float()
    model, _ = load("llama-pocket")
    ids = torch.tensor([[0, 7, 9, 300]])
    torch.testing.assert_close(model(ids).logits, original(ids).logits)
    half, _ = load("llama-pocket", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_geometries():
    llama, gpt2 = new("llama-mini"), new("gpt2-mini")
    assert (type(llama).__name__, type(gpt2).__name__) == ("LlamaForCausalLM", "GPT2LMHeadModel")
    count = lambda model: sum(p.numel() for p in model.parameters())
    # By hand. LLaMA: embedding; 12 x (q and o, k and v of 2 heads in 8, three MLP matrices, two norms); norm.
    assert count(llama) == 4096 * 256 + 12 * (2 * 256**2 + 2 * 256 * 64 + 3 * 256 * 768 + 2 * 256) + 256
    # GPT-2: embeddings; 12 x (qkv, out, MLP, two norms, with biases); norm.
    block = 256 * 768 + 768 + 256**2 + 256 + 2 * 256 * 1024 + 1024 + 256 + 4 * 256
    assert count(gpt2) == (4096 + 1024) * 256 + 12 * block + 512
    assert llama.config.head_dim == 32 and new("llama-nano").config.num_hidden_layers == 6
    assert {new(name).config.max_position_embeddings for name in bundled()} == {1024}
    for name in bundled():
        c = new(name).config
        assert (c.vocab_size, c.bos_token_id, c.eos_token_id, c.pad_token_id) == (4096, 0, 0, 1)
    # The end of text begins every row: its embedding must learn.
    embedding = llama.get_input_embeddings()
    assert embedding.padding_idx == 1 and embedding.weight[0].abs().sum() > 0


def test_new_depends_on_its_seed_only():
    weight = lambda model: model.get_input_embeddings().weight
    torch.manual_seed(5)
    first = new("llama-pocket", seed=3)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    assert torch.equal(weight(first), weight(new("llama-pocket", seed=3)))
    assert not torch.equal(weight(first), weight(new("llama-pocket", seed=4)))


def test_the_tokenizer_adds_nothing_and_returns_every_text(data):
    _, tokenizer = load("llama-pocket")
    text = "the bear , went  over\n\nthe mountain 's é <|user|> x"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert ids[0] > len(SPECIAL) and 2 in ids and tokenizer("").input_ids == []
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (0, 0, 1)
    batch = tokenizer(["the", "the bear went"], padding=True, return_tensors="pt")
    assert batch.input_ids[0, 0] == 1 and batch.attention_mask[0, 0] == 0


def test_generate_works(data):
    model, tokenizer = load("llama-pocket")
    ids = torch.tensor([[0, *tokenizer("the bear").input_ids]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert ids.shape[1] < out.shape[1] <= ids.shape[1] + 3


def test_load_is_fast(data):
    load("gpt2-mini")  # imports
    seconds = []
    for _ in range(3):
        start = time.process_time()
        load("gpt2-mini")
        seconds.append(time.process_time() - start)
    assert min(seconds) < 5  # of this process, which needs about 0.2, however busy the machine is


def test_load_prints_nothing(data, capfd):
    load("llama-pocket")
    assert capfd.readouterr() == ("", "")


# --- what can be wrong ----------------------------------------------------------------------------


def test_damaged_weights(data):
    file = data / "models" / "llama-pocket" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(DamagedModel, match="truncated or altered.*make models"):
        load("llama-pocket")
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DamagedModel, match="truncated or altered"):
        load("llama-pocket")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="is missing; reinstall"):
        load("llama-pocket")
    file.write_bytes(whole)
    load("llama-pocket")


def test_damaged_tokenizer_and_absent_model(data):
    with pytest.raises(FileNotFoundError, match="llama-mini is not installed.*make models"):
        load("llama-mini")
    shared = data / "models" / "tokenizer.json"
    shared.write_text(shared.read_text() + " ")
    with pytest.raises(DamagedModel, match="tokenizer.json is truncated or altered"):
        load("llama-pocket")
    shared.unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer.json is missing"):
        load("llama-pocket")


def test_revision(data):
    revision = models.revision("llama-pocket")
    assert len(revision) == 12 and revision != models.revision("gpt2-mini")
    load("llama-pocket", revision=revision)
    with pytest.raises(ValueError, match=f"revision 'main' of llama-pocket is not.*installed, '{revision}'"):
        load("llama-pocket", revision="main")
    with pytest.raises(ValueError, match="name must be one of llama-mini, gpt2-mini"):
        models.revision("gpt3")


@pytest.mark.parametrize("victim", ["model.safetensors", "checksums.json"])
def test_full_disk_while_saving(data, monkeypatch, victim):
    """The file that was being written stays as it was; a folder of two generations is refused."""
    folder = data / "models" / "llama-pocket"
    before = (folder / victim).read_bytes()
    write_bytes = Path.write_bytes

    def full(path, content):
        if victim in path.name:
            write_bytes(path, content[:10])
            raise OSError(28, "No space left on device")
        return write_bytes(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            save_model(new("llama-pocket", seed=2), folder)
    assert (folder / victim).read_bytes() == before
    assert not list(folder.glob(".*"))
    if victim == "model.safetensors":
        load("llama-pocket")
    else:
        with pytest.raises(DamagedModel, match="altered"):
            load("llama-pocket")


def test_pickles_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match="pickle.*save_pretrained"):
        load(tmp_path / "pytorch_model.bin")
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickle \(pytorch_model.bin\)"):
        load(folder)
    with pytest.raises(FileNotFoundError, match="no .*safetensors in the folder"):
        load(data)


def test_local_path(data, tmp_path, tokenizer_file):
    folder = tmp_path / "mine"
    save_model(new("llama-pocket", seed=7), folder, tokenizer_file=tokenizer_file)
    model, tokenizer = load(folder)
    original = new("llama-pocket", seed=7).to(torch.bfloat16).float()
    assert torch.equal(model.get_input_embeddings().weight, original.get_input_embeddings().weight)
    assert tokenizer("the bear").input_ids == models.tokenizer_from(tokenizer_file)("the bear").input_ids
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DamagedModel, match="lack model.layers.4"):
        load(folder)


def test_unreachable_names(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="is not a folder; Bundled.*gpt2-mini"):
        load("./nowhere")
    with pytest.raises(OSError) as caught:
        load("nobody/nothing", revision="v2")
    tried = ("nobody/nothing", "revision v2", "not a bundled name", "no folder", "hub")
    for part in (*tried, *bundled()):
        assert part in str(caught.value)


def test_bad_arguments():
    with pytest.raises(TypeError, match="dtype must be a torch.dtype"):
        load("llama-mini", dtype="float32")
    with pytest.raises(ValueError, match="name must be one of"):
        new("gpt2")


def test_importing_models_imports_no_transformers():
    code = "import refimpl.models, refimpl.training, sys; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
