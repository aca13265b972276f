"""Llama 3's tokenizer: vocabulary and special tokens, the chat format, and training a vocabulary of one's own."""
