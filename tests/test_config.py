"""A configuration says exactly what a person meant, or everything that is wrong with it at once."""

import json
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest

from minillm.config import ConfigError, Layer, arguments, build, file_layer, help_text, lookup, to_dict


@dataclass(frozen=True)
class Shape:
    dim: Annotated[int, "model width", "> 0"] = 128
    n_heads: Annotated[int, "query heads", "> 0"] = 4
    dropout: Annotated[float, "share of activations dropped", ">= 0, < 1"] = 0.0

    def __post_init__(self):
        if self.dim % self.n_heads:
            raise ValueError(f"n_heads: {self.n_heads} does not divide dim {self.dim}")


@dataclass(frozen=True)
class Optim:
    lr: Annotated[float, "peak learning rate", "> 0"] = 1e-3
    warmup_steps: Annotated[int | None, "steps of warm-up; none: chosen", ">= 0"] = None
    name: Annotated[Literal["adamw", "muon"], "optimizer"] = "adamw"
    betas: Annotated[tuple[float, float], "decay rates"] = (0.9, 0.95)
    fused: Annotated[bool, "one kernel"] = True


@dataclass(frozen=True)
class Data:
    path: Annotated[str | list[str] | None, "text"] = None
    val: Annotated[str, "validation split"] = "0.1"


@dataclass(frozen=True)
class Config:
    model: Shape = field(default_factory=Shape)
    optim: Optim = field(default_factory=Optim)
    data: Data = field(default_factory=Data)

    def __post_init__(self):
        if self.data.path is None and self.optim.name == "muon":
            raise ValueError("optim.name: muon needs data.path")


def from_words(*words: str) -> Config:
    return build(Config, [arguments(Config, words)[1]])


@pytest.mark.parametrize(
    ("words", "section", "name", "value"),
    [
        (["--optim.lr", "1e-3"], "optim", "lr", 0.001),
        (["--optim.lr=3"], "optim", "lr", 3.0),
        (["--optim.warmup_steps", "2_000"], "optim", "warmup_steps", 2000),
        (["--optim.warmup_steps", "1e3"], "optim", "warmup_steps", 1000),
        (["--optim.warmup_steps", "none"], "optim", "warmup_steps", None),
        (["--optim.fused", "false"], "optim", "fused", False),
        (["--optim.fused"], "optim", "fused", True),
        (["--optim.fused", "no"], "optim", "fused", False),
        (["--optim.betas", "0.8,0.99"], "optim", "betas", (0.8, 0.99)),
        (["--optim.betas", "[0.8, 0.99]"], "optim", "betas", (0.8, 0.99)),
        (["--data.path", "a.txt"], "data", "path", "a.txt"),
        (["--data.path", "a.txt,b.txt"], "data", "path", ["a.txt", "b.txt"]),
        (["--data.val", "0.05"], "data", "val", "0.05"),
        (["--model.dim", "64", "--model.dim", "256"], "model", "dim", 256),
    ],
)
def test_words_mean_what_a_person_expects(words, section, name, value):
    got = getattr(getattr(from_words(*words), section), name)
    assert got == value
    assert type(got) is type(value)


def test_big_whole_numbers_stay_exact():
    assert from_words("--model.dim", "9007199254740993", "--model.n_heads", "1").model.dim == 9007199254740993


def test_the_command_line_wins_over_the_file_and_the_file_over_the_default(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('[optim]\nlr = 5\nwarmup_steps = 7\n[data]\npath = ["x", "y"]\nval = 0.2\n')
    words, line = arguments(Config, [str(path), "--optim.lr", "6"])
    layers = [file_layer(words[0]), line]
    config = build(Config, layers)
    assert (config.optim.lr, config.optim.warmup_steps, config.optim.name) == (6.0, 7, "adamw")
    assert (config.data.path, config.data.val) == (["x", "y"], "0.2")
    assert lookup(layers, "optim.lr") == "6"
    assert lookup(layers, "model.dim", 1) == 1


def test_a_saved_config_builds_the_same_config(tmp_path):
    config = from_words("--optim.betas", "0.8,0.99", "--data.path", "a,b", "--optim.warmup_steps", "3")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(config)))
    assert build(Config, [file_layer(path)]) == config


