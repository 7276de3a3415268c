import json
import re

import numpy as np
import pytest
import torch
import yaml

from dcngen.data import ImageSet
from dcngen.evaluation import charts
from dcngen.evaluation.comparison import Arm, Comparison, reconstruct
from dcngen.evaluation.repeats import group_repeats
from dcngen.evaluation.report import render, terminal_table, write_report
from dcngen.evaluation.runs import Run, config_differences, require_comparable, unequal_training, unet_flops
from dcngen.evaluation.scores import Scores
from dcngen.evaluation.verdict import judge, judge_repeats


def scores(fid, kid, *, num_images=5000, spread=0.01, offset=0.0):
    """Scores whose leave-one-group-out values wander by ``spread``; arms with one offset wander together."""
    wander = np.sin(np.arange(20.0) + offset)
    return Scores(
        num_images=num_images,
        num_reference=num_images,
        frechet=fid,
        frechet_error=0.1,
        kernel=kid,
        kernel_error=1e-4,
        frechet_infinity=fid - 1 if num_images >= 2048 else None,
        frechet_without=(fid + spread * wander).tolist(),
        kernel_without=(kid + spread * 1e-3 * wander).tolist(),
    )


@pytest.mark.parametrize(
    ("candidate", "outcome", "reason"),
    [
        (scores(18.0, 0.008), "better", "10.0% lower, beyond the 95 % interval over seeds, and KID agrees"),
        (scores(22.0, 0.012), "worse", "10.0% higher"),
        (scores(18.0, 0.008, spread=1.0, offset=2.0), "inconclusive", "includes 0: draw more pictures"),
        (scores(19.8, 0.009), "inconclusive", "training again with another seed"),
        (scores(18.0, 0.012), "inconclusive", "KID says the opposite"),
        (scores(18.0, 0.010), "better", "while the interval of KID's difference includes 0"),
        (scores(18.0, 0.010, num_images=500), "inconclusive", "FID is biased at this number"),
        (scores(18.0, 0.008, num_images=500), "better", "KID agrees"),
    ],
)
def test_verdict_follows_the_rule(candidate, outcome, reason):
    baseline = scores(20.0, 0.010, num_images=candidate.num_images)
    if outcome != "inconclusive" or "draw more pictures" not in reason:
        baseline.kernel_without = (np.array(baseline.kernel_without) + 1e-7 * np.cos(np.arange(20.0))).tolist()
    verdict = judge(baseline, candidate)
    assert (verdict.outcome, reason in verdict.reason) == (outcome, True), verdict.reason
    assert verdict.frechet_difference == pytest.approx(candidate.frechet - 20.0)
    assert verdict.frechet_interval[0] <= verdict.frechet_difference <= verdict.frechet_interval[1]


def test_pairing_removes_what_both_arms_share():
    together = judge(scores(20.0, 0.01, spread=0.5), scores(18.0, 0.008, spread=0.5))
    apart = judge(scores(20.0, 0.01, spread=0.5), scores(18.0, 0.008, spread=0.5, offset=2.0))
    widths = [v.frechet_interval[1] - v.frechet_interval[0] for v in (together, apart)]
    assert widths[0] < 1e-9 < 1 < widths[1]


@pytest.mark.parametrize(
    ("candidate", "outcome", "reason"),
    [
        ([(18.0, 8), (18.1, 8.1), (17.9, 7.9)], "better", "over training seeds, and KID agrees"),
        ([(22.0, 12), (22.1, 12.1)], "worse", "means of 3 and 2 training runs"),
        ([(19.8, 9.8), (19.9, 9.9), (19.85, 9.85)], "better", "0.7% lower"),  # the known scatter decides, not 1.3 %
        ([(18.0, 8), (24.0, 14), (17.0, 7)], "inconclusive", "includes 0: train with more seeds"),
        ([(18.0, 12), (18.1, 12.1), (17.9, 11.9)], "inconclusive", "KID says the opposite"),
        ([(18.0, 8), (18.6, 8.6)], "inconclusive", "8.5% lower, but"),  # two runs, and they scatter more
        ([(18.0, 8)], "inconclusive", "10.0% lower in the mean, but one side was trained once"),
    ],
)
def test_verdict_over_training_seeds(candidate, outcome, reason):
    baseline = [scores(20.0, 10e-3), scores(20.05, 10.05e-3), scores(19.95, 9.95e-3)]
    verdict = judge_repeats(baseline, [scores(fid, kid * 1e-3) for fid, kid in candidate])
    assert (verdict.outcome, reason in verdict.reason) == (outcome, True), verdict.reason
    assert verdict.frechet_difference == pytest.approx(np.mean([fid for fid, _ in candidate]) - 20.0)


