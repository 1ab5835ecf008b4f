"""Comparisons at tiny size: several runs into one table, and eight schools."""

import json

import numpy as np
import pytest

from avb_jax import UserError
from experiments import compare, eight_schools, mnist
from experiments.configs import eight_schools as eight_schools_config
from experiments.configs import mnist as mnist_config

TINY = {
    "steps": 4, "log_every": 2, "checkpoint_every": 2, "batch_size": 8, "network.channels": 2, "network.kernel_size": 3,
    "network.z_widths": (8,), "network.adversary_features": 4, "data.name": "digits", "data.binarize": "none",
    "contrast.bases": 2, "contrast.widths": (4,), "noise_dim": 2, "noise_draws": 2, "latent_dim": 2, "check_images": 4,
    "evaluation.importance_images": 7, "evaluation.importance_samples": 5,
}  # fmt: skip


def tiny(variant):
    config = mnist_config.get_config(variant)
    config.update_from_flattened_dict(TINY)
    return config


SUITE = compare.Suite(
    mnist.main, tiny, {"avb32_ac": -80.2, "vae32": None}, "vae32",
    {
        "estimators": "elbo,importance,bdmc,ais", "ais.images": 6, "ais.chains": 2, "ais.temperatures": 4,
        "ais.leapfrog_steps": 2, "ais.chunk": 6, "bdmc.images": 3, "elbo.images": 8, "importance.images": 6,
        "importance.samples": 4,
    },
)  # fmt: skip


@pytest.mark.slow
def test_one_table_of_several_runs(tmp_path, capsys):
    rows = compare.compare(SUITE, tmp_path, "", list(SUITE.runs))
    assert set(rows) == {"avb32_ac", "vae32"}
    values = {}
    for run, name in (("avb32_ac", "avb"), ("vae32", "vae")):
        (block,) = (tmp_path / run / "evaluation" / f"{name}-0" / "ais").glob("*.npz")
        values[run] = np.load(block)["log_likelihood"]
        np.testing.assert_allclose(rows[run]["log_likelihood_ais"], values[run].mean(), rtol=1e-5)
    difference = values["avb32_ac"] - values["vae32"]
    np.testing.assert_allclose(rows["avb32_ac"]["difference"], difference.mean(), rtol=1e-4)
    np.testing.assert_allclose(rows["avb32_ac"]["difference_error"], difference.std(ddof=1) / np.sqrt(6), rtol=1e-4)
    assert "difference" not in rows["vae32"]
    assert json.loads((tmp_path / "results.json").read_text()).keys() == rows.keys()
    text = (tmp_path / "table.md").read_text()
    assert "-80.2" in text
    assert text.count("(under T)") == 2
    assert len({line.count("|") for line in text.splitlines()}) == 1
    assert (tmp_path / "samples.png").exists()

    capsys.readouterr()
    again = compare.compare(SUITE, tmp_path, "", list(SUITE.runs))
    assert "avb: finished at step 4 of 4" in capsys.readouterr().err
    np.testing.assert_equal(again, rows)


def test_unknown_runs_are_refused(tmp_path):
    with pytest.raises(UserError, match="--runs=avb9: must be among avb32_ac, vae32"):
        compare.compare(SUITE, tmp_path, "", ["avb9"])


@pytest.mark.slow
def test_eight_schools_end_to_end(tmp_path, capsys):
    eight_schools.main(eight_schools_config.get_config("smoke"), tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"nuts", "avb", "mean_field", "full_rank"}
    for quantities in results.values():
        assert {"sliced_wasserstein", "kl_knn", "share_tau_positive"} <= set(quantities)
    assert (tmp_path / "figures" / "eight_schools.png").exists()
    assert "NUTS, against itself" in capsys.readouterr().out
