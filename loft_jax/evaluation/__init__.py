"""Evaluation: perplexity, answer choices and generation, over a model and a tokenizer."""
