"""Define a task in a YAML file: the data, the prompt, and the right answers. `task_files/` holds
the tasks that are included.

name: reviews
train: [train.tsv]              # files in the data folder; the first one that exists
test: [dev.tsv]
columns: [sentence, label]      # for a .tsv or .csv without a header
template: "{sentence} It was"   # the model's input; {field} is a field of the data
label: label                    # a field ...
choices:                        # ... and the text for each of its values, after the prompt
  "0": " terrible"
  "1": " great"
metric: accuracy

With `answer: " {answers}"` in place of `label` and `choices` the model learns to say that text.
With neither, the template is plain text that is learned as a whole.
"""

import re
import string
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from qzo_diffusion.core.errors import ConfigError
from qzo_diffusion.system import strict_yaml

SHIPPED = Path(__file__).parent / "task_files"
# A column of a table may be called "Review Text", "Class Index" or "text (en)".
FIELD = re.compile(r"[^\W\d]([\w ()/#&+-]*[\w)])?")
Kind = Literal["choice", "answer", "text"]
Metric = Literal["accuracy", "f1", "loss"]


class TaskSpec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    train: tuple[str, ...] = Field(min_length=1)
    test: tuple[str, ...] = Field(min_length=1)
    columns: tuple[str, ...] = ()
    template: str = Field(min_length=1)
    label: str | None = None
    choices: dict[str, str] | None = None
    answer: str | None = None
    stop: str = "\n"  # a generated answer ends before this text
    answer_tokens: int = Field(default=32, ge=1)  # and after so many tokens
    metric: Metric

    @field_validator("*", mode="before")
    @classmethod
    def _is_encodable(cls, value: Any) -> Any:
        return _with_whole_pairs(value)

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        if not re.fullmatch(r"[\w-][\w.-]*", name):  # a run's folder has this name
            raise ValueError("letters, digits, '_', '-' and '.', the last not at the beginning")
        return name

    @field_validator("template", "answer")
    @classmethod
    def _has_plain_fields(cls, text: str | None) -> str | None:
        if text is not None:
            fields_of(text)
        return text

    @field_validator("choices")
    @classmethod
    def _has_choices(cls, choices: dict[str, str] | None) -> dict[str, str] | None:
        if choices is None:
            return None
        if len(choices) < 2:
            raise ValueError("at least two choices")
        if len(set(choices.values())) < len(choices) or "" in choices.values():
            raise ValueError("a text of its own for every choice")
        return choices

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> "TaskSpec":
        if (self.label is None) != (self.choices is None):
            raise ValueError("label and choices together, or neither")
        if self.choices is not None and self.answer is not None:
            raise ValueError("either label and choices, or answer")
        fitting: dict[Kind, tuple[Metric, ...]] = {
            "choice": ("accuracy",),
            "answer": ("f1", "accuracy"),
            "text": ("loss",),
        }
        if self.metric not in fitting[self.kind]:
            raise ValueError(
                f"metric {' or '.join(fitting[self.kind])} for a task with {_WHAT[self.kind]}"
            )
        return self

    @property
    def kind(self) -> Kind:
        return (
            "choice"
            if self.choices is not None
            else "answer"
            if self.answer is not None
            else "text"
        )

    @property
    def fields(self) -> list[str]:
        """The names of the data fields that the task reads."""
        found = (
            fields_of(self.template)
            + fields_of(self.answer or "")
            + ([self.label] if self.label else [])
        )
        return list(dict.fromkeys(found))


_WHAT: dict[Kind, str] = {
    "choice": "choices",
    "answer": "an answer",
    "text": "neither choices nor an answer",
}


def _with_whole_pairs(value: Any) -> Any:
    """Join the two halves that JSON writes for one character, which YAML leaves separate.

    Raises:
        ValueError: a half stands alone.
    """
    if isinstance(value, str):
        try:
            return value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            raise ValueError("text without half of a Unicode surrogate pair") from None
    if isinstance(value, dict):
        return {_with_whole_pairs(key): _with_whole_pairs(one) for key, one in value.items()}
    return [_with_whole_pairs(one) for one in value] if isinstance(value, list) else value


