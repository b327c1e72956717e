"""Parts of a scene's training, each built from the options of ``scorefield sds``."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from PIL import ImageColor
from torch import Tensor
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from scorefield import Cond, Conditioned, Denoiser, guided
from scorefield.cache import fingerprint
from scorefield.gradient import TimeWeight
from scorefield.models.codec import Codec
from scorefield.models.quantize import stored_weights
from scorefield.models.teacher import Teacher, load_teacher
from scorefield.randomness import Rng, derived_generator
from scorefield.times import ramp, uniform
from sds.cameras import CameraDistribution, Views, orbit, view_prompts, word_bins, word_weights
from sds.canvas import Canvas
from sds.inversion import ism, sdi
from sds.losses import (
    Distillation,
    alpha_sigma_squared,
    csd,
    noise_to_signal,
    sds,
    sigma_squared,
    unit,
    x0_reconstruction,
)
from sds.options import Config, Pair
from sds.penalties import Penalties
from sds.probe import Probe
from sds.scene import Scene
from sds.shading import ShadingSchedule
from sds.training import Backdrop, CanvasSubject, Observation, SceneDistillation, SceneSubject
from sds.vsd import VSD, WithoutConditions, low_rank_denoiser

WEIGHTS: dict[str, TimeWeight] = {
    "sigma_squared": sigma_squared,
    "unit": unit,
    "alpha_sigma_squared": alpha_sigma_squared,
    "noise_to_signal": noise_to_signal,
}


def colour_of(name: str) -> tuple[float, float, float]:
    """Return the RGB values, in [-1, 1], of a colour's name. Raises ``ValueError`` for an unknown name."""
    try:
        red, green, blue = ImageColor.getcolor(name, "RGB")  # type: ignore[misc]
    except ValueError as error:
        raise ValueError(f"--backdrops takes names of colours, such as white or #808080; got {name!r}.") from error
    return red / 127.5 - 1, green / 127.5 - 1, blue / 127.5 - 1


def frozen_teacher(config: Config, device: torch.device) -> Teacher:
    """Return the frozen model that ``--teacher`` names, on its device; on a GPU ``--precision bf16`` applies."""
    half = config.precision == "bf16" and device.type != "cpu"
    return load_teacher(
        config.teacher, dtype=torch.bfloat16 if half else torch.float32, device=device,
        size=config.size or None, tiny_vae=config.tiny_vae or None, allow_pickle=config.allow_pickle,
        variant=config.variant or None, rounding=config.quantize,
    )  # fmt: skip


def read_prompts(config: Config, teacher: Teacher) -> list[Cond]:
    """Return the conditions of all prompts of the run. They are cached, so the text encoders can be dropped."""
    asked = [[config.prompt.strip()]]
    if not config.canvas:
        asked = [words_of(config, name) for name in config.backdrops or (None,)]
    teacher.usable(sum(asked, list[str]()), config.long_prompts, "the scene")
    return [teacher.negative(config.negative_prompt), *map(teacher.prompts, asked)]


def fingerprints(teacher: Teacher) -> dict[str, str]:
    """Return hashes of the teacher's weights and of its codec, for the run's identity."""
    codec: list[Tensor] = []
    if isinstance(teacher.codec, Codec):
        codec = [*teacher.codec.vae.state_dict().values(), teacher.codec.numbers]
    return {"teacher": fingerprint(stored_weights(teacher.denoiser.network)), "codec": fingerprint(codec)}


def fingerprint_of_words(words: list[Cond]) -> dict[str, str]:
    """Return a hash of the conditions of all prompts of a run, for its identity."""
    return {"conditions": fingerprint(value for cond in words for _, value in sorted(cond.items()))}


def along(config: Config, pair: Pair, step: int) -> float:
    """Return the value at this step of an option that moves from a first to a last value."""
    start, end = (share * config.steps for share in config.anneal)
    return ramp(step, start, pair[0], pair[1], end)


