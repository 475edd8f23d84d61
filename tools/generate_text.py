"""Generate text from a prompt with a trained model; the text streams to standard output.

python tools/generate_text.py run_dir=runs/plays prompt=ROMEO max_tokens=200 temperature=0.8 seed=1
python tools/generate_text.py run_dir=runs/plays prompt=ROMEO min_p=0.05 frequency_penalty=0.3 stop='["\\n\\n", "JULIET"]'
"""

import sys

from megagpt.command import main
from megagpt.generate.generate_text import GenerateConfig, generate_run


def run(config: GenerateConfig) -> None:
    """Print the prompt and what the model makes of it; several samples one after another, each under its number."""
    texts = [config.prompt] * config.num_samples
    alone = config.num_samples == 1
    if alone:
        sys.stdout.write(config.prompt)
    for sample, piece in generate_run(config):
        texts[sample] += piece
        if alone:
            sys.stdout.write(piece)
            sys.stdout.flush()
    print("" if alone else "\n".join(f"--- sample {i}\n{text}" for i, text in enumerate(texts)))


if __name__ == "__main__":
    main(GenerateConfig, run, __doc__ or "")
