"""Make what a release ships, into dist/: the wheel, the EPUB, and a zip of the offline book (`make dist`)."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"


def epub_config(config: dict, version: str) -> dict:
    """The book's configuration as the EPUB builder needs it.

    No launch buttons (the theme's handler for them fails without its HTML pages), and of an output that is
    both HTML and picture the picture: readers of EPUB run no scripts.
    """
    epub = {
        key: value for key, value in config.items() if key not in {"launch_buttons", "repository", "html"}
    }
    sphinx = epub.get("sphinx", {})
    epub["sphinx"] = sphinx | {
        # relative to the configuration file, which is not in the root here
        "local_extensions": {k: str(ROOT / v) for k, v in sphinx.get("local_extensions", {}).items()},
        "config": sphinx.get("config", {})
        | {
            "project": config["title"],
            "version": version,
            "release": version,
            "epub_show_urls": "no",
            "nb_mime_priority_overrides": [["epub", "image/png", 1]],
        }
    }
    return epub


def run(*command: str | Path) -> None:
    """Run a command in the repository's root; a failure ends the program."""
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True)


def main() -> int:
    """Build all three; the HTML of the zip is that of `make book`, which ran before."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    shutil.rmtree(DIST, ignore_errors=True)
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # an old build's modules would go into the wheel
    DIST.mkdir()
    run(sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--wheel-dir", DIST)

    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    out = ROOT / "_build" / "epub-book"
    out.mkdir(parents=True, exist_ok=True)
    config_file = out / "_config.yml"
    config_file.write_text(yaml.safe_dump(epub_config(config, version)), encoding="utf-8")
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    run(jupyter_book, "build", ".", "--config", config_file, "--path-output", out,
        "--builder", "custom", "--custom-builder", "epub", "--keep-going")  # fmt: skip
    (epub,) = (out / "_build" / "epub").glob("*.epub")
    shutil.copyfile(epub, DIST / f"memory-to-alignment-{version}.epub")

    shutil.make_archive(str(DIST / f"memory-to-alignment-{version}-html"), "zip", ROOT / "_build" / "html")
    for file in sorted(DIST.iterdir()):
        print(f"{file.stat().st_size / 1e6:8.1f} MB  {file.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
