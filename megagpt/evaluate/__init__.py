"""Scores of a model: loss, likelihoods, tasks."""
