"""FD-DINOv2, with a tiny random DINOv2 from a folder: the resize, the class token, provenance, names, refusals."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Dinov2Model, ViTConfig

from dcngen.evaluation import evaluate
from dcngen.evaluation.dinov2 import load_dinov2, resize_like_pillow
from dcngen.evaluation.features import Features, Provenance
from dcngen.evaluation.scores import load_statistics, score
from dcngen.evaluation.spaces import DINOV2, INCEPTION
from dcngen.evaluation.verdict import judge


def pictures(n, seed=0, size=8, top=256):
    return np.random.default_rng(seed).integers(0, top, (n, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [8, 32, 64, 300])
def test_resize_is_pillows_to_one_grey_level(size):
    picture = pictures(1, size=size)[0]
    theirs = np.asarray(Image.fromarray(picture).resize((224, 224), Image.Resampling.BICUBIC)).astype(float)
    ours = resize_like_pillow(torch.from_numpy(picture).permute(2, 0, 1)[None], 224)[0].permute(1, 2, 0)
    difference = np.abs(ours.numpy() - theirs)
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


def test_features_are_the_normed_class_token_in_full_precision(dinov2_folder):
    network = load_dinov2(dinov2_folder)
    images = torch.from_numpy(pictures(3, size=224)).permute(0, 3, 1, 2)
    x = images.float() / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    expected = Dinov2Model.from_pretrained(dinov2_folder)(x).pooler_output
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = network.train()(images)
    assert features.shape == (3, network.num_features) and features.dtype == torch.float32
    assert torch.allclose(features, expected, atol=1e-5) and not network.training
    with pytest.raises(TypeError, match="expected uint8 pictures"):
        network(x)


def test_digest_names_the_weights(dinov2_folder, tmp_path):
    config, tensors = (dinov2_folder / "config.json").read_text(), load_file(dinov2_folder / "model.safetensors")
    digests = [load_dinov2(dinov2_folder).weights_digest]
    for change in (0.0, 1e-3):
        (tmp_path / "config.json").write_text(config)
        changed = tensors | {"layernorm.bias": tensors["layernorm.bias"] + change}
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        digests.append(load_dinov2(tmp_path).weights_digest)
    assert digests[0] == digests[1] != digests[2]


def test_other_models_and_incomplete_weights_are_refused(dinov2_folder, tmp_path):
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a vit model, expected dinov2"):
        load_dinov2(tmp_path)
    (tmp_path / "config.json").write_text((dinov2_folder / "config.json").read_text())
    tensors = load_file(dinov2_folder / "model.safetensors")
    del tensors["layernorm.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not hold all weights of a DINOv2 model: layernorm\.bias"):
        load_dinov2(tmp_path)


def test_without_the_hub_the_error_lists_remedies(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub._is_offline_mode", True, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"no DINOv2 weights: somebody/absent-dinov2(.|\n)*remedies: .*hf download"):
        load_dinov2("somebody/absent-dinov2")


def features_of(values, network):
    provenance = Provenance("data", len(values), 8, "rule", "same", values.shape[1], "made up", network)
    return Features(values, np.zeros(len(values), dtype=int), provenance)


def test_scores_verdicts_and_notes_never_say_fid(gaussian_features):
    reference = features_of(gaussian_features(60, 6, 1), "DINOv2")
    first, second = (
        score(features_of(gaussian_features(60, 6, 0, shift), "DINOv2"), reference) for shift in (1.0, 0.2)
    )
    assert first.space is DINOV2
    plain = first.to_dict() | first.space.named(vars(judge(first, second)))
    assert {"fd_dinov2", "fd_dinov2_error", "kd_dinov2", "fd_dinov2_difference", "kd_dinov2_interval"} <= set(plain)
    assert "FD-DINOv2 is" in plain["reason"] and "KD-DINOv2 agrees" in plain["reason"]
    assert "ViT-L/14" in " ".join(first.notes) and "singular" not in " ".join(first.notes)
    assert "fid" not in json.dumps(plain).lower() and "kid" not in json.dumps(plain).lower()


def test_features_of_two_networks_are_not_compared(gaussian_features, tmp_path):
    x = gaussian_features(60, 6, 0)
    with pytest.raises(ValueError, match=r"different feature networks \(DINOv2 and Inception\)"):
        score(features_of(x, "DINOv2"), features_of(x, INCEPTION.network))
    np.savez(tmp_path / "published.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ValueError, match=r"mu of 6 DINOv2 features, got \(2048,\)"):
        load_statistics(tmp_path / "published.npz", features_of(x, "DINOv2").provenance)


def test_evaluate_command(dinov2_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DCNGEN_CACHE", str(tmp_path / "cache"))
    for index, picture in enumerate(pictures(30, seed=1)):
        path = tmp_path / "data" / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    np.savez(tmp_path / "samples.npz", arr_0=pictures(30, top=200), arr_1=np.arange(30) % 2)
    output = tmp_path / "scores.json"
    arguments = [
        str(tmp_path / "samples.npz"),
        "--data",
        str(tmp_path / "data"),
        "--device",
        "cpu",
        "--json",
        str(output),
    ]
    assert evaluate.main([*arguments, "--features", "dinov2", "--dinov2-weights", str(dinov2_folder)]) == 0
    text = capsys.readouterr().out
    assert f"DINOv2 weights {load_dinov2(dinov2_folder).weights_digest[:16]} from {dinov2_folder}" in text
    scores = json.loads(output.read_text())
    assert f"FD-DINOv2      {scores['fd_dinov2']:.3f} +- " in text and "FID" not in text
    assert scores["features"] == "DINOv2" and "fid" not in scores
