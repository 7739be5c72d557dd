"""A whole run as data: model, method, ratio, calibration, seeds. Read from YAML or the command line, kept with the result."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lexigram.allocation.uniform import Accounting
from lexigram.errors import LexigramError
from lexigram.memory import parsed
from lexigram.methods import METHODS, PRESETS, AnyMethod, CospadiConfig, QuantizeConfig
from lexigram.methods.base import chooses, couples, ranks, shares
from lexigram.shown import CALIBRATION, FORM, MACHINE, Shown

SELF = "self"
"""The calibration text that is sampled from the model itself."""

AMOUNTS = ("ratio", "bits", "size")
"""The keys that say how much is to be left, each in its own way; a recipe has one of them."""

UNIFORM, KNAPSACK, GLOBAL = "uniform", "knapsack", "global"
"""The allocations that are made here; any other name is a file to replay."""

METHOD_DEFAULTS = {"allocation": {name: config.allocation for name, config in METHODS.items()}}
"""Settings whose default is the method's own: by key, then by method."""

OptionOf = Callable[[Sequence[str]], str | None]
"""From the keys that lead to a value to the option that it came from, as that is written; None for any other origin."""


def no_option(_path: Sequence[str]) -> None:
    """For values none of which came from an option."""


Names = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
"""Several strings; in a file a single one may stand without a list."""


BOS = "Begin every sequence of a text with the tokenizer's BOS token; models like Gemma make no sense of others."
"""Of a field, wherever text is read."""


def _size(value: Any) -> Any:
    """A size as text, which a file may also hold as a number of bytes; what is neither is left to pydantic."""
    text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    if isinstance(text, str):
        try:
            parsed(text)
        except LexigramError:
            raise ValueError("it should be a size such as 4GB, 800MB or 2GiB") from None
    return text


