"""What a user installs: a wheel that works alone, and a source archive whose tests run. Needs no network."""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import scorefield

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("attack", "controlnet", "distill", "edit", "scorefield", "sds", "toyworld")
LAZY = {"torch", "diffusers", "transformers", "accelerate", "nerfstudio", "kornia", "tyro"}
NOT_SHIPPED = shutil.ignore_patterns(
    ".git", ".venv*", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "runs", "build", "dist", "site"
)


def call(*words, **options):
    result = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=1200, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def build(kind, tree, out):
    """What pip calls to build one."""
    call(sys.executable, "-c", f"from setuptools.build_meta import *; build_{kind}({str(out)!r})", cwd=tree)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the repository: what is built leaves files beside the sources."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("tree") / "scorefield", ignore=NOT_SHIPPED)


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    build("wheel", tree, out)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The commands of an environment that holds the wheel and the libraries, and nothing of the repository."""
    folder = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", folder)
    # -I: what PYTHONPATH holds must not look installed.
    call(folder / "bin" / "python", "-I", "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    own = next(folder.glob("lib/python*/site-packages"))
    (own / "libraries.pth").write_text(sysconfig.get_paths()["purelib"])
    return folder / "bin"


@pytest.fixture
def alone(tmp_path):
    """Where a user would be who has never seen the repository."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {"cwd": tmp_path, "env": {**environment, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}}


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_what_the_toy_world_needs(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if ".dist-info/" not in name} == shipped
    assert {f"{package}/py.typed" for package in PACKAGES} < names


@pytest.mark.slow
def test_the_wheel_says_what_it_is(wheel):
    archive = zipfile.ZipFile(wheel)
    assert wheel.name == f"scorefield-{scorefield.__version__}-py3-none-any.whl"
    metadata = archive.read(f"scorefield-{scorefield.__version__}.dist-info/METADATA").decode().split("\n\n")[0]
    assert "License-Expression: Apache-2.0" in metadata
    requirements = re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)
    assert all(re.search(r"[=>]=\d|^mkdocstrings", line) for line in requirements), "every dependency has a floor"


def test_the_version_is_that_of_the_change_log():
    assert f"\n## {scorefield.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {scorefield.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_library_that_is_imported_is_a_requirement():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = config["options"]["install_requires"] + "\n".join(config["options.extras_require"].values())
    known = {re.split(r"[^\w-]", line)[0].lower().replace("-", "_") for line in listed.splitlines() if line}
    called = {"PIL": "pillow", "yaml": "pyyaml", "skimage": "scikit_image", "sklearn": "scikit_learn",
              "imageio_ffmpeg": "imageio"}  # fmt: skip
    imported = set()
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    # Of --optimizer adamw8bit, and of AutoAttack: their messages say what to install.
    optional = {"bitsandbytes", "autoattack", "torchattacks"}
    foreign = imported - sys.stdlib_module_names - set(PACKAGES) - optional
    assert {called.get(name, name) for name in foreign} <= known


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "--version",
        "demo --dry-run",
        "distill toyworld-1step --dry-run",
        "control toyworld-canny --dry-run",
        "sample --teacher toyworld --prompts mug --num-images 1 --steps 2 --out drawn",
    ],
)
def test_commands_of_an_installed_wheel_run_anywhere(installed, alone, words):
    said = call(installed / "scorefield", *words.split(), **alone).stdout
    if words == "--version":
        assert said == f"scorefield {scorefield.__version__}\n"
    elif "--dry-run" in words:
        assert re.search(r"steps: |\"teacher_steps\": ", said)
        assert not [path for path in alone["cwd"].rglob("*") if path.name == "checkpoints"]
    else:
        assert len(list(alone["cwd"].glob("drawn/**/*.png"))) == 1


@pytest.mark.slow
def test_python_m_scorefield_is_the_same_command(installed, alone):
    assert call(installed / "python", "-m", "scorefield", "--help", **alone).stdout.startswith("usage: scorefield")


@pytest.mark.slow
def test_the_package_that_is_imported_is_the_installed_one_and_costs_nothing(installed, alone):
    program = "import scorefield; print(scorefield.__file__)"
    result = call(installed / "python", "-X", "importtime", "-c", program, **alone)
    assert Path(result.stdout.strip()).is_relative_to(installed.parent)
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "scorefield" in imported
    assert not {name.split(".")[0] for name in imported} & LAZY


@pytest.mark.slow
def test_the_source_archive_is_whole_and_its_tests_run(tree, tmp_path):
    build("sdist", tree, tmp_path)
    archive = next(tmp_path.glob("*.tar.gz"))
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    folder = tmp_path / archive.name.removesuffix(".tar.gz")

    def files(place):
        return {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}

    left_out = {".gitignore"}
    there = {name for name in files(tree) if not name.startswith(("build/", "scorefield.egg-info/"))}
    assert there - files(folder) == left_out & there
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    chosen = ["tests/test_schedule.py", "tests/test_readme.py::test_named_files_exist"]
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    said = call(*words, cwd=folder, env=environment)
    assert re.search(r"\d+ passed", said.stdout)
