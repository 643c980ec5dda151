"""Models: the ones pretrained for this book, offline by name; any other by local path or hub id.

A bundled model is a folder `data/models/<name>/`: `config.json`, `model.safetensors` (bfloat16, tied
weights stored once), `checksums.json`, and its records `card.md`, `evaluation.json`, `history.json`. All of
them share `data/models/tokenizer.json`. Its revision is the beginning of the SHA-256 of its weights.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from refimpl.paths import atomic_write, data_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# In transformers' LLaMA the padding id becomes the embedding's padding_idx: a row of zeros without gradient.
# So it must be an id that occurs in no text (1), never the end of text (0), which begins every row.
_IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
_SIZES = {"vocab_size": 4096, **_IDS}


def _llama(width: int, layers: int, heads: int, mlp: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        **_SIZES,
    }


GEOMETRIES: dict[str, dict[str, Any]] = {
    "llama-mini": _llama(width=256, layers=12, heads=8, mlp=768),
    "gpt2-mini": {
        "model_type": "gpt2",
        "n_embd": 256,
        "n_layer": 12,
        "n_head": 8,
        "n_positions": 1024,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        **_SIZES,
    },
    "llama-nano": _llama(width=128, layers=6, heads=4, mlp=384),
    "llama-nano-clean": _llama(width=128, layers=6, heads=4, mlp=384),
    "llama-pocket": _llama(width=128, layers=4, heads=4, mlp=384),
}
_TOKENIZER = {
    "bos_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|pad|>",
    # Left: generation continues the last column of a batch.
    "padding_side": "left",
    "clean_up_tokenization_spaces": False,
    "model_max_length": 1024,
}
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


class DamagedModel(ValueError):
    """Weights or a tokenizer that must not be used: truncated, altered, or not what their config says."""


def bundled() -> tuple[str, ...]:
    """Return the names of the models that come with the package.

    >>> bundled()
    ('llama-mini', 'gpt2-mini', 'llama-nano', 'llama-nano-clean', 'llama-pocket')
    """
    return tuple(GEOMETRIES)


def folder_of(name: str) -> Path:
    """Return the folder of a bundled model; `ValueError` for another name.

    >>> folder_of("llama-mini").name
    'llama-mini'
    """
    if name not in GEOMETRIES:
        raise ValueError(f"name must be one of {', '.join(bundled())}, got {name!r}")
    return data_file("models", name)


def revision(name: str) -> str:
    """Return the revision of a bundled model: the first 12 hexadecimal digits of the SHA-256 of its weights.

    Raises `ValueError` for a name that is not bundled, `FileNotFoundError` when the model is not installed.
    """
    return _checksums(name, folder_of(name))["revision"]


def evaluation(name: str) -> dict[str, Any]:
    """Return what was measured when a bundled model was trained: `gates`, `book_score`, `date`, `device`.

    Raises `ValueError` for a name that is not bundled, `FileNotFoundError` when it was not measured, and
    `DamagedModel` for a file that is not whole or belongs to other weights.
    """
    file = folder_of(name) / "evaluation.json"
    if not file.is_file():
        raise FileNotFoundError(f"{name} was not evaluated: no {file}; {_REMEDY}")
    found = _read_json(file, ("gates", "book_score"))
    if found.get("revision", revision(name)) != revision(name):
        raise DamagedModel(f"{file} is of revision {found['revision']}, installed is {revision(name)}")
    return found


def load(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> tuple["PreTrainedModel", "PreTrainedTokenizerFast"]:
    """Load a causal language model and its tokenizer.

    Parameters: `name`, a bundled name (`bundled()`; works offline), the path of a folder that transformers
    saved, or a hub id; `device` and `dtype` of the weights; `revision`, the one that a bundled model must
    have, or a branch, tag or commit of a hub id. The model is in evaluation mode. The tokenizer of a bundled
    model adds nothing to a text: functions that feed text to a model put id 0 in front.
    Raises `DamagedModel` (a `ValueError`) for weights that are altered or truncated, `ValueError` for a
    pickle or another revision, `FileNotFoundError` or `OSError` for what cannot be found; each says what can
    be done.
    """
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype such as torch.float32, got {dtype!r}")
    if not isinstance(name, str | Path):
        raise TypeError(f"name must be a string or a path, got {type(name).__name__}")
    if not str(name).strip():
        raise ValueError(f"name must not be empty; {_available()}")
    if str(name) in GEOMETRIES:
        model, tokenizer = _load_bundled(str(name), dtype, revision)
    else:
        model, tokenizer = _load_other(name, dtype, revision)
    return model.to(device).eval(), tokenizer


def new(name: str, *, seed: int = 0) -> "PreTrainedModel":
    """Return a randomly initialized model with the geometry of a bundled one, float32, in evaluation mode.

    Parameters: `name`, one of `bundled()`; `seed`. torch's global random state is left as it was.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder_of(name)
    config = AutoConfig.for_model(**GEOMETRIES[name])
    # transformers initializes from the global state.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tokenizer_from(file: str | Path) -> "PreTrainedTokenizerFast":
    """Return a `tokenizer.json` as transformers' tokenizer, which adds nothing to a text on its own.

    Raises `FileNotFoundError` when there is no such file, `DamagedModel` when it is not a tokenizer.
    """
    from transformers import PreTrainedTokenizerFast

    if not Path(file).is_file():
        raise FileNotFoundError(f"no tokenizer at {file}")
    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(file), **_TOKENIZER)
    except Exception as error:  # that is the class which the tokenizers library raises
        raise DamagedModel(f"{file} is not a tokenizer.json, or not a whole one ({error})") from error