class Calibration(BaseModel):
    """Which text the Grams are taken on; `self` stands alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: Annotated[Names, Shown(name="calibration", short="-c", metavar="TEXT")] = Field(
        default=(SELF,),
        description="A .txt or .jsonl file (or .gz), `demo`, `hub:NAME`, or `self`: sampled from the model.",
    )
    sequences: int = Field(default=64, ge=1, description="How many sequences of it.")
    length: Annotated[int | None, Shown(none="1024, or the model's context")] = Field(
        default=None, ge=2, description="Tokens a sequence."
    )
    seed: Annotated[int, Shown(name="calibration-seed")] = Field(
        default=0, ge=0, description="Decides which sequences are drawn, in place of the recipe's `seed`."
    )
    bos: bool = Field(default=False, description=BOS)


class Recipe(BaseModel):
    """Everything that decides the bytes of the result.

    One of `ratio`, `bits` and `size` says how much is to be left; where none does, `ratio` has its default, and beside another
    one it is None. All three are kept in the same way: never more bytes than asked, and as close as the form allows. With the
    accounting `paper`, `ratio` is of parameters. `matched` pairs are those of GeoPair. `sequential` calibration moves
    a layer's weights by the share `correction` of the way to where they would make up best for the layers before: the whole
    way follows the calibration text too closely. `seed` drives the method, the calibration has its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # The first is the command's argument; the method and the calibration consist of fields with options of their own.
    model: Annotated[str, Shown(option=False)] = Field(
        description="A folder, a .gguf file, a hub id such as Qwen/Qwen3-0.6B, or `demo`."
    )
    method: Annotated[AnyMethod, Shown(option=False)] = Field(
        default=CospadiConfig(), description="How layers are made smaller."
    )
    ratio: Annotated[float | None, Shown(short="-r")] = Field(
        default=0.2, gt=0, lt=1, description="Share of the compressed layers' stored bytes to remove."
    )
    bits: Annotated[float | None, Shown(none="by the ratio")] = Field(
        default=None,
        gt=0,
        lt=16,
        description="Instead of a ratio: stored bits for each weight of the compressed layers, at most, of 16 before.",
    )
    size: Annotated[str | None, BeforeValidator(_size), Shown(metavar="SIZE", none="by the ratio")] = Field(
        default=None,
        description="Instead of a ratio: bytes of all tensors of the result, at most, such as 4GB; what is not compressed "
        "counts too.",
    )
    accounting: Accounting = Field(default="bytes", description="Count bytes, or parameters as the paper does.")
    share: Annotated[Literal["none", "consecutive", "matched", "site"], Shown(FORM)] = Field(
        default="none",
        description="Which matrices share a dictionary: `consecutive` layers', `matched` pairs of any kinds, or those on one "
        "input `site` (q, k, v; gate, up).",
    )
    group: Annotated[int, Shown(FORM)] = Field(
        default=2, ge=2, description="How many consecutive layers share; implies share `consecutive`."
    )
    allocation: Annotated[str, Shown(metavar=f"{UNIFORM}|{KNAPSACK}|{GLOBAL}|FILE")] = Field(
        default=UNIFORM,
        description=f"How the bytes are spent over the layers: `{UNIFORM}`, the same share of each; `{KNAPSACK}`, where they "
        f"lower the error most; `{GLOBAL}`, by a ranking of the parts of all layers (cap, lowrank-sparse); FILE, as in the "
        "allocation.json of an earlier result.",
    )
    measure: Literal["loss", "relative", "absolute"] = Field(
        default="loss", description="What an allocation that chooses counts as the cost of an error."
    )
    refine: int = Field(
        default=0,
        ge=0,
        description="Steps that move sizes and rank shares from the knapsack's by the loss of the models they lead to.",
    )
    sequential: Annotated[bool, Shown(CALIBRATION)] = Field(
        default=False, description="Calibrate every layer on inputs from the already compressed ones."
    )
    correction: Annotated[float, Shown(CALIBRATION)] = Field(
        default=0.25,
        ge=0,
        le=1,
        description="How far sequential weights move to make up for the layers before: 0 to 1.",
    )
    calibration: Annotated[Calibration, Shown(option=False)] = Field(
        default=Calibration(), description="Which text the layers' inputs are measured on."
    )
    include: Annotated[Names, Shown(metavar="PATTERN")] = Field(
        default=(), description="Compress only layers that match, such as `q_proj` or `*.mlp.*`."
    )
    exclude: Annotated[Names, Shown(metavar="PATTERN")] = Field(default=(), description="Leave out layers that match.")
    seed: int = Field(
        default=42, ge=0, description="Of the method's random choices; as an option, of the calibration's too."
    )
    device: Annotated[str, Shown(MACHINE)] = Field(
        default="auto", description="`cpu`, `cuda`, ...; `auto` takes a GPU where there is one."
    )
    compute_dtype: Annotated[Literal["auto", "float32", "bfloat16"], Shown(MACHINE)] = Field(
        default="auto",
        description="Of the calibration's forward pass; `auto` takes bfloat16 where the device has it.",
    )
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], Shown(MACHINE)] = Field(
        default="bfloat16", description="What is not compressed is stored in this."
    )

    @model_validator(mode="after")
    def _one_amount(self) -> "Recipe":
        given = [key for key in AMOUNTS if key in self.model_fields_set and getattr(self, key) is not None]
        if len(given) > 1:
            said = " and ".join(f"{key} {getattr(self, key)}" for key in given)
            raise ValueError(f"{said} each say how much is to be left; give one of them")
        own = self.ratio or type(self).model_fields["ratio"].default
        object.__setattr__(self, "ratio", own if self.bits is None and self.size is None else None)
        return self

    @model_validator(mode="after")
    def _paper_stores_14_bits(self) -> "Recipe":
        """The paper's accounting is exact in bytes for 14-bit coefficients and bfloat16 only (`methods.cospadi`)."""
        papers = {"value_bits": 14, "dictionary_bits": 16}
        if self.accounting == "paper" and isinstance(self.method, CospadiConfig):
            for key, bits in papers.items():
                if key in self.method.model_fields_set and getattr(self.method, key) != bits:
                    raise ValueError(
                        f"the accounting `paper` stores {key} of {bits}; set {key} to that, or leave it out"
                    )
            object.__setattr__(self, "method", self.method.model_copy(update=papers))
        return self

    @model_validator(mode="after")
    def _possible(self) -> "Recipe":
        if "group" in self.model_fields_set and "share" not in self.model_fields_set:
            object.__setattr__(self, "share", "consecutive")
        if self.share != "none" and not shares(self.method):
            raise ValueError(
                f"the method {self.method.name} shares nothing between matrices; leave share and group out"
            )
        solver = self.method
        if isinstance(solver, CospadiConfig) and self.share in ("consecutive", "matched"):
            several = solver.metric == "exact" and not solver.plain
            if several and (solver.coding == "threshold" or solver.update.startswith("ksvd")):
                raise ValueError(
                    f"coding {solver.coding!r} with update {solver.update!r} knows one metric only; share with metric `mean`, "
                    "or take coding htp or omp with update mod"
                )
        if self.sequential and self.share in ("consecutive", "matched"):
            raise ValueError(
                f"sequential calibration needs a layer's factors before the next layer is run, and share {self.share!r} gives "
                "them later; share on one `site`, or leave one of the two out"
            )
        if "allocation" not in self.model_fields_set:
            object.__setattr__(self, "allocation", self.method.allocation)
        if chooses(self.method) and self.allocation == KNAPSACK:
            raise ValueError(f"the method {self.method.name} chooses by itself; take the allocation global or uniform")
        if couples(self.method) and self.allocation == KNAPSACK:
            raise ValueError(
                f"the knapsack adds up the errors of all matrices, and {self.method.name} loses only at the last of several; "
                "take the allocation uniform"
            )
        if chooses(self.method) and self.sequential:
            raise ValueError(
                f"the method {self.method.name} chooses over the original model's layers together; leave sequential out"
            )
        if self.allocation == GLOBAL and not (chooses(self.method) or ranks(self.method)):
            raise ValueError(f"the allocation global is not for {self.method.name}; take uniform, knapsack or a file")
        if self.accounting == "paper" and self.ratio is None:
            raise ValueError(
                "the accounting `paper` counts parameters, and bits and size count stored bytes; leave the accounting out, or "
                "give a ratio"
            )
        if self.accounting == "paper" and isinstance(self.method, QuantizeConfig):
            raise ValueError("the accounting `paper` counts values, and quantisation removes none; leave it out")
        if self.accounting == "paper" and self.by_curves:
            raise ValueError(
                f"the allocation {self.allocation} counts stored bytes; leave the accounting `paper` out, or take uniform"
            )
        if self.refine and self.allocation != KNAPSACK:
            raise ValueError(
                f"refine begins at the knapsack, and the allocation is {self.allocation}; leave refine out"
                + ("" if chooses(self.method) or couples(self.method) else f", or take the allocation {KNAPSACK}")
            )
        if self.refine and self.calibration.sequences < 2:
            raise ValueError("refine holds a sequence back to judge by; calibrate on 2 sequences or more")
        if self.share != "consecutive" and self.group != 2:
            raise ValueError(f"share {self.share!r} takes no group; leave group out, or share consecutive")
        return self

    @property
    def amount(self) -> str:
        """How much is to be left, as it was asked for."""
        if self.bits is not None:
            return f"{self.bits:g} bits a weight"
        return f"ratio {self.ratio:g}" if self.size is None else f"size {self.size}"

    @property
    def by_curves(self) -> bool:
        """Whether the bytes are spent by what every unit would lose at every size."""
        return self.allocation == KNAPSACK or (self.allocation == GLOBAL and ranks(self.method))

    @classmethod
    def parse(cls, content: dict[str, Any], where: str = "the recipe", option_of: OptionOf = no_option) -> "Recipe":
        """Validate plain data; the last two arguments are those of `explain`.

        Raises:
            LexigramError: naming the key, its value and, for an unknown key, the nearest known one.
        """
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise LexigramError(explain(error, where, option_of)) from None

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


