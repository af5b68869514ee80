"""Reading a trained model."""

from __future__ import annotations

from typing import Any

from asv_benchmarks import jobs
from ldvae_ext import tl


class Reading:
    timeout = 300

    def setup(self) -> None:
        self.model = jobs.trained()
        self.z_nk = self.model.get_latent_representation()
        self.time_ablate()  # compiles

    def time_ablate(self) -> Any:
        return self.model.ablate()

    def time_ablate_exported(self) -> Any:
        return tl.ablate(self.model.adata)

    def time_decode(self) -> Any:
        return self.model.decode(self.z_nk, return_numpy=True)

    def time_posterior_mean_expression(self) -> Any:
        return self.model.get_normalized_expression(use_posterior_mean=True, return_numpy=True)

    def time_latents(self) -> Any:
        return self.model.get_latent_representation()

    def time_export(self) -> None:
        self.model.export_to_anndata()

    def peakmem_ablate(self) -> Any:
        return self.model.ablate()


class Populations:
    timeout = 300

    def setup(self) -> None:
        if not hasattr(tl, "population_expression"):
            raise NotImplementedError  # an older commit: skipped
        self.model = jobs.trained()

    def time_population_expression(self) -> Any:
        return tl.population_expression(self.model.adata, "population")
