"""Reading a configuration: preset < YAML file(s) < command line. Unknown keys are errors."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from dcngen.config.checks import check_sampling
from dcngen.config.options import TrainConfig
from dcngen.config.presets import PRESETS

LATEST = "latest"
# Arguments that say what to do with a configuration, and are no part of it.
_FLAGS = ("config", "preset", "resume", "overwrite", "dry_run", "dry-run", "print_config", "help")


@dataclass(frozen=True)
class Command:
    """One command line, understood.

    Attributes:
        config: the resolved configuration.
        resume: None, "latest" (the newest complete checkpoint of the run, if there is one) or a checkpoint's folder.
        overwrite: start over, deleting the run folder of that name.
        dry_run: describe the run and stop.
    """

    config: TrainConfig
    resume: str | None = None
    overwrite: bool = False
    dry_run: bool = False


def load_config(argv: Sequence[str] | None = None) -> TrainConfig:
    """The configuration that a command line describes; see `parse_command_line`."""
    return parse_command_line(argv).config


def parse_command_line(argv: Sequence[str] | None = None) -> Command:
    """Understand `--config FILE --preset NAME --resume [PATH] --overwrite --dry-run --group.key value ...`.

    Args:
        argv: the arguments without the program's name; sys.argv when None.

    Raises:
        ValueError: an unknown key (the message names the nearest one), a value of the wrong type or out of range, a
            sampler that the objective cannot use, a preset or file that is not there.
        SystemExit: after --help or --print_config.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    known = known_keys(TrainConfig)
    _check_arguments(argv, known)
    parser = _parser()
    preset, files = None, _values_of(argv, "--config")
    for file in files:
        values = _read_yaml(Path(file))
        _check_keys(_flatten(values), known, where=file)
        preset = values.get("preset", preset)
    preset = (_values_of(argv, "--preset") or [preset])[-1]
    if preset is not None:
        parser.set_defaults(_flatten(_preset(preset)))
    try:
        values = parser.parse_args(argv).as_dict()
    except ArgumentError as error:
        raise ValueError(f"configuration: {error}") from error
    config = build(TrainConfig, values)
    check_sampling(config)
    if config.name is None:
        config.name = Path(files[-1]).stem if files else Path(config.data.name).name.replace(":", "-")
    return Command(config, values["resume"], values["overwrite"], values["dry_run"])


def load_run_config(path: str | Path) -> TrainConfig:
    """The configuration saved in a run folder's config.yaml.

    Raises:
        ValueError: the file has keys that this version does not know; the message names the nearest ones.
    """
    values = _read_yaml(Path(path))
    _check_keys(_flatten(values), known_keys(TrainConfig), where=str(path))
    return build(TrainConfig, values)


def build(cls, values: Mapping):
    """A configuration dataclass from nested mappings; keys that are left out take their defaults."""
    types = get_type_hints(cls)
    arguments = {}
    for item in fields(cls):
        if item.name in values:
            value = values[item.name]
            arguments[item.name] = build(types[item.name], value) if is_dataclass(types[item.name]) else value
    return cls(**arguments)


def known_keys(cls, prefix: str = "") -> dict[str, bool]:
    """Dotted name of every key and group; the value says whether it is a group."""
    keys = {}
    for name, kind in get_type_hints(cls).items():
        if name not in {item.name for item in fields(cls)}:
            continue
        keys[prefix + name] = is_dataclass(kind)
        if is_dataclass(kind):
            keys |= known_keys(kind, f"{prefix}{name}.")
    return keys


def to_yaml(config: TrainConfig) -> str:
    """The resolved configuration as YAML, in the order of the dataclasses."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False, width=120, default_flow_style=None)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="train_ldm.py", exit_on_error=False, description=_DESCRIPTION)
    parser.add_argument("--config", action="config", help="YAML file; given twice, the later one wins key by key")
    parser.add_argument("--preset", type=str, help=f"a size to start from: {', '.join(PRESETS)}")
    parser.add_argument(
        "--resume", nargs="?", const=LATEST, type=str, help="continue from the newest checkpoint, or from this folder"
    )
    parser.add_argument("--overwrite", action="store_true", help="delete the run of this name and start over")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="describe the run; touch nothing")
    parser.add_class_arguments(TrainConfig)
    return parser


_DESCRIPTION = "Train a class-conditional latent diffusion model; values: preset < --config file < command line."


def _check_arguments(argv: Sequence[str], known: Mapping[str, bool]) -> None:
    for argument in argv:
        if argument.startswith("--") and len(argument) > 2:
            key = argument[2:].split("=", 1)[0].removesuffix("+")
            if key not in _FLAGS:
                _check_keys({key: None}, known, where="the command line")


def _check_keys(keys, known: Mapping[str, bool], where: str) -> None:
    for key in keys:
        if key in known or (where != "the command line" and key == "preset"):
            continue
        raise ValueError(f"unknown key {key!r} in {where}{_hint(key, known)}")


def _hint(key: str, known: Mapping[str, bool]) -> str:
    """`; did you mean ...`: by the whole dotted name, or else by its last part (--learning_rate)."""
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [name for name in known if name.rsplit(".", 1)[-1] == leaf and not known[name]]
    close = same_leaf or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not close:
        by_leaf = {name.rsplit(".", 1)[-1]: name for name in known}
        close = [by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.5)]
    if not close:
        return f"; the groups are {', '.join(name for name in known if '.' not in name)}"
    return f"; did you mean {' or '.join(map(repr, close))}?"


def _values_of(argv: Sequence[str], flag: str) -> list[str]:
    """Every value given to a flag, as `--flag value` or `--flag=value`."""
    values = [a.split("=", 1)[1] for a in argv if a.startswith(flag + "=")]
    return values + [b for a, b in pairwise(argv) if a == flag]


def _read_yaml(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"configuration file {path} is not there; the recipes lie in configs/")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"configuration file {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"configuration file {path}: expected a mapping of keys, got a {type(values).__name__}")
    return values


def _preset(name: str) -> dict:
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}{_hint(name, dict.fromkeys(PRESETS, True))}")
    return PRESETS[name]


def _flatten(values: Mapping, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
