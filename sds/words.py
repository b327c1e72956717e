"""Signs in the prompts of a run that its scene will be another than they say."""

from scorefield.shipped import shipped, ships
from sds.options import Config, shown


def doubts_of_words(config: Config) -> list[str]:
    """Return what looks wrong with the prompts: words that the teacher never saw, or that have no effect."""
    found = []
    if ships("words", config.teacher):
        unknown = shipped(f"words {config.teacher}")(f"{config.prompt} {config.negative_prompt}")
        if unknown:
            found.append(
                f"--teacher {config.teacher} was never shown the words {', '.join(unknown)}; it will make "
                'something else of them. It knows captions such as "a red mug".'
            )
    # CSD, ISM and SDI use the negative prompt whatever the guidance.
    if config.negative_prompt.strip() and config.guidance == (1.0, 1.0) and config.method in ("sds", "vsd", "x0"):
        found.append(
            f"--negative-prompt {config.negative_prompt!r} has no effect at --guidance {shown(config.guidance)}. "
            "Raise --guidance above 1."
        )
    return found
