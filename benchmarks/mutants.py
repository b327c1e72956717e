"""Break one line of code at a time and check that a test fails: signs, weights, schedules, keys, resumes.

    python benchmarks/mutants.py [--only WORD]     # about ten minutes on one core

Each mutant is written into a temporary copy of the sources, never into the checkout, and is run against one test
file. Exits with 1 if any mutant survives.
"""

import argparse
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = (
    *("scorefield", "distill", "sds", "controlnet", "edit", "attack", "toyworld"),
    *("train_scripts", "benchmarks", "tests", "docs"),
)
HEAVY = (
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "hypothesis",
    "scipy",
)


@dataclass(frozen=True)
class Mutant:
    """One change of the code.

    Attributes:
        what: What it breaks, in words.
        file: Path from the root.
        old: Text that occurs once in the file.
        new: Text that replaces it.
        test: Test file that should fail, in ``tests``, without its suffix.
    """

    what: str
    file: str
    old: str
    new: str
    test: str


MUTANTS = (
    Mutant("sign of the gradient", "scorefield/gradient.py", "baseline - target, t)", "target - baseline, t)",
           "test_gradient"),
    Mutant("sign of guidance", "scorefield/guidance.py", "self.scale * (pos - neg)", "self.scale * (neg - pos)",
           "test_guidance"),
    Mutant("DMD's weight", "distill/dmd.py", "scale.to(distance) / distance", "scale.to(distance) * distance",
           "test_dmd"),
    Mutant("weight of the GAN term", "distill/dmd.py", "self.gan.generator_weight * metrics", "metrics",
           "test_dmd"),
    Mutant("weight of the regression", "distill/dmd.py", "self.regression.weight * metrics", "metrics",
           "test_dmd"),
    Mutant("weight of the critic", "distill/dmd.py", "self.gan.critic_weight * critic", "critic", "test_dmd"),
    Mutant("weight of eps", "scorefield/gradient.py", '"eps": alpha,', '"eps": torch.ones_like(alpha),',
           "test_gradient"),
    Mutant("EDM's weight", "scorefield/gradient.py", "1 / ratio**2 + 1 / sigma_data**2",
           "1 / ratio**2 + sigma_data**2", "test_gradient"),
    Mutant("variance of DDIM", "scorefield/sampling.py", "eta**2 * posterior_variance", "eta * posterior_variance",
           "test_sampling"),
    Mutant("Heun's slope", "scorefield/sampling.py", "slope_t + slope_s, length", "slope_t + slope_t, length",
           "test_sampling"),
    Mutant("cosine schedule", "scorefield/schedule.py", "(steps + offset)", "steps", "test_schedule"),
    Mutant("EDM's spacing", "scorefield/schedule.py", "self.t_min ** (1 / self.rho), ", "self.t_min, ",
           "test_schedule"),
    Mutant("shift of a flow", "scorefield/times.py", "shift * schedule.ratio(times", "schedule.ratio(times",
           "test_times"),
    Mutant("rates after a setback", "distill/guarding.py", "            _halve(phase)", "            pass",
           "test_stages"),
    Mutant("conditions in the key of pairs", "distill/pair_store.py", "self.times.double(), *conditions]",
           "self.times.double()]", "test_pair_store"),
    Mutant("guidance in the key of pairs", "distill/pair_store.py", "float(self.guidance), ", "",
           "test_pair_store"),
    Mutant("shape in a cache's key", "scorefield/cache.py", 'f"{content.dtype} {tuple(content.shape)}"',
           'f"{content.dtype}"', "test_cache"),
    Mutant("null class in a teacher's identity", "scorefield/models/teacher.py",
           "self.num_classes, self.null_class, *code)", "self.num_classes, *code)", "test_own_teachers"),
    Mutant("schedule in a teacher's identity", "scorefield/models/teacher.py",
           "meaning = [describe_schedule(denoiser.schedule), denoiser.kind", "meaning = [denoiser.kind",
           "test_own_teachers"),
    Mutant("a learning rate that is not restored", "scorefield/training/checkpoint.py",
           'phase.lr_schedule.load_state_dict(own["lr_schedule"])', "pass", "test_checkpoint"),
    Mutant("an average that is not restored", "scorefield/training/checkpoint.py",
           'phase.ema.num_updates = own["ema_updates"]', "pass", "test_training"),
    Mutant("a run that resumes a step too late", "scorefield/training/checkpoint.py", 'return int(state["step"])',
           'return int(state["step"]) + 1', "test_trainers"),
    Mutant("random numbers that ignore the step", "scorefield/randomness.py",
           "derived_generator(self.seed, self.step, self.micro, purpose, self.rank)",
           "derived_generator(self.seed, self.micro, purpose, self.rank)", "test_randomness"),
    Mutant("decay of the average", "scorefield/training/loop.py", "(10 + self.num_updates)",
           "(11 + self.num_updates)", "test_training"),
    Mutant("another config that is not refused", "scorefield/training/checkpoint.py",
           "ignored = {FREE,", "ignored = wanted.keys() | {FREE,", "test_checkpoint"),
    Mutant("a guard that does not ask for the noise", "distill/guard.py", "not gap <= deviations * error",
           "not gap <= 0 * error", "test_guard"),
    Mutant("counts without a limit", "scorefield/training/options.py", "value >= 2**31", "value >= 2**63",
           "test_trainers"),
    Mutant("a range of noise levels that is not checked", "distill/checks.py", "0 < low < high < math.inf",
           "low < math.inf", "test_distill_options"),
    Mutant("pickles that are read unasked", "scorefield/models/teacher.py", "allow_pickle: bool = False, variant",
           "allow_pickle: bool = True, variant", "test_pretrained"),
    Mutant("weight of progressive distillation", "distill/progressive.py", ".square().clamp(min=1)", ".square()",
           "test_progressive"),
    Mutant("end of a stage", "distill/progressive.py", "if self.num_updates in self.ends",
           "if self.num_updates - 1 in self.ends", "test_progressive"),
    Mutant("files that nobody wrote are published", "scorefield/publish/result.py",
           "{*others, MARKER, CARD}", "{MARKER, CARD}", "test_push"),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants whose words or file hold this")
    wanted = parser.parse_args().only
    chosen = [mutant for mutant in MUTANTS if wanted in f"{mutant.what} {mutant.file} {mutant.test}"]
    for name in HEAVY:  # once, before any fork
        __import__(name)
    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            shutil.copytree(ROOT / name, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "setup.cfg", folder)
        survivors = [mutant.what for mutant in chosen if not is_caught(mutant, Path(folder))]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} caught; survivors: {', '.join(survivors) or 'none'}")
    sys.exit(bool(survivors))


