"""How tests say that something is refused."""

import pytest


def refused(message, kind=ValueError):
    """Expect an error whose words match a regular expression."""
    return pytest.raises(kind, match=message)