@pytest.fixture
def make_run(tmp_path):
    def make(name, **config):
        folder = tmp_path / name
        folder.mkdir()
        base = {"name": name, "seed": 0, "data": {"name": "earth"}, "objective": {"prediction_type": "epsilon"}}
        (folder / "config.yaml").write_text(yaml.safe_dump(base | config))
        (folder / "run.json").write_text(json.dumps({"train_seconds": 3725.0, "device_name": "abacus"}))
        lines = [
            {"step": k, "num_images_seen": 64 * k, "loss": 1 / k, "images_per_second": 100.0 + k} for k in range(1, 60)
        ]
        text = "\n".join(map(json.dumps, lines)) + '\n{"step": 60, "lo'
        (folder / "metrics.jsonl").write_text(text)
        return Run.open(folder)

    return make


def test_run_is_read_whole_even_with_a_torn_last_line(make_run, tmp_path):
    run = make_run("arm", model={"conv_operator": "dcnv4"})
    assert run.name == "arm" and run.data_config.name == "earth" and len(run.metrics) == 59
    assert run.training["num_images_seen"] == 59 * 64 and run.training["train_seconds"] == 3725
    assert run.training["images_per_second"] == 130
    with pytest.raises(FileNotFoundError, match="not a finished run"):
        Run.open(tmp_path / "absent")


def test_differences_leave_bookkeeping_out(make_run):
    runs = [make_run("a", model={"op": "conv"}), make_run("b", model={"op": "dcnv4"}, logging={"steps": 3})]
    assert config_differences(runs) == {"model.op": ["conv", "dcnv4"]}


def test_runs_of_other_data_autoencoder_or_objective_are_refused(make_run):
    runs = [make_run("a"), make_run("b"), make_run("c", objective={"prediction_type": "flow"})]
    assert require_comparable(runs[:2], ["v", "v"], ["d", "d"], allow=False) == []
    for vaes, data, chosen, what in (
        (["v", "w"], ["d", "d"], runs[:2], "autoencoder"),
        (["v", "v"], ["d", "e"], runs[:2], "data set"),
        (["v", "v"], ["d", "d"], runs[::2], "objective"),
    ):
        with pytest.raises(ValueError, match=rf"{what}(.|\n)*--allow-different"):
            require_comparable(chosen, vaes, data, allow=False)
        assert len(require_comparable(chosen, vaes, data, allow=True)) == 1


def test_where_files_lie_does_not_part_training_seeds(make_run):
    runs = [
        make_run("a", seed=0, data={"name": "earth", "cache_dir": None}),
        make_run("b", seed=1, data={"name": "earth", "cache_dir": "/scratch", "source": "/mnt/earth.whl"}),
    ]
    arms = [Arm(run, scores(20.0, 0.01), None, 1, 1, {}) for run in runs]
    assert len(group_repeats(arms)) == 1 and config_differences(runs) == {"seed": [0, 1]}


def test_unequal_training_is_a_warning(make_run, tmp_path):
    runs = [make_run("a"), make_run("b")]
    assert unequal_training(runs) == []
    runs[1].metrics[-1]["num_images_seen"] = 999
    assert "a 3,776, b 999" in unequal_training(runs)[0]
    runs[1].folder = tmp_path / "elsewhere" / "a"  # of the same name
    assert "a 3,776, a 999" in unequal_training(runs)[0]


