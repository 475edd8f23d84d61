"""The settings of the section `monitor`, and their checks against this machine."""

from importlib.util import find_spec
from typing import Literal

from pydantic import Field

from megagpt.config import Config, UserError


class MonitorConfig(Config):
    """What is logged of a run, and where. Nothing here changes the trained model."""

    log_every_steps: int = Field(default=10, gt=0)
    """Steps between two lines of metrics."""
    norms_every_steps: int = Field(default=0, ge=0)
    """Steps between two rows of norms by layer (weights, gradients, update relative to weights); 0 = none. At those steps each
    rank copies 8 bytes per weight that it holds to the host."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases: off, offline (written under run_dir/wandb, `wandb sync` sends it later), or online."""
    wandb_project: str = "megagpt"
    """Project of the W&B run."""
    wandb_entity: str | None = None
    """Team or user that owns the W&B project; null = the account's default."""
    wandb_name: str | None = None
    """Name of the W&B run; null = the name of run_dir."""
    wandb_init_seconds: float = Field(default=90.0, gt=0)
    """How long to wait for the W&B server at the start; after that the run is logged offline, with a warning."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Peak of one device in TFLOP/s (dense, in the dtype of training), for MFU; null = from the table of known GPUs."""
    tensorboard: bool = False
    """Also write run_dir/tensorboard for TensorBoard. Needs megagpt[monitor]."""
    prometheus_port: int | None = Field(default=None, ge=0, le=65535)
    """Serve the newest values and the node's GPU readings to Prometheus, one port per node; 0 = any free port, which is
    logged; null = none. Needs megagpt[monitor]."""
    prometheus_address: str = "127.0.0.1"
    """The address of the port. With any other than 127.0.0.1, everybody who can reach it can read the values."""
    panel: bool = False
    """Draw a panel instead of one line per row, if rank 0's standard error is a terminal; otherwise print lines."""
    alert_pause_seconds: float = Field(default=1800.0, ge=0)
    """Least time between two alerts of the same kind (a row `alert`, and one of W&B)."""
    close_seconds: float = Field(default=300.0, gt=0)
    """How long the end of an attempt waits for W&B and the other writers to send their remaining rows."""


def check_monitor(config: MonitorConfig) -> None:
    """Raise UserError if a configured writer cannot work on this machine: its package or W&B's credentials are missing."""
    wanted = {"tensorboard": config.tensorboard, "prometheus_client": config.prometheus_port is not None}
    port = f"monitor.prometheus_port={config.prometheus_port}"
    settings = {"tensorboard": "monitor.tensorboard=true", "prometheus_client": port}
    for package, is_wanted in wanted.items():
        if is_wanted and find_spec(package) is None:
            raise UserError(
                f"{settings[package]}: the package {package} is not installed (pip install -c constraints.txt '.[monitor]')"
            )
    check_wandb(config)


def check_wandb(config: MonitorConfig) -> None:
    """Raise UserError if config.wandb=online and this machine has no credentials for W&B. It never asks on the terminal."""
    if config.wandb != "online":
        return
    import wandb
    from wandb.errors import AuthenticationError
    from wandb.sdk.lib.wbauth import authenticate_session

    try:
        found = authenticate_session(host=wandb.setup().settings.base_url, source="megagpt", prompt=False)
    except AuthenticationError as error:
        raise UserError(f"wandb=online: {error}") from None
    if found is None:
        raise UserError("wandb=online: no credentials (set WANDB_API_KEY, or run `wandb login` once, or use wandb=offline)")
