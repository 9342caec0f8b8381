"""Train a byte model of 150,000 weights on a text of your own, in under a minute on a laptop.

python examples/train_tiny.py TEXT_FILE [FOLDER]
"""

import sys

import bdlm
from bdlm.training.config import load_config


def main(text: str, folder: str = "runs/tiny-example", steps: int = 200) -> str:
    # a recipe, and what differs from it; every field is listed by `bdlm train --help`
    config = load_config("tiny", [f"data.train={text}", f"out={folder}", f"limits.steps={steps}"])
    result = bdlm.train(config)  # go on after an interruption by calling it again
    for bound in result.valid:
        print(
            f"blocks of {bound['block_size']}: {bound['nats_per_token']:.3f} ±"
            f" {bound['stderr']:.3f} nats per token"
        )
    assert result.model is not None, "stopped before its end"
    print(bdlm.load(result.model).generate("The ", max_new_tokens=100).text)
    return result.model


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:3])
