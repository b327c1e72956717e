"""The folder of a finished adapter: stock diffusers loads it without loss, and it says what it is worth."""

import json
from dataclasses import replace

import pytest
import tiny_pipelines as tiny
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image
from tiny_controls import HintPyramid, make_adapter, make_base, make_controlled, make_inputs

from controlnet.adapter import ControlledDenoiser
from controlnet.evidence import BoundedScore, Gap, Probe
from controlnet.evidence_log import Evidence
from controlnet.export import contact_sheet, load_adapter, model_card, save_adapter
from scorefield.atomic import MARKER
from scorefield.denoiser import NetworkDenoiser, freeze
from scorefield.guidance import guided
from scorefield.models.networks import DiffusersNetwork
from scorefield.sampling import sample
from scorefield.schedule import VariancePreserving

close = torch.testing.assert_close
LOOK = Evidence(3000, Gap(0.1, 0.12, 0.001, 0.3), {"edge_f1_1px": BoundedScore(0.7, 0.2, 0.9)})
WEIGHTS = "diffusion_pytorch_model.safetensors"


def make_card(**changes):
    settings = {
        "base": "toyworld/pipeline", "hint": "canny edges", "look": LOOK, "event": "was learned at step 2,500",
        "training": {"updates": 4000, "learning rate": 1e-4}, "limits": "64 held-out renders; one seed.",
    }  # fmt: skip
    return model_card(**{**settings, **changes})


def pixels_adapter():
    return make_adapter(make_base("pixels"), "pixels", trained=True)


@pytest.mark.parametrize("name", ["sdxl", "pixels"])
@torch.no_grad()
def test_stock_diffusers_and_we_read_the_folder_without_loss(name, tmp_path):
    """Hints of one channel (sdxl) are written as three, which computes the same; all else is equal bit by bit."""
    controlled, inputs = make_controlled(name, trained=True), make_inputs(name)
    folder = save_adapter(controlled.adapter, tmp_path / "control", make_card())
    stock, read = ControlNetModel.from_pretrained(folder), load_adapter(folder)
    wanted = controlled.adapter.model.state_dict()
    assert stock.state_dict().keys() == wanted.keys()
    grey = controlled.adapter.channels == 1
    different = {key for key, value in stock.state_dict().items() if not torch.equal(value, wanted[key])}
    assert different == ({"controlnet_cond_embedding.conv_in.weight"} if grey else set())
    added = {key: value for key, value in inputs["cond"].items() if key in ("text_embeds", "time_ids")}
    down, mid = stock(
        inputs["x_t"], inputs["t"], encoder_hidden_states=inputs["cond"]["encoder_hidden_states"],
        controlnet_cond=inputs["hint"].expand(-1, stock.config.conditioning_channels, -1, -1),
        added_cond_kwargs=added, return_dict=False,
    )  # fmt: skip
    call = (inputs["x_t"], inputs["t"], inputs["cond"])
    for got, expected in zip([*down, mid], controlled.residuals(*call).values(), strict=True):
        close(got, expected, rtol=1e-4, atol=1e-5)
        assert grey or torch.equal(got, expected)
    close(replace(controlled, adapter=read)(*call), controlled(*call), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, read.model.state_dict()[key]) for key, value in stock.state_dict().items())
    assert not any(p.requires_grad for p in read.parameters())
    assert (read.channels, read.factor) == (3 if grey else controlled.adapter.channels, controlled.adapter.factor)
    assert controlled.adapter.model.config.conditioning_channels == controlled.adapter.channels, "not touched"
    assert {path.name for path in folder.iterdir()} == {"config.json", WEIGHTS, "README.md", MARKER}


