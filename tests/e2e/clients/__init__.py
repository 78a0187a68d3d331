"""Chat clients of others as their users write them: only the base URL is ours."""
