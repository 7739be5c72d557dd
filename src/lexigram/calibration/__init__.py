"""From text to Grams: fixed token batches (`text`), the model layer by layer (`layerwise`), sums of ``x x^T`` (`gram`)."""
