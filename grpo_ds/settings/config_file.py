"""A YAML file of settings, read as it was written: YAML's own readings, such as `no` for false, are left out."""

import difflib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import Field
from pathlib import Path
from typing import Any

import yaml

from grpo_ds.settings.values import Written, read_values


def read_settings(file: str | Path, flags: "Sequence[Field[Any]]", *, strict: bool) -> tuple[dict[str, Any], list[str]]:
    """Return the values of the flags that the file sets, and a message for each problem, without the file's name.

    strict: names of no flag are problems, too; else they are skipped, for a file of another version or command.
    """
    known, (written, problems) = {flag.name: flag for flag in flags}, _written(Path(file))
    unknown = [name for name in written if name not in known] if strict else []
    problems += [f"unknown flag {name}{_similar(name, known)}" for name in unknown]
    values, unreadable = read_values(known, {name: its for name, its in written.items() if name in known})
    return values, problems + unreadable


def _similar(name: str, known: "dict[str, Field[Any]]") -> str:
    close = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _written(file: Path) -> tuple[dict[str, Written], list[str]]:
    """Return what the file says for each setting, and its problems."""
    try:
        if not os.path.isfile(file):  # every rank reads it, so it cannot be a pipe
            return {}, ["it is not a file" if os.path.exists(file) else f"there is no such file in {os.getcwd()}"]
        root = yaml.compose(file.read_bytes().decode("utf-8-sig"), Loader=yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            return {}, ["it holds no settings; write one per line: num_steps: 40"]
        if not all(isinstance(name, yaml.ScalarNode) for name, _ in root.value):
            return {}, ["the name of a setting must be a word: num_steps: 40"]
        written = [(str(name.value), _as_written(node)) for name, node in root.value]
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        return {}, [f"it is not UTF-8 text: {byte}; save it as UTF-8, uncompressed"]
    except RecursionError:
        return {}, ["it is nested too deeply; write one setting per line: num_steps: 40"]
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: an escape beyond Unicode
        return {}, [f"it is not YAML: {_on_one_line(error)}"]
    except OSError as error:
        return {}, [f"it cannot be read: {error.strerror or error}"]
    counts = Counter(name for name, _ in written)
    return dict(written), [f"{name} is set {count} times; keep one" for name, count in counts.items() if count > 1]


def _as_written(node: yaml.Node, *, within_list: bool = False) -> Written:
    """Return a node's text, or its list of texts. Raises ConstructorError for a tag that plain YAML does not have."""
    if node.tag not in yaml.SafeLoader.yaml_constructors:
        raise yaml.constructor.ConstructorError(None, None, f"no setting has the tag {node.tag}", node.start_mark)
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else str(node.value)
    if isinstance(node, yaml.SequenceNode) and not within_list:
        return [_as_written(item, within_list=True) for item in node.value]
    return {}


def _on_one_line(error: Exception) -> str:
    """Describe what is wrong with the YAML, with its line and column."""
    mark = getattr(error, "problem_mark", None)
    place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return f"{' '.join(str(getattr(error, 'problem', None) or error).split())[:160]}{place}"
