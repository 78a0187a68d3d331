"""Anthropic's Messages: a chat completion asked and answered in their shape."""
