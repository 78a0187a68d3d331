"""Banks: planted truths, refusals, files."""
