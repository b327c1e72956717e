"""An adapter learns: a frozen text-to-image model is taught to follow a hint, and shows when it has learned to."""
