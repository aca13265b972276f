"""A run in Weights & Biases, by an outbox: what W&B cannot take now stops no training."""

from dataclasses import asdict

from megatron_llama3.config.run import RunConfig
from megatron_llama3.training.events import log_folder
from megatron_llama3.training.outbox import Outbox


class WandB:
    """Takes the records of metrics.jsonl. Offline unless --wandb-mode says otherwise."""

    def __init__(self, config: RunConfig):
        import wandb

        log = config.logging
        folder = log.wandb_save_dir or log_folder(config) or "."
        self.run = wandb.init(project=log.wandb_project, name=log.wandb_exp_name, dir=folder, mode=log.wandb_mode, config=asdict(config))
        self.outbox = Outbox("W&B", lambda record: self.run.log(record, step=record["iteration"]), (OSError, wandb.Error))

    def add(self, record: dict) -> None:
        self.outbox.add(record)

    def close(self) -> None:
        import wandb

        self.outbox.close()
        self.run.finish()
        wandb.teardown()  # waits for its own process, which may not have written the run's file yet
