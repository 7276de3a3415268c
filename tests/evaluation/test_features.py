import json

import numpy as np
import pytest
import torch
from PIL import Image

from dcngen.data import ImageSet
from dcngen.data.images import evenly_over_classes
from dcngen.diffusion.plan import SamplePlan
from dcngen.evaluation import evaluate, scores
from dcngen.evaluation.features import Features, Provenance, extract_features, matching_reference, open_generated
from dcngen.evaluation.scores import load_statistics, save_statistics, score
from dcngen.evaluation.statistics import KernelSums


def image_set(n, seed=0, classes=3):
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 3, 8, 8), dtype=np.uint8)
    names = [str(i) for i in range(classes)]
    return ImageSet(pixels, np.arange(n) % classes, names, digest=f"noise{seed}", name="noise", split="train")


def test_features_are_cached_by_content_and_network(tmp_path, colour_network):
    images, network = image_set(20), colour_network()
    first = extract_features(images, network, cache_root=tmp_path, progress=False)
    assert torch.allclose(first.values, network(images.batch(range(20))[0]), atol=1e-6)
    assert set(network.batches[:-1]) == {16}
    calls = len(network.batches)
    again = extract_features(images, network, cache_root=tmp_path, progress=False)
    assert torch.equal(again.values, first.values) and len(network.batches) == calls
    part = extract_features(images, network, indices=[3, 1], cache_root=tmp_path, progress=False)
    assert torch.equal(part.values, first.values[[3, 1]]) and part.labels.tolist() == [0, 1]
    assert part.provenance.data_digest != first.provenance.data_digest


def test_generated_pictures_open_alike_from_npz_and_png(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    (tmp_path / "png").mkdir()
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "png" / f"{index:06d}.png")
    Image.new("RGB", (50, 50)).save(tmp_path / "png" / "grid.png")
    np.savez(tmp_path / "stored.npz", arr_0=pictures, arr_1=np.arange(5))
    np.savez_compressed(tmp_path / "packed.npz", arr_0=pictures, arr_1=np.arange(5))
    png, stored, packed = (open_generated(tmp_path / name) for name in ("png", "stored.npz", "packed.npz"))
    expected = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    for images in (png, stored, packed):
        assert torch.equal(images.batch(range(5))[0], expected)
    assert stored.digest == packed.digest and stored.labels.tolist() == [0, 1, 2, 3, 4]


def test_pictures_without_labels_are_not_of_the_first_class(tmp_path):
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((6, 8, 8, 3), dtype=np.uint8))
    images = open_generated(tmp_path)
    assert images.class_names == ["all"] and evaluate.labels_for(str(tmp_path), images, 3) is None


def test_pictures_in_a_folder_have_the_labels_of_their_plan(tmp_path):
    for index in range(6):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{index:06d}.png")
    (tmp_path / "plan.json").write_text(json.dumps({"plan": SamplePlan(num_images=6).to_dict()}))
    images = open_generated(tmp_path)
    images = evaluate.labelled(images, evaluate.labels_for(str(tmp_path), images, 3))
    assert images.labels.tolist() == [0, 1, 2, 0, 1, 2] and images.num_classes == 3


def test_unusable_generated_pictures_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        open_generated(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no pictures"):
        open_generated(tmp_path)
    np.savez(tmp_path / "other.npz", a=np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"other\.npz holds no pictures"):
        open_generated(tmp_path / "other.npz")
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match="one size"):
        open_generated(tmp_path)


def test_reference_follows_the_labels_or_the_own_mixture():
    images = image_set(30)
    indices, note = matching_reference(images, np.array([0, 0, 0, 2]), 4)
    assert sorted(images.labels[indices].tolist()) == [0, 0, 0, 2] and "as many as generated" in note
    too_many = np.zeros(20, dtype=int)
    indices, note = matching_reference(images, too_many, 20)
    assert len(indices) == 20 and "own mixture" in note and set(images.labels[indices]) == {0, 1, 2}
    assert len(matching_reference(images, None, 99)[0]) == 30


def features_of(values, labels=None, digest="net", size=32):
    provenance = Provenance("data", len(values), size, "rule", digest, values.shape[1], "made up")
    return Features(values, np.zeros(len(values), dtype=int) if labels is None else labels, provenance)


