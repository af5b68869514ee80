"""Every argument of the constructor does something, or says why not."""

from __future__ import annotations

import inspect
import warnings

import numpy as np
import pytest
import scvi
import torch
from scvi.model import LinearSCVI
from torch.nn.functional import softplus

from ldvae_ext.model import LDVAE
from ldvae_ext.module import LDVAEModule
from tests.helpers import counts, untrained
from tests.reference import covariate_counts, network64, setup_arguments

# Arguments of the network that the registered data decide.
OF_DATA = {
    "n_input": 21,
    "n_batch": 4,
    "n_labels": 3,
    "n_continuous_cov": 1,
    "n_cats_per_cov": [2],
    "use_size_factor_key": True,
    "library_log_means": np.ones((1, 3)),
    "library_log_vars": np.full((1, 3), 2.0),
}
# What to change each argument to, and with what other arguments it matters.
CHANGES = {
    "n_hidden": (9, {}),
    "n_latent": (3, {}),
    "n_layers_encoder": (2, {}),
    "dropout_rate": (0.5, {}),
    "dispersion": ("gene-batch", {}),
    "log_variational": (False, {}),
    "gene_likelihood": ("zinb", {}),
    "use_batch_norm": (False, {"bias": "auto"}),
    "bias": (True, {"use_batch_norm": False}),
    "latent_distribution": ("ln", {}),
    "use_observed_lib_size": (True, {}),
    "encode_covariates": (True, {}),
    "deeply_inject_covariates": (False, {"encode_covariates": True, "n_layers_encoder": 2}),
    "batch_representation": ("embedding", {}),
    "use_layer_norm": ("encoder", {}),
    "extra_payload_autotune": (True, {}),
    "var_activation": (softplus, {}),
    "extra_encoder_kwargs": ({"activation_fn": torch.nn.Tanh}, {}),
    "batch_embedding_kwargs": ({"embedding_dim": 2}, {"batch_representation": "embedding"}),
}
# Arguments that must be left alone, and why.
REFUSED = {"extra_decoder_kwargs": ({"n_layers": 2}, "the linear decoder has none")}

BASE = {
    "n_input": 20,
    "n_batch": 3,
    "n_labels": 2,
    "n_continuous_cov": 2,
    "n_cats_per_cov": [3, 1],
    "n_hidden": 8,
    "n_latent": 4,
    "library_log_means": np.full((1, 3), 4.0),
    "library_log_vars": np.ones((1, 3)),
}


def minibatch(module, n_cells=12):
    """Cells that any module can read, the same ones for the same sizes."""
    generator = torch.Generator().manual_seed(0)

    def codes(n_codes):
        return torch.arange(n_cells).reshape(-1, 1) % max(1, n_codes)

    return {
        "X": torch.poisson(torch.full((n_cells, module.n_input), 3.0), generator=generator),
        "batch": codes(module.n_batch),
        "labels": codes(module.n_labels),
        "extra_continuous_covs": torch.randn(n_cells, 2, generator=generator)[:, : module.n_continuous_cov],
        "extra_categorical_covs": torch.cat([codes(n) for n in (*module.n_cats_per_cov, 1)], dim=1)[:, :-1],
        "size_factor": torch.rand(n_cells, 1, generator=generator) + 0.5,
    }


def fingerprint(module, *, same_parameters=False):
    """What a module is and says: parameters, posterior, loss in training mode, what the loss carries.

    With ``same_parameters`` those are set to values that depend on their size alone, so that a difference is one of the
    network, not of the random numbers that it drew.
    """
    tensors = minibatch(module)
    if same_parameters:
        with torch.no_grad():
            for value in module.parameters():
                value.copy_(torch.sin(torch.arange(value.numel())).reshape(value.shape) / 2)
    posterior = module.eval().posterior(tensors)
    torch.manual_seed(1)
    _, _, losses = module.train()(tensors)
    out = {f"state {name}": value for name, value in module.state_dict().items()}
    out |= dict(zip(posterior._fields, posterior))
    out |= {f"extra {name}": value for name, value in losses.extra_metrics.items()}
    out |= {"loss": losses.loss, "kl": losses.kl_local["kl_divergence_z"]}
    return {name: value.detach().numpy().copy() for name, value in out.items()}


