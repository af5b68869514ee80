"""Training: two epochs after what compiles on first use."""

from __future__ import annotations

from asv_benchmarks import jobs


class Training:
    timeout = 300
    warmup_time = 0
    number = 1
    repeat = (3, 7, 30.0)

    def setup(self) -> None:
        jobs.alone()
        self.adata = jobs.counts()
        jobs.fresh(self.adata).train(1, **jobs.TRAIN)
        self.model = jobs.fresh(self.adata)

    def time_two_epochs(self) -> None:
        self.model.train(2, **jobs.TRAIN)

    def time_two_epochs_minibatches_of_512(self) -> None:
        self.model.train(2, batch_size=512, **jobs.TRAIN)

    def peakmem_two_epochs(self) -> None:
        self.model.train(2, **jobs.TRAIN)
