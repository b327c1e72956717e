"""Break one line at a time and see that a test fails: signs, weights, schedules, keys, resuming, refusals.

    python benchmarks/mutants.py [--only WORD]     # about ten minutes on one core

Each mutant is written into a temporary copy of the sources, never into the checkout, and meets the one test file
that should know. Exits with 1 if any of them survives.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("scorefield", "distill", "sds", "controlnet", "toyworld", "train_scripts", "benchmarks", "tests", "docs")
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
        what: what it breaks, in words.
        file: where, from the root.
        old: what is there once.
        new: what is put in its place.
        test: the file that should fail, from ``tests``, without its ending.
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
    Mutant("cosine schedule", "scorefield/schedule.py", "(steps + offset)", "(steps - offset)", "test_schedule"),
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
           "        compare(path, config)\n\n\ndef", "        pass\n\n\ndef", "test_trainers"),
    Mutant("a guard that does not ask for the noise", "distill/guard.py", "not gap <= deviations * error",
           "not gap <= 0 * error", "test_guard"),
    Mutant("counts without a limit", "scorefield/training/options.py", "value >= 2**31", "value >= 2**63",
           "test_trainers"),
    Mutant("a range of noise levels that is not checked", "distill/options.py", "0 < low < high < math.inf",
           "low < math.inf", "test_distill_options"),
    Mutant("pickles that are read unasked", "scorefield/models/teacher.py", "allow_pickle: bool = False, variant",
           "allow_pickle: bool = True, variant", "test_pretrained"),
    Mutant("sign of DDS", "sds/losses.py", "(x0 - x0_hat) - (source - source_hat)",
           "(source - source_hat) - (x0 - x0_hat)", "test_sds_losses"),
    Mutant("weight of SDS", "sds/losses.py", "return schedule.sigma(t) ** 2", "return schedule.sigma(t)",
           "test_sds_losses"),
    Mutant("scale of CSD", "sds/losses.py", "return scale * w(t, schedule)", "return w(t, schedule)",
           "test_sds_losses"),
    Mutant("a phi that is told no camera", "sds/losses.py",
           "{name: cond[name] for name in self.phi_only if name in cond}", "{}", "test_sds_vsd"),
    Mutant("mean over the draws", "sds/training.py", "unflatten(0, (num_draws, batch)).mean(0)",
           "unflatten(0, (num_draws, batch)).sum(0)", "test_sds_training"),
    Mutant("penalty of a step", "sds/training.py", 'values.pop("loss") + seen.penalty', 'values.pop("loss")',
           "test_sds_training"),
    Mutant("rates after a rollback", "sds/recovery.py", "_lower(phase, factor**times)", "_lower(phase, factor)",
           "test_sds_recovery"),
    Mutant("annealing of a scene", "sds/parts.py", "return ramp(step, start, pair[0], pair[1], end)",
           "return ramp(step, start, pair[1], pair[0], end)", "test_sds_parts"),
    Mutant("matter that forgets what is before it", "sds/scene.py", "* torch.exp(-before)", "* torch.exp(before)",
           "test_sds_scene"),
    Mutant("elevations by area", "sds/cameras.py", "by_area = torch.rad2deg(", "by_area = torch.deg2rad(",
           "test_sds_cameras"),
    Mutant("a mesh inside out", "sds/mesh.py", 'gradient_direction="ascent"', 'gradient_direction="descent"',
           "test_sds_mesh"),
    Mutant("guess mode", "controlnet/adapter.py", "10 ** (i / last - 1) if", "10 ** (i / last) if",
           "test_controlnet_adapter"),
    Mutant("strength of control", "controlnet/adapter.py", "self.scale * d * value", "d * value",
           "test_controlnet_adapter"),
    Mutant("hints of others in the gap", "controlnet/evidence.py", "self.hint.roll(far, 0)",
           "self.hint.roll(0, 0)", "test_controlnet_evidence"),
    Mutant("an event of one look", "controlnet/evidence.py", "if look.shows(threshold) else []",
           "if look.shows(threshold) else run", "test_controlnet_evidence"),
    Mutant("mirrored samples in the key of latents", "controlnet/data.py", " mirrored={mirrored}", "",
           "test_controlnet_data"),
    Mutant("hints dropped with the prompts", "controlnet/data.py", 'dropped(f"drop hint {n}", ',
           'dropped("drop prompt", ', "test_controlnet_data"),
    Mutant("thresholds of edges", "controlnet/hints/canny.py", "torch.minimum(first, second), torch.maximum",
           "torch.maximum(first, second), torch.minimum", "test_controlnet_hints"),
    Mutant("an adapter's options that are not checked", "controlnet/options.py", "0 <= config.lr_floor <= 1:",
           "0 <= config.lr_floor:", "test_controlnet_recipe"),
    Mutant("a scene's options that are not checked", "sds/checks.py", "config.anneal[0] > config.anneal[1] or", "",
           "test_sds_recipe"),
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


def run_tests(folder: Path, test: str) -> int:
    """Return pytest's exit code of one file, up to its first failure, in a process of its own."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    silence = os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(silence, 1), os.dup2(silence, 2)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path[:] = [
        str(folder),
        *(path for path in sys.path if not Path(path or ".").resolve().is_relative_to(ROOT)),
    ]
    import pytest

    os._exit(int(pytest.main(["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", f"tests/{test}.py"])))


if __name__ == "__main__":
    main()
