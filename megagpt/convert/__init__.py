"""Weights in and out: Hugging Face and llama2.c into runs, runs into exports, each hand-over checked by logits."""
