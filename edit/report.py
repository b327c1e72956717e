"""What ``scorefield edit`` leaves: pictures, a strip, figures, and the page that shows them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.utils import make_grid, save_image

from edit.options import Config
from edit.requests import Request
from scorefield.atomic import whole_folder
from scorefield.report.write import add_page
from scorefield.training.identity import resolved

MOST = 20
"""Edits in the strip."""

CHANGED = 0.1
"""Largest difference of a channel, in a range of 1, up to which a pixel counts as the same."""


@dataclass(frozen=True, eq=False)
class Edit:
    """One edit as it is written.

    Attributes:
        request: what was asked for.
        image: (3, h, w) the picture, or the source that was drawn.
        source: (3, h, w) the source as the method rebuilds it.
        target: (3, h, w) the edit; all in [-1, 1].
        facts: figures of its batch.
        words: of the target's prompt.
        maps: (words, h', w') attention to them, where it was read.
    """

    request: Request
    image: Tensor
    source: Tensor
    target: Tensor
    facts: dict[str, float]
    words: Sequence[str] = ()
    maps: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """(1, h, w) where the edit differs from the picture, as 0 and 1."""
        return ((self.target - self.image).abs().amax(0, keepdim=True) / 2 > CHANGED).float()

    def figures(self) -> dict[str, Any]:
        """Return what report.json says of it."""
        asked = {"source": self.request.source, "target": self.request.target, "image": self.request.image}
        return {
            **asked, "psnr_of_rebuilt_source": _db(self.source, self.image),
            "psnr_to_source": _db(self.target, self.image), "changed": float(self.mask.mean()), **self.facts,
        }  # fmt: skip


def _db(a: Tensor, b: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB, at most 99."""
    error = float((a - b).square().mean())
    return min(99.0, 10 * float(torch.tensor(4 / max(error, 1e-12)).log10()))


def write(edits: Sequence[Edit], config: Config, strips: Mapping[str, Sequence[Tensor]]) -> None:
    """Write all pictures, strip.png, report.json and the page; whole or not at all.

    ``strips`` are the targets of all edits under other options, by what the page calls these.
    """
    with whole_folder(config.out.resolve()) as folder:
        rows = []
        for number, edit in enumerate(edits):
            _save(edit.image, folder / f"{number:06d}.source.png")
            _save(edit.target, folder / f"{number:06d}.png")
            rows.append({"file_name": f"{number:06d}.png", **edit.figures()})
            if config.report:
                _save(edit.mask * 2 - 1, folder / f"{number:06d}.changed.png")
                if strips:
                    others = torch.stack([targets[number] for targets in strips.values()])
                    _save(
                        make_grid(others, nrow=len(others), padding=2, pad_value=1.0),
                        folder / f"{number:06d}.strip.png",
                    )
                if edit.maps is not None:
                    rows[-1]["attention"] = list(edit.words)
                    _save(_attention(edit.maps, edit.image.shape[1:]), folder / f"{number:06d}.attention.png")
        pairs = [picture for edit in edits[:MOST] for picture in (edit.image, edit.source, edit.target)]
        _save(make_grid(torch.stack(pairs), nrow=3, padding=2, pad_value=1.0), folder / "strip.png")
        content = {"options": resolved(config), "edits": rows, **({"strips": list(strips)} if strips else {})}
        (folder / "report.json").write_text(json.dumps(content, indent=2) + "\n")
        add_page(folder, shown=config.out)


def _attention(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Return the maps side by side, each from black to white."""
    large = interpolate(maps[:, None], size=tuple(size))
    peaks = large.flatten(1).amax(1).clamp(min=1e-12)[:, None, None, None]
    return make_grid(large / peaks * 2 - 1, nrow=len(maps), padding=2, pad_value=1.0)


def _save(picture: Tensor, file: Path) -> None:
    save_image(picture, file, normalize=True, value_range=(-1, 1))
