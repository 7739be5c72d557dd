"""A whole run as data: model, method, ratio, calibration, seeds. Read from YAML or the command line, kept with the result."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lexigram.errors import LexigramError
from lexigram.methods import METHODS, AnyMethod, CospadiConfig

SELF = "self"
"""The calibration text that is sampled from the model itself."""

Names = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
"""Several strings; in a file a single one may stand without a list."""


class Calibration(BaseModel):
    """Which text the Grams are taken on.

    `text` holds file names, `demo`, ``hub:...`` names, or the single word `self`: sequences sampled from the model. `length` is
    in tokens; None means 1024, or the model's context where that is shorter.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: Names = (SELF,)
    sequences: int = Field(default=64, ge=1)
    length: int | None = Field(default=None, ge=2)
    seed: int = Field(default=0, ge=0)


class Recipe(BaseModel):
    """Everything that decides the bytes of the result.

    `ratio` is the share of the stored bytes of the compressed layers that is removed; with the accounting `paper`, of their
    parameters. `dtype` is what the tensors that are not compressed are stored in. `seed` drives the method, the calibration
    has its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    method: AnyMethod = CospadiConfig()
    ratio: float = Field(default=0.2, gt=0, lt=1)
    accounting: Literal["bytes", "paper"] = "bytes"
    calibration: Calibration = Calibration()
    include: Names = ()
    exclude: Names = ()
    seed: int = Field(default=42, ge=0)
    device: str = "auto"
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"

    @model_validator(mode="after")
    def _paper_stores_14_bits(self) -> "Recipe":
        """The paper's accounting is exact in bytes for 14-bit coefficients only (`methods.cospadi`)."""
        if self.accounting == "paper" and isinstance(self.method, CospadiConfig) and self.method.coefficient_bits != 14:
            if "coefficient_bits" in self.method.model_fields_set:
                raise ValueError("the accounting `paper` stores coefficients in 14 bits; set coefficient_bits to 14")
            object.__setattr__(self, "method", self.method.model_copy(update={"coefficient_bits": 14}))
        return self

    @classmethod
    def parse(cls, content: dict[str, Any], where: str = "the recipe") -> "Recipe":
        """Validate plain data.

        Raises:
            LexigramError: naming the key, its value and, for an unknown key, the nearest known one.
        """
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise LexigramError(f"{where}: {explain(error)}") from None

    @classmethod
    def read(cls, file: Path) -> dict[str, Any]:
        """The plain content of a recipe file, not yet validated (the command line may still override parts of it)."""
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise LexigramError(
                f"the recipe {file} cannot be read: {error.strerror or error}; check the path"
            ) from error
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise LexigramError(f"the recipe {file} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise LexigramError(f"the recipe {file} holds no mapping; write keys and values such as `ratio: 0.3`")
        for key in ("method", "calibration"):
            if not isinstance(content.get(key) or {}, dict):
                raise LexigramError(
                    f"{file}: {key} is {content[key]!r}; write a mapping such as "
                    + ("`method: {name: svd}`" if key == "method" else "`calibration: {text: demo}`")
                )
        return content

    def to_yaml(self) -> str:
        """The recipe, complete, as YAML that `read` accepts."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def explain(error: ValidationError) -> str:
    """The first problem of a pydantic error in one sentence, with the nearest known key for an unknown one."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    method = path.pop(1) if path[:1] == ["method"] and len(path) > 1 else None  # pydantic's, not written by the user
    where = ".".join(path)
    if first["type"] == "extra_forbidden":
        known = _known_keys(path, method)
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the keys here are {', '.join(known)}"
        return f"unknown key {where!r}{f' of the method {method}' if method else ''}; {hint}"
    if first["type"] == "union_tag_invalid":
        return f"unknown method {first['input'].get('name')!r}; the methods are {', '.join(METHODS)}"
    if not path:  # a rule over several keys
        return first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{where} is missing; give it a value"
    message = first["msg"].replace("Input should", "it should")
    return f"{where} is {first['input']!r}; {message[:1].lower()}{message[1:]}"


def _known_keys(path: list[str], method: str | None) -> list[str]:
    if method is not None:
        return list(METHODS[method].model_fields)
    return list(Calibration.model_fields if path[0] == "calibration" and len(path) > 1 else Recipe.model_fields)
