"""The dependency rules of the architecture, read from the source, and what importing the core may cost."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import scorefield.cli as cli

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ("scorefield", "toyworld", "distill", "sds", "controlnet", "edit", "attack")
CODE = (*LIBRARY, "train_scripts", "benchmarks")

# Which package may import which; itself always. Nothing between the pillars; the toy world may use them.
PACKAGES = {
    "scorefield": set(),
    "toyworld": {"scorefield", "distill", "sds", "controlnet", "edit", "attack"},
    "distill": {"scorefield"},
    "sds": {"scorefield"},
    "controlnet": {"scorefield"},
    "attack": {"scorefield"},
    "edit": {"scorefield"},
    "train_scripts": set(LIBRARY),
    "benchmarks": set(LIBRARY),
}

# The floors inside scorefield: a folder may import from those below it, and from itself.
FLOORS = {
    "": set(),  # the mathematics, and reading and writing files
    "models": {""},
    "data": {""},
    "diagnosis": {""},
    "report": {"", "data"},
    "publish": {"", "report"},
    "training": {"", "models", "data", "diagnosis"},
    "play": {"", "models", "data", "training"},
    "commands": {"", "models", "data", "diagnosis", "training", "report", "publish", "play"},
}

# The only places where a heavy library may be imported.
LIBRARIES = {
    "accelerate": (
        "scorefield/training/", "scorefield/commands/sample.py", "distill/parts.py", "distill/stages.py",
        "distill/guarding.py", "distill/text_recipe.py", "distill/trial.py", "sds/recipe.py",
        "controlnet/recipe.py", "controlnet/batches.py", "controlnet/tasks.py", "controlnet/watch.py",
        "train_scripts/", "benchmarks/",
    ),
    "diffusers": (
        "scorefield/models/pretrained.py", "scorefield/models/codec.py", "scorefield/models/families/",
        "scorefield/models/networks.py", "scorefield/models/lora_keys.py", "toyworld/parts.py",
        "toyworld/circles.py", "toyworld/evaluate.py",
        "distill/export.py", "controlnet/adapter.py", "controlnet/export.py", "train_scripts/", "benchmarks/",
    ),
    "transformers": (
        "scorefield/models/families/", "scorefield/models/pipeline.py", "scorefield/models/preflight.py",
        "toyworld/parts.py", "train_scripts/", "benchmarks/",
    ),
    "nerfstudio": ("sds/scene.py",),
    "peft": ("scorefield/models/lora.py",),
    "gradio": ("scorefield/play/page.py", "scorefield/play/server.py"),
    "skimage": ("sds/mesh.py",),
    "trimesh": ("sds/formats.py", "benchmarks/mesh_voxels.py"),
    "fast_simplification": ("sds/simplify.py",),
    "xatlas": ("sds/texture.py",),
    "scipy": ("sds/solid.py", "sds/texture.py", "sds/topology.py", "benchmarks/"),
    "imageio_ffmpeg": ("sds/formats.py",),
    "kornia": ("sds/", "controlnet/", "attack/", "toyworld/", "train_scripts/"),
    "datasets": ("scorefield/data/tables.py", "scorefield/data/parquet.py"),
}  # fmt: skip

# The core without these costs torch alone; these import accelerate or diffusers.
FORBIDDEN = (
    *("diffusers", "transformers", "accelerate", "nerfstudio", "peft", "kornia", "datasets"),
    *("skimage", "trimesh", "imageio_ffmpeg", "fast_simplification", "xatlas", "scipy"),
)
CONTROL = {"canny", "circles", "data", "degraded", "geometry", "hints", "lines", "samples"}
HEAVY = {
    *("parts", "vsd", "training", "recovery", "doubts", "probe", "queue", "recipe", "pretrained"),
    *("preflight", "codec", "teacher", "pipeline", "circles", "draw", "bench", "control", "demo", "evaluate"),
    *("students", "judge", "renders", "lora", "lora_keys", "lora_student", "attacked", "places"),
}
HEAVY_FOLDERS = ("scorefield/training/", "scorefield/commands/", "scorefield/play/")


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


def floor(module):
    """Folder of scorefield that a dotted module lies in; "" for those beside the folders."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 or (parts[1:2] and parts[1] in FLOORS) else ""


def floor_violations(files):
    for path, source in files.items():
        if not path.startswith("scorefield/"):
            continue
        here = floor(path.removesuffix(".py").replace("/", "."))
        if here not in FLOORS:
            yield f"{path} lies in a folder that FLOORS of tests/test_imports.py does not know."
            continue
        for name in imports(source, path):
            if not name.startswith("scorefield."):
                continue
            there = floor(name) if name.split(".")[1] in FLOORS else ""
            if there != here and there not in FLOORS[here]:
                allowed = ", ".join(sorted(FLOORS[here])) or "no folder"
                yield f"{path} imports {name}; {here or 'the mathematics'} may import {allowed}."