def merge(
    content: Mapping[str, Any],
    *,
    preset: str | None,
    method: Mapping[str, Any],
    calibration: Mapping[str, Any],
    settings: Mapping[str, Any],
    where: str = "the settings",
    option_of: OptionOf = no_option,
) -> Recipe:
    """Options over the preset over a recipe's content over defaults; an option that is None was not given.

    A seed is an option for the method and for the calibration, unless that is given its own. An option for one of `AMOUNTS`
    stands in place of whichever of them the content has.

    Args:
        content: of a recipe file, as `Recipe.read` gives it; may be empty.
        preset: one of `PRESETS`; an option that sets the whole method.
        method: options of the method; `name` among them.
        calibration: options of the calibration.
        settings: options of the recipe itself.
        where: what an error message names.
        option_of: what it names instead for a value that came from an option of the command line.

    Raises:
        LexigramError: for a preset of another method, and as `Recipe.parse` does.
    """
    method, calibration, settings = _given(method), _given(calibration), _given(settings)
    if any(key in settings for key in AMOUNTS):
        content = {key: value for key, value in content.items() if key not in AMOUNTS}
    if "group" in settings:
        settings.setdefault("share", "consecutive")
    if "seed" in settings:
        calibration = {"seed": settings["seed"], **calibration}
    return Recipe.parse(
        {
            **content,
            **settings,
            "method": _merged_method(content, preset, method),
            "calibration": {**(content.get("calibration") or {}), **calibration},
        },
        where,
        option_of,
    )


