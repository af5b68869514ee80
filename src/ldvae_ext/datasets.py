"""Example data: real counts from scanpy, and simulated counts with a known decoder."""

from __future__ import annotations

import warnings
from typing import Literal, overload

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from ldvae_ext._keys import SIMULATED_LATENT, SIMULATED_PROGRAM, SIMULATED_USAGE
from ldvae_ext._validate import check_number, check_one_of, check_positive_int
from ldvae_ext.core import LinearDecoder

__all__ = ["pbmc68k", "simulate"]

# The log-counts were rounded to three decimals.
_ROUNDING = 0.5e-3
# Standard deviation of a simulated latent within a population; the means of populations have standard deviation 1.
_SPREAD = 0.5
_ADDITIVE = ("additive", "identity-activity")


def pbmc68k() -> AnnData:
    """Raw counts of 700 peripheral blood cells, recovered from scanpy's ``pbmc68k_reduced``.

    The data set that scanpy ships (Zheng et al. 2017, 10.1038/ncomms14049) holds log1p of counts per 10,000, rounded to
    three decimals. With the cell's total ``n_counts``, ``expm1(x) * n_counts / 1e4`` is an integer up to that rounding,
    so the counts are recovered exactly; both are checked.

    Returns
    -------
    700 cells x 765 genes. ``X``: counts, CSR float32. ``obs``: as in scanpy, with the labels ``bulk_labels``.

    Raises
    ------
    RuntimeError
        If a value is farther from an integer than rounding explains, as in another version of the data set.

    Examples
    --------
    >>> cells = ldvae_ext.datasets.pbmc68k()
    >>> cells.shape
    (700, 765)
    >>> cells.obs["bulk_labels"].nunique()
    10
    """
    import scanpy as sc

    with warnings.catch_warnings():
        # Reading a file of an old format warns.
        warnings.simplefilter("ignore")
        reduced = sc.datasets.pbmc68k_reduced()
    raw = reduced.raw.to_adata()
    log_counts = sparse.csr_matrix(raw.X).astype(np.float64)
    per_count = np.repeat(raw.obs["n_counts"].to_numpy(dtype=np.float64) / 1e4, np.diff(log_counts.indptr))
    exact = np.expm1(log_counts.data) * per_count
    counts = np.rint(exact)
    tolerance = np.exp(log_counts.data) * per_count * _ROUNDING * 1.05
    if (np.abs(exact - counts) > tolerance).any() or (tolerance >= 0.5).any() or (counts < 1).any():
        msg = "The counts of scanpy's pbmc68k_reduced cannot be recovered: some values are not rounded log-counts."
        raise RuntimeError(msg)
    recovered = sparse.csr_matrix(
        (counts.astype(np.float32), log_counts.indices, log_counts.indptr), shape=log_counts.shape
    )
    return AnnData(X=recovered, obs=raw.obs.copy(), var=pd.DataFrame(index=raw.var_names.copy()))


@overload
def simulate(
    n_cells: int = ...,
    n_genes: int = ...,
    n_latent: int = ...,
    *,
    kind: Literal["log-linear"] = ...,
    n_batches: int = ...,
    n_populations: int = ...,
    specific_program: bool = ...,
    likelihood: str = ...,
    median_library: float = ...,
    theta: float = ...,
    dropout: float = ...,
    seed: int = ...,
) -> tuple[AnnData, LinearDecoder]: ...


@overload
def simulate(
    n_cells: int = ...,
    n_genes: int = ...,
    n_latent: int = ...,
    *,
    kind: Literal["additive", "identity-activity"],
    likelihood: str = ...,
    median_library: float = ...,
    theta: float = ...,
    dropout: float = ...,
    seed: int = ...,
) -> tuple[AnnData, None]: ...


