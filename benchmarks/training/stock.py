"""lerobot's own training loop, one step at a time: ``lerobot.scripts.lerobot_train.train`` from its own pieces."""

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

from app.dataset import SiteDataset
from app.policy import Processors


class Stock:
    """lerobot's DataLoader, preprocessor, ``update_policy``, optimiser and schedule over a loaded policy.

    ``workers`` load batches in processes of their own, as ``lerobot-train --num_workers`` has it.
    """

    def __init__(
        self,
        policy: Any,
        processors: Processors,
        dataset: SiteDataset,
        *,
        batch_size: int,
        steps: int,
        workers: int,
    ) -> None:
        import torch
        from accelerate import Accelerator  # type: ignore[import-untyped]
        from lerobot.datasets.sampler import EpisodeAwareSampler
        from lerobot.utils.logging_utils import AverageMeter, MetricsTracker
        from lerobot.utils.utils import cycle
        from torch.utils.data import DataLoader

        on_gpu = policy.config.device != "cpu"
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = True
        opened = dataset.lerobot(dataset.train_episodes, policy.config.chunk_size)
        episodes = opened.meta.episodes
        sampler = EpisodeAwareSampler(
            episodes["dataset_from_index"],
            episodes["dataset_to_index"],
            episode_indices_to_use=list(dataset.train_episodes),
            shuffle=True,
            seed=0,
            absolute_to_relative_idx=opened.absolute_to_relative_idx,
        )
        loader = DataLoader(
            opened,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=workers,
            pin_memory=on_gpu,
            persistent_workers=workers > 0,
            multiprocessing_context="spawn" if workers else None,
        )
        preset = policy.config.get_optimizer_preset()
        optimizer = preset.build(policy.get_optim_params())
        scheduler = policy.config.get_scheduler_preset().build(optimizer, steps)
        self._accelerator = Accelerator(
            step_scheduler_with_optimizer=False,
            cpu=not on_gpu,
            # As our step: float32 on a CPU, bfloat16 where a GPU has it.
            mixed_precision="bf16" if on_gpu else "no",
        )
        self._policy, self._optimizer, loader, self._scheduler = self._accelerator.prepare(
            policy, optimizer, loader, scheduler
        )
        self._clip = preset.grad_clip_norm
        self._processors, self._cameras = processors, opened.meta.camera_keys
        self._batches: Iterator[dict[str, Any]] = cycle(loader)
        meters = {name: AverageMeter(name) for name in ("loss", "grad_norm", "lr", "update_s")}
        if torch.cuda.is_available():
            meters["gpu_mem_gb"] = AverageMeter("mem_gb")
        self._tracker = MetricsTracker(
            batch_size,
            len(opened),
            len(dataset.train_episodes),
            meters,
            accelerator=self._accelerator,
        )

    @property
    def rate(self) -> float:
        """The next step's learning rate."""
        rate: float = self._optimizer.param_groups[0]["lr"]
        return rate

    def step(self, before: Callable[[], object] = lambda: None) -> float:
        """Take one step, ``before`` called with its batch there; its loss."""
        import torch
        from lerobot.scripts.lerobot_train import update_policy

        batch = next(self._batches)
        for camera in self._cameras:
            if camera in batch and batch[camera].dtype == torch.uint8:
                batch[camera] = batch[camera].to(dtype=torch.float32) / 255.0
        batch = self._processors[0](batch)
        before()
        with contextlib.redirect_stdout(io.StringIO()):
            update_policy(
                self._tracker,
                self._policy,
                batch,
                self._optimizer,
                self._clip,
                accelerator=self._accelerator,
                lr_scheduler=self._scheduler,
            )
        self._tracker.step()
        return float(self._tracker.loss.val)
