"""What a run can be told: typed sections, read from YAML and `key=value` overrides.

    config = load_config("cifar10_ijepa", ["train.epochs=2", "data.train=/data/train-*.tar"])

Sections that only hand values on to a class (models, masks, transforms, digit scenes) take their
keys, types and defaults from its signature, so that these are written in one place.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import os
import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

try:
    import yaml
    from pydantic import (
        AfterValidator,
        BaseModel,
        BeforeValidator,
        ConfigDict,
        Field,
        ValidationError,
        create_model,
        model_validator,
    )
    from pydantic_core import PydanticKnownError
except ImportError as error:
    raise ImportError(
        f'the configuration of a run needs {error.name}: pip install "jepa-fast[train]"'
    ) from error

from jepa_fast.data import DigitScenes, Transform
from jepa_fast.masks import BlockMaskSampler
from jepa_fast.models.ijepa import IJepa
from jepa_fast.models.probijepa import ProbIJepa
from jepa_fast.models.tcjepa import TCJepa
from jepa_fast.models.tijepa import TIJepa
from jepa_fast.nn.heads import HEADS
from jepa_fast.ops.latent_loss.reference import KINDS as LOSSES
from jepa_fast.ops.text_cross_attention.api import MOST_CAPTIONS
from jepa_fast.train.errors import ConfigError
from jepa_fast.train.schedules import cosine, linear

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def _no_number(kind: Literal["int_type", "float_type"]) -> BeforeValidator:
    """Refuses what pydantic would turn into a number: truth values, and numbers in quotes."""

    def check(value: Any) -> Any:
        if isinstance(value, (bool, str)):
            raise PydanticKnownError(kind)
        return value

    return BeforeValidator(check)


Integer = Annotated[int, _no_number("int_type")]
Float = Annotated[float, _no_number("float_type")]
Positive = Annotated[Integer, Field(gt=0)]
Count = Annotated[Integer, Field(ge=0)]
Seed = Annotated[Integer, Field(ge=0, lt=2**63)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegative = Annotated[Float, Field(ge=0)]
Share = Annotated[Float, Field(ge=0, le=1)]
BelowOne = Annotated[Float, Field(ge=0, lt=1)]
# No shell expands the tilde of `data.train=~/images`, nor of a YAML file.
PathText = Annotated[str, AfterValidator(os.path.expanduser)]


class Section(BaseModel):
    """Named values; an unknown name is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _section_of(
    constructor: type, skip: Sequence[str] = (), base: type[Section] = Section, **more: Any
) -> Any:
    """A section with the keys, types and defaults of a constructor, without `skip`.

    more: further keys, as `key=(type, default)`.
    """
    hints = get_type_hints(constructor.__init__)  # type: ignore[misc]
    fields = {
        name: (
            _exact(hints[name]),
            ... if parameter.default is parameter.empty else parameter.default,
        )
        for name, parameter in inspect.signature(constructor).parameters.items()
        if name not in skip
    }
    return create_model(constructor.__name__, __base__=base, **{**fields, **more})


