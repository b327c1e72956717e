"""Former module of ``Teacher``, kept so that users' wrappers that import it from here still work."""

from scorefield.models.teacher import Teacher as Teacher
