"""`dsv2 serve`: an OpenAI-compatible endpoint, by the server of `transformers serve` with our model in it."""
