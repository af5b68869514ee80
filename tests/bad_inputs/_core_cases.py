"""Bad inputs of `ldvae_ext.core`: arrays of wrong shapes, types and values, and files that are no decoders."""

from __future__ import annotations

import pickle
from functools import partial

import numpy as np
from scipy import sparse

from ldvae_ext import core
from ldvae_ext.core import LinearDecoder
from tests.bad_inputs._saving_cases import Harmful
from tests.bad_inputs.case import N_GENES, N_LATENT, Case, bad, right

DECODER = "core.LinearDecoder"
Z, X = np.zeros((4, N_LATENT)), np.ones((4, N_GENES))
LIBRARY, CODES = np.full(4, 100.0), np.zeros(4, dtype=np.int64)


def build(**changes):
    """The decoder from its arrays, some of which are others."""
    return lambda b: partial(LinearDecoder.from_arrays, {**b.decoder().to_arrays(), **changes})


def make(**changes):
    given = {
        "weight_gk": np.zeros((2, 1)), "intercept_bg": np.zeros((1, 2)), "genes": ["a", "b"], "batches": ["0"],
        "factors": ["Z_0"], "theta_bg": np.ones((1, 2)),
    }  # fmt: skip
    return lambda b: partial(LinearDecoder, **{**given, **changes})


def use(method, *arguments, **options):
    return lambda b: partial(getattr(b.decoder(), method), *arguments, **options)


def function(name, *arguments, **options):
    return lambda b: partial(getattr(core, name), *arguments, **options)


def of_decoder(name, *arguments, **options):
    return lambda b: partial(getattr(core, name), b.decoder(), *arguments, **options)


def with_file(content):
    """A file that is no decoder; `content` is bytes or writes the file from the decoder."""

    def prepare(b):
        path = b.folder / "decoder.npz"
        if callable(content):
            content(b.decoder(), path)
        else:
            path.write_bytes(content)
        return partial(LinearDecoder.load, path)

    return prepare


def cut(decoder, path):
    decoder.save(path)
    path.write_bytes(path.read_bytes()[:-200])


def objects(decoder, path):
    arrays = decoder.to_arrays()
    np.savez(path, **{**arrays, "genes": np.array([Harmful(path.with_name("harm"))] * N_GENES, dtype=object)})


def one_array(decoder, path):
    with path.open("wb") as file:
        np.save(file, decoder.weight_gk)


def same_genes(result):
    assert result.genes.tolist() == ["<b>$x_1$</b>", "../../etc/passwd\n"]


def save_to(path):
    return lambda b: partial(b.decoder().save, b.folder / path)


