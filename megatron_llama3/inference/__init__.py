"""Text from a trained model: key/value cache, sampling, and the engine that continues prompts."""