@pytest.mark.parametrize("guess", [False, True])
def test_the_stock_pipeline_draws_the_image_that_ours_draws(guess, tmp_path):
    """The whole way through diffusers: its pipeline, its guidance, its DDIM, from the same noise."""
    pipeline = tiny.sd()
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    base = NetworkDenoiser(DiffusersNetwork(freeze(pipeline.unet)), VariancePreserving.scaled_linear())
    adapter = make_adapter(base, "toyworld", trained=True)  # one channel, at twice the tiny latents' factor
    folder = save_adapter(adapter, tmp_path / "control", "")
    stock = StableDiffusionControlNetPipeline(
        **{name: part for name, part in pipeline.components.items() if name != "image_encoder"},
        controlnet=ControlNetModel.from_pretrained(folder), requires_safety_checker=False,
    )  # fmt: skip
    stock.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    edges = torch.rand(32, 32, generator=torch.Generator().manual_seed(2)) > 0.5
    hint = Image.fromarray((255 * edges).byte().numpy())  # grey, as a file of edges is
    embeds, negative = torch.randn(2, 1, 5, 32, generator=torch.Generator().manual_seed(3))
    stock.vae_scale_factor = 4  # the tiny autoencoder's is 2; the hint decides the size of what is drawn
    drawn = stock(
        prompt_embeds=embeds, negative_prompt_embeds=negative, image=hint, latents=noise, num_inference_steps=4,
        guidance_scale=3.0, guess_mode=guess, output_type="latent", height=32, width=32,
        controlnet_conditioning_scale=0.8,
    ).images  # fmt: skip
    controlled = ControlledDenoiser(base, load_adapter(folder), edges[None, None].float(), scale=0.8, guess=guess)
    denoiser = guided(controlled, 3.0, {"encoder_hidden_states": negative})
    times = torch.tensor([751.0, 501.0, 251.0, 1.0], dtype=torch.float64)
    with torch.no_grad():
        x_t = sample(denoiser, noise, {"encoder_hidden_states": embeds}, times=times)
    close(drawn, x_t, rtol=1e-5, atol=1e-5 * float(drawn.abs().max()))


def test_an_export_replaces_the_one_before_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    adapter = pixels_adapter()
    folder = save_adapter(adapter, tmp_path / "control", "first")
    before = (folder / WEIGHTS).read_bytes()
    with torch.no_grad():
        adapter.model.conv_in.weight.add_(1.0)

    def fail(*arguments, **settings):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr("controlnet.export.save_image", fail)
        with pytest.raises(OSError, match="disk full"):
            save_adapter(adapter, folder, "second", samples=torch.zeros(1, 3, 4, 4))
    assert (folder / "README.md").read_text() == "first"
    assert (folder / WEIGHTS).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["control"]
    save_adapter(adapter, folder, "second", samples=torch.zeros(1, 3, 4, 4))
    assert (folder / "README.md").read_text() == "second"
    assert (folder / WEIGHTS).read_bytes() != before


def test_what_is_no_adapter_or_not_finite_is_refused(tmp_path):
    adapter = pixels_adapter()
    adapter.model.conv_in.bias.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        save_adapter(adapter, tmp_path / "control", "")
    with pytest.raises(ValueError, match="is the form of an EncoderCopy; got HintPyramid"):
        save_adapter(HintPyramid(3), tmp_path / "control", "")
    assert not list(tmp_path.iterdir())
    make_base("pixels").network.model.save_pretrained(tmp_path / "unet")
    (tmp_path / "empty").mkdir()
    for name in ("unet", "empty"):
        with pytest.raises(ValueError, match=name):
            load_adapter(tmp_path / name)


# The card and the picture.


def test_the_card_tells_score_floor_ceiling_and_event():
    card = make_card()
    assert card.startswith('---\nlibrary_name: diffusers\nbase_model: "toyworld/pipeline"\n')
    assert make_card(licence="mit").startswith("---\nlicense: mit\nlibrary_name: ")
    for part in (
        "| edge_f1_1px | 0.7000 | 0.2000 | 0.9000 | 0.71 |", "learned at step 2,500", "- learning rate: 0.0001",
        "under another sample's 0.12000 (difference 0.02000 +- 0.00100)", "64 held-out renders; one seed.",
    ):  # fmt: skip
        assert part in card
    assert "Control was not learned by" in make_card(event="was not learned by the criterion")
    blind = make_card(look=replace(LOOK, bounded_scores={"edge_f1": BoundedScore(0.157, 0.173, 0.166)}))
    assert "| edge_f1 | 0.1570 | 0.1730 | 0.1660 | cannot tell |" in blind
    assert "No evidence was taken." in make_card(look=None)
    header = make_card(base='a "quoted" name: with colon').split("---")[1]
    line = next(line for line in header.splitlines() if line.startswith("base_model: "))
    assert json.loads(line.removeprefix("base_model: ")) == 'a "quoted" name: with colon'


