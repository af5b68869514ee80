from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

from ldvae_ext import get, pl
from tests.pl.helpers import assert_legible


def test_bars_are_the_kl_of_the_factors_in_the_exported_order(exported):
    adata = exported()
    table = get.factors(adata)
    ax = pl.factor_scree(adata, show=False)
    assert [bar.get_height() for bar in ax.patches] == table["kl"].tolist()
    assert [label.get_text() for label in ax.get_xticklabels()] == table.index.tolist()
    assert table.index.tolist() != sorted(table.index)
    assert "nats" in ax.get_ylabel()


def test_the_line_is_the_share_of_the_kl_up_to_each_factor(exported):
    adata = exported()
    kl = get.factors(adata)["kl"].to_numpy()
    pl.factor_scree(adata, show=False)
    (line,) = plt.gcf().axes[1].lines
    np.testing.assert_allclose(line.get_ydata(), np.cumsum(kl) / kl.sum())
    assert line.get_ydata()[-1] == pytest.approx(1)


@pytest.mark.parametrize("n_latent", [1, 2, 3, 10, 30, 60])
def test_all_labels_are_legible(exported, n_latent):
    assert_legible(pl.factor_scree(exported(n_latent), return_fig=True))
