"""List, verify, prune or average the checkpoints of a run.

    python tools/inspect_checkpoints.py run_dir=runs/first
    python tools/inspect_checkpoints.py run_dir=runs/first verify=true
    python tools/inspect_checkpoints.py run_dir=runs/first prune=true keep_last=2 keep_every_steps=10000
    python tools/inspect_checkpoints.py run_dir=runs/first average=[9000,9500,10000] output_dir=runs/first_average
    python tools/inspect_checkpoints.py run_dir=runs/tuned merge=true output_dir=runs/tuned_whole

Exit status 1 if verify finds damage in a checkpoint that a start would use.
"""

from megagpt.checkpoint.admin import InspectConfig, inspect
from megagpt.command import EXIT_CRASH, EXIT_DONE, main
from megagpt.terminal import safe_line


def run(config: InspectConfig) -> int:
    """Print a line per checkpoint."""
    found = inspect(config)
    for item in found:
        loss = "" if item.validation_loss is None else f"  validation loss {item.validation_loss:.4f}"
        state = "DAMAGED: " + "; ".join(item.problems) if item.problems else ("good" if config.verify else "")
        notes = f"{loss}{'  best' if item.best else ''}{'  quarantined' if item.aside else ''}"
        print(safe_line(f"{item.path}  {item.bytes / 1e6:,.1f} MB  {item.saved_at}{notes}  {state}".rstrip()))
    if not found:
        print(f"{config.run_dir / 'checkpoints'}: no checkpoints")
    return EXIT_CRASH if any(item.problems and not item.aside for item in found) else EXIT_DONE


if __name__ == "__main__":
    main(InspectConfig, run, __doc__ or "")
