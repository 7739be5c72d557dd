"""Which device to compute on, and in which dtype a forward pass is run there."""

from typing import Literal

import torch

from lexigram.errors import LexigramError


def resolve_device(name: str) -> torch.device:
    """The device called `name`; ``auto`` is a CUDA GPU where there is one, else the CPU.

    Raises:
        LexigramError: where it cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float64, device=device).item()  # Grams are added up in float64
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise LexigramError(
            f"the device {name!r} cannot be used: {reason}; name another, such as cpu, or auto"
        ) from error
    return device


def forward_dtype(device: torch.device, wanted: Literal["auto", "float32", "bfloat16"] = "auto") -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32; or what is wanted."""
    if wanted != "auto":
        return torch.float32 if wanted == "float32" else torch.bfloat16
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        abilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        native = bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16"))
    else:
        native = False
    return torch.bfloat16 if native else torch.float32