def simulate(
    n_cells: int = 1000,
    n_genes: int = 300,
    n_latent: int = 5,
    *,
    kind: Literal["log-linear", "additive", "identity-activity"] = "log-linear",
    n_batches: int = 1,
    n_populations: int = 1,
    specific_program: bool = False,
    likelihood: str = "nb",
    median_library: float = 500.0,
    theta: float = 5.0,
    dropout: float = 0.2,
    seed: int = 0,
) -> tuple[AnnData, LinearDecoder | None]:
    """Counts from a known linear decoder, or from additive gene programs.

    With ``kind="additive"`` a cell's expression is a mixture of ``n_latent`` profiles, whose shares are drawn from a
    Dirichlet distribution with parameter 0.3. With ``"identity-activity"``, as in the simulation of Kotliar et al. (2019,
    10.7554/eLife.43803), each cell has one of ``n_latent - 1`` identity profiles, and two fifths of the cells of the first half of
    these types spend a share of 0.1 to 0.7 on the last profile, an activity; in each profile 5 % of the genes are raised about 4.5-fold.
    The other arguments of populations and batches are for ``"log-linear"``, which is described below.

    Each factor is a sparse program: a tenth of the genes have loadings, most of them positive. Latents are standard
    normal and library sizes log-normal. Genes differ in abundance, and batches in small offsets of all genes.

    Populations have equal sizes, and each is in all batches. They differ in the means of the latents, which are standard
    normal; within a population a latent has standard deviation 0.5. With ``specific_program`` the last latent is different:
    it varies only in the first population, with mean 0 and standard deviation 1, and is 0 in all other cells. No other
    factor has loadings in its genes.

    Parameters
    ----------
    n_cells, n_genes, n_latent, n_batches
        Sizes.
    kind
        ``"log-linear"``, ``"additive"`` or ``"identity-activity"``.
    n_populations
        Number of populations. With 1, the latents of all cells are standard normal.
    specific_program
        True if the last factor is a program of the first population. Needs at least two populations and two factors, and
        enough genes in which the other factors have no loadings.
    likelihood
        ``"nb"``, ``"zinb"`` or ``"poisson"``.
    median_library
        Median counts of a cell.
    theta
        Inverse dispersion of all genes, in counts.
    dropout
        Probability of an additional zero, under ``"zinb"``.
    seed
        Seed of the generator; the same call gives the same data.

    Returns
    -------
    The AnnData (``X``: CSR float32 counts; ``obs["batch"]``; ``obs["population"]`` if there are several, categorical:
    ``"population_0"``, ...; ``obsm["z_true"]``) and the decoder that generated it. Its expected expression is
    ``decoder.scale(adata.obsm["z_true"], adata.obs["batch"])``. For the additive kinds ``obsm["usage_true"]`` holds the shares of the
    programs and ``varm["program_true"]`` their profiles, which sum to one, ``obs`` has no columns, and None takes
    the place of the decoder.

    Raises
    ------
    ValueError
        If a number is out of range, or ``specific_program`` lacks populations, factors or genes.

    Examples
    --------
    >>> cells, truth = ldvae_ext.datasets.simulate(200, 50, n_latent=3, n_batches=2)
    >>> cells.shape, truth.weight_gk.shape
    ((200, 50), (50, 3))
    >>> expression = truth.scale(cells.obsm["z_true"], cells.obs["batch"])
    """
    for name, value in (
        ("n_cells", n_cells),
        ("n_genes", n_genes),
        ("n_latent", n_latent),
        ("n_batches", n_batches),
        ("n_populations", n_populations),
    ):
        check_positive_int(name, value)
    for name, value in (("n_populations", n_populations), ("n_latent", n_latent)):
        if specific_program and value < 2:
            msg = f"`{name}` must be at least 2 for a program of one population; got {value!r}."
            raise ValueError(msg)
    check_one_of("likelihood", likelihood, ("nb", "zinb", "poisson"))
    for name, number, most in (
        ("theta", theta, np.inf),
        ("median_library", median_library, np.inf),
        ("dropout", dropout, 1),
    ):
        check_number(name, number)
        if not 0 < number < most:
            msg = f"`{name}` must be above 0{' and below 1' if most == 1 else ' and finite'}; got {number!r}."
            raise ValueError(msg)
    check_positive_int("seed", seed, least=0)
    check_one_of("kind", kind, ("log-linear", *_ADDITIVE))
    rng = np.random.default_rng(seed)
    if kind in _ADDITIVE:
        if n_batches > 1 or n_populations > 1 or specific_program:
            msg = f"`kind={kind!r}` has no `n_batches`, `n_populations` and `specific_program`; they belong to 'log-linear'."
            raise ValueError(msg)
        if n_latent < 2:
            msg = f"`n_latent` must be at least 2 for `kind={kind!r}`; got {n_latent!r}."
            raise ValueError(msg)
        usage_nk, profile_gk = _additive(rng, kind, n_cells, n_genes, n_latent)
        rate_ng = usage_nk @ profile_gk.T
        rate_ng *= (median_library * np.exp(rng.normal(0, 0.3, n_cells)))[:, None]
        adata = _counted(rng, rate_ng, likelihood, theta, dropout)
        adata.obsm[SIMULATED_USAGE], adata.varm[SIMULATED_PROGRAM] = usage_nk, profile_gk
        return adata, None
    weight_gk = _programs(rng, n_genes, n_latent, last_is_disjoint=specific_program)
    intercept_bg = rng.normal(0, 1.5, n_genes) + rng.normal(0, 0.2 * (n_batches > 1), (n_batches, n_genes))
    names = [f"batch_{b}" for b in range(n_batches)]
    decoder = LinearDecoder(
        weight_gk=weight_gk,
        intercept_bg=intercept_bg,
        genes=np.array([f"gene_{g}" for g in range(n_genes)]),
        batches=np.array(names),
        factors=np.array([f"Z_{k}" for k in range(n_latent)]),
        likelihood=likelihood,
        theta_bg=None if likelihood == "poisson" else np.full((1, n_genes), theta),
        dropout_weight_gk=np.zeros_like(weight_gk) if likelihood == "zinb" else None,
        dropout_intercept_bg=np.full_like(intercept_bg, np.log(dropout / (1 - dropout)))
        if likelihood == "zinb"
        else None,
    )
    z_nk = rng.normal(size=(n_cells, n_latent))
    if n_populations > 1:
        population_n = rng.permutation(np.arange(n_cells) % n_populations)
        mean_pk = rng.normal(size=(n_populations, n_latent))
        shared = slice(n_latent - specific_program)
        z_nk[:, shared] = mean_pk[population_n, shared] + _SPREAD * z_nk[:, shared]
        z_nk[population_n > 0, shared.stop :] = 0
    batch_n = np.arange(n_cells) % n_batches
    rate_ng = decoder.rate(z_nk, batch_n, library=median_library * np.exp(rng.normal(0, 0.3, n_cells)))
    adata = _counted(rng, rate_ng, likelihood, theta, dropout)
    adata.obs["batch"] = pd.Categorical.from_codes(batch_n.tolist(), categories=pd.Index(names))
    if n_populations > 1:
        adata.obs["population"] = pd.Categorical.from_codes(
            population_n, categories=pd.Index([f"population_{p}" for p in range(n_populations)])
        )
    adata.obsm[SIMULATED_LATENT] = z_nk
    return adata, decoder