def save_model(
    model: "PreTrainedModel", folder: str | Path, *, tokenizer_file: str | Path | None = None
) -> str:
    """Write a model as a bundled folder and return its revision.

    Parameters: `model`; `folder`, made if it does not exist; `tokenizer_file`, a `tokenizer.json` to put
    beside it (None: the one in the folder, the one above it that models share, or the package's). Weights are
    rounded to bfloat16. Each file is written whole or not at all and the checksums last, so that `load`
    refuses a folder whose writing was cut short. Raises `FileNotFoundError` when there is no tokenizer.
    """
    from safetensors.torch import save

    folder = Path(folder)
    found = _tokenizer_file(folder)
    if not found.is_file():
        found = data_file("models", "tokenizer.json")
    tokenizer_bytes = Path(tokenizer_file or found).read_bytes()
    weights: dict[str, torch.Tensor] = {}
    stored: set[int] = set()
    for key, tensor in model.state_dict().items():
        if tensor.data_ptr() in stored:
            continue  # a tied weight under its second name
        stored.add(tensor.data_ptr())
        weights[key] = tensor.detach().to("cpu", torch.bfloat16, copy=True).contiguous()
    config = model.config.to_dict() | {"dtype": "bfloat16", "architectures": [type(model).__name__]}
    content = save(weights, metadata={"format": "pt"})
    digest = hashlib.sha256(content).hexdigest()
    checksums = {
        "model.safetensors": digest,
        "tokenizer.json": hashlib.sha256(tokenizer_bytes).hexdigest(),
        "revision": digest[:12],
    }
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", **_TOKENIZER}
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "config.json", _json(config))
    if tokenizer_file is not None:
        atomic_write(folder / "tokenizer.json", tokenizer_bytes)
    atomic_write(folder / "tokenizer_config.json", _json(tokenizer_config))
    atomic_write(folder / "model.safetensors", content)
    atomic_write(folder / "checksums.json", _json(checksums))
    return digest[:12]


# --- bundled --------------------------------------------------------------------------------------


