"""One commit to the Hugging Face Hub: all of it is there, or nothing."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub import constants as hub

from scorefield.files import load_json
from scorefield.publish.result import CARD, SHOWN, Result


def without_place(file: Path) -> Path | bytes:
    """Return a file, or its bytes without the place that a config was loaded from."""
    if file.suffix != ".json":
        return file
    try:
        held = load_json(file)
    except ValueError:
        return file
    if not isinstance(held, dict) or "_name_or_path" not in held:
        return file
    kept = {name: value for name, value in held.items() if name != "_name_or_path"}
    return (json.dumps(kept, indent=2) + "\n").encode()


def check_reachable() -> str:
    """Return the token of the user. Raises ``ValueError`` without one, and where the hub was switched off."""
    if hub.HF_HUB_OFFLINE:
        raise ValueError("HF_HUB_OFFLINE is set, and nothing can be sent. Unset it, or pass --dry-run.")
    if (token := get_token()) is None:
        raise ValueError("nobody is logged in to the Hugging Face Hub. Run `hf auth login`, or set HF_TOKEN.")
    return token


def upload(result: Result, card: str, name: str, *, private: bool, token: str) -> str:
    """Send files and card, and return their address. The repository is made if it is not there.

    Args:
        result: what is published.
        card: its text.
        name: owner/name of the repository.
        private: nobody else may see it; a public one that is there already is refused.
        token: of a user who may write there.

    Raises:
        ConnectionError: whatever the hub or the network answers in place of it.
    """
    files: list[tuple[str, Any]] = [(one, without_place(result.folder / one)) for one in result.files]
    files.append((CARD, card.encode()))
    if result.picture is not None:
        files.append((SHOWN, result.picture))
    api = HfApi(token=token)
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        if private and not api.model_info(name).private:
            raise ValueError("it is there already, and public. Make it private on its page, or take another name.")
        operations = [CommitOperationAdd(path_in_repo=one, path_or_fileobj=source) for one, source in files]
        api.create_commit(name, operations, commit_message="Publish with scorefield")
    except Exception as error:  # of whichever package the library asks the network with
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConnectionError(
            f"{name} was not published: {said} None of its files is there. Try again."
        ) from error
    return str(address)