def graph(files):
    """Each module, and the modules among ``files`` that it imports anywhere, lazily too."""
    names = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in files}
    found = {}
    for module, path in names.items():
        asked = set()
        for name in imports(files[path], path):
            target = name if name in names else name.rpartition(".")[0]
            if target in names and target != module:
                asked.add(target)
        found[module] = asked
    return found


def library_violations(files):
    for path, source in files.items():
        for library in {name.split(".")[0] for name in imports(source, path)} & LIBRARIES.keys():
            if not path.startswith(LIBRARIES[library]):
                yield f"{path} imports {library}, which belongs in {', '.join(LIBRARIES[library])} only."


def test_packages_folders_and_heavy_libraries_are_imported_only_where_they_belong():
    assert sources("scorefield")
    for check in (package_violations, floor_violations, library_violations):
        assert not list(check(sources(*CODE)))


def test_no_module_imports_itself_in_a_circle():
    graphlib.TopologicalSorter(graph(sources(*LIBRARY))).prepare()
    circle = {
        "sds/a.py": "from sds import b",
        "sds/b.py": "def f():\n    from sds.a import x",
        "sds/__init__.py": "",
    }
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph(circle)).prepare()


@pytest.mark.parametrize(("check", "path", "source"), [
    (package_violations, "scorefield/new.py", "from distill.dmd import DMD"),
    (package_violations, "sds/cameras.py", "def f():\n    import controlnet.hints as hints"),
    (package_violations, "distill/dmd.py", "import importlib\nimportlib.import_module('sds.losses')"),
    (package_violations, "attack/pgd.py", "import distill.dmd"),
    (package_violations, "toyworld/world.py", "from train_scripts import digits"),
    (floor_violations, "scorefield/schedule.py", "from scorefield.models.teacher import Teacher"),
    (floor_violations, "scorefield/schedule.py", "from .models.teacher import Teacher"),
    (floor_violations, "scorefield/times.py", "def f():\n    import scorefield.training.loop"),
    (floor_violations, "scorefield/models/teacher.py", "from scorefield.training import checkpoint"),
    (floor_violations, "scorefield/models/teacher.py", "from ..data import pictures"),
    (floor_violations, "scorefield/unlisted/new.py", ""),
    (library_violations, "scorefield/denoiser.py", "if True:\n    from accelerate import Accelerator"),
    (library_violations, "scorefield/sampling.py", "import diffusers.schedulers"),
    (library_violations, "distill/dmd.py", "from kornia.filters import canny"),
    (library_violations, "controlnet/hints.py", "def f():\n    import nerfstudio"),
    (library_violations, "controlnet/training.py", "from diffusers import ControlNetModel"),
    (package_violations, "controlnet/evidence.py", "from toyworld.judge import load_judge"),
    (library_violations, "sds/losses.py", "from nerfstudio.cameras.rays import RayBundle"),
    (library_violations, "sds/vsd.py", "from peft import LoraConfig"),
    (library_violations, "toyworld/data.py", "def f():\n    from datasets import load_dataset"),
    (package_violations, "scorefield/exact.py", "from toyworld.render import render"),
    (package_violations, "sds/rasterise.py", "from toyworld.camera import orbit"),
    (library_violations, "sds/losses.py", "def f():\n    import skimage.measure"),
    (library_violations, "sds/mesh.py", "def f():\n    from trimesh import Trimesh"),
    (library_violations, "sds/export.py", "import imageio_ffmpeg"),
])  # fmt: skip
def test_the_checks_see_every_way_to_import(check, path, source):
    assert len(list(check({path: source}))) == 1


def test_importing_the_core_imports_no_heavy_library():
    light = [path for path in sources("scorefield", "toyworld", "sds") if Path(path).stem not in HEAVY]
    paths = [path for path in light if "families/" not in path and not path.startswith(HEAVY_FOLDERS)]
    modules = [path[:-3].replace("/", ".") for path in paths]
    program = (
        "import importlib, sys\n"
        "import scorefield\n"
        f"def heavy(): return [m for m in {FORBIDDEN} if m in sys.modules]\n"
        "assert not heavy(), f'import scorefield imports {heavy()}'\n"
        f"for name in {[m.removesuffix('.__init__') for m in modules]}:\n"
        "    importlib.import_module(name)\n"
        "    assert not heavy(), f'{name} imports {heavy()}'\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_help_is_printed_before_torch_is_imported():
    program = (
        "import sys\n"
        "from scorefield.cli import main\n"
        f"for command in {list(cli.COMMANDS)!r}:\n"
        "    try:\n"
        "        main([*command.split(), '--help'])\n"
        "    except SystemExit as stop:\n"
        "        assert not stop.code\n"
        "    assert not {'torch', 'numpy', 'PIL'} & sys.modules.keys(), command\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(f"scorefield {command}" in result.stdout for command in cli.COMMANDS)


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
