"""What an experiment can be told: each field carries its range, its help, and who may change it.

>>> class Config(StudyConfig):
...   methods: Annotated[tuple[str, ...], Among(("itd", "aid"))] = ("itd", "aid")
...   '''Which methods to run.'''
...   learning_rate: Positive = 0.1
...   '''Of Adam.'''
>>> Config(learning_rate=-1)
Traceback (most recent call last):
ValueError: learning_rate should be greater than 0, got -1
"""

import dataclasses
import functools
import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

import pandas as pd
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

Settings = TypeVar("Settings")

Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]

FREE = "free"  # Marks a field that a resumed run may have otherwise.
GROWS = "grows"  # Marks a field of which a resumed run may have more.


def _each_once(values: Any) -> Any:
  if len(set(values)) < len(values):
    raise ValueError(f"should name each one once, got {' '.join(map(str, values))}")
  return values


Value = TypeVar("Value")
Several = Annotated[tuple[Value, ...], Field(min_length=1), AfterValidator(_each_once)]


class Among(AfterValidator):
  """A name, or several ones without repetition, of those that there are; ``--help`` lists them."""

  names: str

  def __init__(self, names: Iterable[str], least: int = 1):
    object.__setattr__(self, "names", ", ".join(names))  # It is frozen.
    super().__init__(functools.partial(_among, self.names, least))


def _among(names: str, least: int, value: Any) -> Any:
  chosen = (value,) if isinstance(value, str) else value or ()
  unknown = [name for name in chosen if name not in names.split(", ")]
  if unknown:
    raise ValueError(f"should be among {names}; got {' '.join(unknown)}")
  if value is not None and len(chosen) < least:
    raise ValueError(f"should name at least {least} of {names}; got none")
  _each_once(chosen)
  return value


class Checked(BaseModel):
  """A group of fields; what is out of its range raises ``ValueError`` with a sentence for each."""

  model_config = ConfigDict(
    frozen=True,
    extra="forbid",
    use_attribute_docstrings=True,
    allow_inf_nan=False,
    protected_namespaces=(),
  )

  def __init__(self, **values: Any):
    try:
      super().__init__(**values)
    except ValidationError as error:
      raise ValueError("; ".join(map(_sentence, error.errors()))) from None

  @classmethod
  def __pydantic_init_subclass__(cls, **options: Any) -> None:
    super().__pydantic_init_subclass__(**options)
    for field in cls.model_fields.values():
      for mark in field.metadata:
        if isinstance(mark, Among) and field.description and "Among:" not in field.description:
          field.description += f" Among: {mark.names}."

  def but(self, **changes: Any) -> Self:
    """The same with other values, checked again."""
    return type(self)(**(dict(self) | changes))


class StudyConfig(Checked):
  """The fields that every experiment has."""

  smallest: ClassVar[Mapping[str, Any]] = {}  # What ``--smoke`` makes of what is not given.

  seeds: Count = 3
  """How many seeds."""
  first_seed: Index = 0
  """The first seed; others follow it."""
  resume: Annotated[bool, FREE] = False
  """Continues the run in output_dir; the settings that define that run must be the same."""
  overwrite: Annotated[bool, FREE] = False
  """Deletes the run in output_dir first."""
  smoke: Annotated[bool, FREE] = False
  """The smallest run, less than a minute: cuts every setting that is not given."""
  save_results: Annotated[str | None, FREE] = None
  """Keeps the run's tables under this name in the experiment's results/, for the docs."""
  data_dir: Annotated[Path | None, FREE] = None
  """The folder of tensorflow-datasets, instead of TFDS_DATA_DIR or ~/tensorflow_datasets."""
  output_dir: Annotated[Path, FREE] = Path("runs")
  """Where results and checkpoints go."""

  @model_validator(mode="before")
  @classmethod
  def _smoke(cls, given: Any) -> Any:
    return {**cls.smallest, **given} if given.get("smoke") else given

  @model_validator(mode="after")
  def _resume_or_overwrite(self) -> Self:
    if self.resume and self.overwrite:  # Nothing would be left to go on with.
      raise ValueError("resume and overwrite should not be given together")
    return self

  def all_seeds(self) -> range:
    """The seeds."""
    return range(self.first_seed, self.first_seed + self.seeds)

  def given(self) -> dict[str, Any]:
    """The values that are not the defaults."""
    fields = type(self).model_fields
    return {name: value for name, value in self if value != fields[name].get_default()}

  def override(self, settings: Settings) -> Settings:
    """``settings``, a dataclass, with the fields of the same names that are not ``None`` here."""
    mine = {f.name: getattr(self, f.name, None) for f in dataclasses.fields(settings)}  # type: ignore[arg-type]
    changes = {name: value for name, value in mine.items() if value is not None}
    return dataclasses.replace(settings, **changes)  # type: ignore[type-var]

  def identity(self) -> dict[str, Any]:
    """What a resumed run must have in common with the run that it continues, as JSON has it.

    Of :meth:`lengths` it may have more.
    """
    fields = self.model_dump(mode="json", exclude=self._marked(FREE) | {"seeds", "first_seed"})
    return fields | json.loads(json.dumps(self.in_full()))

  @classmethod
  def of(cls, identity: Mapping[str, Any], **more: Any) -> Self:
    """The configuration of a run that has this identity."""
    return cls(**{name: v for name, v in identity.items() if name in cls.model_fields} | more)

  def in_full(self) -> dict[str, Any]:
    """What the fields that were not given stand for, as JSON has it: defaults may change."""
    return {}

  def settings_in_full(self, **settings: Any) -> dict[str, Any]:
    """All fields of dataclasses, which are :meth:`override`'s, but for :meth:`lengths`."""
    lengths = self.lengths()
    every = ((of, n, v) for of, one in settings.items() for n, v in vars(one).items())
    return {f"{of}.{name}": value for of, name, value in every if name not in lengths}

  def lengths(self) -> dict[str, Any]:
    """The fields of which a resumed run may have more; those of a default have it here."""
    return {name: getattr(self, name) for name in self._marked(GROWS)}

  @classmethod
  def _marked(cls, mark: str) -> set[str]:
    return {name for name, field in cls.model_fields.items() if mark in field.metadata}

  def flags(self) -> str:
    """The flags that repeat the run, without what is only about this machine."""
    words = ["--smoke"] if self.smoke else []
    others = type(self)(smoke=self.smoke)._flat()
    for name, value in self._flat().items():
      flag = f"--{name.replace('_', '-')}"
      if name in others and value == others[name]:
        continue
      if isinstance(value, bool):
        words.append(flag if value else flag.replace("--", "--no-", 1))
      else:
        words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)

  def _flat(self) -> dict[Any, Any]:
    """The values by name, a group's after its own, without what is only about this machine."""
    only_here = {"resume", "overwrite", "smoke", "save_results", "data_dir", "output_dir"}
    values = self.model_dump(mode="json", exclude=only_here)
    return pd.json_normalize(values).to_dict("records")[0]


def _sentence(error: Any) -> str:
  """What is wrong with a field: its name, what is allowed, and what was given."""
  name = ".".join(str(part) for part in error["loc"] if not isinstance(part, int))
  message = error["msg"].removeprefix("Value error, ")
  if not name:  # Of several fields together: the message names them.
    return message
  message = message.removeprefix("Input ")
  if "got" not in message:
    message += f", got {error['input']!r}"
  of_a_group = error["type"] == "value_error" and not message.startswith("should")
  return f"{name}.{message}" if of_a_group else f"{name} {message}"
