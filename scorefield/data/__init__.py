"""Pictures of the user, and caches of what was computed from them."""
