"""torchmetrics' distances: that they are the printed ones, and that the forms behind the error bars agree with them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

import dcngen
from dcngen.evaluation import frechet_metric
from dcngen.evaluation.features import Features, Provenance
from dcngen.evaluation.metrics import frechet_distance, kernel_distance
from dcngen.evaluation.moments import FeatureStatistics
from dcngen.evaluation.scores import score
from dcngen.evaluation.statistics import KernelSums, closed_frechet_distance

ROOT = Path(dcngen.__file__).parents[1]


@pytest.mark.parametrize(
    ("n", "m", "d", "tolerance"),
    [(300, 200, 24, 1e-9), (2048, 2048, 256, 1e-9), (20, 300, 24, 1e-6), (90, 70, 256, 1e-6)],
)
def test_the_form_behind_the_error_bars_is_the_printed_distance(gaussian_features, n, m, d, tolerance):
    x, y = gaussian_features(n, d, 0), gaussian_features(m, d, 1, shift=0.1)
    printed = frechet_distance(x, y)
    assert closed_frechet_distance(x, y) == pytest.approx(printed, rel=tolerance)
    assert frechet_distance(x, FeatureStatistics.of(y)) == pytest.approx(printed, rel=1e-12)


def test_both_agree_on_inception_features(inception):
    """2048 features of far fewer pictures, where the product of the covariances is singular."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8, generator=generator)
    smooth = torch.nn.functional.interpolate(noise[:, :, :4, :4].float(), 32, mode="bilinear").byte()
    x, y = inception(noise), inception(smooth)
    assert closed_frechet_distance(x, y) == pytest.approx(frechet_distance(x, y), rel=1e-6)
    groups = np.arange(24) % 4
    assert KernelSums(x, y, groups).distance() == pytest.approx(kernel_distance(x, y), rel=1e-9)


def test_kernel_distance_is_all_pairs_and_leaves_the_generator_alone(gaussian_features):
    x, y = gaussian_features(50, 6, 0, shift=0.2), gaussian_features(50, 6, 1)
    before = torch.get_rng_state()
    printed = kernel_distance(x, y)
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(3)
    assert kernel_distance(x, y) == printed
    for groups in (np.zeros(50, dtype=int), np.arange(50) % 7):
        assert KernelSums(x, y, groups).distance() == pytest.approx(printed, rel=1e-9)
    with pytest.raises(ValueError, match="equally many pictures, 2 or more, got 50 and 49"):
        kernel_distance(x, y[1:])


def test_one_picture_is_refused(gaussian_features):
    x = gaussian_features(5, 3, 0)
    for pair in ((x[:1], x), (x, x[:1])):
        with pytest.raises(ValueError, match="at least 2 pictures on each side, got 1"):
            frechet_distance(*pair)


def test_metric_keeps_its_real_side(gaussian_features):
    x, z, y = gaussian_features(60, 8, 0), gaussian_features(60, 8, 2, shift=0.5), gaussian_features(90, 8, 1)
    statistics = FeatureStatistics.of(y)
    metric = frechet_metric(statistics)
    values = []
    for features in (x, z):
        metric.update(features, real=False)
        values.append(float(metric.compute()))
        metric.reset()
    assert values == pytest.approx([frechet_distance(x, y), frechet_distance(z, y)], rel=1e-12)
    metric.update(z, real=True)
    assert torch.equal(statistics.total, y.double().sum(dim=0))


def features_of(values):
    provenance = Provenance("data", len(values), 8, "rule", "colours", values.shape[1], "made up")
    return Features(values, np.zeros(len(values), dtype=int), provenance)