NUMBERS = "numbers"
DECODERS = [
    bad(f"{DECODER}.__init__", "loadings of NaN", make(weight_gk=[[np.nan], [0.0]]), ValueError, "`weight_gk`", "finite", "1 of 2"),
    bad(f"{DECODER}.__init__", "loadings of text", make(weight_gk=[["a"], ["b"]]), ValueError, "`weight_gk`", NUMBERS),
    bad(f"{DECODER}.__init__", "complex loadings", make(weight_gk=[[1j], [0.0]]), ValueError, "`weight_gk`", NUMBERS, "complex"),
    bad(f"{DECODER}.__init__", "a vector of loadings", make(weight_gk=[1.0, 2.0]), ValueError, "`weight_gk`", "shape", "(2,)"),
    bad(f"{DECODER}.__init__", "an intercept of other genes", make(intercept_bg=np.zeros((1, 3))), ValueError, "`intercept_bg`", "(None, 2)", "(1, 3)"),
    bad(f"{DECODER}.__init__", "a gene twice", make(genes=["a", "a"]), ValueError, "`genes`", "unique", "'a'"),
    bad(f"{DECODER}.__init__", "a gene that ends with NUL", make(genes=["a", "a\x00"]), ValueError, "`genes`", "NUL", r"'a\x00'"),
    bad(f"{DECODER}.__init__", "fewer names than genes", make(genes=["a"]), ValueError, "`genes`", "2 names", "1"),
    bad(f"{DECODER}.__init__", "no dispersions", make(theta_bg=None), ValueError, "`theta_bg`", "must be given"),
    bad(f"{DECODER}.__init__", "negative dispersions", make(theta_bg=-np.ones((1, 2))), ValueError, "`theta_bg`", "positive", "-1"),
    bad(f"{DECODER}.__init__", "a likelihood that does not exist", make(likelihood="gamma"), ValueError, "`likelihood`", "'nb'", "'gamma'"),
    bad(f"{DECODER}.__init__", "text for the covariates", make(covariates=("age",)), TypeError, "`covariates`", "Covariate", "'age'"),
    right(f"{DECODER}.__init__", "genes with markup and path traversal", make(genes=["<b>$x_1$</b>", "../../etc/passwd\n"]), same_genes),
    bad(f"{DECODER}.from_arrays", "arrays of something else", lambda b: partial(LinearDecoder.from_arrays, {"a": 1}), ValueError, "hold no decoder", "'weight_gk'"),
    bad(f"{DECODER}.from_arrays", "a number", lambda b: partial(LinearDecoder.from_arrays, 3), TypeError, "`arrays`", "mapping", "int"),
    bad(f"{DECODER}.from_arrays", "half of the covariates", build(covariate_names=np.array(["age"])), ValueError, "hold no decoder", "'covariate_levels'"),
    bad(f"{DECODER}.from_arrays", "raw weights of text", build(raw_weight=np.array([["a"]])), ValueError, "`weight`", NUMBERS),
    bad(f"{DECODER}.from_loadings", "loadings of NaN", lambda b: partial(LinearDecoder.from_loadings, [[np.nan]], [0], genes=["a"]), ValueError, "`loadings`", "finite"),
    bad(f"{DECODER}.from_loadings", "loadings of text", lambda b: partial(LinearDecoder.from_loadings, [["a"]], [0], genes=["a"]), ValueError, "`loadings`", NUMBERS),
    bad(f"{DECODER}.from_loadings", "no names of genes", lambda b: partial(LinearDecoder.from_loadings, [[0.0]], [0]), ValueError, "`genes`"),
    bad(f"{DECODER}.from_loadings", "negative counts", lambda b: partial(LinearDecoder.from_loadings, [[1], [2]], counts=-X[:, :2], genes=["a", "b"]), ValueError, "`counts`", "negative"),
    bad(f"{DECODER}.from_loadings", "an AnnData for the counts", lambda b: partial(LinearDecoder.from_loadings, np.eye(N_GENES)[:, :2], counts=b.counts(), genes=b.counts().var_names), TypeError, "`counts`", "AnnData"),
    bad(f"{DECODER}.from_loadings", "neither counts nor an intercept", lambda b: partial(LinearDecoder.from_loadings, [[1], [2]], genes=["a", "b"]), ValueError, "`counts`", "`intercept`"),
    bad(f"{DECODER}.load", "a file that does not exist", lambda b: partial(LinearDecoder.load, b.folder / "none.npz"), FileNotFoundError, "none.npz"),
    bad(f"{DECODER}.load", "a folder", lambda b: partial(LinearDecoder.load, b.folder), IsADirectoryError, "FOLDER"),
    bad(f"{DECODER}.load", "an empty file", with_file(b""), ValueError, "decoder.npz", "LinearDecoder.save"),
    bad(f"{DECODER}.load", "a file of text", with_file(b"not a decoder"), ValueError, "decoder.npz", "LinearDecoder.save"),
    bad(f"{DECODER}.load", "a file that is cut", with_file(cut), ValueError, "decoder.npz", "LinearDecoder.save"),
    bad(f"{DECODER}.load", "a pickle that runs code", with_file(pickle.dumps(Harmful("harm"))), ValueError, "decoder.npz", "LinearDecoder.save"),
    bad(f"{DECODER}.load", "object arrays that run code", with_file(objects), ValueError, "decoder.npz", "LinearDecoder.save"),
    bad(f"{DECODER}.load", "one array for several", with_file(one_array), ValueError, "decoder.npz", "LinearDecoder.save"),
    bad(f"{DECODER}.load", "an archive of other arrays", with_file(lambda d, path: np.savez(path, a=1)), ValueError, "decoder.npz", "hold no decoder"),
    bad(f"{DECODER}.save", "a folder", save_to("."), IsADirectoryError, "FOLDER"),
    bad(f"{DECODER}.save", "a folder that does not exist", save_to("none/decoder.npz"), FileNotFoundError, "FOLDER/none"),
    bad(f"{DECODER}.scale", "latents of another width", use("scale", np.zeros((4, 9)), 0), ValueError, "`z`", "(cells, 3)", "(4, 9)"),
    bad(f"{DECODER}.scale", "a batch that does not exist", use("scale", Z, "b9"), ValueError, "`batch`", "'b9'", "'b1'"),
    bad(f"{DECODER}.scale", "text for the latents", use("scale", "z", 0), ValueError, "`z`", NUMBERS),
    bad(f"{DECODER}.rate", "libraries of other cells", use("rate", Z, 0, library=[1.0, 2.0]), ValueError, "`library`", "4 cells", "2"),
    bad(f"{DECODER}.rate", "text for the library", use("rate", Z, 0, library="big"), ValueError, "`library`", NUMBERS),
    bad(f"{DECODER}.logits", "a code of a batch beyond the last", use("logits", Z, 3), ValueError, "`batch`", "3", "0 to 2"),
    bad(f"{DECODER}.logits", "covariates that the decoder does not have", use("logits", Z, 0, {"age": 3.0}), ValueError, "`covariates`", "'age'"),
    bad(f"{DECODER}.apply_link", "logits of other genes", use("apply_link", np.zeros((4, 2))), ValueError, "`logits_ng`", "30", "(4, 2)"),
    bad(f"{DECODER}.dropout_logits", "a likelihood without dropout", use("dropout_logits", Z, 0), ValueError, "likelihood='zinb'", "'nb'"),
    bad(f"{DECODER}.theta", "a batch that does not exist", lambda b: partial(_by_batch(b).theta, "b9"), ValueError, "`batch`", "'b9'"),
    bad(f"{DECODER}.batch_codes", "a fraction of a batch", use("batch_codes", 0.5, 4), ValueError, "`batch`", "0.5", "'b1'"),
    bad(f"{DECODER}.batch_codes", "fewer batches than cells", use("batch_codes", [0, 1], 4), ValueError, "`batch`", "4 cells", "2"),
    bad(f"{DECODER}.gene_information_error", "errors of other genes", use("gene_information_error", np.ones((2, 3))), ValueError, "`error_gk`", "(30, 3)", "(2, 3)"),
    bad(f"{DECODER}.reordered", "a factor twice", use("reordered", [0, 0, 1]), ValueError, "`order`", "permutation", "0, 0, 1"),
    bad(f"{DECODER}.reordered", "a sign of 2", use("reordered", [0, 1, 2], [1, 2, 1]), ValueError, "`signs`", "[1, 2, 1]"),
    bad(f"{DECODER}.rotated", "axes that depend on each other", use("rotated", np.ones((3, 3)) / np.sqrt(3)), ValueError, "independent"),
    bad(f"{DECODER}.rotated", "axes of NaN", use("rotated", np.full((3, 3), np.nan)), ValueError, "rotation", "finite"),
    bad(f"{DECODER}.rotated", "axes of another size", use("rotated", np.eye(2)), ValueError, "rotation", "(3, 3)", "(2, 2)"),
    bad(f"{DECODER}.with_genes", "a gene that does not exist", use("with_genes", ["gene0", "../../x"]), ValueError, "`genes`", "'../../x'"),
    bad(f"{DECODER}.with_genes", "a gene twice", use("with_genes", ["gene0", "gene0"]), ValueError, "`genes`", "'gene0'"),
    bad(f"{DECODER}.with_genes_in_order", "a gene twice", use("with_genes_in_order", np.zeros(N_GENES, int)), ValueError, "`order`", "permutation"),
    bad(f"{DECODER}.with_batches", "a batch that does not exist", use("with_batches", ["new"], "b9"), ValueError, "b9", "'b1'"),
    bad(f"{DECODER}.with_batches", "a single name for several", use("with_batches", "new"), ValueError, "`batches`", "'new'"),
]  # fmt: skip


