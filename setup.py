"""The one build step that pyproject.toml cannot say: the wheel carries models, adapters and the world."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = ("models", "adapters", "world")
SUFFIXES = {".safetensors", ".json", ".jsonl", ".toml", ".txt", ".md"}


class BuildPyWithData(build_py):
    """Copy `data/` to `refimpl/_data` of the build; an editable install reads the checkout's `data/`."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "refimpl" / "_data"
        shutil.rmtree(target, ignore_errors=True)  # what an older build left would ship as well
        for folder in FOLDERS:
            for source in sorted(Path("data", folder).rglob("*")):
                if source.suffix in SUFFIXES and "checkpoints" not in source.parts:
                    copy = target / source.relative_to("data")
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, copy)


setup(cmdclass={"build_py": BuildPyWithData})
