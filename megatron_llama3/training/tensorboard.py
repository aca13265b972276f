"""TensorBoard's files of a run, by an outbox: they may lie on a file system that fails for a while."""

from pathlib import Path

from megatron_llama3.config.storage import is_passing, user_error
from megatron_llama3.training.outbox import Outbox


class TensorBoard:
    """Takes the records of metrics.jsonl. A writer's steps take the place of those that an earlier one wrote from its first step on, so
    that what a crashed start, or a writer that failed, wrote in part is superseded."""

    def __init__(self, folder: str, first_step: int):
        """Raises UserError for a folder that cannot be made, unless the reason may pass."""
        self.folder, self.writer = folder, None
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if not is_passing(error):
                raise user_error(error, "--tensorboard-dir: ") from error
        self.outbox = Outbox(f"--tensorboard-dir {folder}", self._write)
        self.first_step = first_step

    def add(self, record: dict) -> None:
        self.outbox.add(record)

    def close(self) -> None:
        self.outbox.close()
        if self.writer is not None:
            self.writer.close()

    def _write(self, record: dict) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            if self.writer is None:
                self.writer = SummaryWriter(self.folder, purge_step=self.first_step)
            for name, value in record.items():
                add = self.writer.add_text if isinstance(value, str) else self.writer.add_scalar
                add(name, value, record["iteration"])
            self.writer.flush()  # its thread's errors would come with a later record otherwise
        except OSError:
            self.writer, self.first_step = None, record["iteration"]  # one whose thread has failed takes nothing more
            raise