def snippet(card):
    return "\n".join(line[4:] for line in card.splitlines() if line.startswith("    "))


@pytest.mark.parametrize("unlocked", [False, True])
def test_what_the_card_shows_works(tmp_path, monkeypatch, unlocked):
    """Run as it stands, in a folder with a hint of edges, grey as files of edges are."""
    pipeline = tiny.sd()
    pipeline.save_pretrained(tmp_path / "base")
    base = NetworkDenoiser(DiffusersNetwork(freeze(pipeline.unet)), VariancePreserving.scaled_linear())
    adapter = make_adapter(base, "toyworld", trained=True)
    with torch.no_grad():
        pipeline.unet.conv_out.bias.add_(1.0)
    card = make_card(base=str(tmp_path / "base"), hint_channels=1, unlocked=unlocked)
    folder = tmp_path / "path/of/this/folder"
    folder.parent.mkdir(parents=True)
    save_adapter(adapter, folder, card, unet=pipeline.unet if unlocked else None)
    Image.new("L", (32, 32), 255).save(tmp_path / "hint.png")
    monkeypatch.chdir(tmp_path)
    code = snippet(card).replace('"a prompt", image=hint', '"a prompt", image=hint, num_inference_steps=1')
    # The tiny autoencoder halves where the adapter's hint is quartered.
    names = {}
    exec(code.replace("image = pipe", "pipe.vae_scale_factor = 4\nimage = pipe"), names)
    assert isinstance(names["pipe"], StableDiffusionControlNetPipeline)
    assert isinstance(names["image"], Image.Image)
    assert torch.equal(names["pipe"].unet.conv_out.bias, pipeline.unet.conv_out.bias) == unlocked
    assert ("needs the folder `unet`" in card) == unlocked


def test_the_card_of_other_hints_and_bases_shows_what_can_be_done():
    assert "hint = torch.zeros(1, 4, height, width)" in snippet(make_card(hint_channels=4))
    assert "Image.open" not in make_card(hint_channels=4)
    assert "pipe" not in snippet(make_card(pipeline=False))
    compile(snippet(make_card(pipeline=False)), "card", "exec")


@pytest.mark.parametrize("channels", [1, 3, 7])
def test_the_sheet_shows_hint_image_and_sample_of_everyone(channels, tmp_path):
    hint = torch.rand(5, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    x0 = make_inputs("pixels", 5)["x0"]
    probe = Probe(x0=x0, hint=hint, cond={}, images=x0.clamp(-1, 1))
    sheet = contact_sheet(probe, torch.full((5, 3, 8, 8), -1.0), columns=2)
    assert sheet.shape == (1, 3, 9 * 9 + 1, 2 * 9 + 1)
    assert 0 <= float(sheet.min()) <= float(sheet.max()) <= 1

    def tile(row, column):
        return sheet[0, :, 1 + 9 * row : 9 + 9 * row, 1 + 9 * column : 9 + 9 * column]

    close(tile(1, 1), (probe.images[1] + 1) / 2)
    close(tile(7, 0), (probe.images[4] + 1) / 2)
    assert bool((tile(2, 0) == 0).all()), "a sample"
    assert bool((tile(8, 1) == 0.5).all()), "a place that is left over"
    if channels in (1, 3):
        close(tile(3, 1), probe.hint[3].expand(3, -1, -1))
    folder = save_adapter(pixels_adapter(), tmp_path / "control", "", samples=sheet)
    assert Image.open(folder / "samples.png").size == (19, 82)
    # Large images are shrunk: Pillow refuses to open what 64 tiles of 1024 pixels would make.
    large = torch.zeros(5, 3, 128, 64)
    large[:, :, :, 32:] = 1.0
    sheet = contact_sheet(replace(probe, images=large), large, columns=2, most=3, side=32)
    assert sheet.shape == (1, 3, 2 * 3 * 33 + 1, 2 * 17 + 1)
    close(sheet[0, :, 67:99, 1:9], torch.full((3, 32, 8), 0.5))
    close(sheet[0, :, 67:99, 9:17], torch.full((3, 32, 8), 1.0))
