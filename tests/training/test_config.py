from pathlib import Path

import pytest
import torch
import yaml

from dcngen.config import PRESETS, load_config, load_run_config, parse_command_line
from dcngen.config.loader import _flatten, to_yaml

CONFIGS = Path(__file__).parents[2] / "configs"
PAIRS = ("earth", "cifar10", "imagenet256")


def test_preset_is_below_file_is_below_command_line(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("preset: tiny\nmodel:\n  layers_per_block: 3\noptimizer:\n  learning_rate: 1e-5\n")
    config = load_config(["--config", str(file), "--optimizer.learning_rate", "0.25"])
    assert config.model.block_out_channels == PRESETS["tiny"]["model"]["block_out_channels"]
    assert config.model.layers_per_block == 3 and config.optimizer.learning_rate == 0.25
    assert config.ema.decay == PRESETS["tiny"]["ema"]["decay"] and config.name == "mine"
    assert load_config(["--config", str(file)]).optimizer.learning_rate == 1e-5
    assert load_config(["--config", str(file), "--preset", "base"]).data.image_size == 256


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["--optimizer.lerning_rate", "1"], "'optimizer.learning_rate'"),
        (["--learning_rate=1"], "'autoencoder.learning_rate' or 'optimizer.learning_rate'"),
        (["--modle.dropout", "0.1"], "'model.dropout'"),
        (["--preset", "tinny"], "'tiny'"),
    ],
)
def test_unknown_key_names_the_nearest(arguments, nearest):
    with pytest.raises(ValueError, match="unknown") as error:
        parse_command_line(arguments)
    assert f"did you mean {nearest}?" in str(error.value)


def test_unknown_key_in_a_file_names_file_and_nearest(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("train:\n  max_train_step: 3\n")
    with pytest.raises(ValueError, match=r"'train.max_train_step' in .*bad.yaml; did you mean 'train.max_train_steps'"):
        parse_command_line(["--config", str(file)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.max_train_steps", "many"], "train.max_train_steps"),
        (["--train.max_train_steps", "0"], "positive"),
        (["--train.label_dropout", "1.5"], "probability"),
        (["--objective.prediction_type", "x0"], "prediction_type"),
        (["--autoencoder.block_out_channels", "[10,20]"], "multiples of norm_num_groups"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (
            ["--train.compile=true", "--train.compile_mode=reduce-overhead", "--train.gradient_accumulation_steps=2"],
            "cannot accumulate",
        ),
        (["--sampling.num_images", "0"], r"sampling\.num_images: expected at least 1"),
        (["--sampling.seed", "-1"], r"sampling\.seed: expected 0 to"),
        (["--sampling.sampler", "ddim", "--sampling.num_inference_steps", "30"], r"num_inference_steps 30: .*25 or 40"),
        (["--sampling.num_inference_steps", "1001"], "expected 1 to 1000"),
        (["--sampling.sampler", "ddim", "--objective.prediction_type", "flow"], "got a flow model; use euler"),
    ],
)
def test_wrong_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse_command_line(arguments)


def test_saved_configuration_reads_back_the_same(tmp_path):
    config = load_config(["--preset", "base", "--model.conv_operator", "[conv,conv,dcnv4,dcnv4]", "--seed", "7"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_run_config(tmp_path / "config.yaml") == config
    assert config.model.conv_operator == ["conv", "conv", "dcnv4", "dcnv4"]


def test_a_run_saved_with_a_sampler_that_does_not_fit_still_opens(tmp_path):
    config = load_config(["--preset", "tiny"])
    config.sampling.sampler, config.sampling.num_inference_steps = "ddim", 30
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_run_config(tmp_path / "config.yaml") == config


def test_resume_takes_a_path_or_nothing():
    assert parse_command_line(["--resume"]).resume == "latest"
    assert parse_command_line(["--resume", "--seed", "3"]).resume == "latest"
    assert parse_command_line(["--resume", "a/step-00000001"]).resume == "a/step-00000001"
    assert parse_command_line([]).resume is None


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_differs_in_the_operators_alone(name):
    arms = [CONFIGS / f"{name}_{arm}.yaml" for arm in ("baseline", "dcn")]
    baseline, dcn = (_flatten(load_config(["--config", str(arm)]).to_dict()) for arm in arms)
    differing = {key for key in baseline if baseline[key] != dcn[key]}
    assert differing == {"name", "model.conv_operator", "model.attention_operator"}
    assert (baseline["model.conv_operator"], baseline["model.attention_operator"]) == ("conv", "attention")
    assert (dcn["model.conv_operator"], dcn["model.attention_operator"]) == ("dcnv4", "dcnv4")
    # The files themselves say the same: nothing is left to a default in one arm only.
    assert _flatten(yaml.safe_load(arms[0].read_text())).keys() == _flatten(yaml.safe_load(arms[1].read_text())).keys()


def test_the_wide_recipe_is_the_other_one_at_the_baselines_size():
    from dcngen.models import count_parameters
    from dcngen.training import build_unet

    names = ("cifar10_baseline", "cifar10_dcn", "cifar10_dcn_wide")
    baseline, dcn, wide = (load_config(["--config", str(CONFIGS / f"{name}.yaml")]) for name in names)
    ours, other = _flatten(wide.to_dict()), _flatten(dcn.to_dict())
    assert {key for key in ours if ours[key] != other[key]} == {"name", "model.block_out_channels"}
    with torch.device("meta"):
        sizes = [
            count_parameters(
                build_unet(config.model, latent_shape=(4, 16, 16), num_classes=10, num_train_timesteps=1000, seed=0)
            )
            for config in (baseline, wide)
        ]
    assert abs(sizes[1] / sizes[0] - 1) < 0.05
