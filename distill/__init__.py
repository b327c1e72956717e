"""A network learns: one-step and few-step generators by distribution matching."""