def differ(a, b):
    return {n for n in a.keys() | b.keys() if n not in a or n not in b or not np.array_equal(a[n], b[n])}


def make_module(**kwargs):
    torch.manual_seed(0)
    return LDVAEModule(**{**BASE, **kwargs})


def make_model(**kwargs):
    adata = covariate_counts(n_batches=3)
    LDVAE.setup_anndata(adata, **setup_arguments("both", labels=True))
    scvi.settings.seed = 0
    return LDVAE(adata, **{"n_hidden": 8, "n_latent": 4, **kwargs})


def arguments_of(cls):
    return {p.name for p in inspect.signature(cls.__init__).parameters.values() if p.kind is not p.VAR_KEYWORD} - {
        "self"
    }


def test_every_argument_has_an_entry():
    assert arguments_of(LDVAEModule) == OF_DATA.keys() | CHANGES.keys() | REFUSED.keys()
    # `n_layers` is the network's `n_layers_encoder`; test_where_the_data_come_from speaks of the first two.
    own = (arguments_of(LDVAE) - {"adata", "registry", "n_layers"}) | {"n_layers_encoder"}
    assert own <= CHANGES.keys()


@pytest.mark.parametrize("argument", [*CHANGES, *OF_DATA])
def test_each_argument_of_the_network_changes_it(argument):
    changed, base = CHANGES.get(argument, (OF_DATA.get(argument), {}))
    if argument == "n_labels":
        base = {"dispersion": "gene-label"}
    if argument == "n_batch":
        base = {"library_log_means": np.zeros((1, 4)), "library_log_vars": np.ones((1, 4))}
    default = inspect.signature(LDVAEModule).parameters[argument].default
    assert not np.array_equal(changed, base.get(argument, BASE.get(argument, default))), "this would be no change"
    reference = fingerprint(make_module(**base), same_parameters=True)
    again = fingerprint(make_module(**base), same_parameters=True)
    assert not differ(reference, again), "the comparison itself must be exact"
    other = fingerprint(make_module(**{**base, argument: changed}), same_parameters=True)
    assert differ(reference, other) > set()


@pytest.mark.grid(1)
@pytest.mark.parametrize("argument", CHANGES)
def test_each_argument_of_the_model_reaches_its_network(argument):
    changed, base = CHANGES[argument]
    name = {"n_layers_encoder": "n_layers"}.get(argument, argument)
    base = {{"n_layers_encoder": "n_layers"}.get(key, key): value for key, value in base.items()}
    reference = make_model(**base)
    assert not differ(fingerprint(reference.module), fingerprint(make_model(**base).module))
    model = make_model(**base, **{name: changed})
    assert differ(fingerprint(reference.module), fingerprint(model.module)) > set()
    assert model.init_params_ != reference.init_params_


def test_where_the_data_come_from():
    model = make_model()
    other = counts(n_cells=30, n_genes=7)
    LDVAE.setup_anndata(other)
    assert LDVAE(other).module.n_input == 7
    bare = LDVAE(registry=model.registry, n_hidden=8, n_latent=4)
    assert bare.adata is None
    assert bare.module.state_dict().keys() == model.module.state_dict().keys()
    np.testing.assert_array_equal(bare.module.library_log_means, 0)
    assert (model.module.library_log_means > 1).all()


@pytest.mark.parametrize("argument", OF_DATA)
def test_what_the_data_decide_is_refused(argument):
    with pytest.raises(TypeError, match=f"'{argument}': the registered data decide; see `setup_anndata`"):
        make_model(**{argument: OF_DATA[argument]})


