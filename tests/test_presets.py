"""Known shapes: their parameter counts are the published ones, and overrides reach what follows from them."""

import pytest

from minillm.model.config import ModelConfig
from minillm.model.presets import PRESETS, gpt2, preset, preset_fields
from minillm.plan import count_parameters

PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "gpt2-350m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "ministral-8b": 8_019_808_256,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "olmo-1b": 1_176_764_416,
    "olmo-7b": 6_888_095_744,
}
LADDER = {"nano": 0.2e6, "micro": 1e6, "mini": 3e6, "small": 10e6, "medium": 26e6, "large": 60e6, "xl": 125e6}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    assert count_parameters(preset(name)).total == PUBLISHED[name]


@pytest.mark.parametrize("name", LADDER)
def test_the_small_ones_have_the_size_they_claim(name):
    config = preset(name)
    without_embedding = count_parameters(config).total - config.vocab_size * config.dim
    assert without_embedding == pytest.approx(LADDER[name], rel=0.08)


def test_every_preset_is_checked_here():
    assert set(PRESETS) == set(PUBLISHED) | set(LADDER)


def test_overrides_reach_what_follows_from_them():
    assert preset("gpt2-124m", vocab_size=300).vocab_size == 300
    config = gpt2("124m", dim=96, n_heads=4)
    assert (config.head_dim, config.n_kv_heads, config.ffn_dim) == (24, 4, 384)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_fields_say_the_same_config(name):
    assert ModelConfig(**preset_fields(name)) == preset(name)


def test_preset_fields_leave_open_what_follows():
    fields = preset_fields("gpt2-124m")
    assert (fields["n_kv_heads"], fields["head_dim"], fields["ffn_dim"]) == (None, None, None)
    fields = preset_fields("qwen3-0.6b")
    assert (fields["n_kv_heads"], fields["head_dim"], fields["ffn_dim"]) == (8, 128, 3072)


def test_a_misspelled_preset_names_the_nearest():
    with pytest.raises(ValueError, match="preset: 'gpt-124m' is not known; did you mean gpt2-124m"):
        preset("gpt-124m")