def is_caught(mutant: Mutant, folder: Path) -> bool:
    """Return whether its test file fails, and print a line. Raises ``ValueError`` where the code has changed."""
    file, begun = folder / mutant.file, time.monotonic()
    whole = file.read_text()
    if whole.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file} holds {whole.count(mutant.old)} times {mutant.old!r}; expected it once.")
    file.write_text(whole.replace(mutant.old, mutant.new))
    try:
        code = run_tests(folder, mutant.test)
    finally:
        file.write_text(whole)
    said = {0: "SURVIVES", 1: "caught"}.get(code, f"pytest's exit code is {code}")
    print(f"{said:10} {mutant.what:45} {mutant.test:22} {time.monotonic() - begun:6.1f} s", flush=True)
    return code == 1


def _stays(entry: str) -> bool:
    # Not the checkout's own modules; its .venv, which may lie in it, has everything else.
    path = Path(entry or ".").resolve()
    return not path.is_relative_to(ROOT) or path.is_relative_to(Path(sys.prefix).resolve())


def run_tests(folder: Path, test: str) -> int:
    """Return pytest's exit code of one file, up to its first failure, in a process of its own."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    silence = os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(silence, 1), os.dup2(silence, 2)
    resource.setrlimit(resource.RLIMIT_DATA, (2**33, 2**33))  # a mutant may ask for all memory that there is
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path[:] = [str(folder), *filter(_stays, sys.path)]
    code = 70
    try:  # whatever is raised must not reach the parent's code, which would remove the folder
        import pytest

        code = int(pytest.main(["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", f"tests/{test}.py"]))
    finally:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