@pytest.mark.parametrize("argument", ["use_batchnorm", "n_layers_encoder", "n_layers_decoder", "kl_weight"])
def test_unknown_arguments_are_refused_with_what_there_is(argument):
    with pytest.raises(TypeError, match=f"LDVAE has no argument '{argument}'; its network takes") as error:
        make_model(**{argument: 1})
    arguments = arguments_of(LDVAEModule) - OF_DATA.keys() - {"n_layers_encoder"}
    assert all(repr(name) in str(error.value) for name in arguments)


@pytest.mark.parametrize("argument", REFUSED)
def test_what_a_linear_decoder_cannot_have_is_refused_with_the_reason(argument):
    value, reason = REFUSED[argument]
    for make in (make_model, make_module):
        with pytest.raises(ValueError, match=reason):
            make(**{argument: value})


@pytest.mark.parametrize("use_layer_norm", ["decoder", "both"])
def test_layer_norm_in_the_decoder_is_refused_with_the_reason(use_layer_norm):
    with pytest.raises(ValueError, match=rf"`use_layer_norm='{use_layer_norm}'`.*is not linear.*'none' and 'encoder'"):
        make_model(use_layer_norm=use_layer_norm)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dispersion": "cell"}, "`dispersion` must be one of 'gene', .*; got 'cell'"),
        ({"gene_likelihood": "gamma"}, "`gene_likelihood` must be one of 'nb', .*; got 'gamma'"),
        ({"latent_distribution": "beta"}, "`latent_distribution` must be one of 'normal', 'ln'; got 'beta'"),
        ({"batch_representation": "hash"}, "`batch_representation` must be one of 'one-hot', 'embedding'; got 'hash'"),
        ({"use_batch_norm": "all"}, "`use_batch_norm` must be one of True, False, 'both', .*; got 'all'"),
        ({"use_layer_norm": "all"}, "`use_layer_norm` must be one of 'none', 'encoder'; got 'all'"),
        ({"bias": "yes"}, "`bias` must be True, False or 'auto'; got 'yes'"),
        ({"batch_embedding_kwargs": {"embedding_dim": 2}}, "only of use with `batch_representation='embedding'`"),
    ],
)
def test_values_that_nothing_can_have_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model(**arguments)


class TestBatchNorm:
    @pytest.mark.parametrize(("old", "new"), [(True, "both"), (False, "encoder")])
    def test_true_and_false_are_the_strings(self, old, new):
        assert not differ(
            fingerprint(make_model(use_batch_norm=old).module), fingerprint(make_model(use_batch_norm=new).module)
        )

    @pytest.mark.parametrize(
        ("use_batch_norm", "encoder", "decoder"),
        [("both", True, True), ("encoder", True, False), ("decoder", False, True), ("none", False, False)],
    )
    def test_is_where_it_was_asked_for(self, use_batch_norm, encoder, decoder):
        module = make_model(use_batch_norm=use_batch_norm).module

        def has(part):
            return any(isinstance(layer, torch.nn.BatchNorm1d) for layer in part.modules())

        assert (has(module.z_encoder), has(module.l_encoder)) == (encoder, encoder)
        assert (has(module.decoder.factor_regressor), has(module.decoder.px_dropout_decoder)) == (decoder, decoder)

    @pytest.mark.parametrize("use_batch_norm", ["both", "encoder", "decoder", "none"])
    @pytest.mark.parametrize("representation", ["one-hot", "embedding"])
    def test_loadings_are_the_slopes_of_the_network(self, use_batch_norm, representation):
        adata = covariate_counts(n_batches=3)
        setup = setup_arguments("both", labels=True)
        model = untrained(adata, setup=setup, use_batch_norm=use_batch_norm, batch_representation=representation)
        z = np.random.default_rng(0).normal(size=(60, 4))
        loadings = model.get_loadings()
        assert loadings.shape == (20, 4)
        for k in range(4):
            up, down = z.copy(), z.copy()
            up[:, k] += 0.5
            down[:, k] -= 0.5
            slope = (
                network64(model, up, adata.obs, "both", 1).parts["logits"]
                - network64(model, down, adata.obs, "both", 1).parts["logits"]
            )
            np.testing.assert_allclose(slope, np.broadcast_to(loadings.iloc[:, k], (60, 20)), rtol=1e-5, atol=1e-6)