def test_five_mistakes_come_in_one_report(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text('[optim]\nwarmup_step = 5\nlr = "fast"\n[model]\nn_heads = 5\ndropout = 2\n[modle]\ndim = 1\n')
    with pytest.raises(ConfigError) as error:
        build(Config, [file_layer(path)])
    assert len(error.value.problems) == 5
    report = str(error.value)
    assert f"{path}: optim.warmup_step is not a field; did you mean optim.warmup_steps?" in report
    assert f"{path}: optim.lr is 'fast'; a number is expected" in report
    assert f"{path}: model.dropout is 2.0; it must be >= 0, < 1" in report
    assert "model.n_heads: 5 does not divide dim 128" in report
    assert "modle.dim is not a field; did you mean model.dim?" in report


def test_a_combination_is_not_blamed_on_a_field_that_already_failed():
    with pytest.raises(ConfigError) as error:
        from_words("--model.dim", "wide", "--model.n_heads", "5")
    assert error.value.problems == ["command line: model.dim is 'wide'; a whole number is expected"]


def test_combinations_of_sections_are_checked():
    with pytest.raises(ConfigError, match=r"optim\.name: muon needs data\.path"):
        from_words("--optim.name", "muon")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optim.lr"], "--optim.lr: a value is missing"),
        (["--optim.lr", "nan"], "is 'nan'; a number is expected"),
        (["--optim.lr", "inf"], "is 'inf'; a number is expected"),
        (["-optim.lr", "1"], "-optim.lr: an option begins with --"),
        (["--optim.lr", "-1"], "is -1.0; it must be > 0"),
        (["--model.dim", "1.5"], "is '1.5'; a whole number is expected"),
        (["--optim.warmup_steps", "true"], "a whole number or none is expected"),
        (["--optim.fused=maybe"], "is 'maybe'; true or false is expected"),
        (["--optim.name", "sgd"], "is 'sgd'; one of adamw, muon is expected"),
        (["--optim.betas", "1"], "a list of numbers is expected"),
        (["--lr", "1"], "lr is not a field; did you mean optim.lr?"),
    ],
)
def test_mistakes_on_the_command_line_are_named(words, message):
    with pytest.raises(ConfigError) as error:
        from_words(*words)
    assert message in str(error.value)


def test_a_switch_leaves_the_word_after_it_alone():
    positional, layer = arguments(Config, ["--optim.fused", "my.toml", "--optim.lr=1"])
    assert positional == ["my.toml"]
    assert layer.values == {"optim.fused": True, "optim.lr": "1"}


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "bom.toml"
    path.write_bytes(b"\xef\xbb\xbf[optim]\nlr = 5\n")
    assert build(Config, [file_layer(path)]).optim.lr == 5


def test_a_json_file_of_no_sections_is_refused(tmp_path):
    path = tmp_path / "list.json"
    path.write_text("[1, 2]")
    with pytest.raises(ConfigError, match="sections with fields are expected, found a list"):
        file_layer(path)


@pytest.mark.parametrize("text", ["[optim\nlr = 1", "\x00", "lr = = 2"])
def test_a_broken_file_is_named(tmp_path, text):
    path = tmp_path / "broken.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.toml: not a valid config file"):
        file_layer(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read"):
        file_layer(tmp_path / "none.toml")


def test_a_boolean_typed_as_number_in_a_file_is_refused():
    with pytest.raises(ConfigError, match="a number is expected"):
        build(Config, [Layer("f.toml", {"optim.lr": True})])


def test_help_lists_every_field_with_type_default_range_and_a_line():
    text = help_text(Config, "usage: python train.py")
    assert (
        "--optim.warmup_steps\n"
        "      steps of warm-up; none: chosen (a whole number or none; default none; must be >= 0)" in text
    )
    assert "--optim.betas\n      decay rates (a list of numbers; default 0.9,0.95)" in text
    assert text.count("  --") == 10


def test_a_required_field_left_out_is_named():
    @dataclass(frozen=True)
    class Verb:
        run: Annotated[str, "run directory"]

    with pytest.raises(ConfigError, match="run is missing"):
        build(Verb, [])


def test_a_misspelled_choice_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"optim\.name is 'adammw' \(did you mean adamw\?\); one of adamw, muon"):
        build(Config, [Layer("command line", {"optim.name": "adammw"})])