def _load_bundled(name: str, dtype: torch.dtype, revision: str | None) -> tuple[Any, Any]:
    folder = folder_of(name)
    checksums = _checksums(name, folder)
    if revision is not None and revision != checksums["revision"]:
        installed = checksums["revision"]
        raise ValueError(f"revision {revision!r} of {name} is not the one installed, {installed!r}")
    tokenizer_file = _tokenizer_file(folder)
    _verify(folder / "model.safetensors", checksums)
    _verify(tokenizer_file, checksums)
    return _from_pretrained(folder, dtype, local_files_only=True), tokenizer_from(tokenizer_file)


_REMEDY = "reinstall refimpl, restore the file from git, or train the model again with `make models`"


def _verify(file: Path, checksums: dict[str, str]) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; {_REMEDY}")
    if _sha256(file) != checksums[file.name]:
        raise DamagedModel(f"{file} is truncated or altered (its checksum differs); {_REMEDY}")


def _checksums(name: str, folder: Path) -> dict[str, str]:
    file = folder / "checksums.json"
    if not file.is_file():
        raise FileNotFoundError(f"the bundled model {name} is not installed: no {file}; {_REMEDY}")
    return _read_json(file, ("model.safetensors", "tokenizer.json", "revision"))


def _read_json(file: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """Read a model's record; DamagedModel if it is not whole."""
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise DamagedModel(f"{file} is truncated or altered ({error}); {_REMEDY}") from error
    missing = [key for key in keys if not isinstance(found, dict) or key not in found]
    if missing:
        raise DamagedModel(f"{file} is truncated or altered (it lacks {', '.join(missing)}); {_REMEDY}")
    return found


def _tokenizer_file(folder: Path) -> Path:
    """The folder's own tokenizer, or the one that all models beside it share."""
    own, shared = folder / "tokenizer.json", folder.parent / "tokenizer.json"
    return own if own.is_file() else shared


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


# --- local paths and the hub ----------------------------------------------------------------------


def _load_other(name: str | Path, dtype: torch.dtype, revision: str | None) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    path = Path(name)
    if path.suffix in _PICKLES:
        raise ValueError(f"name: {name} is a pickle, which can run code when it is read; {_CONVERT}")
    if path.is_dir():
        if not any(path.glob("*.safetensors")):
            pickles = [file.name for file in sorted(path.iterdir()) if file.suffix in _PICKLES]
            if pickles:
                raise ValueError(f"name: {name} holds its weights as a pickle ({pickles[0]}); {_CONVERT}")
            raise FileNotFoundError(f"name: no *.safetensors in the folder {name}")
        if (path / "checksums.json").is_file():  # a folder that `save_model` wrote
            _verify(path / "model.safetensors", _checksums(path.name, path))
        return _from_pretrained(path, dtype, local_files_only=True), AutoTokenizer.from_pretrained(path)
    a_hub_id = not str(name).startswith((".", "/", "~")) and str(name).count("/") <= 1
    if isinstance(name, Path) or path.exists() or not a_hub_id:
        raise FileNotFoundError(f"name: {name} is not a folder; {_available()}")
    try:
        model = _from_pretrained(name, dtype, revision=revision)
        return model, AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise OSError(
            f"could not load {name!r} (revision {revision or 'main'}): it is not a bundled name, there is no "
            f"folder of that name, and the Hugging Face hub gave no safetensors model under that id "
            f"({_first_line(error)}). {_available()}"
        ) from error


_CONVERT = "save it as safetensors first: model.save_pretrained(folder)"


def _available() -> str:
    return "Bundled models, which need no network: " + ", ".join(bundled())


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _from_pretrained(source: str | Path, dtype: torch.dtype, **where: Any) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        with _quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, use_safetensors=True, output_loading_info=True, **where
            )
    except SafetensorError as error:
        raise DamagedModel(f"the weights of {source} are truncated or altered ({error})") from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:5])
        raise DamagedModel(f"the weights of {source} lack {missing}: they do not belong to its config.json")
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar of transformers over a tenth of a second of reading."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