def _counted(rng: np.random.Generator, rate_ng: np.ndarray, likelihood: str, theta: float, dropout: float) -> AnnData:
    """Counts with given means."""
    if likelihood != "poisson":
        rate_ng = rng.gamma(theta, rate_ng / theta)
    counts = rng.poisson(rate_ng).astype(np.float32)
    if likelihood == "zinb":
        counts[rng.random(counts.shape) < dropout] = 0
    return AnnData(
        X=sparse.csr_matrix(counts),
        obs=pd.DataFrame(index=[f"cell_{n}" for n in range(len(counts))]),
        var=pd.DataFrame(index=[f"gene_{g}" for g in range(counts.shape[1])]),
    )


def _additive(
    rng: np.random.Generator, kind: str, n_cells: int, n_genes: int, n_programs: int
) -> tuple[np.ndarray, np.ndarray]:
    """Shares of programs in cells, (cells, programs), and profiles, (genes, programs), whose columns sum to one."""
    abundance_g1 = np.exp(rng.normal(0, 1.3, (n_genes, 1)))
    if kind == "additive":
        profile_gk = abundance_g1 * rng.gamma(0.3, 1.0, (n_genes, n_programs))
        usage_nk = rng.dirichlet(np.full(n_programs, 0.3), n_cells)
        return usage_nk, profile_gk / profile_gk.sum(axis=0)
    is_raised_gk = rng.random((n_genes, n_programs)) < 0.05
    profile_gk = abundance_g1 * np.where(is_raised_gk, np.exp(np.abs(rng.normal(1.5, 0.5, is_raised_gk.shape))), 1.0)
    type_n = rng.integers(0, n_programs - 1, n_cells)
    is_active_n = (rng.random(n_cells) < 0.4) & (type_n < n_programs // 2)
    usage_nk = np.eye(n_programs)[type_n]
    share_n1 = (rng.uniform(0.1, 0.7, n_cells) * is_active_n)[:, None]
    usage_nk = usage_nk * (1 - share_n1)
    usage_nk[:, -1:] = share_n1
    return usage_nk, profile_gk / profile_gk.sum(axis=0)


def _programs(rng: np.random.Generator, n_genes: int, n_latent: int, *, last_is_disjoint: bool) -> np.ndarray:
    """Sparse loadings, shape (genes, latents); with ``last_is_disjoint`` the last factor shares no gene with the others."""
    n_program = max(1, n_genes // 10)
    weight_gk = np.zeros((n_genes, n_latent))
    for k in range(n_latent):
        allowed = np.arange(n_genes)
        if last_is_disjoint and k == n_latent - 1:
            allowed = allowed[~weight_gk.any(axis=1)]
            if len(allowed) < n_program:
                msg = (
                    f"`specific_program=True` needs {n_program} genes in which the other factors have no loadings; "
                    f"{len(allowed)} of {n_genes} genes are left with {n_latent} factors."
                )
                raise ValueError(msg)
        genes = rng.choice(allowed, n_program, replace=False)
        weight_gk[genes, k] = rng.gamma(4.0, 0.25, n_program) * np.where(rng.random(n_program) < 0.8, 1, -1)
    return weight_gk
