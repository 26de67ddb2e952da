from dataclasses import dataclass, field, fields, is_dataclass
from typing import Optional

import pytest

from ldm_smd.commands import COMMANDS
from ldm_smd.config import current_name, dump_config, load_config
from ldm_smd.data.settings import EncodeConfig
from ldm_smd.errors import UserError
from ldm_smd.sampling.settings import SampleConfig
from ldm_smd.schema import Settings, number
from ldm_smd.training.settings import TrainAutoencoderConfig, TrainConfig

GIVEN = ["shards=a", "autoencoder=b", "output=c"]


def test_overrides_take_precedence_over_the_file(tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text("shards: a\nautoencoder: b\noutput: c\nbatch_size: 8\nmodel: {z_channels: 4}\n")
    config = load_config(TrainConfig, file, ["model.z_channels=6"])
    assert (config.batch_size, config.model.z_channels, config.model.placement) == (8, 6, "up")


def test_a_dumped_config_loads_again(tmp_path):
    config = load_config(TrainConfig, None, [*GIVEN, "objective.patch_sizes=[0,3]"])
    (tmp_path / "dump.yaml").write_text(dump_config(config))
    assert load_config(TrainConfig, tmp_path / "dump.yaml") == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["bath_size=8"], "'bath_size'; the nearest known key is 'batch_size'"),
        (["model.z_chanels=8"], "the nearest known key is 'model.z_channels'"),
        (["batch_size=many"], "batch_size"),
        (["batch_size=0"], "batch_size: expected a number from 1 to 1,048,576, found 0"),
        (["model.placement=down"], "model.placement: expected one of in_out, up, all, found 'down'"),
        (["objective.draws=1"], "objective.draws: expected at least 2 for the energy score, found 1"),
        (["model.z_channels=0"], "objective.name: expected mse for a Gaussian model"),
        (["model.block_out_channels=[30,60]"], "model.block_out_channels: expected multiples of norm_num_groups"),
        (["batch_size=1e30"], "batch_size: expected a value of the right type, found: Value '1e+30'"),
        (["learning_rate=nan"], "learning_rate: expected a number above 0, at most 1, found nan"),
        (["objective.patch_sizes=[]"], "objective.patch_sizes: expected a list of 1 or more numbers, found []"),
        (["objective.patch_sizes=[0,-1]"], "objective.patch_sizes: expected a number from 0 to 1,024, found -1"),
        (["output=''"], "output: expected text of 1 to 4,096 characters, found ''"),
        (["output=${nothing}"], "settings: expected values that can be resolved, found: Interpolation key 'nothing' not found"),
        (["batch_size"], "override: expected key=value, found 'batch_size'"),
    ],
)
def test_wrong_overrides_give_one_line(overrides, message):
    with pytest.raises(UserError) as error:
        load_config(TrainConfig, None, GIVEN + overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@dataclass
class Entry(Settings):
    RENAMED = {"size": "length"}
    length: int = number(1, 1, 9)


@dataclass
class Renamed(Settings):
    RENAMED = {"part": "inner"}
    inner: Entry = field(default_factory=Entry)
    entries: list[Entry] = field(default_factory=list)


@pytest.mark.parametrize("given", ["inner.length=2", "inner.size=2", "part.length=2", "part.size=2"])
def test_old_names_still_work(given, caplog):
    assert load_config(Renamed, None, [given]).inner.length == 2
    warnings = {"part": "part is deprecated, use inner", "size": "inner.size is deprecated, use inner.length"}
    assert [record.getMessage() for record in caplog.records] == [
        f"{given}: {warning}" for old, warning in warnings.items() if old in given
    ]


def test_old_names_still_work_in_the_entries_of_a_list(tmp_path, caplog):
    (tmp_path / "list.yaml").write_text("entries: [{length: 2}, {size: 3}]\n")
    assert [entry.length for entry in load_config(Renamed, tmp_path / "list.yaml").entries] == [2, 3]
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "entries[1].size is deprecated, use entries[1].length"
    ]


def test_a_setting_given_by_its_old_and_new_name_is_refused(tmp_path):
    (tmp_path / "both.yaml").write_text("inner: {length: 2, size: 3}\n")
    with pytest.raises(UserError, match=r"both\.yaml: expected inner\.length, found its former name inner\.size too$"):
        load_config(Renamed, tmp_path / "both.yaml")


def test_an_override_by_an_old_name_takes_precedence_over_the_file(tmp_path):
    (tmp_path / "file.yaml").write_text("inner: {length: 2}\n")
    assert load_config(Renamed, tmp_path / "file.yaml", ["part.size=3"]).inner.length == 3


