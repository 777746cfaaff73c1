"""A model provider that speaks OpenAI's shape: it streams, fails, stalls, and keeps its own count of what it bills."""
