"""Servers with OpenAI's chat completions API: they judge answers, or write them. The runner asks them."""
