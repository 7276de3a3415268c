"""The parameter counts of the paper-scale pair."""

import json

import pytest

from dcngen.models import params


@pytest.fixture(scope="module")
def counts():
    return params.paper_scale_counts()


def test_kinds_sum_to_the_total(counts):
    for row in counts.values():
        assert row["convolutions"] + row["attention"] + row["rest"] == row["total"]


def test_baseline_is_the_known_network(counts):
    # Stable Diffusion v1's U-Net has the same residual and resampling convolutions: 541,024,960 parameters.
    assert counts["baseline"]["convolutions"] == 541_024_960
    assert counts["baseline"]["total"] == 643_199_364


def test_saving_is_near_the_paper(counts):
    saving = (counts["baseline"]["total"] - counts["dcnv4, 16 channels a group"]["total"]) / 1e6
    assert saving == pytest.approx(params.PAPER_BASELINE - params.PAPER_DCN, rel=0.05)


def test_command_prints_the_table(capsys):
    assert params.main([]) == 0
    text = capsys.readouterr().out
    assert "643.2" in text and "860 M and 566 M" in text


def test_command_counts_a_saved_model(tmp_path, capsys, make_unet):
    model = make_unet()
    model.save_pretrained(tmp_path)
    assert params.main([str(tmp_path), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)[str(tmp_path)]
    assert row["total"] == sum(p.numel() for p in model.parameters())
    assert (row["dcnv4 convolutions"], row["dcnv4 attentions"]) == (16, 4)
