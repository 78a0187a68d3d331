"""The engine's side: how it is reached, what was agreed on with it, whether it is ready."""