def test_flops_of_a_known_layer_and_of_dcnv4():
    from dcngen.models import DCNUNet2DModel

    shape = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "norm_num_groups": 8,
    }
    shape |= {"layers_per_block": 1, "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    stock = unet_flops(DCNUNet2DModel(**shape, conv_operator="conv", attention_operator="attention"))
    conv_in_and_out = 2 * 2 * 8 * 8 * 9 * 4 * 16
    assert stock > conv_in_and_out


@pytest.mark.parametrize("fused", [True, False])
def test_flops_count_the_operator_and_its_products(fused):
    from dcngen.nn import DCNv4

    class OneLayer(torch.nn.Module):
        config = {"sample_size": 8}

        def __init__(self, **_):
            super().__init__()
            self.config = type("Config", (dict,), {"sample_size": 8, "in_channels": 32, "num_class_embeds": None})()
            self.layer = DCNv4(32, group=2, fuse_projections=fused)

        def forward(self, sample, timestep, class_labels=None):
            return self.layer(sample.permute(0, 2, 3, 1))

    pixels, offsets_and_masks = 64, 2 * 27 + 2  # padded to a multiple of 8
    products = 2 * pixels * 32 * (32 + offsets_and_masks + 32)
    assert unet_flops(OneLayer()) == products + 8 * 9 * pixels * 32


class Halving(torch.nn.Module):
    """An autoencoder that halves every value, so that a reconstruction is known."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.5))

    def encode(self, x):
        latent = type("Latent", (), {"mode": lambda _: x * self.weight})()
        return type("Encoded", (), {"latent_dist": latent})()

    def decode(self, z):
        return type("Decoded", (), {"sample": z})()


def noise_images(split, n=40):
    pixels = np.random.default_rng(0).integers(0, 256, (n, 3, 8, 8), dtype=np.uint8)
    return ImageSet(pixels, np.arange(n) % 2, ["a<b", "c"], digest="d", name="noise", split=split, provenance="dice")


def test_reconstruction_is_encode_decode_round():
    images = noise_images("held-out")
    out = reconstruct(images, np.array([3, 1]), Halving(), "v", progress=False)
    expected = np.clip(np.round((0.5 * (images.pixels[[3, 1]] / 127.5 - 1) + 1) * 127.5), 0, 255)
    assert np.abs(out.pixels.astype(int) - expected).max() <= 1
    assert out.labels.tolist() == [1, 1]


@pytest.fixture
def comparison(make_run):
    from dcngen.diffusion.plan import SamplePlan

    runs = [make_run("stock"), make_run("deformable", model={"op": "dcnv4"})]
    speed = {"images_per_second": 12.5, "seconds": 3.2, "device": "cpu", "folder": "x"}
    arms = [
        Arm(run, score, noise_images("generated"), 700_000, 33_000_000, speed)
        for run, score in zip(runs, (scores(20.0, 0.01), scores(18.0, 0.008)), strict=True)
    ]
    arms[1].verdict = judge(arms[0].scores, arms[1].scores)
    return Comparison(
        plan=SamplePlan(num_images=40),
        arms=arms,
        floors={"train": scores(2.0, 0.0), "reconstruction": scores(5.0, 0.001)},
        reference=noise_images("held-out"),
        reference_indices=np.arange(40),
        reference_note="40 pictures",
        differences=config_differences(runs),
        warnings=[],
        weights_digest="w" * 64,
        weights_origin="test",
        device="abacus",
        command="python -m dcngen compare stock deformable",
    )


def test_table_and_page_hold_the_numbers(comparison, tmp_path):
    table = terminal_table(comparison)
    assert "stock" in table and "20.00 +- 0.20" in table and "0.70 M" in table and "1 h 02 min" in table
    assert "deformable is BETTER against stock" in table and "autoencoder alone (rFID)" in table
    page, numbers = write_report(comparison, tmp_path / "out" / "report.html")
    content = json.loads(numbers.read_text())
    assert content["arms"][1]["verdict"]["outcome"] == "better" and content["plan"]["num_images"] == 40
    text = page.read_text()
    assert "18.00 &plusmn; 0.20" in text and "model.op" in text and comparison.weights_digest in text


@pytest.fixture
def repeated(comparison, make_run):
    """Three training seeds of the stock arm, two of the other."""
    first, other = comparison.arms
    for seed, fid in ((1, 20.3), (2, 19.8)):
        run = make_run(f"stock{seed}", seed=seed)
        comparison.arms.append(Arm(run, scores(fid, 0.01 + seed * 1e-4), first.samples, 1, 1, first.sampling))
    run = make_run("deformable1", seed=1, model={"op": "dcnv4"})
    comparison.arms.append(Arm(run, scores(18.2, 0.0081), other.samples, 1, 1, other.sampling))
    for arm in comparison.arms[1:]:
        arm.verdict = judge(first.scores, arm.scores)
    comparison.repeats = group_repeats(comparison.arms)
    return comparison


def test_runs_that_differ_in_the_seed_alone_are_judged_together(repeated):
    stock, deformable = repeated.repeats
    assert [arm.name for arm in stock.arms] == ["stock", "stock1", "stock2"] and stock.verdict is None
    assert [arm.name for arm in deformable.arms] == ["deformable", "deformable1"]
    assert deformable.verdict.frechet_difference == pytest.approx(18.1 - 20.033333)
    assert stock.mean("frechet") == pytest.approx((20.033333, 0.6252), rel=1e-4)  # 4.3027 * 0.2517 / sqrt(3)


def test_without_repeated_recipes_arms_are_judged_one_by_one(repeated, make_run):
    stock, deformable = repeated.arms[:2]
    assert group_repeats([stock, deformable]) == []
    assert group_repeats([stock, stock, deformable]) == []  # one run twice is no second seed
    (alone,) = group_repeats([stock, repeated.arms[2]])  # one recipe: a mean, nothing to compare with
    assert len(alone.arms) == 2 and alone.verdict is None
    third = Arm(make_run("third", model={"op": "third"}), deformable.scores, stock.samples, 1, 1, {})
    third.verdict = judge(stock.scores, third.scores)
    groups = group_repeats([stock, third, deformable, repeated.arms[-1]])
    assert [len(group.arms) for group in groups] == [1, 1, 2] and groups[1].verdict is third.verdict
    assert groups[2].verdict.outcome == "inconclusive"  # the baseline's scatter is not known


def test_table_and_page_show_means_over_training_seeds(repeated, tmp_path):
    table = terminal_table(repeated)
    assert "stock, 3 training seeds" in table and "20.03 +- 0.63" in table and "18.10 +- 1.27" in table
    assert table.count("against") == 1
    assert "deformable, 2 training seeds is BETTER against stock, 3 training seeds: FID is 9.7% lower" in table
    page, numbers = write_report(repeated, tmp_path / "report.html")
    deformable = json.loads(numbers.read_text())["repeats"][1]
    assert deformable["runs"] == ["deformable", "deformable1"] and deformable["fid_mean"] == pytest.approx(18.1)
    text = page.read_text()
    assert text.count('class="verdict better"') == 1 and "over training seeds" in text
    assert text.count("<img") == 2 * 3  # classes x (one run a recipe + real)
    assert text.count('class="key arm0"') == 3 + 1 + 1 and 'class="key arm2"' not in text  # rows, mean, pictures


def test_page_is_self_contained_and_escaped(comparison):
    from html.parser import HTMLParser

    class Balanced(HTMLParser):
        void, stack, images = {"meta", "br", "img"}, [], 0

        def handle_starttag(self, tag, attributes):
            attributes = dict(attributes)
            assert not str(attributes.get("src", "data:")).startswith(("http", "/")) and "href" not in attributes
            self.images += tag == "img"
            if tag not in self.void:
                self.stack.append(tag)

        def handle_endtag(self, tag):
            assert self.stack.pop() == tag

    parser = Balanced()
    page = render(comparison)
    parser.feed(page)
    assert parser.stack == [] and parser.images == 2 * 3  # classes x (two arms + real)
    assert "a&lt;b" in page and "a<b" not in page


def test_the_reports_folder_has_a_name_that_a_disk_takes():
    from dcngen.evaluation.cli import default_page

    assert default_page(["/r/a", "/r/b"]).parts[-2] == "compare-a-b"
    many = [f"/r/cifar10_baseline_seed{seed}" for seed in range(30)]
    names = {default_page(many).parts[-2], default_page(many[:-1]).parts[-2]}
    assert len(names) == 2 and max(map(len, names)) < 120 and all("cifar10_baseline_seed0-and-" in n for n in names)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.013, 0.017), (-3, 250_000), (5, 5)])
def test_ticks_are_round_and_enclose(low, high):
    found = charts.ticks(low, high)
    assert found[0] <= low + 1e-9 and found[-1] >= high - 1e-9 and 2 <= len(found) <= 12
    assert np.allclose(np.diff(found), found[1] - found[0])


def test_the_turned_label_is_beside_the_ticks():
    y = np.linspace(0.0625, 0.0131, 50)
    drawn = charts.line_chart([charts.Series("a", np.arange(50.0), y, "arm0")], "pictures seen", "training loss")
    ticks = re.findall(r'<text class="tick" x="([\d.]+)"[^>]*text-anchor="end">([^<]+)<', drawn)
    assert max(len(text) for _, text in ticks) >= 4
    width = 7.7  # of a figure in 12 px DejaVu Sans, a wide face
    assert all(float(x) - width * len(text) > 16 for x, text in ticks)  # the label stands at 12, its letters up to 16


def test_running_mean():
    assert charts.smoothed(np.array([1.0, 3, 5, 7]), 2).tolist() == [1, 2, 4, 6]
