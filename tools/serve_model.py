"""Serve a model over HTTP: OpenAI's clients understand it, SIGTERM drains it.

python tools/serve_model.py run_dir=runs/plays                                   # http://127.0.0.1:8000, with a page to try it
python tools/serve_model.py export=exports/plays port=9000 num_slots=32
MEGAGPT_API_KEYS=... python tools/serve_model.py run_dir=runs/plays host=0.0.0.0
"""

from megagpt.command import main
from megagpt.serve.config import ServeConfig
from megagpt.serve.server import serve


def run(config: ServeConfig) -> None:
    """Serve until a signal."""
    serve(config)


if __name__ == "__main__":
    main(ServeConfig, run, __doc__ or "")
