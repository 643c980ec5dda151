"""What ships: versions, pins, data in the wheel, nothing of the machine on which it was made."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import refimpl

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
VERSION = PYPROJECT["project"]["version"]
REQUIREMENTS = [
    Requirement(text)
    for group in [
        PYPROJECT["project"]["dependencies"],
        *PYPROJECT["project"]["optional-dependencies"].values(),
    ]
    for text in group
]
NOT_OURS = ("book/_static/vendor/", "data/world/")
TEXT = {".py", ".md", ".toml", ".txt", ".yml", ".cff", ".ipynb", ".json", ".bib", ".css", ".sh", ".svg", ""}


def files() -> list[Path]:
    """The files of the repository that are or would be committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout: there is no list of files")
    return [
        ROOT / name for name in sorted(set(listed.stdout.split("\0"))) if name and (ROOT / name).is_file()
    ]


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert VERSION == refimpl.__version__ == citation["version"] == newest


def test_every_constraint_is_an_exact_version_and_nothing_else():
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        assert re.fullmatch(r"#.*|[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line), f"not an exact pin: {line!r}"
    assert constraints()["torch"] == "2.13.0"


def test_every_pin_lies_in_the_range_that_pyproject_supports():
    pins = {canonical(name): Version(version) for name, version in constraints().items()}
    for requirement in REQUIREMENTS:
        if requirement.name in ("lm-eval", "bitsandbytes", "torchao"):
            continue  # of the extra `peers`, which `make test` does not install
        pin = pins.get(canonical(requirement.name))
        assert pin is not None, f"{requirement} has no line in constraints.txt"
        assert requirement.specifier.contains(pin), (
            f"constraints.txt pins {pin}, pyproject allows {requirement}"
        )


def test_supported_ranges_have_both_ends():
    ranges = {r.name: str(r.specifier) for r in REQUIREMENTS}
    assert ranges["torch"] == "<2.14,>=2.11" and ranges["transformers"] == "<5.24,>=5.2"
    assert ranges["jupyter-book"] == "<2,>=1.0.4.post1"
    assert PYPROJECT["project"]["requires-python"] == ">=3.11,<3.14"


def test_no_file_names_a_path_of_this_machine_or_a_package_registry():
    machine = re.compile(r"/(work|farm|root)/|/opt/(pypi|wheels)|/tmp/(studio|inst|helpers)|/home/[a-z]+/")
    registry = re.compile(r"pypi\.(org|python\.org)|files\.pythonhosted\.org|registry\.npmjs\.org|"
                          r"(conda\.anaconda|repo\.anaconda)\.(org|com)")  # fmt: skip
    pytorch = re.compile(r"download\.pytorch\.org")
    allowed = {"README.md", "binder/requirements.txt"}  # the two that must say where the CPU build is
    found = []
    for path in files():
        name = path.relative_to(ROOT).as_posix()
        if path.suffix not in TEXT or name.startswith(NOT_OURS) or path == Path(__file__):
            continue
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            text = re.sub(r'"image/png": "[^"]*"|base64,[A-Za-z0-9+/=]+', "", text)
        found += [f"{name}: {m.group()}" for m in [*machine.finditer(text), *registry.finditer(text)]]
        if pytorch.search(text) and name not in allowed:
            found.append(f"{name}: {pytorch.search(text).group()}")
    assert not found, "\n".join(found)


def test_every_jupyter_book_requirement_stays_below_version_2():
    for path in files():
        if path.name in {"requirements.txt", "environment.yml", "README.md", "Makefile"}:
            for match in re.finditer(r"install[^\n]*jupyter-book\S*", path.read_text(encoding="utf-8")):
                assert "<2" in match.group(), f"{path.name}: {match.group()}"


def test_readme_and_makefile_agree_on_the_targets():
    targets = set(
        re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    wanted = {"book", "serve", "test", "lab", "notebooks", "models", "evaluate", "bench", "peers", "compat",
              "dist", "doctor", "clean"}  # fmt: skip
    assert wanted <= targets
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [t for t in sorted(wanted) if f"`make {t}" not in readme and f"`{t}`" not in readme] == []


MIB = 2**20
SHIPPED = {"models", "adapters", "world"}  # the folders of data/ that the wheel carries


@pytest.mark.parametrize(
    "folder, limit",
    [("data/models", 52 * MIB), ("data/adapters", 24 * MIB), ("data/world", 4 * MIB),
     ("data/results", 6 * MIB), ("", 120 * MIB)],
)  # fmt: skip
def test_the_tree_keeps_to_its_size(folder, limit):
    size = sum(f.stat().st_size for f in files() if f.relative_to(ROOT).as_posix().startswith(folder))
    assert size <= limit, f"{folder or 'the tree'} takes {size / MIB:.1f} MiB, allowed are {limit / MIB:.0f}"


def test_no_adapter_is_over_3_mib():
    big = [f.name for f in files() if "data/adapters/" in f.as_posix() and f.stat().st_size > 3 * MIB]
    assert not big


def test_every_data_file_that_is_not_a_script_is_of_a_kind_that_the_wheel_takes():
    suffixes = set(
        re.search(r"SUFFIXES = \{(.*)\}", (ROOT / "setup.py").read_text())[1].replace('"', "").split(", ")
    )
    for path in files():
        parts = path.relative_to(ROOT).parts
        if parts[:1] == ("data",) and parts[1] in SHIPPED and path.suffix != ".py":
            assert path.suffix in suffixes, f"{path.name} would not be in the wheel (setup.py, SUFFIXES)"


def test_the_wheel_holds_code_catalogue_type_mark_and_data(tmp_path):
    """Build the wheel of a small project with our build files, and look into it."""
    project = tmp_path / "project"
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "LICENSE-prose"):
        target = project / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    contents = {
        "refimpl/__init__.py": "", "refimpl/py.typed": "", "refimpl/systems.toml": "",
        "refimpl/kv/__init__.py": "", "refimpl/kv/table.toml": "",
        "data/models/tiny/model.safetensors": "x", "data/models/tiny/tokenizer.json": "",
        "data/models/tiny/README.md": "", "data/models/tiny/checkpoints/model.safetensors": "x",
        "data/adapters/a/adapter.safetensors": "x", "data/world/qa.jsonl": "", "data/world/gates.toml": "",
        "data/world/make.py": "", "data/results/bench.json": "", "data/pretrain.py": "",
        "tests/test_x.py": "",
    }  # fmt: skip
    for name, text in contents.items():
        target = project / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index",
         "--wheel-dir", "out"],
        cwd=project, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = (project / "out").glob("*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    data = {
        n
        for n in contents
        if n.split("/")[:2] in (["data", "models"], ["data", "adapters"], ["data", "world"])
    }
    data -= {"data/models/tiny/checkpoints/model.safetensors", "data/world/make.py"}
    code = {n for n in contents if n.startswith("refimpl/")}
    assert names == code | {n.replace("data/", "refimpl/_data/", 1) for n in data}
