"""Bad input at the doors of the ground floor: each a clear error, and nothing changed.

One section for each kind; the single modules' tests go further into their own.
"""

import json
import subprocess
import sys

import pytest
import torch

from refimpl import checks, models, systems
from refimpl.__main__ import main
from refimpl.backbone import Backbone
from refimpl.checks.tiny import tiny
from refimpl.corpus import read_books
from refimpl.evaluate import ChoiceItem, choice_logps, greedy_answers, score_documents, token_nll
from refimpl.models import DamagedModel, load, new, save_model, tokenizer_from
from refimpl.paths import data_file
from refimpl.scoring import encode_items, sample, score_completions
from refimpl.trace import trace
from refimpl.world.gates import evaluate_gates

NAME = "llama-pocket"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / NAME
    save_model(new(NAME), folder, tokenizer_file=data_file("models", "tokenizer.json"))
    return folder


@pytest.fixture
def folder(pristine, tmp_path, monkeypatch):
    """The folder of a bundled model that a test may damage."""
    copy = tmp_path / "models" / NAME
    copy.mkdir(parents=True)
    for file in pristine.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(models, "data_file", lambda *parts: tmp_path.joinpath(*parts))
    return copy


@pytest.fixture(scope="module")
def pocket():
    return new(NAME), tokenizer_from(data_file("models", "tokenizer.json"))


# --- weights: missing, truncated, altered ---------------------------------------------------------


def damage(file, how):
    whole = file.read_bytes()
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes({"truncated": whole[:-100], "no header": whole[:20], "empty": b"",
                          "altered": whole[:-1] + bytes([whole[-1] ^ 1])}[how])  # fmt: skip


@pytest.mark.parametrize("by", ["name", "path"])
@pytest.mark.parametrize("how", ["missing", "truncated", "no header", "empty", "altered"])
def test_damaged_weights_are_refused_by_name_and_by_path(folder, how, by):
    damage(folder / "model.safetensors", how)
    error = FileNotFoundError if how == "missing" else DamagedModel
    with pytest.raises(error, match="safetensors"):
        load(NAME if by == "name" else folder)


@pytest.mark.parametrize("how", ["truncated", "no header", "empty"])
def test_damaged_weights_of_another_program_are_refused(folder, how):
    (folder / "checksums.json").unlink()
    damage(folder / "model.safetensors", how)
    with pytest.raises(DamagedModel, match=f"weights of .*{NAME} are truncated or altered"):
        load(folder)


@pytest.mark.parametrize("content", [b"", b'{"revision": "0', b"[]", b"{}", b"\xff\xfe"])
def test_a_damaged_record_of_checksums_is_refused(folder, content):
    (folder / "checksums.json").write_bytes(content)
    with pytest.raises(DamagedModel, match="checksums.json is truncated or altered"):
        load(NAME)


@pytest.mark.parametrize("content", [b"", b'{"gates": [', b"null", b'{"gates": []}'])
def test_a_damaged_evaluation_is_refused(folder, content, capsys):
    (folder / "evaluation.json").write_bytes(content)
    with pytest.raises(DamagedModel, match="evaluation.json is truncated or altered"):
        models.evaluation(NAME)
    assert main(["evaluate", NAME]) == 1
    assert "evaluation.json is truncated or altered" in capsys.readouterr().err


def test_an_evaluation_that_is_missing_or_of_other_weights_is_refused(folder):
    with pytest.raises(FileNotFoundError, match=f"{NAME} was not evaluated"):
        models.evaluation(NAME)
    record = {"gates": [], "book_score": None, "revision": "0123456789ab"}
    (folder / "evaluation.json").write_text(json.dumps(record))
    with pytest.raises(DamagedModel, match="is of revision 0123456789ab, installed is"):
        models.evaluation(NAME)


# --- a prompt longer than the context -------------------------------------------------------------


def test_a_prompt_longer_than_the_context(pocket):
    model, tokenizer = pocket
    long = "word " * 2000
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match=r"prompts\[0\]: 1020 \+ 5 new tokens, the context is 1024"):
        sample(model, [[0] * 1020], 5, generator)
    with pytest.raises(ValueError, match=r"prompts\[1\]: .*exceed the context of 1024"):
        greedy_answers(model, [[5], [5] * 1024], 2)
    with pytest.raises(ValueError, match=r"items\[0\]: .*the model's context is 1024"):
        score_completions(model, encode_items(tokenizer, [(long, " A")]))
    with pytest.raises(ValueError, match=r"items\[0\] needs .* max_len is 1024"):
        choice_logps(model, tokenizer, [ChoiceItem(long.strip(), (" A", " B"), 0)])
    with pytest.raises(ValueError, match="max_len 1025 exceeds the model's context of 1024"):
        token_nll(model, [5, 6], max_len=1025)


