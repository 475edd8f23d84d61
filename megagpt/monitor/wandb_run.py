"""Write rows to the W&B run of a run_dir: one W&B run over all restarts, with every step once."""

import logging
import secrets
from pathlib import Path
from typing import Any, Literal

from megagpt.files import read_json, write_json
from megagpt.monitor.config import MonitorConfig
from megagpt.monitor.metrics import Metrics, plain
from megagpt.monitor.wandb_files import missing_rows, values_of, wait_for_writer
from megagpt.monitor.writers import flat

log = logging.getLogger(__name__)


class WandbRun:
    """The W&B run of a run_dir. Restarts keep its id, which is in wandb.json; its steps only grow."""

    name = "W&B"

    def __init__(self, run_dir: Path, config: MonitorConfig, run_config: dict[str, Any], earlier: Metrics) -> None:
        """earlier: the rows in metrics.jsonl. Those that W&B lacks are sent first; those that it has are not sent again."""
        import wandb
        from wandb.errors import CommError

        self._run_dir = run_dir
        path = run_dir / "wandb.json"
        if not path.exists():
            write_json(path, {"id": secrets.token_hex(8), "project": config.wandb_project})
        self.id: str = read_json(path)["id"]
        self.mode: Literal["offline", "online"] = "online" if config.wandb == "online" else "offline"
        self._last_step, self._step = -1, -1
        options: dict[str, Any] = {
            "id": self.id,
            "project": config.wandb_project,
            "entity": config.wandb_entity,
            "name": config.wandb_name or run_dir.resolve().name,
            "dir": str(run_dir),
            "config": run_config,
            "resume": "allow",
            "allow_val_change": True,
            "settings": wandb.Settings(console="off", silent=True, init_timeout=config.wandb_init_seconds),
        }
        try:
            self._run: Any = wandb.init(mode=self.mode, **options)
        except CommError as error:
            # A run that waited days in a queue must not end because a dashboard is out of reach.
            log.warning("W&B cannot be reached (%s): this attempt is logged offline under %s/wandb", error, run_dir)
            self.mode = "offline"
            wandb.teardown()
            self._run = wandb.init(mode=self.mode, **options)
        self._samples: Any = wandb.Table(columns=["step", "prompt", "text"], log_mode="INCREMENTAL")
        self.folder = Path(self._run.settings.sync_dir).name
        server_step = self._run.starting_step - 1 if self.mode == "online" else None
        missing = missing_rows(earlier, run_dir, server_step)
        if missing.rows:
            log.info("W&B lacks %d rows of earlier attempts: they are sent again", len(missing.rows))
        for row in missing.rows:
            self.write(row["kind"], row["step"], plain(values_of(row)))
        self._last_step = missing.last_step

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Send the values as `<kind>/<name>`, unless the step was sent before a restart or is before the current step."""
        if step <= self._last_step or step < self._step:
            return
        self._step = step
        if kind == "alert":
            self._run.alert(title=f"{values['alert']}: {self._run.name}", text=f"step {step}: {values['reason']}")
        row = dict(flat(kind, values))
        if kind == "sample":
            self._samples.add_data(step, values.get("prompt"), values.get("text"))
            row["samples"] = self._samples
        self._run.log(row, step=step)

    def close(self) -> None:
        """Flush and end the W&B run; its file is then complete (W&B's process closes it after finish() has returned)."""
        self._run.finish()
        for path in (self._run_dir / "wandb" / self.folder).glob("run-*.wandb"):
            wait_for_writer(path)