def test_scores_are_what_the_metrics_compute(gaussian_features, monkeypatch):
    x, y = features_of(gaussian_features(60, 6, 0)), features_of(gaussian_features(60, 6, 1))
    honest = score(x, y)
    assert honest.frechet == frechet_distance(x.values, y.values)
    assert honest.kernel == kernel_distance(x.values, y.values)
    monkeypatch.setattr(FrechetInceptionDistance, "compute", lambda _: torch.tensor(42.0))
    monkeypatch.setattr(KernelInceptionDistance, "compute", lambda _: (torch.tensor(0.5), torch.tensor(0.0)))
    patched = score(x, y)
    assert (patched.frechet, patched.kernel) == (42.0, 0.5)
    assert patched.frechet_without == honest.frechet_without


def test_unequal_numbers_still_have_a_kernel_distance(gaussian_features):
    x, y = features_of(gaussian_features(60, 6, 0)), features_of(gaussian_features(50, 6, 1))
    for errors in (True, False):
        expected = KernelSums(x.values, y.values, np.zeros(60, dtype=int)).distance()
        assert score(x, y, errors=errors).kernel == pytest.approx(expected, rel=1e-9)


def test_a_metric_on_pictures_gives_the_score_of_their_features(colour_network):
    network, generator = colour_network(), torch.Generator().manual_seed(0)
    real, drawn = (torch.randint(0, top, (40, 3, 8, 8), dtype=torch.uint8, generator=generator) for top in (256, 200))
    metric = FrechetInceptionDistance(feature=network)
    with torch.no_grad():
        metric.update(real, real=True)
        metric.update(drawn, real=False)
        scored = score(features_of(network(drawn)), features_of(network(real)), errors=False)
    assert scored.frechet == pytest.approx(float(metric.compute()), rel=1e-6)  # the metric ends in float32


SHARED_WORK = """
import sys, torch
from accelerate import PartialState
from torchmetrics.image.fid import FrechetInceptionDistance
from dcngen.evaluation import frechet_distance, kernel_distance
state = PartialState(cpu=True)
assert state.num_processes == 2
data = torch.load(sys.argv[1], weights_only=True)
numbers = [frechet_distance(data["x"], data["y"])]
if state.is_main_process:  # alone: nothing may wait for the other process
    numbers.append(kernel_distance(data["x"], data["y"]))
class Flat(torch.nn.Module):
    num_features = 6
    def forward(self, pictures):
        return pictures.double().flatten(1)
metric = FrechetInceptionDistance(feature=Flat())
for side, real in (("x", False), ("y", True)):
    with state.split_between_processes(list(range(len(data[side])))) as share:
        metric.update(data[side][share], real=real)
numbers.append(float(metric.compute()))
torch.save(numbers, f"{sys.argv[1]}.{state.process_index}")
state.wait_for_everyone()
state.destroy_process_group()
"""


def test_two_processes_compute_one_number(gaussian_features, tmp_path):
    x, y = gaussian_features(60, 6, 0), gaussian_features(60, 6, 1)
    torch.save({"x": x, "y": y}, tmp_path / "data")
    (tmp_path / "script.py").write_text(SHARED_WORK)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launch, str(tmp_path / "script.py"), str(tmp_path / "data")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(tmp_path / f"data.{rank}", weights_only=True) for rank in (0, 1))
    assert first[0] == second[0] == pytest.approx(frechet_distance(x, y), rel=1e-9)
    assert first[1] == pytest.approx(kernel_distance(x, y), rel=1e-9)
    assert first[2] == second[1] == pytest.approx(first[0], rel=1e-9)


def test_broken_import_of_torchmetrics_is_told_before_any_work(tmp_path):
    """torch-fidelity without its torchvision makes the whole of torchmetrics fail."""
    information = tmp_path / "site" / "torch_fidelity-0.4.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-fidelity\nVersion: 0.4.0\n")
    (tmp_path / "site" / "torch_fidelity").mkdir()
    (tmp_path / "site" / "torch_fidelity" / "__init__.py").write_text("import torchvision_that_is_absent\n")
    code = "from dcngen.evaluation.metrics import torchmetrics_image; torchmetrics_image()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert "RuntimeError: torchmetrics cannot be imported (ModuleNotFoundError: No module named" in done.stderr
    assert "pip uninstall torch-fidelity" in done.stderr