def build_canvas(config: Config, teacher: Teacher) -> Canvas:
    """Return particles of noise in the shape of the teacher's x0; bounded if x0 are pixels."""
    return Canvas.noise(
        teacher.shape, num_particles=config.batch_size, std=0.1 if teacher.codec is None else 1.0,
        bounded=teacher.codec is None, generator=derived_generator("canvas", config.seed),
    )  # fmt: skip


def cameras_at(config: Config, step: int) -> list[tuple[CameraDistribution, int]]:
    """Return pairs (distribution, number of views) for a step."""
    usual = CameraDistribution()
    around = replace(
        usual, distance=config.distance, focal=config.focal, elevation=config.elevation,
        position_jitter=config.jitter * usual.position_jitter, target_jitter=config.jitter * usual.target_jitter,
        up_jitter=config.jitter * usual.up_jitter, uniform_angle=1.0 if config.overhead else usual.uniform_angle,
    )  # fmt: skip
    above = replace(around, elevation=config.overhead_elevation)
    if config.widen:
        around = around.widened(min(1.0, step / (config.widen * config.steps)))
    number = config.batch_size - config.overhead
    pairs = [(around, number)]
    if config.quarters < 1:
        spread = ramp(step, 0, config.quarters, 1.0, config.quarters_until * config.steps)
        pairs = [(quarter, number // 4) for quarter in around.quarters(spread)]
    return [*pairs, (above, config.overhead)] if config.overhead else pairs


def build_subject(config: Config, scene: Scene, teacher: Teacher, num_ranks: int) -> SceneSubject:
    """Return the scene as it is observed: random views, each with its conditions."""
    colours: list[str | None] = list(config.backdrops) or [None]
    backdrops = [
        Backdrop(conditions=conditions(config, teacher, name), colour=None if name is None else colour_of(name))
        for name in colours
    ]
    schedule = ShadingSchedule()
    return SceneSubject(
        scene=scene,
        encode=teacher.encode,
        size=teacher.size,
        cameras=lambda step: cameras_at(config, step),
        backdrops=backdrops,
        resolution=lambda step: int(config.render_size[step >= config.grow_at * config.steps]),
        weights=word_weights if config.words == "interpolated" else word_bins,
        penalties=lambda step: penalties_at(config, step),
        shading=schedule.draw if config.shading == "dreamfusion" else None,
        tell_camera=config.method == "vsd",
        num_ranks=num_ranks,
    )


def canvas_subject(config: Config, canvas: Canvas, teacher: Teacher) -> CanvasSubject:
    """Return the canvas with the conditions of the prompt, without view words."""
    return CanvasSubject(canvas=canvas, conditions=teacher.prompts([config.prompt.strip()]))


def penalties_at(config: Config, step: int) -> Penalties:
    """Return the weights of the penalties at a step."""
    names = ("opacity", "entropy", "orientation", "distortion")
    return Penalties(**{name: along(config, getattr(config, name), step) for name in names})


def conditions(config: Config, teacher: Teacher, backdrop: str | None) -> Cond:
    """Return the teacher's conditions for the prompts of :func:`words_of`."""
    return teacher.prompts(words_of(config, backdrop))


def words_of(config: Config, backdrop: str | None) -> list[str]:
    """Return the prompt with each view word; a named backdrop is added as "on a ... background"."""
    prompt = config.prompt.strip() + (f" on a {backdrop} background" if backdrop else "")
    return [prompt] * 4 if config.words == "none" else list(view_prompts(prompt))


def build_method(config: Config, teacher: Teacher) -> Callable[[int], Distillation]:
    """Return a function from a step to its loss."""
    negative, denoiser = teacher.negative(config.negative_prompt), teacher.denoiser
    w = WEIGHTS[config.weight]
    phi = None
    if config.method == "vsd":
        generator = derived_generator("phi", config.seed)
        phi = low_rank_denoiser(
            denoiser, rank=config.phi_rank, generator=generator,
            camera_at=None if config.canvas else time_embedding(denoiser.network),
        )  # fmt: skip

    def method(step: int) -> Distillation:
        times = uniform(along(config, config.t_low, step), along(config, config.t_high, step))
        scale = along(config, config.guidance, step)
        if config.method == "csd":
            return csd(denoiser, negative, scale=scale, times=times, w=w)
        target = guided(denoiser, scale, negative, rescale=config.rescale)
        if phi is not None:
            return VSD(teacher=target, phi=phi, times=times, w=w)
        if config.method == "ism":
            null = Conditioned(denoiser, negative)
            between = {"interval": config.interval, "stride": config.inversion_stride}
            return ism(target, null, times=times, w=w, **between)
        if config.method == "sdi":
            inverter = guided(denoiser, config.inversion_guidance, negative)
            return sdi(target, inverter, stride=config.inversion_stride, times=times, w=w)
        build = sds if config.method == "sds" else x0_reconstruction
        return build(target, times=times, w=w)

    return method


def time_embedding(network: Any) -> str:
    """Return the name of the submodule to which VSD's phi adds the camera.

    Raises ``ValueError`` for a network of another kind.
    """
    names = [name for name, _ in network.named_modules()]
    for wanted in ("model.time_embedding", "model.time_text_embed"):
        if wanted in names:
            return wanted
    kind = type(getattr(network, "model", network)).__name__
    raise ValueError(
        f"--method vsd needs a --teacher with a UNet or SD3 transformer of diffusers; got {kind}. "
        "Use --method sds."
    )


def build_probe(config: Config, task: SceneDistillation, teacher: Teacher) -> Probe:
    """Return the probe: front, side, back and overhead views over the first backdrop, or all particles."""
    subject, method = task.subject, task.method(0)
    negative = teacher.negative(config.negative_prompt)
    target: Denoiser = guided(teacher.denoiser, config.guidance[1], negative, rescale=config.rescale)
    if isinstance(method, VSD):
        target = WithoutConditions(target, method.phi_only)

    def observe(view: Views, step: int) -> Observation:
        assert isinstance(subject, SceneSubject)
        return subject.observe_from(view, torch.zeros(1, dtype=torch.long), step, None, None)

    def observe_canvas(step: int) -> Observation:
        return subject.observe(Rng(config.seed, step))

    views = fixed_views(config)
    each = [partial(observe, views[number : number + 1]) for number in range(len(views))]
    return Probe(
        views=[observe_canvas] if config.canvas else each, target=target, decode=teacher.decode,
        network=subject.network,
    )  # fmt: skip


def fixed_views(config: Config) -> Views:
    """Return front, side, back and overhead views, at the middle of the options' distances and focal lengths."""
    azimuth, elevation = torch.tensor([0.0, 90.0, 180.0, 0.0]), torch.tensor([0.0, 0.0, 0.0, 1.0])
    around, above = sum(config.elevation) / 2, sum(config.overhead_elevation) / 2
    many = torch.ones(4)
    return orbit(
        azimuth, around + elevation * (above - around), sum(config.distance) / 2 * many,
        sum(config.focal) / 2 * many,
    )  # fmt: skip


def optimizers(config: Config, task: SceneDistillation) -> tuple[Optimizer, LambdaLR, Optimizer | None]:
    """Return Adam and a linear learning-rate schedule for the scene, and AdamW for VSD's phi (None otherwise)."""
    network = task.subject.network
    background = getattr(network, "background", None)
    behind = [] if background is None else list(background.parameters())
    matter = [p for p in network.parameters() if not any(p is other for other in behind)]
    groups = [{"params": matter, "lr": config.learning_rate[0]}]
    if behind:
        groups.append({"params": behind, "lr": config.background_lr})
    # A negligible epsilon: in empty space gradients are tiny, and they count.
    optimizer = Adam(groups, betas=(0.9, 0.99), eps=1e-15)
    first, last = config.learning_rate
    lr_schedule = LambdaLR(optimizer, lambda step: 1 + (last / first - 1) * min(1.0, step / config.steps))
    method = task.method(0)
    phi = None
    if isinstance(method, VSD):
        phi = torch.optim.AdamW(method.phi.network.parameters(), lr=config.phi_lr)
    return optimizer, lr_schedule, phi
