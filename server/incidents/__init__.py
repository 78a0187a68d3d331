"""Requests that were flagged, steered, blocked or could not be judged."""
