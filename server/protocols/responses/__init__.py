"""OpenAI's Responses: a chat completion asked and answered in their shape."""