def test_current_name_of_an_old_name():
    assert current_name(TrainConfig, "model.latent_channels") == "model.z_channels"
    assert current_name(TrainAutoencoderConfig, "model.latent_channels") == "model.latent_channels"
    assert current_name(Renamed, "part.size") == "inner.length"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_old_names_are_not_current_settings(command):
    def check(schema):
        assert set(schema.RENAMED.values()) <= {item.name for item in fields(schema)}
        assert not set(schema.RENAMED) & {item.name for item in fields(schema)}
        for item in fields(schema):
            if is_dataclass(item.default_factory):
                check(item.default_factory)

    check(command.schema)


def test_errors_give_the_full_name_of_a_setting():
    given = ["images.source=a", "held_out.source=a", "output=c", "held_out.resolution=1"]
    with pytest.raises(UserError, match=r"^held_out\.resolution: expected a number from 8 to 8,192, found 1$"):
        load_config(TrainAutoencoderConfig, None, given)


def test_configs_created_in_python_are_checked_too():
    with pytest.raises(UserError, match="batch_size: expected a number from 1"):
        TrainConfig(shards="a", autoencoder="b", output="c", batch_size=0)


def test_no_is_a_precision(tmp_path):
    """Although it is false in YAML."""
    (tmp_path / "train.yaml").write_text("precision: no\n")
    for file, overrides in ((tmp_path / "train.yaml", []), (None, ["precision=no"])):
        assert load_config(TrainConfig, file, [*GIVEN, *overrides]).precision == "no"


def test_a_missing_mandatory_value_gives_one_line():
    with pytest.raises(UserError, match="output: expected a value"):
        load_config(TrainConfig, None, GIVEN[:2])


def test_unreadable_files_give_one_line(tmp_path):
    for content in ("a: [", "- a\n- b\n", "\x00"):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(UserError, match="--config: expected a YAML"):
            load_config(TrainConfig, tmp_path / "bad.yaml")
    with pytest.raises(UserError, match="found no file"):
        load_config(TrainConfig, tmp_path / "none.yaml")


def test_command_line_exit_codes(run):
    seen = []
    code, out, _ = run(SampleConfig, seen.append, "model=m", "output=o", "--dry-run", "steps=3")
    assert (code, seen) == (0, []) and "steps: 3" in out
    code, _, err = run(EncodeConfig, seen.append, "outptu=o")
    assert code == 2 and err.startswith("tool: error: ") and "nearest known key is 'output'" in err
    code, _, _ = run(SampleConfig, seen.append, "model=m", "output=o")
    assert code == 0 and seen[0].model == "m"


@dataclass
class Texts(Settings):
    word: str = "a"
    other: Optional[str] = None
    words: list[str] = field(default_factory=list)
    named: dict[str, str] = field(default_factory=dict)


@pytest.mark.parametrize(
    "override, expected",
    [
        ("words=[010,no,1e3,12:30,'a, b']", ["010", "no", "1e3", "12:30", "a, b"]),
        ("word=2024_01_15", "2024_01_15"),
        ("word=a balloon, number #1: red", "a balloon, number #1: red"),
        ("word='no'", "no"),
        ("other=on", "on"),
        ("other=null", None),
        ("named={first: 007}", {"first": "007"}),
        ("named.second=1.50", {"second": "1.50"}),
    ],
)
def test_texts_are_kept_as_they_are_written(override, expected, tmp_path):
    """Not read as a number or truth value of YAML and written back."""
    name, _, value = override.partition("=")
    name = name.partition(".")[0]
    assert getattr(load_config(Texts, None, [override]), name) == expected
    if "." not in override.partition("=")[0] and "#" not in value:
        (tmp_path / "texts.yaml").write_text(f"{name}: {value}\n")
        assert getattr(load_config(Texts, tmp_path / "texts.yaml"), name) == expected


def test_a_nested_section_may_refer_to_another(tmp_path):
    given = ["images.source=a", "held_out=${images}", "output=o"]
    assert load_config(TrainAutoencoderConfig, None, given).held_out.source == "a"
    with pytest.raises(UserError, match="settings: expected values that can be resolved, found: Interpolation key 'nothing'"):
        load_config(TrainAutoencoderConfig, None, [*given, "model=${nothing}"])


@pytest.mark.parametrize("content", ["foo\n", "shards=a\noutput=c\n", "- shards\n"])
def test_a_file_without_settings_gives_one_line(content, tmp_path):
    (tmp_path / "text.yaml").write_text(content)
    with pytest.raises(UserError, match="--config: expected a YAML mapping, found something else in"):
        load_config(TrainConfig, tmp_path / "text.yaml", GIVEN)
