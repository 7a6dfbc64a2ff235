"""Text to tokens and back: vocabularies, tokenizers and chat templates."""
