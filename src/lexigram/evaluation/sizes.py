"""What a loaded model weighs: all that it stores, and the bits a weight of its compressed layers."""

from transformers import PreTrainedModel

from lexigram.transformers_io import factored_layers, shared_matrices


def stored_bytes(model: PreTrainedModel) -> int:
    """Of all tensors as the model holds them; a tied weight counts once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())


def bits_per_weight(model: PreTrainedModel) -> float:
    """Stored bits for each weight of the compressed layers, what they share included; without any, those of its dtype."""
    specs = [layer.factors.spec for _, layer in factored_layers(model)]
    if not specs:
        return 8.0 * model.dtype.itemsize
    stored = sum(spec.bytes for spec in specs) + sum(matrix.spec.bytes for matrix in shared_matrices(model).values())
    return 8 * stored / sum(spec.rows * spec.cols for spec in specs)
