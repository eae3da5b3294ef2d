"""One YAML file -> one frozen, strict object: loading, dotted overrides, origins, and errors that name the key."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    field_serializer,
    model_validator,
)

from data_pipeline.config import DataConfig, TokenizerConfig
from solomonov.errors import ConfigurationError
from solomonov.model.config import ModelConfig
from solomonov.parallel import ParallelConfig
from solomonov.plan import TrainingConfig
from solomonov.schedule import ScheduleConfig
from solomonov.section import Section

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"


class RunConfig(Section):
    """What the run is called, where it is kept, and its seed."""

    name: str = Field(pattern=f"^{NAME_PATTERN}$")
    """Name of the run and of its folder: letters, digits, `.`, `_`, `-`."""
    folder: str = "runs"
    """Folder that holds the run folders; relative paths start at the working directory."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the initial weights and of the data order."""
    branch_of: str | None = Field(default=None, pattern=r"^.+@[0-9]{1,15}$")
    """RUN@STEP: begin from that checkpoint of another run instead of step 0, with its masters, moments and place in the
    data; RUN is a name in `folder`, or the path of a run's folder. Model, data, seed and batch must be the same."""
    deterministic: bool = False
    """Ask CUDA for deterministic kernels, at their cost in speed; CPU runs always are."""


class ObjectiveConfig(Section):
    """What the model is trained to predict."""

    kind: Literal["clm"] = "clm"
    """`clm`: the next token."""


class OptimizerConfig(Section):
    """The optimizer and its constants."""

    kind: Literal["adamw", "muon"] = "adamw"
    """`adamw`: Adam with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101). `muon`: orthogonalised
    momentum for the matrices between embedding and head, adamw for the rest (Jordan et al., 2024; arXiv 2502.16982)."""
    lr: float = Field(default=0.003, gt=0.0)
    """Peak learning rate; with muon, of its matrices, whose updates have the size of AdamW's."""
    adamw_lr: float | None = Field(default=None, gt=0.0)
    """With muon: peak learning rate of the parameters that AdamW updates; None: `lr`."""
    momentum: float = Field(default=0.95, ge=0.0, lt=1.0)
    """With muon: decay rate of its momentum (Nesterov's)."""
    newton_schulz: Literal["auto", "fp32", "bf16"] = "auto"
    """With muon: type of the products that orthogonalise; auto: bf16 on CUDA, fp32 on the CPU. In bf16 two layouts
    agree to about 1e-3 only."""
    betas: tuple[float, float] = Field(default=(0.9, 0.95), strict=False)
    """Decay rates of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0.0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0.0)
    """Decoupled decay of all matrices; norm gains and the embedding do not decay."""


class CheckpointConfig(Section):
    """When checkpoints are written and how many are kept."""

    every_steps: int = Field(default=100, ge=1)
    """Updates between two checkpoints; the last update is always followed by one."""
    keep_last: int = Field(default=3, ge=1)
    """Newest verified checkpoints that are kept."""


class ResilienceConfig(Section):
    """What is done when numbers go wrong, or when nothing goes on."""

    hang_minimum_seconds: float = Field(default=10.0, gt=0.0)
    """A gang whose hindmost rank stays in one section of a step for longer than this, and than three times the 99th
    percentile of that section, hangs: all stacks are written, and it is started again."""
    hang_start_seconds: float = Field(default=600.0, gt=0.0)
    """The same for a section of which fewer than three stays are known: imports, compilation, the first saves."""

    preflight: Literal["auto", "always", "never"] = "auto"
    """Look at the machines of the run before the first step of each attempt: devices, versions, clocks, the run's
    folder, the network between them. auto: where its ranks are on several machines."""
    max_skipped_updates: int = Field(default=10, ge=0)
    """Consecutive updates that may be skipped for a non-finite gradient before the run ends with exit code 70."""


class EvaluationConfig(Section):
    """Held-out evaluation during training."""

    every_steps: int = Field(default=200, ge=0)
    """Updates between two evaluations; 0: never during training."""
    rows: int = Field(default=256, ge=1)
    """Largest number of held-out rows of one evaluation during training (spread over all, always the same)."""


class MetricsConfig(Section):
    """What is written while training. metrics.jsonl gets a line a step, whatever stands here."""

    every_steps: int = Field(default=1, ge=1)
    """Updates between two points in TensorBoard."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    diagnostics_every_steps: int = Field(default=0, ge=0)
    """Updates between two measurements of how the model uses its depth and where its heads look, which TensorBoard
    shows under depth and attention; 0: never. Each costs nine forward passes over eight held-out rows, and a copy of
    the fp32 weights in the host's memory meanwhile: every 100 to 1,000 updates will do."""

    @model_validator(mode="after")
    def _diagnostics_are_shown(self) -> Self:
        if self.diagnostics_every_steps and not self.tensorboard:
            raise ValueError(
                f"diagnostics_every_steps {self.diagnostics_every_steps} with tensorboard false: they are written "
                "nowhere else. Set tensorboard to true, or diagnostics_every_steps to 0"
            )
        return self