def method_name(content: Mapping[str, Any], *, preset: str | None = None, option: str | None = None) -> str:
    """The method that `merge` takes: as the option says, or else the preset, the recipe's content, the default."""
    if option is not None:
        return option
    return PRESETS[preset].name if preset else (content.get("method") or {}).get("name", CospadiConfig().name)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def _merged_method(content: Mapping[str, Any], preset: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options over the preset, or else over a recipe's method; those of another method do not carry over."""
    # A preset asks for what it changes; its defaults may still give way, as those of a config do.
    base = PRESETS[preset].model_dump(exclude_defaults=True) if preset else content.get("method") or {}
    default = method_name(content, preset=preset)
    name = method_name(content, preset=preset, option=options.get("name"))
    if preset and name != default:
        raise LexigramError(f"--preset {preset} is a solver of {default}; leave it out for the method {name}")
    return {**(base if name == default else {}), **options, "name": name}


def explain(error: ValidationError, where: str = "", option_of: OptionOf = no_option) -> str:
    """The first problem of a pydantic error in one sentence, with the nearest known key for an unknown one.

    Args:
        error: of a recipe, or of other settings.
        where: what holds the keys, to stand before the sentence; empty where the caller says so himself.
        option_of: a value that came from an option is named by that, in place of `where` and its key.
    """
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    method = path.pop(1) if path[:1] == ["method"] and len(path) > 1 else None  # pydantic's, not written by the user
    before, key = f"{where}: " if where else "", ".".join(path)
    if first["type"] == "extra_forbidden":
        known = _known_keys(path, method)
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the keys here are {', '.join(known)}"
        return f"{before}unknown key {key!r}{f' of the method {method}' if method else ''}; {hint}"
    if first["type"] == "union_tag_invalid":
        return f"{before}unknown method {first['input'].get('name')!r}; the methods are {', '.join(METHODS)}"
    if not path or (method and path == ["method"]):  # a rule over several keys
        return before + first["msg"].removeprefix("Value error, ")
    name = option_of(path) or before + key
    if first["type"] == "missing":
        return f"{name} is missing; give it a value"
    message = first["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    return f"{name} is {first['input']!r}; {message[:1].lower()}{message[1:]}"


def _known_keys(path: list[str], method: str | None) -> list[str]:
    if method is not None:
        return list(METHODS[method].model_fields)
    return list(Calibration.model_fields if path[0] == "calibration" and len(path) > 1 else Recipe.model_fields)
