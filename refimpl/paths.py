"""Where the package's data lie, and the one way to write a file."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

_INSTALLED = Path(__file__).resolve().parent / "_data"
_CHECKOUT = Path(__file__).resolve().parent.parent / "data"


def data_file(*parts: str) -> Path:
    """Return the path of a data file: the installed package's copy if there is one, else the checkout's.

    Parameters: `parts`, the path below the data folder, for example `"models", "llama-mini"`. The file
    need not exist: who reads it says what is missing. Raises `ValueError` for a path that leaves the folder.

    >>> data_file("models", "llama-mini").parts[-2:]
    ('models', 'llama-mini')
    """
    relative = Path(*parts)
    if relative.is_absolute() or ".." in relative.parts:
        raise ValueError(f"parts must stay inside the data folder, got {str(relative)!r}")
    return (_INSTALLED if _INSTALLED.is_dir() else _CHECKOUT) / relative


def atomic_write(path: str | Path, content: bytes | Callable[[Path], None]) -> None:
    """Write a file whole or not at all: into a temporary file of the same folder, which then replaces it.

    Parameters: `path`, in a folder that exists; `content`, the bytes, or a function that writes the file
    whose path it is given. Whatever goes wrong (a full disk, a kill), an older file stays as it was.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "note.txt"
    >>> atomic_write(file, b"kept")
    >>> file.read_text()
    'kept'
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            content(temporary)
        # mkstemp makes files that only their owner can read; give them the usual rights, less the umask.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        # On the disk before the rename: else a power cut could leave the new name with no content.
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