def _exact(hint: Any) -> Any:
    """A type with every `int` and `float` in it as `Integer` and `Float`."""
    if hint in (int, float):
        return Integer if hint is int else Float
    inner = tuple(_exact(each) for each in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return Union[inner]  # noqa: UP007, the members are in a tuple
    if get_origin(hint) in (tuple, Sequence):
        return get_origin(hint)[inner]
    return hint


# Model -------------------------------------------------------------------------------------------


Loss: Any = Literal[LOSSES]


class EncoderOptions(Section):
    """Where the encoder departs from the size in its name."""

    embed_dim: Positive | None = None
    depth: Positive | None = None
    num_heads: Positive | None = None
    mlp_ratio: PositiveFloat | None = None


class ModelBase(Section):
    """Keys of every method.

    encoder: a name for `create_encoder`, such as `vit_base_patch16`.
    """

    encoder: str = "vit_base_patch16"
    encoder_options: EncoderOptions = EncoderOptions()
    img_size: Positive = 224


def _model_section(constructor: type, skip: Sequence[str] = (), **more: Any) -> Any:
    method = (Literal[constructor.__name__.lower()], ...)  # type: ignore[misc]
    skip = ("encoder", "img_size", *skip)
    loss = inspect.signature(constructor).parameters.get("loss")
    if loss is not None:  # the models leave it to their first step to look at it
        more["loss"] = (Loss if loss.default is not None else Loss | None, loss.default)
    return _section_of(constructor, skip, ModelBase, method=method, **more)


IJepaSection = _model_section(IJepa)
TCJepaSection = _model_section(TCJepa, skip=("text_dim",))
TIJepaSection = _model_section(
    TIJepa,
    skip=("text_encoder", "image_dim", "grid", "text_dim", "save_frozen"),
    encoder_weights=(PathText | None, None),
    cache_features=(bool, False),
)
"""Also `encoder_weights`, a checkpoint of an I-JEPA run or of the public code whose teacher becomes
the frozen image encoder, and `cache_features`, to keep that encoder's tokens of every image."""
ProbIJepaSection = _model_section(ProbIJepa, head=(Literal[tuple(HEADS)], "mixture"))
METHODS = ("ijepa", "tijepa", "tcjepa", "probijepa")


# Data --------------------------------------------------------------------------------------------

if TYPE_CHECKING:  # a section made from a signature is beyond a type checker
    AugmentSection = Any
else:
    AugmentSection = _section_of(Transform, skip=("size", "seed"))


class DataBase(Section):
    """Keys of every kind of data.

    augment: arguments of `Transform` for training; evaluation takes the centre and no flip.
    in_memory: decode everything once and keep it, for sets that fit.
    memory_size: pixels a side that images in memory are brought to; None: they have one size.
    workers: processes that read and decode, where not in memory.
    shuffle_buffer: samples that streamed shards are drawn from.
    """

    augment: AugmentSection = AugmentSection()
    in_memory: bool = False
    memory_size: Positive | None = None
    workers: Count = 0
    shuffle_buffer: Positive = 2048


class ShardData(DataBase):
    """WebDataset shards; `train_length` and `val_length` where counting them would take long."""

    kind: Literal["shards"]
    train: PathText
    val: PathText | None = None
    train_length: Positive | None = None
    val_length: Positive | None = None


class FolderData(DataBase):
    """A folder with one sub-folder a class; `captions` is a text with `{}` for the class."""

    kind: Literal["folder"]
    train: PathText
    val: PathText | None = None
    captions: str | None = None


class CocoData(DataBase):
    """COCO caption files (`train`, `val`) and the folders of their images."""

    kind: Literal["coco"]
    train: PathText
    train_images: PathText
    val: PathText | None = None
    val_images: PathText | None = None


DigitData = _section_of(
    DigitScenes,
    skip=("length", "split", "seed"),
    base=DataBase,
    kind=(Literal["digits"], ...),
    train_length=(Positive, 50_000),
    val_length=(Positive, 2_000),
    probe_length=(Positive, 5_000),
)
"""Scenes of handwritten digits: arguments of `DigitScenes`, and how many scenes are trained on,
probes are tested on, and probes learn from (the first of the training scenes)."""
DATA_KINDS = ("shards", "folder", "coco", "digits")


class TextSection(Section):
    """How captions become words.

    encoder: "hashed" (`HashedWords`), or a text encoder's folder or name (`load_text_encoder`).
    captions: at most so many an image; drawn at random where it has more.
    max_words: words, or tokens, a caption.
    dim, context, position: of `HashedWords`.
    normalize, trust_remote_code: of `load_text_encoder`.
    """

    encoder: str = "hashed"
    captions: Positive = 8
    max_words: Positive = 64
    dim: Positive = 256
    context: BelowOne = 0.0
    position: NonNegative = 0.0
    normalize: Literal["none", "word", "sequence"] = "none"
    trust_remote_code: bool = False


# Training ----------------------------------------------------------------------------------------


class LearningRate(Section):
    """Straight line from `start` to `peak`, then a cosine to `final`.

    warmup_epochs: length of the line; None: a tenth of the run.
    """

    start: PositiveFloat = 2e-4
    peak: PositiveFloat = 1e-3
    final: NonNegative = 1e-6
    warmup_epochs: NonNegative | None = None


class Ramp(Section):
    """A value that goes from `start` to `final`; a plain number stands for a constant."""

    start: NonNegative
    final: NonNegative
    shape: Literal["linear", "cosine"] = "linear"

    def at(self, step: float, total: float) -> float:
        """The value at a step of `total`."""
        schedule = linear if self.shape == "linear" else cosine
        return schedule(step, total=total, start=self.start, final=self.final)


class WeightDecay(Ramp):
    """I-JEPA's."""

    start: NonNegative = 0.04
    final: NonNegative = 0.4
    shape: Literal["linear", "cosine"] = "cosine"


class Momentum(Ramp):
    """I-JEPA's, of the teacher."""

    start: Share = 0.996
    final: Share = 1.0


def _constant(value: Any) -> Any:
    return value if isinstance(value, (dict, Ramp)) else {"start": value, "final": value}


class Collapse(Section):
    """What counts as collapsed: targets of a lower effective rank, or spread a dimension."""

    min_rank: NonNegative = 0.0
    min_std: NonNegative = 0.0


class TrainConfig(Section):
    """Schedules, optimizer and bookkeeping. The defaults are I-JEPA's, but for the warm-up.

    steps: length of the run, instead of `epochs`.
    batch_size: of all processes together.
    precision: "bfloat16" is autocast; "auto" takes it where it is the faster: on GPUs, and on CPUs
        with AMX.
    clip_grad: largest norm of the gradient; None for no clipping.
    compile: `torch.compile` every transformer block.
    log_every: steps between rows of the logs, which are means over them.
    checkpoint_every: steps between checkpoints; None: an epoch.
    keep_checkpoints: older ones kept besides the last: 0 leaves one file, 1 leaves two.
    require_learning: a run whose loss did not fall has failed.
    """

    epochs: Positive = 300
    steps: Positive | None = None
    batch_size: Positive = 2048
    lr: LearningRate = LearningRate()
    weight_decay: Annotated[WeightDecay, BeforeValidator(_constant)] = WeightDecay()
    momentum: Annotated[Momentum, BeforeValidator(_constant)] = Momentum()
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    clip_grad: PositiveFloat | None = None
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    compile: bool = False
    log_every: Positive = 50
    checkpoint_every: Positive | None = None
    keep_checkpoints: Count = 1
    collapse: Collapse = Collapse()
    require_learning: bool = False

    def warmup_warning(self, run_epochs: float) -> str | None:
        """What is wrong with the warm-up in a run of so many epochs; None where nothing is."""
        warmup = self.lr.warmup_epochs
        if warmup is None or warmup < run_epochs:
            return None
        return (
            f"train.lr.warmup_epochs: expected less than the run's epochs, {run_epochs:g}, got "
            f"{warmup:g}: it ends before the learning rate comes down from train.lr.peak; lower it"
        )


class EvalSection(Section):
    """What `jepa-fast eval` asks.

    k: neighbours of kNN.
    patches_per_image: labelled patches an image that the per-patch probe looks at.
    batch_size: images encoded at a time.
    head_tokens: held-out targets that a probabilistic head is asked about; 0: none. Likelihoods of
        `diffusion` and `flow_matching` solve an ODE for each.
    """

    k: Positive = 20
    patches_per_image: Positive = 16
    batch_size: Positive = 250
    head_tokens: Count = 512


if TYPE_CHECKING:
    DataSection = Any
    MaskSection = Any
    ModelSection = Any
else:
    MaskSection = _section_of(BlockMaskSampler, skip=("grid", "seed"))
    ModelSection = Annotated[
        IJepaSection | TIJepaSection | TCJepaSection | ProbIJepaSection,
        Field(discriminator="method"),
    ]
    DataSection = Annotated[
        ShardData | FolderData | CocoData | DigitData, Field(discriminator="kind")
    ]


_CHOICES = ("model.method", "data.kind")
"""Keys that say which others there are."""
_MEMBERS: dict[str, dict[str, Any]] = {
    "model": dict(
        zip(METHODS, (IJepaSection, TIJepaSection, TCJepaSection, ProbIJepaSection), strict=True)
    ),
    "data": dict(zip(DATA_KINDS, (ShardData, FolderData, CocoData, DigitData), strict=True)),
}


class Config(Section):
    """One run.

    output: folder for logs, checkpoints and results.
    device: "auto", "cpu", "cuda" or "cuda:<number>"; "auto" takes a GPU where there is one.
    tensorboard: also write TensorBoard events.
    """

    output: PathText
    seed: Seed = 0
    device: str = "auto"
    tensorboard: bool = True
    model: ModelSection
    masks: MaskSection = MaskSection()
    data: DataSection
    text: TextSection = TextSection()
    train: TrainConfig = TrainConfig()
    eval: EvalSection = EvalSection()

    @model_validator(mode="after")
    def _check_across(self) -> Config:
        """What one section alone cannot know."""
        model: Any = self.model
        augment: Any = self.data.augment
        if not re.fullmatch(r"auto|(cpu|cuda)(:\d+)?", self.device):
            raise ValueError(
                f"device: expected auto, cpu, cuda or cuda:<number>, got {self.device!r}"
            )
        if model.method == "probijepa":
            _check_head_options(HEADS[model.head], model.head_options)
        # The pool of captions that are attended to one by one, in one operator.
        in_a_byte = model.method == "tcjepa" and model.conditioning == "words"
        in_a_byte = in_a_byte and model.pool == "max" and not model.per_caption
        if in_a_byte and self.text.captions > MOST_CAPTIONS:
            raise ValueError(
                f"text.captions: expected at most {MOST_CAPTIONS} with model.pool=max, got "
                f"{self.text.captions}; lower it, or set model.per_caption=true"
            )
        caches = model.method == "tijepa" and model.cache_features
        if caches and (augment.crop_scale is not None or augment.flip > 0):
            raise ValueError(
                "model.cache_features: expected false where data.augment has crop_scale or flip, "
                "since an augmented image has other features every time; got true"
            )
        return self

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as YAML and checkpoints take them; `parse_config` reads them back."""
        return self.model_dump(mode="json")


def _check_head_options(head: type, options: Any) -> None:
    """Names and types of the options of a head, which `model.head` chooses."""
    section = _section_of(head, skip=("condition_dim", "target_dim"))
    try:
        section.model_validate(dict(options or {}))
    except ValidationError as error:
        problems = error.errors(include_url=False)
        found = [_describe(problem, section, "model.head_options.") for problem in problems]
        others = {name for each in HEADS.values() for name in inspect.signature(each).parameters}
        if any(
            problem["type"] == "extra_forbidden" and problem["loc"][0] in others
            for problem in problems
        ):  # the recipe's, for its own head, where only `model.head` was meant
            found.append(
                "it is an option of another head: model.head_options=null takes what this one has "
                "by default"
            )
        raise ValueError("; ".join(found)) from None


# Reading -----------------------------------------------------------------------------------------


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_config(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply `key=value` overrides, dotted (`train.lr.peak=1e-3`), values in YAML.

    Args:
        recipe: name of a packaged recipe, or path of a YAML file. Its key `extends` names another
            recipe, packaged or a path from the folder of this one, whose values hold where it gives
            none. Of a recipe with another `model.method` or `data.kind`, only those hold that both
            know; so, too, where an override names it.

    Raises:
        ConfigError: no such recipe, no YAML, an unknown key, or a value of the wrong type.
    """
    path = _find(recipe)
    return parse_config({"output": f"runs/{path.stem}", **_read(path)}, overrides, source=recipe)


def parse_config(values: dict[str, Any], overrides: Sequence[str] = (), source: str = "") -> Config:
    """A configuration of plain values, as `Config.as_dict` gives them, with overrides.

    Raises:
        ConfigError: lists every unknown key and wrong value; `source` says where they come from.
    """
    try:
        return Config.model_validate(overridden(values, overrides))
    except ValidationError as error:
        problems = [_describe(problem) for problem in error.errors(include_url=False)]
        raise ConfigError("\n".join([f"{source}:", *(f"  {p}" for p in problems)])) from None


def overridden(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of plain values with `key=value` overrides, unchecked.

    Raises:
        ConfigError: an override that is no `key=value`, or whose value is not YAML.
    """
    values = copy.deepcopy(values)
    keys = [override.partition("=")[0] for override in overrides]
    # The choice of a method or kind first: it drops what the values have for another one.
    first = sorted(overrides, key=lambda each: each.partition("=")[0] not in _CHOICES)
    for override in first:
        _apply(values, override)
    train = values.get("train")
    if (
        "train.epochs" in keys
        and isinstance(train, dict)
        and not {"train.steps", "train"} & {*keys}
    ):
        train["steps"] = None  # which would win over the epochs asked for
    return values


class _Yaml(yaml.SafeLoader):
    """YAML 1.1 takes 1e-3, which has no dot, for a text; here it is the number that is meant."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _without_duplicates(loader: _Yaml, node: yaml.MappingNode) -> dict[Any, Any]:
    """YAML forbids a key that is there twice; PyYAML drops what the first one has."""
    lines: dict[Any, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
            continue
        if key.value in lines:
            raise yaml.constructor.ConstructorError(
                problem=f"{key.value!r} is there already, in line {lines[key.value] + 1}",
                problem_mark=key.start_mark,
            )
        lines[key.value] = key.start_mark.line
    return loader.construct_mapping(node, deep=True)


_Yaml.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _without_duplicates)


def _from_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Yaml)


def _find(recipe: str, folder: Path = Path()) -> Path:
    """The file; a relative path starts at `folder`."""
    path = folder / os.path.expanduser(recipe)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"recipe: no file {path}")
        return path
    if recipe not in recipe_names():
        raise ConfigError(
            f"recipe: expected a .yaml file or a packaged recipe, got {recipe!r}"
            f"{_nearest(recipe, recipe_names())}; packaged: {', '.join(recipe_names())}"
        )
    return RECIPES / f"{recipe}.yaml"


