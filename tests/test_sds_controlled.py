"""A controlled denoiser is a Denoiser: score distillation makes latents whose edges are those of the hint."""

from dataclasses import replace

import pytest
import torch

import controlnet.recipe as train_controlnet
from controlnet.adapter import ControlledDenoiser
from controlnet.canny import canny
from controlnet.export import load_adapter
from controlnet.options import PRESETS
from controlnet.scores import edge_f1
from scorefield import guided, inject
from scorefield.models.teacher import load_teacher
from scorefield.randomness import derived_generator
from scorefield.times import uniform
from sds.canvas import Canvas
from sds.losses import sds
from toyworld.data import HELD_OUT, captions_of, draw_scenes
from toyworld.render import render

NUM, STEPS = 8, 200


def distilled(denoiser, base, cond):
    """Latents (n, 4, 16, 16) that SDS (arXiv 2209.14988) makes of noise, by the same draws for each denoiser."""
    teacher = guided(denoiser, 7.5, base.negative())
    canvas = Canvas.noise((4, 16, 16), num_particles=NUM, generator=derived_generator("canvas"))
    optimizer = torch.optim.Adam(canvas.parameters(), 0.05)
    for step in range(STEPS):
        method = sds(teacher, times=uniform(0.02, 0.98 - 0.5 * step / STEPS))
        gradient = method.gradient(canvas().detach(), cond, generator=derived_generator("sds", step))
        optimizer.zero_grad()
        inject(canvas(), gradient.value).backward()
        optimizer.step()
    return canvas().detach()


@pytest.mark.slow
def test_score_distillation_under_control_follows_the_hint(tmp_path):
    config = PRESETS["toyworld-canny"]()
    config = replace(config, out=tmp_path / "out", cache=tmp_path / "cache", eval_every=0)
    folder = train_controlnet.main(config)
    base, scenes = load_teacher("toyworld"), draw_scenes(range(2 * HELD_OUT, 2 * HELD_OUT + NUM))
    edges = canny(render(scenes).rgb, torch.tensor(100.0), torch.tensor(200.0))
    controlled = ControlledDenoiser(base.denoiser, load_adapter(folder), edges)
    cond = base.prompts(captions_of(scenes))
    scores = {}
    for name, scale in (("controlled", 1.0), ("free", 0.0)):
        latents = distilled(replace(controlled, scale=scale), base, cond)
        with torch.no_grad():
            images = base.decode(latents).clamp(-1, 1)
        made = canny(images, torch.tensor(100.0), torch.tensor(200.0))
        scores[name] = float(edge_f1(made, edges, 1).mean())
        scores[f"{name}, others"] = float(edge_f1(made, edges.roll(1, 0), 1).mean())
    assert scores["controlled"] > scores["free"] + 0.1, scores
    assert scores["controlled"] > scores["controlled, others"] + 0.3, scores