def test_scores_carry_errors_and_caveats(gaussian_features):
    x, y = features_of(gaussian_features(60, 10, 0, shift=0.4)), features_of(gaussian_features(50, 10, 1))
    result = score(x, y)
    assert result.frechet > 0 and result.frechet_error > 0 and result.kernel > 0 and result.kernel_error > 0
    assert result.is_biased and result.frechet_infinity is None and len(result.frechet_without) == 20
    text = " ".join(result.notes)
    assert "N differs" in text and "fewer than 2,048" in text and "not comparable with published FID" in text
    assert np.isnan(score(x, y, errors=False).frechet_error)


def test_every_group_left_out_of_the_kernel_distance_holds_all_classes(gaussian_features, monkeypatch):
    """Dealt before the pictures are chosen, groups lose whole classes to the choice, and the error is far too large."""
    count, classes, seen = 2000, 5, []

    def spy(values, reference, groups):
        seen.append(groups)
        return KernelSums(values, reference, groups)

    monkeypatch.setattr(scores, "KERNEL_MAX_IMAGES", count // 5)
    monkeypatch.setattr(scores, "KernelSums", spy)
    labels = np.arange(count) % classes
    x, y = (features_of(gaussian_features(count, 6, seed), labels) for seed in (0, 1))
    assert score(x, y).kernel_error > 0
    chosen = labels[evenly_over_classes(labels, count // 5)]
    shares = [np.bincount(chosen[seen[0] == group], minlength=classes).tolist() for group in range(20)]
    assert shares == [[4] * classes] * 20


def test_scores_without_errors_print_none(gaussian_features, capsys):
    evaluate.print_scores(score(*(features_of(gaussian_features(60, 10, k)) for k in (0, 1)), errors=False), "real")
    assert "nan" not in capsys.readouterr().out


def test_other_network_or_size_is_refused(gaussian_features):
    x = features_of(gaussian_features(60, 10, 0))
    with pytest.raises(ValueError, match="different Inception weights"):
        score(x, features_of(gaussian_features(60, 10, 1), digest="other"))
    with pytest.raises(ValueError, match=r"32 pixels.*64"):
        score(x, features_of(gaussian_features(60, 10, 1), size=64))


def test_statistics_round_trip_and_mismatch(gaussian_features, tmp_path):
    x, y = features_of(gaussian_features(60, 10, 0)), features_of(gaussian_features(80, 10, 1))
    save_statistics(y, tmp_path / "ref.safetensors")
    stored, provenance = load_statistics(tmp_path / "ref.safetensors", x.provenance)
    assert provenance == y.provenance
    against_stored = score(x, stored)
    assert against_stored.frechet == pytest.approx(score(x, y).frechet, rel=1e-6) and against_stored.kernel is None
    with pytest.raises(ValueError, match="different Inception weights"):
        load_statistics(tmp_path / "ref.safetensors", features_of(x.values, digest="other").provenance)
    mean, covariance = stored.mean.numpy(), stored.covariance.numpy()
    np.savez(tmp_path / "published.npz", mu=mean, sigma=covariance)
    published, provenance = load_statistics(tmp_path / "published.npz", x.provenance)
    assert provenance is None and score(x, published).frechet == pytest.approx(against_stored.frechet, rel=1e-6)
    np.savez(tmp_path / "wrong.npz", a=mean)
    with pytest.raises(ValueError, match="mu and sigma"):
        load_statistics(tmp_path / "wrong.npz", x.provenance)


def test_evaluate_command(tmp_path, monkeypatch, capsys, colour_network):
    monkeypatch.setenv("DCNGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(evaluate, "load_network", lambda _: colour_network())
    root, generator = tmp_path / "data", np.random.default_rng(0)
    for index in range(40):
        folder = root / f"class{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    generated = generator.integers(0, 200, (30, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "samples.npz", arr_0=generated, arr_1=np.arange(30) % 2)
    output = tmp_path / "scores.json"
    arguments = [str(tmp_path / "samples.npz"), "--data", str(root), "--device", "cpu", "--json", str(output)]
    assert evaluate.main(arguments) == 0
    text = capsys.readouterr().out
    assert "N = 30 generated, 30 reference: 30 pictures, of each class as many as generated" in text
    numbers = json.loads(output.read_text())
    assert numbers["fid"] > 0 and numbers["num_reference"] == 30
    assert numbers["provenance"]["extractor_digest"] == "colours"
    assert evaluate.main([*arguments[:3], "--all-reference", "--device", "cpu"]) == 0
    assert "N differs" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path / "samples.npz")])