def fields_of(template: str) -> list[str]:
    """Return the names in braces.

    Raises:
        ValueError: braces hold anything else, or are not closed.
    """
    names = []
    for _, name, spec, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if spec or conversion or not FIELD.fullmatch(name):
            raise ValueError(f"names of fields in braces, and {{{{ for a brace; not {{{name}}}")
        names.append(name)
    return names


def fill(template: str, row: dict[str, str]) -> str:
    return "".join(
        text + ("" if name is None else row[name])
        for text, name, _, _ in string.Formatter().parse(template)
    )


def literal_texts(name: str, spec: TaskSpec) -> list[tuple[str, str]]:
    """Return (place, text) of the words of a task itself, without the data."""
    found = [("template", _words_of(spec.template)), ("answer", _words_of(spec.answer or ""))]
    found += [("choices", text) for text in (spec.choices or {}).values()]
    found += [("stop", spec.stop)]
    return [(_place(name, key), text) for key, text in found if text]


def _place(name: str, key: str) -> str:
    """Return the file and the line of a key in it."""
    path = _file_of(name)
    return f"{path}, line {_read(path, name).line_of((key,))}: {key}"


def _words_of(template: str) -> str:
    return " ".join(text for text, *_ in string.Formatter().parse(template) if text)


def shipped_tasks() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def _file_of(name: str) -> Path:
    return SHIPPED / f"{name}.yaml" if name in shipped_tasks() else Path(name)


def read_task(name: str) -> TaskSpec:
    """Read an included task by name, or a task from a YAML file.

    Raises:
        ConfigError: it is missing or wrong; the message has the line and the field.
    """
    path = _file_of(name)
    document = _read(path, name)
    if not isinstance(document.content, dict):
        raise ConfigError(
            f"{path} holds no settings", "key: value lines", f"see {SHIPPED} for files that work"
        )
    try:
        return TaskSpec.model_validate(_with_text_keys(document))
    except ValidationError as error:
        raise _explained(error, path, document) from None


def _read(path: Path, name: str) -> strict_yaml.Document:
    remedy = f"see {SHIPPED} for files that work"
    try:
        return strict_yaml.read(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        known = ", ".join(shipped_tasks())
        raise ConfigError(f"no task {name!r}", f"{known}, or a YAML file", remedy) from None
    except (OSError, ValueError) as error:  # not UTF-8, not YAML, or a key stands twice
        raise ConfigError(
            f"{path} can't be read: {error}", "YAML in UTF-8, each key once", remedy
        ) from None


def _explained(error: ValidationError, path: Path, document: strict_yaml.Document) -> ConfigError:
    first = error.errors()[0]
    place = tuple(str(part) for part in first["loc"])
    unknown = first["type"] == "extra_forbidden"
    expected = (
        f"one of {', '.join(TaskSpec.model_fields)}"
        if unknown
        else first["msg"].removeprefix("Value error, ")
    )
    if isinstance(first["input"], bool):
        expected += ", in quotation marks: YAML reads yes, no, on and off as true and false"
    value = "" if first["type"] == "missing" or not place else f" = {first['input']!r}"
    return ConfigError(
        f"{path}, line {document.line_of(place)}: {'.'.join(place) or 'the task'}{value}",
        expected,
        "correct the task file",
    )


def _with_text_keys(document: strict_yaml.Document) -> dict[str, Any]:
    """Turn keys into the text that data has: YAML reads `0:`, `true:` and `no:` as numbers and
    truth values.
    """
    content = document.content
    choices = content.get("choices")
    if isinstance(choices, dict):
        words = _words_for_truth(document)
        texts = {
            words.get(key, as_text(key)) if isinstance(key, bool) else as_text(key): value
            for key, value in choices.items()
        }
        content = content | {"choices": texts}
    return {str(key): value for key, value in content.items()}


def _words_for_truth(document: strict_yaml.Document) -> dict[bool, str]:
    """Return truth value -> the key that stands for it in the file: yes, no, on or off."""
    keys = [path[1] for path in document.lines if path[0] == "choices" and len(path) == 2]
    words = [key for key in keys if key.lower() in ("yes", "no", "on", "off")]
    return {key.lower() in ("yes", "on"): key for key in words}


def as_text(value: Any) -> str:
    """Return a value of YAML or JSON as a file spells it: True is `true`."""
    return str(value).lower() if isinstance(value, bool) else str(value)
