"""A page in the browser on a teacher and what was made of it: draw, control, edit, turn a scene.

    scorefield play                                                # what ships: no download, no GPU
    scorefield play --student runs/toy/student runs/four/student   # beside their teacher, from the same noise
    scorefield play --teacher <pipeline> --control runs/control/controlnet --scene runs/mug

Nothing that is typed, drawn or uploaded is kept, and nothing is sent anywhere. Ctrl-C ends it.
"""

import os
import tempfile
from pathlib import Path

from scorefield.files import warn
from scorefield.play.models import load_models
from scorefield.play.options import LOOPBACK, Play, check_play
from scorefield.progress import working
from scorefield.training.options import check_device


def main(config: Play) -> None:
    """Load, say what each tab uses, and serve until Ctrl-C; after a dry run, return at once."""
    check_play(config)
    check_device(config.device)
    with tempfile.TemporaryDirectory(prefix="scorefield-play-") as folder:
        quieten(folder)
        with working("loading the models"):
            models = load_models(config)
        print("\n".join(models.told()))
        from scorefield.play.page import build_page  # gradio reads its settings when it is imported

        page = build_page(models, Path(folder))
        if config.dry_run:
            return
        if config.host not in LOOPBACK:
            warn(f"--host {config.host}: everyone on the network can use this page; it asks no password.")
        from scorefield.play.server import serve

        serve(page, config.host, config.port, Path(folder))


def quieten(folder: str) -> None:
    """Let gradio keep its files in ``folder`` and ask no network; its settings in the environment are dropped."""
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = folder
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