def _read(path: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    path = path.resolve()
    if path in extended_by:
        raise ConfigError(f"{path}: extends itself")
    try:
        values = _from_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys with values, got {values!r}")
    base = values.pop("extends", None)
    if base is None:
        return values
    base = _read(_find(str(base), path.parent), (*extended_by, path))
    for section, name in (choice.split(".") for choice in _CHOICES):
        mine = values.get(section)
        if isinstance(mine, dict) and name in mine:
            _drop_foreign(base, section, name, mine[name])
    train = values.get("train")
    if isinstance(train, dict) and "epochs" in train and isinstance(base.get("train"), dict):
        base["train"].pop("steps", None)  # which would win over the epochs asked for
    return _merged(base, values)


def _drop_foreign(values: dict[str, Any], section: str, name: str, choice: Any) -> None:
    """Drop what a section has for another method or kind than `choice`, in place."""
    has = values.get(section)
    known = _MEMBERS[section].get(choice) if isinstance(choice, str) else None
    if known is None or not isinstance(has, dict) or has.get(name, choice) == choice:
        return
    # Paths and sizes of other data say nothing of these, even under the same name.
    shared = DataBase if section == "data" else known
    values[section] = {key: has[key] for key in has if key in shared.model_fields}


def _merged(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in values.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merged(base[key], value) if both else value
    return merged


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override: expected key=value, got {override!r}")
    try:
        value = _from_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: {text!r} is not valid YAML: {error}") from None
    *sections, name = key.split(".")
    whole = values
    for section in sections:
        if values.get(section) is None:  # as options that a recipe leaves to the defaults
            values[section] = {}
        inner = values[section]
        if not isinstance(inner, dict):
            raise ConfigError(f"{key}: {section!r} is the value {inner!r}, it has no keys")
        values = inner
    if key in _CHOICES:
        _drop_foreign(whole, sections[0], name, value)
        values = whole[sections[0]]
    values[name] = value


def _describe(problem: Any, root: Any = None, prefix: str = "") -> str:
    """One problem that pydantic found below `root`, in the user's terms."""
    key = prefix + _dotted(problem["loc"])
    got = problem["input"]
    kind = problem["type"]
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    if kind == "extra_forbidden":
        # A key of another kind of data or model is unknown here, and no help either.
        section, *inner = problem["loc"]
        member = _MEMBERS.get(str(section), {}).get(inner[0]) if inner else None
        known = [
            name
            for name in _keys(root or Config, prefix)
            if member is None
            or not name.startswith(f"{section}.")
            or name.split(".")[1] in member.model_fields
        ]
        near = _UNKNOWN.get(key) or _nearest(key, known)
        if not near:
            section = key.rpartition(".")[0]
            beside = sorted({k for k in known if k.rpartition(".")[0] == section})
            near = f"; known: {', '.join(beside)}"
        return f"{key}: unknown key{near}"
    if kind == "missing":
        told = _MISSING.get(key, "")
        return f"{key}: missing{told}"
    if kind == "union_tag_not_found":
        return f"{key}: missing {problem['ctx']['discriminator']}, one of {_tags(key)}"
    if kind == "union_tag_invalid":
        tag = problem["ctx"]["tag"]
        name = problem["ctx"]["discriminator"].strip("'")
        near = _nearest(_ALSO_CALLED.get(tag, tag), _tags(key))
        return f"{key}.{name}: expected one of {_tags(key)}, got {tag!r}{near}"
    if kind in ("model_type", "model_attributes_type"):
        such = f", such as train.lr.peak={got}" if key == "train.lr" else ""
        return f"{key}: expected keys with values{such}, got {got!r}"
    expected = problem["msg"].removeprefix("Input should be ")
    near = _nearest(got, _choices(problem)) if isinstance(got, str) else ""
    return f"{key}: expected {expected}, got {got!r} ({type(got).__name__}){near}"


_MISSING = {
    "data.train": ", the training images: shards (.tar), a folder, or a file of COCO captions",
    "data.train_images": (
        ", the folder of the images; data.train is the file of their captions, such as "
        "data.train=captions_train2017.json data.train_images=train2017"
    ),
}
_UNKNOWN = {
    "data.captions": (
        ", of kind folder alone: shards have captions beside their images, and COCO's come from "
        "the file that data.train names"
    ),
}
_UNKNOWN |= dict.fromkeys(
    ("model.patch_size", "model.patch", "patch_size"),
    ", it is part of the encoder's name, such as model.encoder=vit_small_patch8",
)
_ALSO_CALLED = {
    "webdataset": "shards",
    "wds": "shards",
    "tar": "shards",
    "imagefolder": "folder",
    "image_folder": "folder",
}


def _choices(problem: Any) -> list[str]:
    if problem["type"] != "literal_error":
        return []
    return [
        word.strip("'") for word in problem["ctx"]["expected"].replace(" or ", ", ").split(", ")
    ]


def _tags(key: str) -> list[str]:
    return list(METHODS if key == "model" else DATA_KINDS)


def _dotted(location: tuple[int | str, ...]) -> str:
    """A key as the user writes it: pydantic puts the union's member after `model` and `data`."""
    parts = [str(part) for part in location]
    if len(parts) > 1 and parts[0] in ("model", "data") and parts[1] in (*METHODS, *DATA_KINDS):
        del parts[1]
    return ".".join(parts)


def _keys(section: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted key below a section, of all members of a union."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from _keys(kind, f"{prefix}{name}.")


def _nearest(name: str, known: Sequence[str]) -> str:
    """ "; nearest: ..." where something like `name` is known: here, or of that name elsewhere."""
    section, _, last = name.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    near = [siblings[key] for key in difflib.get_close_matches(last, siblings, n=1)]
    near += [key for key in known if key.rpartition(".")[2] == last]
    near += difflib.get_close_matches(name, known, n=1)
    return f"; nearest: {near[0]}" if near else ""