AUTO = "auto"


def _auto_is_none(value: Any) -> Any:
    """`auto` as None, which no code takes for a layout by mistake."""
    if value is None:
        raise ValueError("expected a mapping, or auto")
    return None if value == AUTO else value


class Config(Section):
    """The whole configuration of a run, less its `launch` section, which belongs to the launcher."""

    run: RunConfig
    """Name, folder, seed."""
    model: ModelConfig
    """The network."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """SentencePiece model that `prepare` trains."""
    data: DataConfig
    """Sources, prepared folder, rows."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What is predicted."""
    training: TrainingConfig
    """Length, batch, precision."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and constants."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over time."""
    parallel: Annotated[ParallelConfig | None, BeforeValidator(_auto_is_none)] = ParallelConfig()
    """Layout over ranks; `auto`: the fastest that fits, which each attempt works out and writes to the journal."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    resilience: ResilienceConfig = ResilienceConfig()
    """Faults in numbers."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out loss."""
    metrics: MetricsConfig = MetricsConfig()
    """Records."""

    @model_validator(mode="after")
    def _positions_reach_the_rows(self) -> Self:
        longest, tokens = self.model.longest_tokens, self.data.sequence_tokens
        if longest is not None and longest < tokens:
            raise ValueError(
                f"data.sequence_tokens {tokens} with model.attention.position learned: there are positions for "
                f"{longest} tokens (model.attention.train_tokens). Set data.sequence_tokens to {longest} at most, or "
                f"model.attention.train_tokens to {tokens}"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _rows_reach_the_model(cls, given: Any) -> Any:
        """`model.attention.train_tokens` where it is not given; what is no mapping is refused by its own field."""
        sections = [given, given.get("model"), given.get("data")] if isinstance(given, Mapping) else [None]
        if not all(isinstance(section, Mapping) for section in sections):
            return given
        attention = given["model"].get("attention", {})
        tokens = given["data"].get("sequence_tokens", DataConfig.model_fields["sequence_tokens"].default)
        if not isinstance(attention, Mapping) or attention.get("train_tokens") is not None or type(tokens) is not int:
            return given
        attention = {**attention, "train_tokens": max(2, tokens)}
        return {**given, "model": {**given["model"], "attention": attention}}

    @field_serializer("parallel")
    def _none_is_auto(self, parallel: ParallelConfig | None) -> Any:
        return AUTO if parallel is None else parallel.model_dump(mode="json")


@dataclass(frozen=True)
class Loaded:
    """A configuration with where it came from."""

    config: Config
    launch: Mapping[str, Any]
    """The `launch` section as given, for the launcher to validate."""
    origins: Mapping[str, str]
    """Dotted key -> `config` or `override`; all other keys are defaults."""
    text: str
    """The file as given."""
    overrides: tuple[str, ...]
    """The dotted overrides as given."""


class _Loader(yaml.SafeLoader):
    """Safe YAML with two repairs: 1e-3 is a number, and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is not text", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} stands twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)$"),
    list("-+0123456789"),
)


def parse_yaml(text: str, *, where: str) -> Any:
    """Parse YAML without tags or objects.

    Raises:
        ConfigurationError: not YAML, or a key twice; the message has line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigurationError(
            f"{where} is not valid YAML",
            got=" ".join(str(error).split()),
            rule="plain YAML: mappings, lists, numbers, text; no tags, no key twice",
            remedy="mend the place named above",
        ) from error


def load_config(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read a configuration file and apply `section.key=value` overrides.

    Raises:
        ConfigurationError: unreadable file, bad YAML, or any number of wrong keys and values, all named at once.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            "the configuration file cannot be read",
            got=f"{path}: {error}",
            rule="a readable UTF-8 YAML file",
            remedy="check the path; `solomonov quickstart` shows a working file",
        ) from error
    return parse_config(text, overrides, where=str(path))


def parse_config(text: str, overrides: Sequence[str], *, where: str) -> Loaded:
    """Like `load_config`, from the file's text."""
    raw = parse_yaml(text, where=where)
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise ConfigurationError(
            f"{where} holds no sections",
            got=f"a {type(raw).__name__}",
            rule=f"a mapping with the sections {', '.join([*Config.model_fields, 'launch'])}",
            remedy="start from a file in configs/",
        )
    origins = dict.fromkeys(_leaves(raw), "config")
    for item in overrides:
        key, value = _split_override(item)
        _assign(raw, key, value)
        origins.update(dict.fromkeys(_leaves({key: value}), "override"))
    launch = raw.pop("launch", None) or {}
    if not isinstance(launch, dict):
        launch = {"launch": launch}
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise configuration_mistakes(error, Config, where=where, extra=("launch",)) from error
    return Loaded(config, launch, origins, text, tuple(overrides))


def configuration_mistakes(
    error: ValidationError, model: type[BaseModel], *, where: str, prefix: str = "", extra: Sequence[str] = ()
) -> ConfigurationError:
    """All mistakes of a failed validation as one message: dotted path, what is wrong, the nearest valid name."""
    lines, remedies = [], []
    for mistake in error.errors(include_url=False):
        path = ".".join(str(part) for part in mistake["loc"])
        dotted = f"{prefix}{path}" if path else (prefix.rstrip(".") or "the configuration")
        if mistake["type"] == "extra_forbidden":
            known = [*_fields_at(model, mistake["loc"][:-1]), *(extra if len(mistake["loc"]) == 1 else ())]
            near = difflib.get_close_matches(str(mistake["loc"][-1]), known, n=1, cutoff=0.5)
            parent = dotted.rpartition(".")[0]
            hint = f"did you mean {parent + '.' if parent else ''}{near[0]}?" if near else f"known: {', '.join(known)}"
            lines.append(f"{dotted}: there is no such key; {hint}")
            remedies.append(f"rename {dotted} to {near[0]}" if near else f"remove {dotted}")
        elif mistake["type"] == "missing":
            lines.append(f"{dotted}: missing")
            remedies.append(f"add {dotted}")
        else:
            value = "" if isinstance(mistake["input"], dict) else f", got {mistake['input']!r}"
            lines.append(f"{dotted}: {mistake['msg'].removeprefix('Value error, ')}{value}")
            remedies.append(f"change {dotted}")
    count = f"{len(lines)} mistake{'s' if len(lines) > 1 else ''}"
    return ConfigurationError(
        f"{where} has {count}",
        got="\n          ".join(lines),
        rule="every key is known and every value is of its field's type and range",
        remedy="; ".join(remedies),
    )


def _fields_at(model: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    """Names of the fields that are legal at a place of the configuration."""
    current: Any = model
    for part in loc:
        if isinstance(part, int):
            continue
        field = current.model_fields.get(part)
        if field is None:
            return []
        current = _model_in(field.annotation)
        if current is None:
            return []
    return list(current.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The section class inside an annotation such as `tuple[Source, ...]` or `Source | None`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    for argument in typing.get_args(annotation):
        found = _model_in(argument)
        if found is not None:
            return found
    return None


def _leaves(raw: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of all leaves of nested mappings (a list is a leaf)."""
    names: list[str] = []
    for key, value in raw.items():
        name = f"{prefix}{key}"
        names += _leaves(value, f"{name}.") if isinstance(value, Mapping) and value else [name]
    return names


def _split_override(item: str) -> tuple[str, Any]:
    key, equals, value = item.partition("=")
    if not equals or (not re.fullmatch(r"[a-z_]+(\.[A-Za-z0-9_]+)+", key) and key != "parallel"):
        raise ConfigurationError(
            "an override is not of the form section.key=value",
            got=repr(item),
            rule="dotted key, equals sign, YAML value, for instance training.total_steps=50",
            remedy="mend or remove the argument",
        )
    return key, parse_yaml(value, where=f"the value of {key}")


def _assign(raw: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a nested key; list items are addressed by number (data.sources.0.weight=2)."""
    *parents, last = dotted.split(".")
    current: Any = raw
    for part in parents:
        if isinstance(current, list):
            current = _item(current, part, dotted)
            continue
        if not isinstance(current.get(part), (dict, list)):
            current[part] = {}
        current = current[part]
    if isinstance(current, list):
        _item(current, last, dotted)
        current[int(last)] = value
    else:
        current[last] = value


def _item(items: list[Any], part: str, dotted: str) -> Any:
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigurationError(
            "an override names a list item that does not exist",
            got=f"{dotted}: item {part!r} of {len(items)}",
            rule=f"a number from 0 to {len(items) - 1}",
            remedy="mend the number, or write the item in the file",
        )
    return items[int(part)]


def flatten(config: Section) -> dict[str, Any]:
    """Dotted key -> JSON value, for all keys, defaults included."""

    def walk(value: Any, prefix: str) -> dict[str, Any]:
        if isinstance(value, dict) and value:
            result: dict[str, Any] = {}
            for key, item in value.items():
                result.update(walk(item, f"{prefix}.{key}" if prefix else key))
            return result
        return {prefix: value}

    return walk(config.model_dump(mode="json"), "")