class TestIntercept:
    def expected(self, adata, size_n=None):
        """Log of each gene's share with half a count more, or softplus's argument for its mean per size factor."""
        x = adata.X.toarray().astype(np.float64)
        if size_n is None:
            share = (x.sum(0) + 0.5) / (x.sum() + 0.5 * x.shape[1])
            return np.log(share)
        mean = ((x / size_n[:, None]).sum(0) + 0.5) / len(x)
        return np.where(mean > 30, mean, np.log(np.expm1(np.minimum(mean, 30))))

    def said(self, **kwargs):
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            make_model(**kwargs)
        return [(str(w.message), w.filename) for w in record if "bias" in str(w.message)]

    @pytest.mark.parametrize("use_batch_norm", [False, "encoder", "none"])
    def test_its_lack_is_said_with_the_remedy(self, use_batch_norm):
        ((message, file),) = self.said(use_batch_norm=use_batch_norm)
        assert message.startswith(
            f"`use_batch_norm={use_batch_norm!r}` without `bias` leaves genes without an intercept"
        )
        assert "`bias='auto'`" in message
        assert file == __file__

    @pytest.mark.parametrize("bias", [True, 1, np.True_])
    def test_one_too_many_is_said(self, bias):
        ((message, file),) = self.said(bias=bias)
        assert "`bias=True` before a batch norm does nothing" in message
        assert file == __file__

    @pytest.mark.parametrize("kwargs", [{}, {"bias": "auto"}, {"use_batch_norm": "none", "bias": True}])
    def test_nothing_is_said_otherwise(self, kwargs):
        assert self.said(**kwargs) == []

    def test_is_off_unless_asked_for(self):
        for kwargs, there in (({}, False), ({"bias": 1}, True), ({"bias": True}, True), ({"bias": 0}, False)):
            layer = make_model(use_batch_norm=False, **kwargs).module.decoder.factor_regressor.fc_layers[0][0]
            assert (layer.bias is not None) == there, kwargs

    @pytest.mark.parametrize("use_batch_norm", [True, False])
    @pytest.mark.parametrize("size_factor", [False, True])
    def test_auto_starts_at_the_mean_expression(self, use_batch_norm, size_factor):
        adata = covariate_counts(n_batches=3)
        x = adata.X.tolil()
        x[:, 3] = 0  # never seen
        x[:, 4] = 5000  # where exp overflows in float32
        adata.X = x.tocsr()
        LDVAE.setup_anndata(adata, **setup_arguments(size_factor=size_factor))
        module = LDVAE(adata, use_batch_norm=use_batch_norm, bias="auto").module
        linear, batch_norm = module.decoder.factor_regressor.fc_layers[0][:2]
        assert (linear.bias is None) == use_batch_norm
        got = (batch_norm if use_batch_norm else linear).bias.detach().numpy()
        assert np.isfinite(got).all()
        expected = self.expected(adata, adata.obs["size"].to_numpy() if size_factor else None)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
        dropout = module.decoder.px_dropout_decoder.fc_layers[0]
        assert not np.allclose((dropout[1] if use_batch_norm else dropout[0]).bias.detach(), expected)

    def test_auto_has_the_names_of_a_stock_bias(self):
        adata = counts(n_batches=3)
        model = untrained(adata, bias="auto", use_batch_norm=False)
        LinearSCVI.setup_anndata(adata, batch_key="batch")
        stock = LinearSCVI(adata, n_latent=4, bias=True, use_batch_norm=False)
        stock.module.load_state_dict(model.module.state_dict(), strict=True)
        np.testing.assert_array_equal(stock.module.eval().get_loadings(), model.get_loadings())


def test_arguments_of_the_encoder_have_one_place():
    adata = counts()
    LDVAE.setup_anndata(adata)
    with pytest.raises(ValueError, match="`extra_encoder_kwargs` may not hold 'use_batch_norm'"):
        LDVAE(adata, extra_encoder_kwargs={"use_batch_norm": False})
