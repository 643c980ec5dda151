"""Print what is installed: `make doctor`."""

import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path

PACKAGES = ("refimpl", "torch", "transformers", "safetensors", "numpy", "jupyter-book", "pytest", "nbval")


def folder_mb(folder: Path) -> float:
    """Size of a folder's files in MB (10^6 bytes)."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6


def torch_build() -> str:
    """Which PyTorch build is installed, and its size; found without importing it."""
    version = importlib.metadata.version("torch")
    folder = Path(importlib.util.find_spec("torch").origin).parent
    # the local part of the version names the build: +cpu, +cu130; macOS and Windows wheels have none
    build = version.partition("+")[2] or "default build of the package index"
    gpu = [d for d in importlib.metadata.distributions() if d.metadata["Name"].startswith("nvidia-")]
    return f"{build}, {folder_mb(folder):.0f} MB" + (f", with {len(gpu)} GPU libraries" if gpu else "")


def main() -> int:
    """Print the report; 1 if a package is missing."""
    print(f"python         {platform.python_version()} on {platform.system()} {platform.machine()}")
    missing = []
    for name in PACKAGES:
        try:
            print(f"{name:14} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            print(f"{name:14} MISSING: run `make install`")
    if "torch" not in missing:
        print(f"torch build    {torch_build()}")
    print(f"cores          {os.cpu_count()}; OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}")
    for weights in sorted(Path("data").glob("*/*/*.safetensors")):
        print(f"{weights.parent.name:14} {weights.stat().st_size / 1e6:.1f} MB")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
