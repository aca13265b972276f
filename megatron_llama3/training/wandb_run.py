"""A run in Weights & Biases, by an outbox: what W&B cannot take now stops no training."""

from contextlib import suppress
from dataclasses import asdict

from megatron_llama3.config.run import RunConfig
from megatron_llama3.training.events import log_folder
from megatron_llama3.training.outbox import Outbox

ID_FILE = "wandb_run_id"
"""in the log folder: every start of a run goes on with the same W&B run"""


class WandB:
    """Takes the records of metrics.jsonl. Offline unless --wandb-mode says otherwise."""

    def __init__(self, config: RunConfig):
        import wandb

        log, kept = config.logging, log_folder(config)
        known, folder = kept and kept / ID_FILE, log.wandb_save_dir or kept or "."
        run_id = known.read_text().strip() if known is not None and known.is_file() else None
        run = wandb.init(project=log.wandb_project, name=log.wandb_exp_name, dir=folder, mode=log.wandb_mode, id=run_id, resume="allow")
        run.config.update(asdict(config), allow_val_change=True)  # a later start may have another layout
        run.define_metric("*", step_metric="iteration")  # W&B's own step cannot go back, as a start after a crash does
        self.run, self.outbox = run, Outbox("W&B", run.log, (OSError, wandb.Error))
        if known is not None:
            with suppress(OSError):  # on a file system that fails for a while; the next start then makes another run
                known.parent.mkdir(parents=True, exist_ok=True)
                known.write_text(run.id)

    def add(self, record: dict) -> None:
        self.outbox.add(record)

    def close(self) -> None:
        import wandb

        self.outbox.close()
        self.run.finish()
        wandb.teardown()  # waits for its own process, which may not have written the run's file yet
