"""Entries of a ledger made up by hand, for what is shown of it."""

from lexigram.factors import FactorSpec
from lexigram.records import LayerRecord


def layer(name: str, index: int | None, spec: FactorSpec, error: float = 0.1) -> LayerRecord:
    """A layer of that name and form, compressed with that error."""
    return LayerRecord.model_validate(
        {
            "name": name,
            "kind": name.rsplit(".", 1)[-1],
            "layer": index,
            "shape": (spec.rows, spec.cols),
            "site": name,
            "factors": spec.model_dump(),
            "bytes_before": 2 * spec.rows * spec.cols,
            "bytes_after": spec.bytes,
            "parameters_after": spec.parameters,
            "fit": {
                "status": "converged",
                "message": "",
                "relative_error": error,
                "objective": [error**2],
                "iterations": 1,
                "seconds": 0.1,
                "gram_rank": 32,
                "gram_damping": 0.0,
            },
        }
    )
