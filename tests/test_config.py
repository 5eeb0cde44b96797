"""SparsityPattern and SamoyedsConfig: what they accept, print, store and refuse."""

import copy
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, MixtralConfig

import samoyeds_hf
from samoyeds_hf import SamoyedsConfig, SparsityPattern
from samoyeds_hf.errors import ConfigError, PatternError, SamoyedsError
from samoyeds_hf.format import FORMAT_VERSION, stored_shapes
from samoyeds_hf.pruning.calibration import Calibration

FULL = {
    "pattern": "4:8:32",
    "method": "magnitude",
    "modules": ["experts", "shared_experts"],
    "overrides": {r"model\.layers\.0\..*": "dense", ".*down_proj": "2:4", ".*": "1:2:128"},
    "strict": False,
    "format_version": 1,
    "refine": True,
    "asymmetric": True,
    "recover": "block",
    "calibration": {
        "data": "texts/novels.txt",
        "samples": 64,
        "sequence_length": 512,
        "seed": 3,
        "sha256": "0123456789abcdef" * 4,
    },
}


# -- SparsityPattern


@given(st.integers(1, 16), st.data(), st.integers(1, 1 << 20))
def test_pattern_prints_as_it_is_written(m, data, quarter_v):
    n = data.draw(st.integers(1, m))
    text = f"{n}:{m}:{4 * quarter_v}"
    pattern = SparsityPattern.parse(text)
    assert (pattern.n, pattern.m, pattern.v) == (n, m, 4 * quarter_v)
    assert str(pattern) == text
    assert SparsityPattern.parse(pattern) is pattern
    assert hash(pattern) == hash(SparsityPattern.parse(text))


def test_plain_2_of_4():
    pattern = SparsityPattern.parse("2:4")
    assert str(pattern) == "2:4"
    assert pattern.density == 0.5
    assert (pattern.n, pattern.m) == (1, 1)
    assert pattern.sub_row(96) == 96  # one Sub-Row as long as the row, whatever the row
    assert pattern.kept_rows(7) == 7


@pytest.mark.parametrize(
    ("text", "density"), [("1:2:64", 0.25), ("4:8:32", 0.25), ("3:4:64", 0.375), ("8:8:16", 0.5)]
)
def test_density(text, density):
    assert SparsityPattern.parse(text).density == density


@pytest.mark.parametrize(
    "text",
    [
        *("", "1:2", "2:4 ", "1:2:64\n", " 1:2:64", "1:2:64:3", "a:b:c", "-1:2:64", "1:2:6.4"),
        *("1-2-64", "dense", "1:2:" + "9" * 5000, "1:2:\u0666\u0664"),  # the last: Arabic digits
        *(3752, 1.5, None, True, ["1:2:64"], (1, 2, 64), b"1:2:64"),
    ],
)
def test_pattern_refuses_text(text):
    message = re.escape(f"is written 'N:M:V' (for example '1:2:64') or '2:4', found {text!r}.")
    with pytest.raises(PatternError, match=message):
        SparsityPattern.parse(text)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 2, 64), "1 <= N <= M <= 16, found N=0, M=2"),
        ((3, 2, 64), "1 <= N <= M <= 16, found N=3, M=2"),
        ((1, 17, 64), "1 <= N <= M <= 16, found N=1, M=17"),
        ((1, 2, 0), "multiple of 4, found 0"),
        ((1, 2, 6), "multiple of 4, found 6"),
        ((1, 2, -4), "multiple of 4, found -4"),
        ((1, 2, None), "needs a Sub-Row length V, found none in 1:2; use e.g. '1:2:64'"),
        ((1, 2, 64.0), "must be integers, found (1, 2, 64.0)"),
        ((True, 2, 64), "must be integers"),
        (("1", 2, 64), "must be integers"),
    ],
)
def test_pattern_refuses_numbers(numbers, message):
    with pytest.raises(PatternError, match=re.escape(message)):
        SparsityPattern(*numbers)


def test_pattern_is_frozen():
    with pytest.raises(AttributeError):
        SparsityPattern(1, 2, 64).v = 32


@given(st.sampled_from(["1:2:64", "4:8:32", "2:4", "3:4:12"]), st.sampled_from([2, 4]))
def test_bytes_are_those_of_the_shapes(text, element_size):
    pattern = SparsityPattern.parse(text)
    sizes = [torch.Size(shape).numel() for shape in stored_shapes((48, 192), pattern)]
    assert pattern.num_bytes(48, 192, element_size) == sizes[0] * element_size + sum(sizes[1:])