def _by_batch(b):
    arrays = b.decoder().to_arrays()
    return LinearDecoder.from_arrays({**arrays, "dispersion": "gene-batch", "theta_bg": np.ones((3, N_GENES))})


ONE = np.ones(2)
PARTS = [
    bad("core.Covariate.__init__", "a level twice", function("Covariate", "donor", ["a", "a"]), ValueError, "donor", "unique", "'a'"),
    bad("core.BatchNorm.__init__", "statistics of other genes", function("BatchNorm", running_mean=ONE, running_var=np.ones(3), gamma=ONE, beta=ONE, eps=0.0), ValueError, "`running_var`", "(2,)", "(3,)"),
    bad("core.BatchNorm.__init__", "negative variances", function("BatchNorm", running_mean=ONE, running_var=-ONE, gamma=ONE, beta=ONE, eps=0.0), ValueError, "`running_var`", "-1"),
    bad("core.RawLinear.__init__", "a bias of other genes", function("RawLinear", weight=np.ones((2, 1)), bias=np.ones(3)), ValueError, "`bias`", "(2,)", "(3,)"),
    bad("core.RawLinear.fold", "more latents than columns", lambda b: partial(core.RawLinear(weight=np.ones((2, 1))).fold, 5), ValueError, "`n_latent`", "5", "1"),
    bad("core.RawLinear.from_arrays", "half of a batch norm", lambda b: partial(core.RawLinear.from_arrays, {"weight": np.ones((2, 1)), "gamma": ONE}), ValueError, "'running_mean'"),
    bad("core.Rotation.__init__", "axes that are not of unit length", function("Rotation", matrix_kk=2 * np.eye(2), method="x"), ValueError, "unit length"),
    bad("core.Rotation.__init__", "axes of text", function("Rotation", matrix_kk=[["a"]], method="x"), ValueError, "rotation", NUMBERS),
    bad("core.Rotation.variance", "variances of other latents", lambda b: partial(core.Rotation(matrix_kk=np.eye(2), method="x").variance, np.ones((4, 3))), ValueError, "`variance_nk`", "2", "(4, 3)"),
    bad("core.Rotation.arranged", "a factor beyond the last", lambda b: partial(core.Rotation(matrix_kk=np.eye(2), method="x").arranged, [0, 9], 1), ValueError, "`order`", "permutation", "0, 9"),
    bad("core.AdditivePrograms.__init__", "scales of other genes", function("AdditivePrograms", np.ones((3, 2)) / 3, np.ones(2), 1.0, 1.0), ValueError, "`scale_g`", "(3,)", "(2,)"),
    bad("core.AdditivePrograms.usages", "expression of other genes", lambda b: partial(_programs().usages, np.ones((4, 9))), ValueError, "`expression_ng`", "3", "(4, 9)"),
    bad("core.AdditivePrograms.usages", "expression of NaN", lambda b: partial(_programs().usages, np.full((4, 3), np.nan)), ValueError, "`expression_ng`", "finite"),
    bad("core.AdditivePrograms.arranged", "a program beyond the last", lambda b: partial(_programs().arranged, [0, 9]), ValueError, "`order`", "permutation", "0, 9"),
    bad("core.AdditivePrograms.match", "programs of other genes", lambda b: partial(_programs().match, core.AdditivePrograms(np.ones((2, 1)) / 2, ONE, 1.0, 1.0)), ValueError, "`other`", "3", "2"),
    bad("core.SlopeSums.__init__", "a negative number of genes", function("SlopeSums", -1, 2), ValueError, "`n_genes`", "-1"),
    bad("core.SlopeSums.add", "usages of other cells", lambda b: partial(core.SlopeSums(2, 1).add, np.ones((4, 2)), np.ones((3, 1))), ValueError, "`usage_nk`", "(4, 1)", "(3, 1)"),
    bad("core.LoadingInformation.__init__", "a path for the decoder", function("LoadingInformation", "decoder.npz"), TypeError, "`decoder`", "str"),
    bad("core.LoadingInformation.errors", "a negative number of cells", lambda b: partial(core.LoadingInformation(b.decoder()).errors, -1), ValueError, "`n_cells`", "-1"),
]  # fmt: skip


