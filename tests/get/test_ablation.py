from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from ldvae_ext import get


@pytest.fixture
def ablation():
    return ad.AnnData(
        X=np.array([[1.0, -2.0], [3.0, 0.0], [-1.0, 4.0], [9.0, 9.0]], dtype=np.float32),
        obs=pd.DataFrame(
            {
                "type": pd.Categorical(
                    ["CD4+/CD25 T", "CD4+/CD25 T", "B", None], categories=["B", "CD4+/CD25 T", "none"]
                )
            },
            index=list("abcd"),
        ),
        var=pd.DataFrame(index=["Z_0", "Z_1"]),
    )


def test_groups_are_summarised_and_cells_without_one_left_out(ablation):
    table = get.ablation_df(ablation, "type")
    expected = pd.DataFrame(
        {
            "group": ["B", "B", "CD4+/CD25 T", "CD4+/CD25 T"],
            "factor": ["Z_0", "Z_1"] * 2,
            "n_cells": [1, 1, 2, 2],
            "mean": [-1.0, 4.0, 2.0, -1.0],
            "median": [-1.0, 4.0, 2.0, -1.0],
            "share_helped": [0.0, 1.0, 1.0, 0.0],
        }
    )
    pd.testing.assert_frame_equal(table[list(expected)], expected)
    assert table.loc[table["group"] == "B", ["effect_size", "p_value", "q_value"]].isna().all(axis=None)
    np.testing.assert_allclose(table["effect_size"][2:], [2 / np.sqrt(2), -1 / np.sqrt(2)])


def test_a_missing_or_empty_column_is_named(ablation):
    with pytest.raises(KeyError, match=r"`groupby`: 'cluster' is not a column of `adata.obs`, which has 'type'"):
        get.ablation_df(ablation, "cluster")
    ablation.obs["none"] = pd.Categorical([None] * 4, categories=["x"])
    with pytest.raises(ValueError, match="no cell has a value in 'none'"):
        get.ablation_df(ablation, "none")