# -- SamoyedsConfig


def test_defaults():
    config = SamoyedsConfig()
    assert config.pattern == SparsityPattern(1, 2, 64)
    assert config.method == "magnitude"
    assert config.modules == ("experts",)
    assert config.overrides == {}
    assert config.strict is True
    assert config.format_version == FORMAT_VERSION
    assert config.quant_method == "samoyeds"
    assert (config.refine, config.asymmetric, config.recover) == (False, False, None)
    assert config.calibration is None
    assert not config.is_calibrated


def test_a_configuration_from_before_calibration():
    stored = SamoyedsConfig("4:8:32", overrides={"a": "dense"}).to_dict()
    for key in ("refine", "asymmetric", "recover", "calibration"):
        del stored[key]
    assert SamoyedsConfig.from_dict(stored) == SamoyedsConfig("4:8:32", overrides={"a": "dense"})


def test_values_are_normalised():
    config = SamoyedsConfig(
        pattern=SparsityPattern(1, 2, 32),
        modules=["shared_experts", "experts", "experts"],
        overrides={"a": SparsityPattern(1, 1), "b": "dense"},
    )
    assert config.modules == ("experts", "shared_experts")
    assert config.overrides == {"a": SparsityPattern(1, 1), "b": None}
    assert SamoyedsConfig(modules="experts").modules == ("experts",)


def ways_to_store():
    def by_dict(config, path):
        return SamoyedsConfig.from_dict(config.to_dict())

    def by_json_string(config, path):
        return SamoyedsConfig.from_dict(json.loads(config.to_json_string()))

    def by_json_file(config, path):
        config.to_json_file(path / "quant.json")
        return SamoyedsConfig.from_dict(json.loads((path / "quant.json").read_text()))

    def by_model_config(config, path):
        model_config = MixtralConfig()
        model_config.quantization_config = config
        model_config.save_pretrained(path)
        return SamoyedsConfig.from_dict(AutoConfig.from_pretrained(path).quantization_config)

    def by_iteration(config, path):
        return SamoyedsConfig(**dict(config))

    def by_deepcopy(config, path):
        return copy.deepcopy(config)

    def by_copy(config, path):
        return copy.copy(config)

    def by_pickle(config, path):
        return pickle.loads(pickle.dumps(config))

    return [
        by_dict,
        by_json_string,
        by_json_file,
        by_model_config,
        by_iteration,
        by_deepcopy,
        by_copy,
        by_pickle,
    ]


@pytest.mark.parametrize("way", ways_to_store(), ids=lambda way: way.__name__)
@pytest.mark.parametrize("arguments", [{}, FULL], ids=["default", "full"])
def test_stored_and_read_again(way, arguments, tmp_path):
    config = SamoyedsConfig(**arguments)
    again = way(config, tmp_path)
    assert again == config
    assert hash(again) == hash(config)
    # JSON keys are sorted on the way, but the first override that matches must stay the first
    assert list(again.overrides.items()) == list(config.overrides.items())
    assert type(again.overrides) is type(config.overrides)


def test_equality_tells_all_fields_apart():
    changed = {
        "pattern": "2:4",
        "modules": ["experts"],
        "overrides": dict(reversed(FULL["overrides"].items())),
        "strict": True,
        "method": "admm",
        "refine": False,
        "asymmetric": False,
        "recover": None,
        "calibration": {**FULL["calibration"], "samples": 65},
    }
    configs = [
        SamoyedsConfig(**FULL),
        *(SamoyedsConfig(**{**FULL, k: changed[k]}) for k in changed),
    ]
    assert len(set(configs)) == len(configs)
    assert SamoyedsConfig() != {}


def test_is_read_only():
    config = SamoyedsConfig(overrides={"a": "2:4"})
    with pytest.raises(AttributeError, match="read-only: make a new one to change 'pattern'"):
        config.pattern = SparsityPattern(1, 1)
    with pytest.raises(AttributeError, match="read-only"):
        config.update(strict=False)
    with pytest.raises(TypeError):
        config.overrides["b"] = None
    given = {"a": "2:4"}
    config = SamoyedsConfig(overrides=given)
    given["b"] = "dense"
    assert list(config.overrides) == ["a"]