def _programs():
    return core.AdditivePrograms(np.array([[0.5, 0], [0.5, 0], [0, 1]]), np.ones(3), 10.0, 1.0)


NAN_K = np.full((4, N_LATENT), np.nan)
FUNCTIONS = [
    bad("core.ablation_effects", "counts of other genes", of_decoder("ablation_effects", np.ones((4, 9)), Z, LIBRARY, CODES, 0, [0]), ValueError, "`x`", "(4, 30)", "(4, 9)"),
    bad("core.ablation_effects", "a factor beyond the last", of_decoder("ablation_effects", X, Z, LIBRARY, CODES, 0, [9]), ValueError, "`factors`", "9", "0 to 2"),
    bad("core.ablation_effects", "a factor before the first", of_decoder("ablation_effects", X, Z, LIBRARY, CODES, 0, [-9]), ValueError, "`factors`", "-9", "0 to 2"),
    bad("core.ablation_effects", "a value of each of other latents", of_decoder("ablation_effects", X, Z, LIBRARY, CODES, [1.0, 2.0], [0]), ValueError, "`value`", "(4, 3)", "(2,)"),
    bad("core.ablation_effects", "libraries of other cells", of_decoder("ablation_effects", X, Z, LIBRARY[:2], CODES, 0, [0]), ValueError, "`library_n`", "4 cells", "2"),
    bad("core.ablation_effects", "a path for the decoder", function("ablation_effects", "decoder.npz", X, Z, LIBRARY, CODES, 0, [0]), TypeError, "`decoder`", "str"),
    bad("core.consensus_loadings", "no loadings", function("consensus_loadings", []), ValueError, "`loadings`", "at least one"),
    bad("core.consensus_loadings", "loadings of other genes", function("consensus_loadings", [np.eye(3), np.eye(2)]), ValueError, "`loadings`", "(2, 2)"),
    bad("core.consensus_loadings", "loadings of NaN", function("consensus_loadings", [np.full((2, 2), np.nan)]), ValueError, "`loadings`", "finite"),
    bad("core.consensus_loadings", "more factors than there are", function("consensus_loadings", [np.eye(3)], 9), ValueError, "`n_factors`", "9", "3"),
    bad("core.fit_programs", "negative expression", function("fit_programs", -X, np.ones(N_GENES), 2), ValueError, "`expression_ng`", "negative"),
    bad("core.fit_programs", "expression of NaN", function("fit_programs", X * np.nan, np.ones(N_GENES), 2), ValueError, "`expression_ng`", "finite"),
    bad("core.fit_programs", "scales of other genes", function("fit_programs", X, ONE, 2), ValueError, "`scale_g`", "(30,)", "(2,)"),
    bad("core.fit_programs", "no programs", function("fit_programs", X, np.ones(N_GENES), 0), ValueError, "`n_programs`", "0"),
    bad("core.information_ledger", "variances of other cells", function("information_ledger", Z, np.ones((3, 3))), ValueError, "`variance_nk`", "(4, 3)", "(3, 3)"),
    bad("core.information_ledger", "means of NaN", function("information_ledger", NAN_K, np.ones((4, 3))), ValueError, "`mean_nk`", "finite"),
    bad("core.information_ledger", "means of text", function("information_ledger", [["a"]], [[1.0]]), ValueError, "`mean_nk`", NUMBERS),
    bad("core.information_ledger", "a negative seed", function("information_ledger", Z + 1, np.ones((4, 3)), seed=-1), ValueError, "`seed`", "-1"),
    bad("core.kl_per_dimension", "variances of other cells", function("kl_per_dimension", np.ones((4, 3)), np.ones((3, 3))), ValueError, "`variance_nk`", "(4, 3)", "(3, 3)"),
    bad("core.kl_per_dimension", "negative variances", function("kl_per_dimension", np.ones((4, 3)), -np.ones((4, 3))), ValueError, "`variance_nk`", "negative", "-1"),
    bad("core.kl_per_dimension", "means of text", function("kl_per_dimension", "mean", 1.0), ValueError, "`mean_nk`", NUMBERS),
    bad("core.log_likelihood", "a likelihood that does not exist", function("log_likelihood", "gamma", X, X, 1.0), ValueError, "`likelihood`", "'nb'", "'gamma'"),
    bad("core.log_likelihood", "no dispersion", function("log_likelihood", "nb", X, X), ValueError, "`theta`", "'nb'"),
    bad("core.log_likelihood", "no dropout", function("log_likelihood", "zinb", X, X, 1.0), ValueError, "`dropout_ng`", "'zinb'"),
    bad("core.log_likelihood", "means of other cells", function("log_likelihood", "poisson", X, X[:3]), ValueError, "`mu_ng`", "(4, 30)", "(3, 30)"),
    bad("core.match_columns", "cosines of NaN", function("match_columns", [[np.nan]]), ValueError, "`cosine_kj`", "finite"),
    bad("core.match_columns", "a vector of cosines", function("match_columns", [1.0]), ValueError, "`cosine_kj`", "(1,)"),
    bad("core.path_attribution", "a point of other factors", of_decoder("path_attribution", np.zeros(9), np.zeros(N_GENES), np.zeros(3), np.zeros(N_GENES)), ValueError, "`z_k`", "(3,)", "(9,)"),
    bad("core.path_attribution", "intercepts of other genes", of_decoder("path_attribution", np.zeros(3), np.zeros(9), np.zeros(3), np.zeros(N_GENES)), ValueError, "`offset_g`", "(30,)", "(9,)"),
    bad("core.population_expression", "a population beyond the last", of_decoder("population_expression", Z, 0, [0, 1, 2, 9], 3), ValueError, "`group_n`", "0 to 2", "9"),
    bad("core.population_expression", "a negative number of populations", of_decoder("population_expression", Z, 0, [0, 0, 0, 0], -3), ValueError, "`n_groups`", "-3"),
    bad("core.population_expression", "text for the populations", of_decoder("population_expression", Z, 0, ["a", "b", "a", "b"], 2), ValueError, "`group_n`", "'a'"),
    bad("core.posterior_of", "counts of other genes", of_decoder("posterior_of", np.ones((4, 9)), 0), ValueError, "`x_ng`", "30 genes", "(4, 9)"),
    bad("core.posterior_of", "negative counts", of_decoder("posterior_of", -X, 0), ValueError, "`x_ng`", "negative"),
    bad("core.posterior_of", "counts of text", of_decoder("posterior_of", X.astype(str), 0), ValueError, "`x_ng`", NUMBERS),
    bad("core.posterior_of", "libraries of 0", of_decoder("posterior_of", X, 0, library=0.0), ValueError, "`library`", "positive"),
    bad("core.posterior_of", "a prior that is no covariance", of_decoder("posterior_of", X, 0, prior_covariance_kk=-np.eye(3)), ValueError, "`prior_covariance_kk`", "(3, 3)"),
    bad("core.posterior_of", "a prior of NaN", of_decoder("posterior_of", X, 0, prior_covariance_kk=np.full((3, 3), np.nan)), ValueError, "`prior_covariance_kk`"),
    bad("core.posterior_of", "no steps", of_decoder("posterior_of", X, 0, max_iterations=0), ValueError, "`max_iterations`", "0"),
    bad("core.posterior_of", "text for the tolerance", of_decoder("posterior_of", X, 0, tolerance="low"), ValueError, "`tolerance`", "'low'"),
    bad("core.posterior_of", "no batch", of_decoder("posterior_of", X), ValueError, "`batch`", "'b1'"),
    right("core.posterior_of", "sparse counts with explicit zeros", of_decoder("posterior_of", sparse.csr_array((np.zeros(4), ([0, 1, 2, 3], [0, 1, 2, 3])), shape=(4, N_GENES)), 0), lambda found: np.testing.assert_array_equal(np.isfinite(found.mean_nk), True)),
    bad("core.procrustes", "loadings of other genes", function("procrustes", np.eye(3), np.eye(2)), ValueError, "`b_gj`", "3", "(2, 2)"),
    bad("core.procrustes", "loadings of NaN", function("procrustes", np.eye(2), np.full((2, 2), np.nan)), ValueError, "`b_gj`", "finite"),
    bad("core.program_direction", "a program of other genes", of_decoder("program_direction", np.ones(9) / 9, np.ones(N_GENES) / N_GENES), ValueError, "`profile_g`", "(30,)", "(9,)"),
    bad("core.program_direction", "a mean of zeros", of_decoder("program_direction", np.ones(N_GENES) / N_GENES, np.zeros(N_GENES)), ValueError, "`mean_g`", "positive"),
    bad("core.promax", "a rotation that is not orthogonal", function("promax", np.eye(2), [[1.0, 0.6], [0.0, 0.8]]), ValueError, "`rotation_kk`", "orthogonal"),
    bad("core.promax", "a power below 1", function("promax", np.eye(2), np.eye(2), 0.5), ValueError, "`power`", "0.5"),
    bad("core.promax", "loadings of NaN", function("promax", np.full((2, 2), np.nan), np.eye(2)), ValueError, "`value_gk`", "finite"),
    bad("core.shrink", "errors of 0", function("shrink", np.ones((2, 1)), np.zeros((2, 1))), ValueError, "`error_gk`", "positive"),
    bad("core.shrink", "errors of other genes", function("shrink", np.ones((2, 1)), np.ones((3, 1))), ValueError, "`error_gk`", "(2, 1)", "(3, 1)"),
    bad("core.shrink", "a level of 95", function("shrink", np.ones((2, 1)), np.ones((2, 1)), 95), ValueError, "`level`", "95"),
    bad("core.shrink", "text for the level", function("shrink", np.ones((2, 1)), np.ones((2, 1)), "95 %"), ValueError, "`level`", "'95 %'"),
    bad("core.varimax", "a vector", function("varimax", np.ones(3)), ValueError, "`value_nk`", "(3,)"),
    bad("core.varimax", "values of NaN", function("varimax", np.full((4, 2), np.nan)), ValueError, "`value_nk`", "finite"),
    bad("core.varimax", "a negative number of starts", function("varimax", np.eye(3), n_starts=-1), ValueError, "`n_starts`", "-1"),
    bad("core.within_directions", "a covariance of other factors", of_decoder("within_directions", np.eye(9)), ValueError, "`covariance_kk`", "(3, 3)", "(9, 9)"),
    bad("core.within_directions", "a covariance of NaN", of_decoder("within_directions", np.full((3, 3), np.nan)), ValueError, "`covariance_kk`", "finite"),
]  # fmt: skip

CORE_CASES: list[Case] = [*DECODERS, *PARTS, *FUNCTIONS]
