"""What a model is worth: perplexity and agreement with a reference. Never changes a model."""

from lexigram.evaluation.perplexity import Evaluation, evaluate, greedy_sentence

__all__ = ["Evaluation", "evaluate", "greedy_sentence"]
