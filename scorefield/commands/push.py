"""Put what a run made on the Hugging Face Hub: student, adapter, LoRA or slider, under a card of its figures.

    scorefield push runs/student --to me/mugs-in-one-step --dry-run
    scorefield push runs/student --to me/mugs-in-one-step

Only files that the run wrote, unchanged, are sent, in one commit. Nothing else sends anything anywhere.
"""

from scorefield.commands.options import Push, check_push
from scorefield.progress import working
from scorefield.publish.card import finished_card
from scorefield.publish.result import CARD, SHOWN, find_result
from scorefield.publish.upload import check_reachable, upload
from scorefield.training.refusal import BEGUN


def main(config: Push) -> None:
    """Send the result, or under ``--dry-run`` say what would be sent."""
    check_push(config)
    result = find_result(config.run)
    card = finished_card(result, config.to, config.licence)
    sizes = {name: (result.folder / name).stat().st_size for name in result.files}
    if result.left:
        print(f"not sent, since the run did not write them: {', '.join(result.left)}")
    if config.dry_run:
        for name, size in sizes.items():
            print(f"{size:>14,} bytes  {name}")
        if result.picture is not None:
            print(f"{result.picture.stat().st_size:>14,} bytes  {SHOWN}, which is {result.picture}")
        print(f"{len(card.encode()):>14,} bytes  {CARD}:\n\n{card}")
        return
    token = check_reachable()
    try:
        with working(f"sending {sum(sizes.values()):,} bytes to {config.to}"):
            address = upload(result, card, config.to, private=config.private, token=token)
    except ConnectionError as error:
        error.add_note(BEGUN)
        raise
    print(f"published: {address}")
