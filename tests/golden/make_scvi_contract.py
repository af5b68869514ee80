"""Record the private functions of scvi-tools and Lightning that the package touches, and write their table for the docs.

`scvi_contract.json` holds a hash of the source of each, for each release. `tests/test_scvi_contract.py` compares the installed
release with it. For a new release:

    python -m tests.golden.make_scvi_contract

adds its hashes, after the differences to the release before have been read and the package has been adapted. Unpacked wheels
of other releases can be given as arguments, such as `scvi-tools==1.5.0=PATH`.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import sys
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
PATH = HERE / "scvi_contract.json"
TABLE = HERE.parents[1] / "docs" / "_static" / "touch_points.md"

# Name -> (why it is touched, what breaks if it changes).
TOUCHED: dict[str, tuple[str, str]] = {
    "scvi.module._vae.VAE.__init__": (
        "`LDVAEModule` calls it instead of `LDVAE.__init__`", "parameters, their order, draws from a seed"),
    "scvi.module._vae.LDVAE.__init__": (
        "`LDVAEModule` builds the same layers in the same order", "LinearSCVI's parameters from a seed"),
    "scvi.module._vae.VAE._get_inference_input": ("`backends.inference` reads the same fields", "encoder inputs"),
    "scvi.module._vae.VAE._get_generative_input": (
        "overridden by `_scvi.GenerativeInputs` for nested dropout", "`order_factors`"),
    "scvi.module._vae.VAE._regular_inference": (
        "`backends.inference` and the fused step compute it on sparse counts", "posteriors, training"),
    "scvi.module._vae.VAE._cached_inference": ("minified data", "posteriors of minified data"),
    "scvi.module._vae.VAE._compute_local_library_params": (
        "called by `LDVAEModule.priors`; the fused step looks the same values up", "KL of the log library"),
    "scvi.module._vae.VAE.generative": ("replaced by `LDVAEModule.generative`", "likelihood, priors"),
    "scvi.module._vae.VAE.loss": (
        "called layer by layer; the fused step computes it in `fused_step._FusedLoss`", "the loss and its gradients"),
    "scvi.module._vae.VAE.marginal_ll": (
        "replaced under `latent_distribution='ln'`", "`get_marginal_ll`, importance weights"),
    "scvi.module.base._base_module._generic_forward": (
        "`backends.layer_by_layer` follows its steps", "training by the backends torch and numba"),
    "scvi.nn._base_components.Encoder.__init__": ("its layers are read by the backends", "posteriors, training"),
    "scvi.nn._base_components.Encoder.forward": (
        "`backends.sparse_encoder`, `folded_encoders` and `fused_step` compute it", "posteriors, training"),
    "scvi.nn._base_components.FCLayers.__init__": ("order of the layers in a block", "posteriors, training, decoder"),
    "scvi.nn._base_components.FCLayers.forward": ("`sparse_encoder._after_first_linear` follows it", "training"),
    "scvi.nn._base_components.FCLayers._apply_layer": ("called by `sparse_encoder`", "training with several layers"),
    "scvi.nn._base_components.LinearDecoderSCVI.__init__": ("base of `LinearDecoderLayer`", "the decoder"),
    "scvi.distributions._negative_binomial.log_nb_positive": (
        "its formula is that of all likelihoods here", "ablations, losses, deviances"),
    "scvi.distributions._negative_binomial.log_zinb_positive": (
        "its formula is that of all likelihoods here", "ablations, losses, deviances"),
    "scvi.train._trainingplans.TrainingPlan.__init__": ("base of `backends.plan.GatheringPlan`", "training"),
    "scvi.train._trainingplans.TrainingPlan.training_step": ("replaced by `GatheringPlan`", "history, early stopping"),
    "scvi.train._trainingplans.TrainingPlan.validation_step": ("replaced by `GatheringPlan`", "history, early stopping"),
    "scvi.train._trainingplans.TrainingPlan.compute_and_log_metrics": (
        "replaced by `GatheringPlan`", "names and values in the history"),
    "scvi.dataloaders._ann_dataloader.AnnDataLoader.__init__": (
        "`backends.loader.CountsLoader` draws the same minibatches", "equality of seeded trainings"),
    "scvi.dataloaders._data_splitting.DataSplitter.__init__": (
        "base of `CountsSplitter`, set by `_scvi.splitting_cells_by`", "division of the cells"),
    "scvi.model.base._base_model.BaseModelClass._validate_anndata": (
        "overridden by `_scvi.DataChecks`", "the check of all inherited methods"),
    "scvi.model.base._base_model.BaseModelClass._make_data_loader": ("called for minibatches", "all readers"),
    "scvi.model.base._base_model.BaseModelClass._register_manager_for_instance": (
        "`model._cells` registers unseen cells for a while", "readers of unseen cells"),
    "scvi.model.base._base_model.BaseModelClass._get_init_params": ("arguments that `load` repeats", "`save`, `load`"),
    "scvi.model.base._base_model.BaseModelClass._get_user_attributes": (
        "attributes that end in an underscore are saved", "`save`, `load`, queries"),
    "scvi.model.base._rnamixin.RNASeqMixin._get_denoised_samples": (
        "overridden by `_scvi.DenoisedSamples` for a Poisson", "`get_feature_correlation_matrix`"),
    "scvi.model.base._training_mixin.UnsupervisedTrainingMixin.train": ("called by `LDVAE.train`", "training"),
    "scvi.model.base._save_load._load_saved_files": ("opens a reference without its data", "`load_query_data`"),
    "scvi.data.fields._dataframe_field.CategoricalDataFrameField.transfer_field": (
        "codes of batches of unseen cells", "readers of unseen cells, queries"),
    "scvi.data.fields._arraylike_field.CategoricalJointField._make_array_categorical": (
        "overridden by `_scvi.StableCategoriesField`", "codes of categorical covariates"),
    "scvi.data._utils._get_adata_minify_type": ("decides whether counts can be read", "readers of minified data"),
    "scvi.data._utils._validate_adata_dataloader_input": ("check of `adata` and `dataloader`", "its message"),
    "scvi.data._utils.registry_key_to_default_dtype": ("dtype of each field", "minibatches"),
    "scvi.model._utils.get_max_epochs_heuristic": ("default of `max_epochs`", "`kl_warmup='auto'`"),
    "scvi.model._utils.parse_device_args": ("device of a training", "`backend='auto'`"),
    "scvi.train._config.merge_kwargs": ("configuration objects as dictionaries", "`train(plan_config=...)`"),
    "scvi.train._trainrunner.TrainRunner.__init__": ("takes `ckpt_path` out of the trainer's arguments", "`train(resume=)`"),
    "scvi.train._callbacks.LoudEarlyStopping._evaluate_stopping_criteria": (
        "`_scvi.checks_of` reads its counter", "`train(resume=)` with a warm-up of early stopping"),
    "scvi.train._logger.SimpleExperiment.log_metrics": ("tables that `train(resume=)` stores", "history after it"),
    "lightning.pytorch.trainer.connectors.logger_connector.logger_connector._LoggerConnector.should_update_logs": (
        "steps at which Lightning logs, see `_steps.is_logging_step`", "history of the KL weight"),
    "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop.advance": (
        "`_steps.ShortSteps` takes its place inside of an epoch", "training, counters of steps"),
    "lightning.pytorch.loops.optimization.automatic._AutomaticOptimization._optimizer_step": (
        "`_steps.ShortSteps` takes its place", "training, `trainer.global_step`"),
    "lightning.pytorch.loops.optimization.automatic._AutomaticOptimization._make_closure": (
        "`_steps.ShortSteps` takes its place", "gradients"),
    "lightning.pytorch.loops.loop._Loop.load_state_dict": (
        "its flags are undone by `_steps.continue_between_epochs`", "minibatches after `train(resume=)`"),
    "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop.on_run_start": (
        "begins the minibatches of an epoch", "minibatches after `train(resume=)`"),
    "lightning.pytorch.loops.fit_loop._FitLoop.reset": (
        "`_steps.as_between_epochs` keeps it from counting a restored epoch again", "epochs after `train(resume=)`"),
}  # fmt: skip


def release_of(name: str) -> str:
    """Distribution that a name belongs to."""
    return "scvi-tools" if name.startswith("scvi.") else "lightning"


def source(name: str, root: Path | None = None) -> str:
    """Source of a function without docstring and white space; empty if there is no such function.

    Parameters
    ----------
    name
        Full name, private modules included.
    root
        Folder that holds the package; the installed one if None.
    """
    parts = name.split(".")
    if root is None:
        spec = importlib.util.find_spec(parts[0])
        root = Path(next(iter(spec.submodule_search_locations))).parent
    for n in range(len(parts) - 1, 0, -1):
        file = root.joinpath(*parts[:n]).with_suffix(".py")
        if file.is_file():
            break
    else:
        return ""
    text = file.read_text()
    nodes = ast.parse(text).body
    node = None
    for part in parts[n:]:
        matches = [m for m in nodes if isinstance(m, (ast.FunctionDef, ast.ClassDef)) and m.name == part]
        if not matches:
            matches = [m for m in nodes if isinstance(m, ast.AnnAssign | ast.Assign) and part in ast.unparse(m)]
        if not matches:
            return ""
        node = matches[-1]
        nodes = getattr(node, "body", [])
    lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
        first = node.body[0]
        del lines[first.lineno - node.lineno : first.end_lineno - node.lineno + 1]
    return "\n".join(line.strip() for line in lines if line.strip())


def hashes(package: str, root: Path | None = None) -> dict[str, str]:
    """Hash of each touched function of a distribution; empty for one that is not there."""
    found = {name: source(name, root) for name in TOUCHED if release_of(name) == package}
    return {name: text and hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in found.items()}


def table() -> str:
    """The touch points as a table for the docs."""
    rows = ["| touched | why | what breaks |", "|---|---|---|"]
    rows += [f"| `{name}` | {why} | {breaks} |" for name, (why, breaks) in TOUCHED.items()]
    return "\n".join(["<!-- Made by `python -m tests.golden.make_scvi_contract`; do not edit. -->", *rows]) + "\n"


def main() -> None:
    known = json.loads(PATH.read_text()) if PATH.exists() else {}
    releases = [(package, version(package), None) for package in ("scvi-tools", "lightning")]
    for argument in sys.argv[1:]:
        package, _, rest = argument.partition("==")
        release, _, folder = rest.partition("=")
        releases.append((package, release, Path(folder)))
    for package, release, root in releases:
        known.setdefault(package, {})[release] = hashes(package, root)
    PATH.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    TABLE.write_text(table())


if __name__ == "__main__":
    main()
