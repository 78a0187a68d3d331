"""OpenAI HTTP in, decisions out."""
