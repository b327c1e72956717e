"""The dependency rules of the architecture, read from the source, and what importing the core may cost."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ("score", "toyworld", "distill", "sds", "controlnet")
CODE = (*LIBRARY, "train_scripts", "benchmarks")

# Which package may import which; itself always. Nothing between the three pillars.
PACKAGES = {
    "score": set(),
    "toyworld": {"score"},
    "distill": {"score"},
    "sds": {"score"},
    "controlnet": {"score"},
    "train_scripts": set(LIBRARY),
    "benchmarks": set(LIBRARY),
}

# Which module of score may import which others. A new module needs a row here.
MODULES = {
    "schedule": set(),
    "randomness": set(),
    "cache": set(),
    "times": {"schedule"},
    "network": {"schedule"},
    "wrapping": set(),
    "lock": set(),
    "denoiser": {"schedule", "wrapping"},
    "data_scale": {"schedule", "denoiser"},
    "guidance": {"schedule", "denoiser"},
    "exact": {"schedule", "denoiser"},
    "files": set(),
    "weights": {"files"},
    "components": {"files"},
    "pretrained": {"schedule", "denoiser", "files", "weights", "components"},
    "preflight": {"components", "files", "pretrained"},
    "codec": {"cache", "files", "randomness", "schedule", "pretrained"},
    "prompts": {"cache", "denoiser"},
    "families": {"denoiser", "prompts"},
    "hub": {
        *("randomness", "schedule", "denoiser", "pretrained", "preflight", "codec", "prompts", "families"),
        *("files", "components"),
    },
    "storage": {"atomic", "schedule", "denoiser", "files", "weights"},
    "gradient": {"randomness", "schedule", "denoiser", "times"},
    "grids": {"schedule"},
    "sampling": {"randomness", "schedule", "denoiser", "exact", "grids"},
    "solvers": {"schedule", "grids", "sampling"},
    "readings": {"schedule", "denoiser"},
    "mistakes": {"schedule", "readings"},
    "baselines": {"schedule"},
    "trials": {"randomness", "schedule", "denoiser", "readings"},
    "symptoms": {"schedule", "denoiser", "sampling", "readings", "mistakes", "trials"},
    "own_samples": {"schedule", "denoiser", "baselines", "readings", "mistakes", "trials", "symptoms"},
    "explanation": {
        *("schedule", "denoiser", "baselines", "readings", "mistakes", "trials", "symptoms", "own_samples")
    },
    "diagnosis": {"randomness", "schedule", "denoiser", "symptoms", "explanation"},
    "lora": set(),
    "metrics": {"schedule", "denoiser", "exact"},
    "atomic": set(),
    "pictures": {"files"},
    "ranks": {"wrapping"},
    "training": {"randomness", "ranks", "wrapping"},
    "checkpoint": {"atomic", "training"},
}

# The only places where a heavy library may be imported.
LIBRARIES = {
    "accelerate": ("score/training.py", "score/ranks.py", "train_scripts/", "benchmarks/"),
    "diffusers": (
        "score/pretrained.py",
        "score/codec.py",
        "score/families.py",
        "toyworld/parts.py",
        "distill/export.py",
        "controlnet/adapter.py",
        "controlnet/export.py",
        "train_scripts/",
        "benchmarks/",
    ),
    "transformers": (
        "score/families.py",
        "score/hub.py",
        "score/preflight.py",
        "toyworld/parts.py",
        "train_scripts/",
        "benchmarks/",
    ),
    "nerfstudio": ("sds/views.py", "sds/scene.py"),
    "peft": ("score/lora.py",),
    "skimage": ("sds/mesh.py",),
    "trimesh": ("sds/formats.py",),
    "imageio_ffmpeg": ("sds/video.py",),
    "kornia": ("sds/", "controlnet/", "toyworld/", "train_scripts/"),
    "datasets": ("controlnet/rows.py", "train_scripts/"),
}

# The core without these costs torch alone; these import accelerate or diffusers.
FORBIDDEN = (
    *("diffusers", "transformers", "accelerate", "nerfstudio", "peft", "kornia", "datasets"),
    *("skimage", "trimesh", "imageio_ffmpeg"),
)
CONTROL = {
    "caching",
    "canny",
    "circles",
    "data",
    "degraded",
    "geometry",
    "hints",
    "lines",
    "pictures",
    "rows",
    "samples",
}
HEAVY = {
    "parts",
    "lora",
    "vsd",
    "looks",
    "learning",
    "guards",
    "probe",
    "training",
    "ranks",
    "checkpoint",
    "pretrained",
    "preflight",
    "codec",
    "families",
    "hub",
}


def sources(*packages):
    """Every Python file of the packages that exist, with its path relative to the root."""
    paths = sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


def imports(source, path):
    """Dotted names that a file imports anywhere in it, with ``from a import b`` as a.b, and importlib calls."""
    here = path.removesuffix(".py").split("/")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = here[: len(here) - node.level] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module", "__import__",
        ):  # fmt: skip
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def package_violations(files):
    for path, source in files.items():
        package = path.split("/")[0]
        for name in imports(source, path):
            target = name.split(".")[0]
            if target in PACKAGES and target != package and target not in PACKAGES[package]:
                allowed = ", ".join(sorted(PACKAGES[package])) or "no other package"
                yield f"{path} imports {name}; {package} may import {allowed}."


def module_violations(files):
    for path, source in files.items():
        module = path.removeprefix("score/").removesuffix(".py").split("/")[0]
        if module == "__init__":
            continue
        if module not in MODULES:
            yield f"{path} has no row in MODULES of tests/test_imports.py; say there what it may import."
            continue
        for name in imports(source, path):
            package, _, inner = name.partition(".")
            target = inner.split(".")[0]
            if package == "score" and target != module and target not in MODULES[module]:
                allowed = ", ".join(sorted(MODULES[module])) or "nothing of score"
                yield f"{path} imports {name}; it may import {allowed}."


def library_violations(files):
    for path, source in files.items():
        for library in {name.split(".")[0] for name in imports(source, path)} & LIBRARIES.keys():
            if not path.startswith(LIBRARIES[library]):
                yield f"{path} imports {library}, which belongs in {', '.join(LIBRARIES[library])} only."


def test_packages_import_only_those_below_them():
    assert not list(package_violations(sources(*CODE)))


def test_modules_of_score_import_only_those_below_them():
    assert sources("score")
    assert not list(module_violations(sources("score")))


def test_allowed_edges_have_no_cycle():
    graphlib.TopologicalSorter(MODULES).prepare()
    graphlib.TopologicalSorter(PACKAGES).prepare()


def test_heavy_libraries_are_imported_only_where_they_belong():
    assert not list(library_violations(sources(*CODE)))


@pytest.mark.parametrize(
    ("check", "path", "source"),
    [
        (package_violations, "score/new.py", "from distill.dmd import DMD"),
        (package_violations, "sds/views.py", "def f():\n    import controlnet.hints as hints"),
        (package_violations, "distill/dmd.py", "import importlib\nimportlib.import_module('sds.losses')"),
        (package_violations, "toyworld/world.py", "from train_scripts import digits"),
        (module_violations, "score/schedule.py", "from score.denoiser import Denoiser"),
        (module_violations, "score/schedule.py", "from .denoiser import Denoiser"),
        (module_violations, "score/times.py", "from . import denoiser"),
        (module_violations, "score/guidance.py", "from score import ScoreDistillation"),
        (module_violations, "score/gradient.py", "import score.sampling"),
        (module_violations, "score/unlisted.py", ""),
        (library_violations, "score/denoiser.py", "if True:\n    from accelerate import Accelerator"),
        (library_violations, "score/sampling.py", "import diffusers.schedulers"),
        (library_violations, "distill/dmd.py", "from kornia.filters import canny"),
        (library_violations, "controlnet/hints.py", "def f():\n    import nerfstudio"),
        (library_violations, "controlnet/training.py", "from diffusers import ControlNetModel"),
        (package_violations, "controlnet/evidence.py", "from toyworld.judge import load_judge"),
        (library_violations, "sds/losses.py", "from nerfstudio.cameras.rays import RayBundle"),
        (library_violations, "sds/vsd.py", "from peft import LoraConfig"),
        (library_violations, "toyworld/data.py", "def f():\n    from datasets import load_dataset"),
        (package_violations, "score/exact.py", "from toyworld.render import render"),
        (package_violations, "sds/rasterise.py", "from toyworld.camera import orbit"),
        (library_violations, "sds/level.py", "def f():\n    import skimage.measure"),
        (library_violations, "sds/mesh.py", "def f():\n    from trimesh import Trimesh"),
        (library_violations, "sds/export.py", "import imageio_ffmpeg"),
    ],
)
def test_the_checks_see_every_way_to_import(check, path, source):
    assert len(list(check({path: source}))) == 1


def test_importing_the_core_imports_no_heavy_library():
    paths = [path for path in sources("score", "toyworld", "sds") if Path(path).stem not in HEAVY]
    modules = [path[:-3].replace("/", ".") for path in paths]
    program = (
        "import importlib, sys\n"
        "import score\n"
        f"def heavy(): return [m for m in {FORBIDDEN} if m in sys.modules]\n"
        "assert not heavy(), f'import score imports {heavy()}'\n"
        f"for name in {[m.removesuffix('.__init__') for m in modules]}:\n"
        "    importlib.import_module(name)\n"
        "    assert not heavy(), f'{name} imports {heavy()}'\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_importing_what_control_needs_imports_neither_annotators_nor_data_sets():
    names = [path[:-3].replace("/", ".") for path in sources("controlnet") if "__init__" not in path]
    light = [name for name in names if name.split(".")[1] in CONTROL]
    assert len(light) == len(CONTROL)
    program = (
        "import importlib, sys\n"
        f"for name in {light}:\n"
        "    importlib.import_module(name)\n"
        f"    found = [m for m in {FORBIDDEN} if m in sys.modules]\n"
        "    assert not found, f'{name} imports {found}'\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_no_function_is_longer_than_sixty_lines():
    long = [
        f"{path}:{node.lineno} {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for path, source in sources(*CODE).items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno + 1 > 60
    ]
    assert not long


def test_no_library_file_is_longer_than_four_hundred_and_fifty_lines():
    lengths = {path: len(source.splitlines()) for path, source in sources(*LIBRARY).items()}
    assert not {path: length for path, length in lengths.items() if length > 450}


def test_no_file_is_called_utils():
    assert not [path for path in sources(*CODE) if Path(path).stem in ("utils", "util", "helpers", "misc")]
