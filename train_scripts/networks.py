"""The place of ``Teacher`` in earlier versions: wrappers of users that import it from here still work."""

from scorefield.models.teacher import Teacher as Teacher
