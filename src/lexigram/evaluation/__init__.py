"""What a model is worth, and what it weighs: perplexity, agreement with a reference, stored bytes. Never changes a model."""

from lexigram.evaluation.perplexity import Evaluation, evaluate, greedy_sentence
from lexigram.evaluation.sizes import bits_per_weight, stored_bytes

__all__ = ["Evaluation", "bits_per_weight", "evaluate", "greedy_sentence", "stored_bytes"]