def test_learned_positions_end_with_the_context():
    model = tiny("gpt2")
    ids = torch.zeros(1, model.config.max_position_embeddings + 1, dtype=torch.long)
    for call in (lambda: Backbone(model).forward(ids), lambda: trace(model, ids)):
        with pytest.raises(ValueError, match="positions"):
            call()


# --- unknown names --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "allowed"),
    [
        (lambda: systems.system("nothing"), "nothing"),
        (lambda: checks.run("nothing"), "trace"),
        (lambda: new("gpt3"), "llama-mini, gpt2-mini"),
        (lambda: models.revision("gpt3"), "llama-mini, gpt2-mini"),
        (lambda: models.evaluation("gpt3"), "llama-mini, gpt2-mini"),
        (lambda: evaluate_gates(None, None, "gpt3"), "llama-mini, gpt2-mini"),
        (lambda: evaluate_gates(None, None, NAME, only=("taste",)), "needle_mean"),
    ],
)
def test_unknown_names_are_answered_with_the_allowed_ones(call, allowed):
    with pytest.raises((ValueError, KeyError), match=allowed):
        call()


def test_a_name_that_cannot_be_one():
    with pytest.raises(ValueError, match="name must not be empty.*llama-mini"):
        load("")
    with pytest.raises(TypeError, match="name must be a string or a path, got NoneType"):
        load(None)


# --- empty text -----------------------------------------------------------------------------------


def test_empty_text(pocket, tmp_path):
    model, tokenizer = pocket
    (tmp_path / "empty.txt").write_text(" \n")
    for call, message in [
        (lambda: score_documents(model, tokenizer, ["a", ""]), r"texts\[1\] is empty"),
        (lambda: token_nll(model, []), "ids must be a non-empty"),
        (lambda: encode_items(tokenizer, []), "items: empty"),
        (lambda: score_completions(model, encode_items(tokenizer, [("a", "")])), r"items\[0\]: prompt and"),
        (lambda: sample(model, [], 5, torch.Generator()), "prompts: at least one"),
        (lambda: sample(model, [[]], 5, torch.Generator()), "prompts: at least one"),
        (lambda: greedy_answers(model, [[]], 2), "non-empty"),
        (lambda: Backbone(model).forward(torch.zeros(1, 0, dtype=torch.long)), "non-empty LongTensor"),
        (lambda: trace(model, torch.zeros(1, 0, dtype=torch.long)), "non-empty LongTensor"),
        (lambda: read_books(tmp_path / "empty.txt"), "empty.txt holds no text"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


# --- text that is not UTF-8 -----------------------------------------------------------------------


def test_what_is_not_utf8(tmp_path):
    file = tmp_path / "latin1.txt"
    file.write_bytes("Drei Bücher.".encode("latin-1"))
    with pytest.raises(ValueError, match="latin1.txt is not UTF-8"):
        read_books(file)
    with pytest.raises(DamagedModel, match="latin1.txt is not a tokenizer.json"):
        tokenizer_from(file)


# --- a full disk ----------------------------------------------------------------------------------

FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from refimpl.models import load, new, save_model
from refimpl.results import store
from refimpl.training import Rows, TrainConfig, train

folder = Path(sys.argv[1])
tokens = torch.randint(300, 4096, (4, 16), generator=torch.Generator().manual_seed(0)).numpy()
def save(): save_model(new("llama-pocket", seed=7), folder / "llama-pocket")
def checkpoint():
    config = TrainConfig(steps=2, batch=2, lr=1e-3, warmup=0, decay_fraction=0.0)
    train(new("llama-pocket"), Rows(tokens, 2), config, out_dir=folder / "run", time_limit=0, progress=False)
def result():
    numbers = ["x" * 90] * 9999
    store(folder / "a.json", command="x", summary="x", sources=[], root=folder, packages=(), numbers=numbers)

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for call in (save, checkpoint, result):
    call()
files = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # no file of this process may grow further
for call in (save, checkpoint, result):
    try:
        call()
    except OSError as error:
        print(call.__name__, "OSError", error)
assert {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()} == files, "a file changed"
load(folder / "llama-pocket")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files")
def test_a_disk_that_is_full_leaves_every_old_file_whole(tmp_path):
    """The operating system refuses to write further, in a process of its own."""
    save_model(new(NAME), tmp_path / NAME, tokenizer_file=data_file("models", "tokenizer.json"))
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["save", "OSError"], ["checkpoint", "OSError"], ["result", "OSError"]
    ], done.stdout  # fmt: skip
