"""How one budget is spent over the layers: a full map from target to `Budget`. Fits nothing."""
