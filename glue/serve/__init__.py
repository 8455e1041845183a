"""A running member behind HTTP: what OpenAI's clients can speak to, and next-token probabilities for proxies."""