def test_first_matching_override_wins():
    config = SamoyedsConfig(overrides={"a.*": "2:4", ".*b": "dense", "a": "1:2:32"})
    assert config.overrides_for("ab") == ["a.*", ".*b"]
    assert config.overrides_for("a") == ["a.*", "a"]
    assert config.overrides_for("bb") == [".*b"]
    assert config.overrides_for("bbc") == []  # the whole name must match
    # The order of the overrides decides, not that of the names: module, then projection.
    assert config.overrides_for("bb", "a") == ["a.*", ".*b", "a"]
    turned = SamoyedsConfig(overrides=list(reversed(config.to_dict()["overrides"])))
    assert turned.overrides_for("a") == ["a", "a.*"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patern": "2:4"}, "found 'patern' (did you mean 'pattern'?); remove it"),
        ({"bits": 4, "module": 1}, "found 'bits', 'module' (did you mean 'modules'?); remove"),
        ({"quant_method": "gptq"}, "must be 'samoyeds', found 'gptq'"),
        ({"format_version": FORMAT_VERSION + 1}, "found version 2; upgrade samoyeds-hf"),
        ({"format_version": 0}, "a positive integer, found 0"),
        ({"format_version": "1"}, "a positive integer, found '1'"),
        ({"format_version": True}, "a positive integer, found True"),
        (
            {"method": "wander"},
            "method must be one of ['admm', 'best', 'magnitude', 'sparsegpt', 'wanda'], found "
            "'wander'",
        ),
        ({"refine": "yes"}, "refine must be true or false, found 'yes'"),
        ({"refine": None}, "refine must be true or false, found None"),
        ({"asymmetric": 1}, "asymmetric must be true or false, found 1"),
        ({"recover": "blocks"}, "one of ['block', 'distill'] or null, found 'blocks'"),
        ({"recover": True}, "one of ['block', 'distill'] or null, found True"),
        ({"recover": ["block"]}, "or null, found ['block']"),
        ({"calibrate": {"data": "a"}}, "found 'calibrate' (did you mean 'calibration'?); remove"),
        ({"calibration": "a.txt"}, "calibration must be a mapping with the key 'data', found"),
        ({"calibration": {}}, "must say which data to read, found no key 'data'"),
        ({"calibration": {"data": ""}}, "calibration data must be a file, a directory"),
        (
            {"calibration": {"data": "a", "sample": 4}},
            "found 'sample' (did you mean 'samples'?); remove it",
        ),
        ({"calibration": {"data": "a", "samples": 0}}, "samples must be a whole number, 1 or"),
        ({"method": ["magnitude"]}, "found ['magnitude']"),
        ({"method": None}, "found None"),
        ({"modules": []}, "must be some of ['experts', 'shared_experts'], found []"),
        ({"modules": ["experts", "attention"]}, "found ['experts', 'attention']"),
        ({"modules": 5}, "must be some of ['experts', 'shared_experts'], found 5"),
        ({"modules": None}, "found None"),
        ({"modules": {"experts": True}}, "found {'experts': True}"),
        ({"modules": [["experts"]]}, "found [['experts']]"),
        ({"strict": "no"}, "strict must be true or false, found 'no'"),
        ({"strict": 1}, "strict must be true or false, found 1"),
        ({"overrides": "dense"}, "must map regex to pattern or 'dense', found 'dense'"),
        ({"overrides": [["a"]]}, "must map regex to pattern or 'dense', found [['a']]"),
        ({"overrides": ["ab"]}, "must map regex to pattern or 'dense', found ['ab']"),
        ({"overrides": {"(": "2:4"}}, "must be a regular expression, found '('"),
        ({"overrides": {0: "2:4"}}, "must be a regular expression, found 0"),
        ({"overrides": {b"a": "2:4"}}, "must be a regular expression, found b'a'"),
        ({"overrides": [["a", "2:4"], ["a", "dense"]]}, "given once, found 'a' twice"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        SamoyedsConfig(**arguments)
    with pytest.raises(ConfigError, match=re.escape(message)):
        SamoyedsConfig.from_dict({**SamoyedsConfig().to_dict(), **arguments})


@pytest.mark.parametrize("arguments", [{"pattern": "1:2"}, {"overrides": {"a": "sparse"}}])
def test_refuses_pattern(arguments):
    with pytest.raises(PatternError, match="is written 'N:M:V'"):
        SamoyedsConfig(**arguments)


@pytest.mark.parametrize(
    ("arguments", "is_calibrated"),
    [
        ({"method": "magnitude"}, False),
        ({"method": "magnitude", "refine": True}, True),
        ({"method": "magnitude", "asymmetric": True}, True),
        ({"method": "magnitude", "recover": "block"}, True),
        ({"method": "magnitude", "recover": "distill"}, False),  # a training of its own, afterwards
        *(({"method": method}, True) for method in ("wanda", "sparsegpt", "admm", "best")),
    ],
)
def test_which_settings_look_at_data(arguments, is_calibrated):
    assert SamoyedsConfig(**arguments).is_calibrated is is_calibrated


def test_calibration_is_a_mapping_or_an_object():
    given = {"data": "a.txt", "samples": 4}
    config = SamoyedsConfig(method="wanda", calibration=given)
    assert config.calibration == Calibration("a.txt", 4)
    assert config == SamoyedsConfig(method="wanda", calibration=Calibration("a.txt", 4))
    given["samples"] = 5
    assert config.calibration.samples == 4


def test_replace_makes_a_copy_with_other_values():
    config = SamoyedsConfig(**FULL)
    other = config.replace(pattern="2:4", calibration=None)
    assert other == SamoyedsConfig(**{**FULL, "pattern": "2:4", "calibration": None})
    assert list(other.overrides.items()) == list(config.overrides.items())
    assert config == SamoyedsConfig(**FULL)
    with pytest.raises(ConfigError, match="did you mean 'method'"):
        config.replace(methods="wanda")


def test_provenance_names_no_directory():
    found = SamoyedsConfig(**FULL).provenance()
    assert found == {
        "method": "magnitude",
        "refine": True,
        "asymmetric": True,
        "permute": False,
        "recover": "block",
        "calibration": {**FULL["calibration"], "data": "novels.txt"},
    }
    assert SamoyedsConfig().provenance()["calibration"] is None


def test_unused_arguments_go_back():
    """The protocol of transformers: what belongs to from_pretrained is handed back."""
    config, rest = SamoyedsConfig.from_dict({}, return_unused_kwargs=True, dtype="auto")
    assert config == SamoyedsConfig()
    assert rest == {"dtype": "auto"}


# -- recipes


def test_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "pattern: '4:8:32'\nmodules: [experts, shared_experts]\nstrict: false\n"
        "overrides:\n  model\\.layers\\.0\\..*: dense\n  .*down_proj: '2:4'\n  .*: 1:2:128\n"
        "refine: true\nasymmetric: true\nrecover: block\n"
        "calibration:\n  data: texts/novels.txt\n  samples: 64\n  sequence_length: 512\n  seed: 3\n"
        f"  sha256: '{FULL['calibration']['sha256']}'\n"
    )
    config = SamoyedsConfig.from_recipe(path)
    assert config == SamoyedsConfig(**FULL)
    assert SamoyedsConfig.from_recipe(str(path)) == config


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("- 1", ConfigError, "must be a mapping .*, found list in .*recipe.yaml"),
        ("", ConfigError, "must be a mapping .*, found NoneType"),
        ("a: [", ConfigError, "must be a readable YAML file, found .*recipe.yaml"),
        ("a: \x00", ConfigError, "must be a readable YAML file"),
        ("pattern:", PatternError, "found None"),
        ("patterns: '2:4'", ConfigError, "did you mean 'pattern'"),
        ("1: 2", ConfigError, "found '1'"),
        ("calibration: a.txt", ConfigError, "a mapping with the key 'data', found 'a.txt'"),
        ("calibration: {samples: 4}", ConfigError, "found no key 'data'"),
        ("calibration: {data: a, samples: 4.5}", ConfigError, "whole number, 1 or more, found"),
        ("recover: yes", ConfigError, "or null, found True"),
    ],
)
def test_refuses_recipe(tmp_path, text, error, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(error, match=message):
        SamoyedsConfig.from_recipe(path)


@pytest.mark.parametrize("text", ["1:2:32", "2:4", "1:2:64"])
def test_pattern_needs_no_quotes(tmp_path, text):
    """Other YAML readers take 1:2:32 and 2:4 for the numbers 3752 and 124, in base 60."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"pattern: {text}\noverrides: {{a: {text}}}\nformat_version: 1\n")
    config = SamoyedsConfig.from_recipe(path)
    assert config == SamoyedsConfig(pattern=text, overrides={"a": text})


def test_refuses_recipe_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"method: \xe9")
    for path in (tmp_path / "missing.yaml", tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(ConfigError, match=f"readable YAML file, found {path}"):
            SamoyedsConfig.from_recipe(path)


RECIPES = sorted((Path(__file__).parents[1] / "configs" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_survives_json(path):
    config = SamoyedsConfig.from_recipe(path)
    assert SamoyedsConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_errors_are_value_errors():
    assert issubclass(SamoyedsError, ValueError)
    for error in (ConfigError, PatternError):
        assert issubclass(error, samoyeds_hf.SamoyedsError)
