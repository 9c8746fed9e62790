"""Configuration: dataclass sections, filled from layers, checked in one report.

A section is a frozen dataclass that stands beside the code it configures. Its fields carry their own help and range:

    lr: Annotated[float, "peak learning rate", "> 0"] = 1e-3

A config is a dataclass whose fields are sections (a script: `--section.field VALUE`) or plain values (a verb of the
command line: `--field VALUE`). A layer is a mapping from the dotted names of fields to values, with the place they
came from; later layers win. Nothing here knows any particular section.
"""

from minillm.config.build import build
from minillm.config.fields import Field, describe, fields_of, help_text, nearest, shown
from minillm.config.layers import ConfigError, Layer, arguments, file_layer, flatten, lookup, to_dict
from minillm.config.values import checked, convert, within

__all__ = [
    "ConfigError",
    "Field",
    "Layer",
    "arguments",
    "build",
    "checked",
    "convert",
    "describe",
    "fields_of",
    "file_layer",
    "flatten",
    "help_text",
    "lookup",
    "nearest",
    "shown",
    "to_dict",
    "within",
]
